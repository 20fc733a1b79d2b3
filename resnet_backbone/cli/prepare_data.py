"""Make a data set of your own images, or unpack and check a published one.

  resnet-backbone prepare-data own --help        your own images with boxes, in any common format
  resnet-backbone prepare-data voc --help        PASCAL VOC, or your own data in its layout
  resnet-backbone prepare-data coco --help       COCO, or your own data in its format
  resnet-backbone prepare-data imagenet --help   ImageNet
  resnet-backbone prepare-data shards --help     tar shards of an image folder, for object stores
  resnet-backbone prepare-data digits --help     the built-in detection set
  resnet-backbone prepare-data labels --help     label images for segmentation

You can repeat an interrupted call: existing files stay. Only shards need an empty folder again.
Exit status: 0, all is well; 1, something is missing, corrupt, or not as many as published; 2, wrong
arguments or unusable files.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from resnet_backbone.classification.data import archives, imagenet
from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.runtime.errors import one_line_errors

SHOWN = 10  # problems printed

DETECTION = """\
This compares the archives with their published checksums, and unpacks them to {folders}
where Detectron2 and the configs find them. Then it checks the layout, the numbers of images and
boxes against the official ones, missing files, every image (decoded; --quick: only its header), and
every annotation. Without --archives, it only checks.

  resnet-backbone prepare-data {own}

This checks your own data in this layout. --pictures DIR gets a chart of the boxes per class and
sheets of images with their boxes. --json FILE gets everything that was found. Boxes that training
leaves out (without area, or outside the image) are listed, but do not count as an error."""
VOC = f"""\
Unpack the official archives of PASCAL VOC, and check what is there.

  export DETECTRON2_DATASETS=$HOME/datasets
  resnet-backbone prepare-data voc --archives VOCtrainval_06-Nov-2007.tar VOCtest_06-Nov-2007.tar \\
      VOCtrainval_11-May-2012.tar

{DETECTION.format(folders="VOC2007/ and VOC2012/,", own="voc my_data --own --pictures checked/")}"""
COCO = f"""\
Unpack the official archives of COCO, and check what is there.

  export DETECTRON2_DATASETS=$HOME/datasets
  resnet-backbone prepare-data coco --archives train2017.zip val2017.zip \\
      annotations_trainval2017.zip

{DETECTION.format(folders="coco/,", own="coco --coco-json train.json --image-root images/")}"""
IMAGENET = """\
Build the ImageNet folders from the official archives, or check folders that are there.

  resnet-backbone prepare-data imagenet imagenet \\
      --train-archive ILSVRC2012_img_train.tar \\
      --val-archive ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz

This writes imagenet/train/<wnid>/*.JPEG and imagenet/val/<wnid>/*.JPEG. A wnid is ImageNet's name
of a class, such as n01440764. With --flat-val, the validation images stay in one folder, and
imagenet/val_labels.txt has a line 'name wnid' for each.

The labels of the validation set are numbers in the order of the development kit. The kit's table
converts them to wnids. Instead of the kit, --val-labels takes a file of wnids.

  resnet-backbone prepare-data imagenet imagenet --check-images

This reads every image (hours on one core; see --workers), and lists unreadable and unusual ones in
imagenet/bad_images.txt. The archives come from image-net.org, after registration."""
SHARDS = """\
Write a data set as tar shards for an object store, or index existing shards.

  resnet-backbone prepare-data shards write imagenet/train shards/train
  resnet-backbone prepare-data shards index shards/train --class-list wnids.txt

The shards have WebDataset's layout (<key>.jpeg and <key>.cls in each tar). index.npz beside them
has the place of each image, so that the trainer reads exact epochs and resumes at any sample. Copy
the folder to a bucket, and train from s3://BUCKET/train (this needs fsspec's package for the store,
such as s3fs or gcsfs)."""
OWN = """\
Make a data set of your own images with boxes, and print the command that trains a detector on it.

  resnet-backbone prepare-data own --images my_images --output my_data
  resnet-backbone prepare-data own --images photos --annotations xml --val 0.2 --output my_data
  resnet-backbone prepare-data own --images photos --annotations boxes.json --output my_data

The command reads VOC XML files, a COCO JSON file, YOLO text files (class names in data.yaml or
classes.txt), and Roboflow downloads in these formats. Annotations may lie beside the images or in a
folder of their own. Folders called train, valid (or val), and test stay splits. Without a split for
validation, --val is its share of the training images, the same for every class if the numbers allow
it.

ImageNet's detection and localization tasks, from ILSVRC's folders or from LOC_val_solution.csv:

  resnet-backbone prepare-data own --format imagenet --images ILSVRC/Data/DET \\
      --annotations ILSVRC/Annotations/DET --classes map_det.txt --val1 balanced --output det
  resnet-backbone prepare-data own --format imagenet --images ILSVRC/Data/CLS-LOC \\
      --annotations ILSVRC/Annotations/CLS-LOC --one-class --output loc

The command opens every image and checks every box. It names what cannot be used, and leaves it out.
The images stay where they are. The output folder gets train.json and val.json in COCO's format,
left_out.txt, a chart of the classes, and sheets of images with their boxes."""
DIGITS = """\
Write the built-in detection set (handwritten digits on photographs) in PASCAL VOC layout.

  resnet-backbone prepare-data digits --output output/quickstart/data

This takes a few seconds and downloads nothing. A folder that already holds the set is kept."""
LABELS = """\
Make label images for segmentation from COCO's instances or its panoptic format.

  resnet-backbone prepare-data labels --coco-json instances_train.json --output labels/train
  resnet-backbone prepare-data labels --panoptic-json panoptic_train2017.json \\
      --output panoptic_stuff_train2017

The first command writes labels/train/semantic (every class, and background), labels/train/stuff
(things, background), labels/train/panoptic, and labels/train/panoptic.json. The smaller of two
overlapping instances lies on top, crowds are ignored, and every other pixel is background. The
second command writes what the semantic head of Panoptic FPN learns from COCO's stuff annotations: 0
for things, then the stuff classes by rising id, and 255 where nothing is annotated."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="DATA")
    for name, description, add_options, run in (
        ("own", OWN, add_own_options, prepare_detection),
        ("voc", VOC, add_detection_options, prepare_detection),
        ("coco", COCO, add_detection_options, prepare_detection),
        ("imagenet", IMAGENET, add_imagenet_options, prepare_imagenet),
        ("shards", SHARDS, add_shards_options, make_shards),
        ("digits", DIGITS, add_digits_options, make_digits),
        ("labels", LABELS, add_labels_options, make_segmentation_labels),
    ):
        texts = dict(description=description, help=description.partition("\n")[0])
        command = commands.add_parser(name, allow_abbrev=False, **texts)
        command.set_defaults(run=run)
        add_options(command)
    words = sys.argv[1:] if argv is None else argv
    if words and words[0].startswith("--") and words[0] != "--help":
        kinds = ", ".join(commands.choices)
        parser.error(f"give the kind of data first ({kinds}), then {words[0]}")
    return parser.parse_args(words)


def add_detection_options(parser: argparse.ArgumentParser) -> None:
    add, several = parser.add_argument, dict(nargs="+", default=[])
    text = "folder of data sets (default: $DETECTRON2_DATASETS, or datasets)"
    place = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    add("root", nargs="?", type=Path, default=place, help=text)
    add("--archives", metavar="FILE", help="archives to unpack first", **several)
    add("--unverified", action="store_true", help="accept archives that are not the official ones")
    add("--own", action="store_true", help="your own data: do not compare with the official counts")
    text = "splits to check, such as trainval (VOC) or instances_val2017 (COCO); default: all"
    add("--splits", metavar="NAME", help=text, **several)
    add("--coco-json", metavar="FILE", help="COCO: annotation files to check", **several)
    add("--image-root", metavar="DIR", help="COCO: their image folder, or one for each", **several)
    add("--quick", action="store_true", help="read only the headers of images")
    text = "processes that decode images (default: %(default)s)"
    number = min(8, os.cpu_count() or 1)
    add("--workers", type=positive, default=number, help=text)
    add("--pictures", type=Path, metavar="DIR", help="write charts and sheets of images there")
    add("--json", type=Path, metavar="FILE", help="write a report there")


def add_own_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="your images")
    text = "folder of .xml or .txt files, a .json, or data.yaml (default: the images' folder)"
    add("--annotations", type=Path, metavar="PATH", help=text)
    formats = ("voc", "coco", "yolo", "imagenet")
    text = "format of the annotations (default: detected; imagenet must be named)"
    add("--format", choices=formats, default="", help=text)
    add("--val", type=float, default=0.2, help="share of the images for validation (default: 0.2)")
    add("--seed", type=int, default=0, help="seed of the split (default: 0)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace the output of an earlier call")
    text = "for localization: leave out images that show several classes"
    add("--one-class", action="store_true", help=text)
    text = (
        "divide val into val1 and val2: a list of val1's images, or 'balanced' for our own halves"
    )
    add("--val1", metavar="FILE", help=text)
    text = "names of the wnids: lines 'wnid number name', such as ILSVRC's map_det.txt"
    add("--classes", type=Path, metavar="FILE", help=text)


def prepare_detection(args: argparse.Namespace) -> int:
    from resnet_backbone.cli import prepare_detection_data as detection  # needs Detectron2

    prepare = detection.convert_own if args.kind == "own" else detection.unpack_and_check
    return prepare(args)


def add_imagenet_options(parser: argparse.ArgumentParser) -> None:
    add, labels = parser.add_argument, parser.add_mutually_exclusive_group()
    add("folder", type=Path, help="folder of train/ and val/")
    add("--train-archive", help="ILSVRC2012_img_train.tar")
    add("--val-archive", help="ILSVRC2012_img_val.tar")
    labels.add_argument("--devkit", help="ILSVRC2012_devkit_t12.tar.gz, with the validation labels")
    text = "file of 'name wnid' lines, or of wnids in the order of the images"
    labels.add_argument("--val-labels", help=text)
    text = "keep the validation images in one folder, with a label list"
    add("--flat-val", action="store_true", help=text)
    add("--check-images", action="store_true", help="read every image and list the bad ones")
    add("--workers", type=positive, default=4, help="processes of --check-images (default: 4)")
    number = dict(type=int, metavar="N")
    text = "expected number (default: %(default)s; 0: any)"
    add("--train-images", default=archives.TRAIN_IMAGES, help=text, **number)
    add("--val-images", default=archives.VAL_IMAGES, help=text, **number)
    add("--classes", default=archives.CLASSES, help=text, **number)


def prepare_imagenet(args: argparse.Namespace) -> int:
    if args.val_archive:  # the quick one first, to find a wrong label file early
        if not (args.devkit or args.val_labels):
            raise ValueError("--val-archive needs --devkit or --val-labels")
        read = archives.devkit_labels if args.devkit else archives.read_labels
        labels = read(args.devkit or args.val_labels)
        archives.extract_val(args.val_archive, args.folder / "val", labels, args.flat_val)
    if args.train_archive:
        archives.extract_train(args.train_archive, args.folder / "train")
    sets = archives.open_sets(args.folder)
    expected = {"train": args.train_images, "val": args.val_images}
    problems = archives.count_problems(sets, expected, args.classes)
    for name, dataset in sets.items():
        print(f"{name}: {len(dataset):,} images in {len(set(dataset.labels.tolist())):,} classes")
    if args.check_images:
        report = archives.read_every_image(sets, args.folder, args.workers)
        print(f"{report.num_bad} bad images, {report.num_converted} unusual ones: {report.path}")
        problems += [f"{path}: {reason}" for path, reason in report.bad.items()]
    for problem in problems[:SHOWN]:
        print(f"problem: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"problem: and {len(problems) - SHOWN} more", file=sys.stderr)
    return 1 if problems else 0


def add_shards_options(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write shards and their index")
    write.add_argument("images", help="folder <class>/<image>, or a flat one with --labels")
    write.add_argument("folder", help="new local folder for the shards")
    write.add_argument("--labels", help="file of 'name label' lines for a flat folder")
    text = "images per shard (default: 1000, about 110 MB)"
    write.add_argument("--samples-per-shard", type=positive, default=1000, help=text)
    text = "seed of the order (default: 0; -1: the folder's order)"
    write.add_argument("--seed", type=int, default=0, help=text)
    index = commands.add_parser("index", help="write the index of existing shards")
    index.add_argument("folder", help="local folder of *.tar")
    for command in (write, index):
        command.add_argument("--class-list", help="file of 'class index' lines, or of wnids")


def make_shards(args: argparse.Namespace) -> None:
    data = (args.images, args.labels) if args.command == "write" else ()
    classes = imagenet.read_class_list(args.class_list, *data) if args.class_list else None
    if args.command == "index":
        archives.index_shards(args.folder, imagenet.name_classes(classes or {}))
        return
    if args.labels:
        dataset = imagenet.read_flat_folder(args.images, args.labels, classes)
    else:
        dataset = imagenet.read_image_folder(args.images, classes)
    seed = None if args.seed < 0 else args.seed
    archives.write_shards(dataset, args.folder, args.samples_per_shard, seed)


def add_digits_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder to create")
    add("--num-train", type=int, default=3000, help="training images (default: 3000)")
    add("--num-test", type=int, default=150, help="test images (default: 150)")
    add("--image-size", type=int, default=160, help="side in pixels (default: 160)")
    add("--seed", type=int, default=0, help="seed of the set (default: 0)")
    add("--overwrite", action="store_true", help="replace a set made with other settings")


def make_digits(args: argparse.Namespace) -> None:
    from resnet_backbone.detection.data import quickstart

    settings = {key: getattr(args, key) for key in ("num_train", "num_test", "image_size", "seed")}
    if quickstart.is_complete(args.output, settings):
        print(f"{args.output}: complete already, nothing to do")
        return
    with tqdm(total=args.num_train + args.num_test, unit="picture", disable=None) as bar:
        settings["overwrite"] = args.overwrite
        quickstart.generate(args.output, **settings, on_image=bar.update)
    print(f"{args.output}: {args.num_train} train and {args.num_test} test pictures")


def add_labels_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco-json", metavar="FILE", help="instances in COCO's format")
    source.add_argument("--panoptic-json", metavar="FILE", help="COCO's panoptic format")
    text = "its segment images (default: the JSON file's name without .json)"
    parser.add_argument("--panoptic-root", default="", metavar="DIR", help=text)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")


def make_segmentation_labels(args: argparse.Namespace) -> None:
    from resnet_backbone.detection.data.panoptic import make_labels, make_stuff

    if args.panoptic_json:
        number = make_stuff(args.panoptic_json, args.output, args.panoptic_root)
        print(f"written: {args.output}, {number} label pictures")
        return
    counts = make_labels(args.coco_json, args.output)
    print("written: {}, {images} images, {segments} segments".format(args.output, **counts))
    print("made from instances; {hidden} of them lie wholly under smaller ones".format(**counts))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return args.run(args) or 0
