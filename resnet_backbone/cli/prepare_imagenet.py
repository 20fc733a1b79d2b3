#!/usr/bin/env python
"""Build the ImageNet folders from the official archives, or check folders that are there.

  python tools/prepare_imagenet.py imagenet \\
      --train-archive ILSVRC2012_img_train.tar \\
      --val-archive ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz

gives imagenet/train/<wnid>/*.JPEG and imagenet/val/<wnid>/*.JPEG. With --flat-val the validation
images stay in one folder, and imagenet/val_labels.txt has a line 'name wnid' for each.

The labels of the validation set are numbers in an order of the development kit's own; sorted
wnids, by which networks count classes, are in another one. This program converts them by the
kit's table, or takes a file of wnids (--val-labels).

  python tools/prepare_imagenet.py imagenet --check-images

reads every image (hours on one core; see --workers) and lists what cannot be read, and what is
not an ordinary image, in imagenet/bad_images.txt.

The archives come from image-net.org, after registration. An interrupted call can be repeated: it
goes on where it was. Exit status: 0 when all is well, 1 when a count is wrong or an image is bad,
2 for a wrong argument or an unusable archive.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from resnet_backbone.classification.data.archives import (
    CLASSES,
    TRAIN_IMAGES,
    VAL_IMAGES,
    check_counts,
    devkit_labels,
    extract_train,
    extract_val,
    labels_file,
    read_labels,
)
from resnet_backbone.classification.data.bad_images import BadImageReport, inspect_file
from resnet_backbone.classification.data.imagenet import (
    ImageFiles,
    read_flat_folder,
    read_image_folder,
)
from resnet_backbone.classification.data.stream import DataError

SHOWN = 10  # problems printed
CHUNK = 64  # images handed to a process at a time


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where train/ and val/ are or will be")
    parser.add_argument("--train-archive", help="ILSVRC2012_img_train.tar")
    parser.add_argument("--val-archive", help="ILSVRC2012_img_val.tar")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--devkit", help="ILSVRC2012_devkit_t12.tar.gz, which has the val labels")
    labels.add_argument(
        "--val-labels", help="file of 'name wnid' lines, or of wnids in the order of the images"
    )
    parser.add_argument("--flat-val", action="store_true", help="one folder and a label list")
    parser.add_argument(
        "--check-images", action="store_true", help="read every image and report the bad ones"
    )
    parser.add_argument("--workers", type=int, default=4, help="of --check-images (default: 4)")
    for name, default in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        parser.add_argument(
            f"--{name}-images",
            type=int,
            default=default,
            metavar="N",
            help=f"how many there should be (default: {default}; 0: any number)",
        )
    parser.add_argument(
        "--classes", type=int, default=CLASSES, help=f"likewise (default: {CLASSES}; 0: any)"
    )
    args = parser.parse_args(argv)
    if args.val_archive and not (args.devkit or args.val_labels):
        parser.error("--val-archive needs --devkit or --val-labels")
    if args.workers < 1:
        parser.error("--workers is 1 at least")
    return args


def build(args: argparse.Namespace) -> None:
    """Unpacks the archives that were given."""
    if args.val_archive:  # the quick one first: a wrong label file shows before an hour is gone
        labels = devkit_labels(args.devkit) if args.devkit else read_labels(args.val_labels)
        bar = partial(tqdm, desc="validation images", unit="img")
        extract_val(args.val_archive, args.folder / "val", labels, args.flat_val, bar)
    if args.train_archive:
        bar = partial(tqdm, desc="training classes", unit="class")
        extract_train(args.train_archive, args.folder / "train", bar)


def open_sets(folder: Path) -> dict[str, ImageFiles]:
    """The data sets that are in a folder."""
    sets = {}
    if (folder / "train").is_dir():
        sets["train"] = read_image_folder(folder / "train")
    val = folder / "val"
    if labels_file(val).is_file():
        sets["val"] = read_flat_folder(val, labels_file(val))
    elif val.is_dir():
        sets["val"] = read_image_folder(val)
    if not sets:
        raise DataError(f"{folder} has neither train nor val: give the archives to unpack")
    return sets


def count_problems(sets: dict[str, ImageFiles], args: argparse.Namespace) -> list[str]:
    """Wrong numbers of images and classes."""
    problems = []
    for name, dataset in sets.items():
        classes = Counter(dataset.class_names[label] for label in dataset.labels)
        expected = {"train": args.train_images, "val": args.val_images}[name]
        problems += check_counts(classes, expected, args.classes, str(args.folder / name))
        print(f"{name}: {len(dataset):,} images in {len(classes):,} classes")
    if len({dataset.class_names for dataset in sets.values()}) > 1:
        problems.append("train and val have different classes")
    return problems


def check_images(sets: dict[str, ImageFiles], folder: Path, workers: int) -> list[str]:
    """Reads every image; what is found goes to ``bad_images.txt``."""
    report = BadImageReport(folder / "bad_images.txt")
    paths = [dataset.name(i) for dataset in sets.values() for i in range(len(dataset))]
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(inspect_file, paths, chunksize=CHUNK)
        for note in tqdm(found, total=len(paths), desc="reading images", unit="img"):
            if note is not None:
                report.add(note)
    print(f"{report.num_bad} bad images, {report.num_converted} unusual ones: {report.path}")
    return [f"{path}: {reason}" for path, reason in report.bad.items()]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        build(args)
        sets = open_sets(args.folder)
        problems = count_problems(sets, args)
        if args.check_images:
            problems += check_images(sets, args.folder, args.workers)
    except (DataError, OSError) as error:
        print(f"prepare_imagenet.py: {error}", file=sys.stderr)
        return 2
    for problem in problems[:SHOWN]:
        print(f"problem: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"problem: and {len(problems) - SHOWN} more", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
