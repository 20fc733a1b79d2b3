#!/usr/bin/env python
"""Unpack the official archives of PASCAL VOC or COCO, and check what is there.

  export DETECTRON2_DATASETS=$HOME/datasets
  python tools/prepare_data.py voc --archives VOCtrainval_06-Nov-2007.tar VOCtest_06-Nov-2007.tar \\
      VOCtrainval_11-May-2012.tar
  python tools/prepare_data.py coco --archives train2017.zip val2017.zip \\
      annotations_trainval2017.zip

compares the archives with their published checksums, and gives VOC2007/, VOC2012/ and coco/ in the
folder, where Detectron2 and the configs of this project find them. Then, and without --archives at
once, it checks: the layout, the numbers of images and boxes against the official ones, missing
files, every image by decoding it (--quick: only its header), every annotation.

  python tools/prepare_data.py voc my_data --own --pictures checked/
  python tools/prepare_data.py coco --coco-json train.json --image-root images/

checks data of your own in these layouts. --pictures DIR gets a chart of the boxes per class and
sheets of images with their boxes; --json FILE gets everything that was found.

An interrupted call can be repeated: what is unpacked stays. Exit status: 0 when all is well, 1 when
something is missing, corrupt, or not as many as it should be, 2 for a wrong argument or an unusable
archive. Boxes that training leaves out (of no size, outside the image) are listed, and no reason
for 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data.preparation.overview import draw_classes, draw_samples
from resnet_backbone.detection.data.preparation.tree_report import TreeCheck, summary, to_json
from resnet_backbone.detection.data.preparation.trees import (
    check_coco_files,
    check_coco_tree,
    check_voc_tree,
    find_coco_folder,
    find_voc_folders,
)
from resnet_backbone.detection.data.preparation.unpack import unpack, verify_archive
from resnet_backbone.detection.engine.command_line import one_line_errors
from resnet_backbone.detection.inference.visualize import written_whole


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("kind", choices=("voc", "coco"), help="layout of the data")
    parser.add_argument(
        "root",
        nargs="?",
        type=Path,
        default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")),
        help="folder of data sets, or one VOC or COCO folder (default: $DETECTRON2_DATASETS, else "
        "datasets)",
    )
    parser.add_argument("--archives", nargs="+", default=[], metavar="FILE", help="to unpack first")
    parser.add_argument(
        "--unverified", action="store_true", help="unpack archives that are not the official ones"
    )
    parser.add_argument(
        "--own", action="store_true", help="data of your own: do not compare with official counts"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        default=[],
        metavar="NAME",
        help="check only these: trainval, test (VOC), instances_val2017 (COCO), ...",
    )
    parser.add_argument("--coco-json", nargs="+", default=[], metavar="FILE", help="files to check")
    parser.add_argument(
        "--image-root", nargs="+", default=[], metavar="DIR", help="their images, one or one each"
    )
    parser.add_argument("--quick", action="store_true", help="read the headers of images only")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)",
    )
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the pictures there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a report there")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UsageError(f"--workers {args.workers}: at least 1 is needed")
    if bool(args.coco_json) != bool(args.image_root):
        raise UsageError("--coco-json and --image-root belong together")
    if args.coco_json and (args.kind == "voc" or args.archives):
        raise UsageError("--coco-json is for 'coco' without --archives")
    if len(args.image_root) not in (0, 1, len(args.coco_json)):
        raise UsageError("--image-root needs one folder, or one for each file of --coco-json")
    return args


def unpack_all(args: argparse.Namespace) -> None:
    """All archives are compared with their checksums before the first is unpacked."""
    for archive in args.archives:
        print(verify_archive(archive, args.unverified), flush=True)
    for archive in args.archives:
        done = unpack(archive, args.root, args.kind)
        print(f"{archive}: {done.written:,} files unpacked, {done.kept:,} were there", flush=True)
        if done.differing:
            print(
                f"{archive}: {len(done.differing):,} files were there with another size and stay "
                f"as they are, the first is {done.differing[0]}; delete them to unpack them again"
            )


def check(args: argparse.Namespace) -> list[TreeCheck]:
    """Every folder that is there, or the files that were named."""
    workers = 0 if args.quick else args.workers
    if args.coco_json:
        roots = args.image_root * (len(args.coco_json) if len(args.image_root) == 1 else 1)
        return [check_coco_files(zip(args.coco_json, roots, strict=True), workers)]
    if args.kind == "coco":
        return [check_coco_tree(find_coco_folder(args.root), args.own, args.splits, workers)]
    folders = find_voc_folders(args.root)
    return [check_voc_tree(folder, args.own, args.splits, workers) for folder in folders]


def draw(trees: list[TreeCheck], folder: Path) -> None:
    for tree in trees:
        name = Path(tree.folder).resolve().name if Path(tree.folder).is_dir() else tree.kind
        chart = folder / f"{name}_classes.png"
        if draw_classes(tree, chart):
            print(f"boxes per class: {chart}")
        for split in tree.splits:
            sheet = folder / f"{name}_{split.name}.jpg"
            if draw_samples(split, sheet):
                print(f"images of {split.name}: {sheet}")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    unpack_all(args)
    trees = check(args)
    for tree in trees:
        print(f"\n{summary(tree)}")
    if args.json:
        with written_whole(args.json) as temporary:
            temporary.write_text(json.dumps([to_json(tree) for tree in trees], indent=1))
    if args.pictures:
        draw(trees, args.pictures)
    return 1 if any(tree.damaged for tree in trees) else 0


if __name__ == "__main__":
    sys.exit(main())
