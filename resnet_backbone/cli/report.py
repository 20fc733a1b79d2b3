"""Make plots, tables, and pages from the files of training runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from resnet_backbone.classification.data.augment import CenterCrop
from resnet_backbone.classification.data.sources import read_cifar10
from resnet_backbone.classification.networks import NetworkSpec, load_network, read_spec
from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.report import plots
from resnet_backbone.report.detection_plots import plot_training
from resnet_backbone.report.evaluations import compare_evaluations, load_evaluation
from resnet_backbone.report.published import parse_network
from resnet_backbone.report.runs import DETECTOR_METRICS, load_metrics, load_run
from resnet_backbone.report.table import results_table
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.files import write_json, write_text
from resnet_backbone.runtime.images import EncodedImage, find_pictures, read_bytes, spread
from resnet_backbone.runtime.records import METRICS, command_line
from resnet_backbone.weights.preprocessing import InputNormalizer

CURVES_EPILOG = """\
examples:
  resnet-backbone report curves --run output/r50 --output curves.png
  resnet-backbone report curves --run output/r50="pre-trained" --run output/scratch=scratch \\
      --output docs/curves.png
  resnet-backbone report curves --run output/plain20 --run output/plain56 \\
      --run output/resnet20 --run output/resnet56 --output fig6.png

For runs of train-net, the plot has the losses, and AP50 if the run evaluated. For runs of
train-classifier, it is the paper's Fig. 4 or 6: error against iterations, training dashed, test
bold, plain and residual networks in separate panels. Runs of the same network, such as several
seeds, share a color, and the legend has their mean test error. Unfinished and resumed runs can be
drawn, too."""

RESPONSES_EPILOG = """\
examples:
  resnet-backbone report responses --weights output/plain56/final.safetensors \\
      --weights output/resnet56/final.safetensors --cifar10 cifar10 --output fig7.png
  resnet-backbone report responses --weights resnet50_msra.safetensors=ResNet-50 \\
      --model resnet50 --preprocessing msra --images imagenet/val --output responses.png

A layer's response is the output of its BN, before the nonlinearity and the addition. Its
standard deviation is taken over images, channels, and positions. The paper finds smaller
responses in residual networks than in plain ones, and in deeper residual networks than in
shallower ones. The weights of train-classifier state their network and input. Others need
--model and --preprocessing."""

TABLE_EPILOG = """\
examples:
  resnet-backbone report table --run output/resnet20 --run output/resnet20_seed2 --output t.md
  resnet-backbone report table --run output/cifar10/* --output docs/results/cifar10.md

Runs of the same network and recipe make one row, with mean and standard deviation over their seeds.
Runs shorter than the published recipe are marked. Below the tables are the command, hardware, and
date of every run."""

EVALUATIONS_EPILOG = """\
examples:
  resnet-backbone report evaluations --run tested/resnet20 --run tested/resnet56 --output e.md
  resnet-backbone report evaluations --run fp32 --run int8="OpenVINO, int8" --output int8.md

The folders are those of evaluate-classifier --output, all of the same images. Each is compared
with the first one, image by image."""

DETECTION_EPILOG = """\
examples:
  resnet-backbone report detection --run output/vgg16_fpn --run output/r50_fpn \\
      --output detection.md
  resnet-backbone report detection --run output/vgg_seed* output/r50_seed* --voc-root VOC2007 \\
      --rows output/improvements/results.json --output detection.md
  resnet-backbone report detection --run output/r50 output/r101 --reference output/r50 \\
      --output r101_over_r50.md

Runs that differ only in their seeds make one row. A folder of seeds (train-net --seeds) stands for
all of them. Any detectors can be compared. Without --reference, each ResNet is compared with the
VGG of the same head, data, and schedule, or else all detectors with the first one. The page has the
gain with its standard error and its 95 % interval over test images, AP per class, curves, errors by
kind, and pictures of what one finds and the other misses. These need the test set. If it has moved
since the runs, give --voc-root, or --coco-json and --image-root."""


LOCALIZATION_EPILOG = """\
example:
  resnet-backbone report localization --run output/rpn output/crop/eval output/rcnn \\
      --output docs/results/localization.md

Each run makes one row, by its network and by how it was tested. The folder "eval" of train-net
--eval-only is a run, too."""


def split_label(text: str) -> tuple[str, str]:
    """Parses "PATH" or "PATH=LABEL" into (path, label or ""); an existing path may contain "="."""
    path, _, label = (text, "", "") if os.path.exists(text) else text.rpartition("=")
    return (path, label) if path else (text, "")


def parse_run(text: str) -> tuple[Path, str]:
    """Parses "DIR" or "DIR=LABEL" into (path of the metrics file, label).

    The default label of a detection run is its folder's name. A classification run has none,
    because its config names the network.
    """
    folder, label = split_label(text)
    for path in (Path(folder, name) for name in ("", METRICS, DETECTOR_METRICS)):
        if path.is_file():
            return path, label or ("" if path.name == METRICS else path.resolve().parent.name)
    names = f"{DETECTOR_METRICS} nor {METRICS}"
    raise argparse.ArgumentTypeError(f"{folder} has neither {names}; give a training run's folder")


def curves(args: argparse.Namespace) -> None:
    """draw training curves of one or more runs"""
    paths, labels = zip(*args.runs, strict=True)
    kinds = {path.name == METRICS for path in paths}
    if len(kinds) > 1:
        raise ValueError("--run names both detection and classification runs: draw them separately")
    if kinds == {True}:
        figure = plots.plot_errors([load_run(path.parent) for path in paths], labels, args.together)
    else:
        series: dict[str, list] = {label: [] for label in labels}
        for path, label in args.runs:
            series[label].append(load_metrics(path))
        figure = plot_training(series, plots.assign_colors(series))
    if figure is None:
        raise ValueError("these runs have neither losses nor AP50: has the training begun?")
    plots.save_png(figure, args.output)
    print(args.output)


def read_images(folder: str, count: int) -> Tensor:
    """Reads center crops, uint8 (N, 3, 224, 224), of at most ``count`` images of a folder."""
    files, crop = spread(find_pictures([folder]), count), CenterCrop()
    images = [EncodedImage(read_bytes(file), file, partial=False) for file in files]
    return torch.stack([crop(image).image for image in images])


def responses(args: argparse.Namespace) -> None:
    """draw the standard deviations of layer responses (the paper's Fig. 7)"""
    if args.cifar10:
        images = read_cifar10(args.cifar10, train=False)[0][: args.num_images]
    else:
        images = read_images(args.images, args.num_images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn, rows = [], {}
    for file, label in map(split_label, args.weights):
        spec = NetworkSpec(args.model, 1000) if args.model else read_spec(file)
        if spec is None:
            raise ValueError(f"{file} does not name its network: give --model")
        model = spec.build()
        preprocessing = load_network(model, file, args.preprocessing)
        network = parse_network(spec.name, spec.options)
        label = label or network.title
        if label in rows:
            raise ValueError(f"two networks are named {label!r}: write --weights FILE=LABEL")
        model = model.to(device, memory_format=torch.channels_last)
        rows[label] = plots.layer_responses(model, InputNormalizer(preprocessing, device)(images))
        drawn.append(plots.Responses(label, network, [std for _, std in rows[label]]))
    plots.save_png(plots.plot_responses(drawn), args.output)
    if args.json:
        write_json(args.json, {"images": len(images), "std": rows}, indent=1)
    print(plots.responses_table(rows), args.output, sep="\n")


def table(args: argparse.Namespace) -> None:
    """tabulate classification results beside the paper's"""
    text = results_table([load_run(folder) for folder in args.runs])
    write_text(args.output, text)
    print(text, args.output, sep="")


def evaluations(args: argparse.Namespace) -> None:
    """compare evaluations of classifiers on the same images, with intervals"""
    named = map(split_label, args.runs)
    text = compare_evaluations([load_evaluation(Path(path), name) for path, name in named])
    write_text(args.output, text)
    print(text, args.output, sep="")


def detection(args: argparse.Namespace) -> None:
    """report detection runs: the gain over VGG-16, published numbers, plots, pictures"""
    from resnet_backbone.report.document import write_detection_report  # needs Detectron2

    paths = {key: getattr(args, key) for key in ("voc_root", "coco_json", "image_root")}
    options = dict(data=paths, rows_files=args.rows, reference=args.reference)
    options |= dict(note=args.note, score=args.score, command=args.command_line)
    write_detection_report(args.runs, args.output, **options)
    print(args.output)


def localization(args: argparse.Namespace) -> None:
    """tabulate localization runs beside the paper's Table 13"""
    from resnet_backbone.report.localization import write_localization_report  # needs Detectron2

    options = dict(note=args.note, command=args.command_line)
    print(write_localization_report(args.runs, args.output, **options), args.output, sep="\n")


def markdown_file(text: str) -> Path:
    if not text.endswith(".md"):
        raise argparse.ArgumentTypeError(f"{text} has no suffix .md")
    return Path(text)


def score_threshold(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no score between 0 and 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, epilog, add_options in (
        (curves, CURVES_EPILOG, add_curves),
        (responses, RESPONSES_EPILOG, add_responses),
        (table, TABLE_EPILOG, add_table),
        (evaluations, EVALUATIONS_EPILOG, add_evaluations),
        (detection, DETECTION_EPILOG, add_detection),
        (localization, LOCALIZATION_EPILOG, add_localization),
    ):
        texts = dict(help=run.__doc__, description=run.__doc__, epilog=epilog)
        command = commands.add_parser(run.__name__, **texts)
        command.set_defaults(run=run)
        add_options(command)
    return parser


def add_curves(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "run folder (or its metrics file), and its name in the legend"
    how = dict(dest="runs", action="append", required=True, metavar="DIR[=LABEL]")
    add("--run", type=parse_run, help=f"{text}; may be given several times", **how)
    add("--output", required=True, metavar="FILE.png", help="image file to write")
    add("--together", action="store_true", help="draw plain and residual networks in one panel")


def add_responses(parser: argparse.ArgumentParser) -> None:
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    text = ".safetensors file, and its name in the legend; may be given several times"
    add("--weights", action="append", required=True, metavar="FILE[=LABEL]", help=text)
    text = "folder of CIFAR-10; its test images are used"
    source.add_argument("--cifar10", metavar="DIR", help=text)
    text = "folder of images; center crops of 224 (short side 256) are used"
    source.add_argument("--images", metavar="DIR", help=text)
    add("--output", required=True, metavar="FILE.png", help="image file to write")
    add("--json", metavar="FILE", help="also write the numbers, by layer name")
    text = "number of images (default: %(default)s)"
    add("--num-images", type=positive, default=1000, metavar="N", help=text)
    add("--model", metavar="NAME", help="network of weights that do not state it")
    add("--preprocessing", default="", metavar="NAME", help="their input, such as msra")


def add_runs(parser: argparse.ArgumentParser, what: str) -> None:
    how = dict(dest="runs", action="extend", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--run", help=f"{what}; may be given several times", **how)


def add_table(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, "run folders of train-classifier")
    about = dict(metavar="FILE.md", help="table to write")
    parser.add_argument("--output", type=Path, required=True, **about)


def add_evaluations(parser: argparse.ArgumentParser) -> None:
    text = "folder of evaluate-classifier --output, and its name; may be given several times"
    how = dict(dest="runs", action="append", required=True, metavar="DIR[=LABEL]")
    parser.add_argument("--run", help=text, **how)
    about = dict(metavar="FILE.md", help="table to write")
    parser.add_argument("--output", type=Path, required=True, **about)


def add_localization(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, "run folders of train-net")
    about = dict(metavar="FILE.md", help="page to write")
    parser.add_argument("--output", type=markdown_file, required=True, **about)
    add_note(parser)


def add_note(parser: argparse.ArgumentParser) -> None:
    text = "a paragraph to add, for example on the data"
    parser.add_argument("--note", default="", metavar="TEXT", help=text)


def add_detection(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, "run folders of train-net, or folders of seeds")
    add = parser.add_argument
    about = dict(metavar="FILE.md", help="page to write; its pictures go to the folder FILE")
    add("--output", required=True, type=markdown_file, **about)
    text = "folder of the test set (default: that of the runs' commands)"
    add("--voc-root", metavar="DIR", help=text)
    add("--coco-json", metavar="FILE", help="annotations of a test set in COCO's format")
    add("--image-root", metavar="DIR", help="its image folder")
    text = "run folder, or folder of seeds, to compare all others with (default: see below)"
    add("--reference", type=Path, metavar="DIR", help=text)
    text = "results.json of evaluate-detector; may be given several times"
    add("--rows", type=Path, action="append", default=[], metavar="FILE", help=text)
    add_note(parser)
    text = "lowest score of detections in the pictures (default: %(default)s)"
    add("--score", type=score_threshold, default=0.5, metavar="S", help=text)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    args.command_line = command_line("report", words)
    args.run(args)
