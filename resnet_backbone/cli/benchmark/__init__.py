"""Measure loading, training, inference, detectors, and evaluation beside the usual libraries.

  resnet-backbone benchmark loader --images photos/   # images/s of one core
  resnet-backbone benchmark train --dtype bf16       # ResNet-50 steps beside torchvision's
  resnet-backbone benchmark infer --batch 1 16       # forward passes beside torchvision's
  resnet-backbone benchmark fpn --engines eager auto # R-50-FPN beside Detectron2's
  resnet-backbone benchmark detect --arch fpn c4     # Faster R-CNN steps beside Detectron2's
  resnet-backbone benchmark profile                  # parts of a training step of Faster R-CNN
  resnet-backbone benchmark data                     # start of a training beside Detectron2's
  resnet-backbone benchmark evaluate                 # COCO and VOC AP beside the references

All candidates take turns within one run, in a rotating order, so that a machine that slows down
does so for all of them. In a turn a candidate runs twice, and the second run counts: the first one
pays for what the others left in memory. The command prints the median and the range of images/s
over the repeats, and of the ratio to the reference within a repeat. --output FILE.json keeps every
measurement with the command, date, hardware, and versions. Nothing else should run on the machine.
`resnet-backbone benchmark COMMAND --help` says what each timing includes.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.cli.benchmark.turns import DTYPES
from resnet_backbone.fast.engines import ENGINES
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.files import write_json
from resnet_backbone.runtime.records import command_line, date, hardware, versions

# command -> module, what it measures, what each timing includes
COMMANDS = {
    "loader": (
        "classification",
        "JPEG to a training crop, beside torchvision's PIL transforms",
        """\
Images are files in memory, in one process on one thread. Candidates:
  reference     Pillow and torchvision's v1 transforms: decode, Resize(short side in 256..480),
                crop of 224, flip, ToTensor, color noise, Normalize, stack: normalized floats
  ours          to stacked bytes and color shifts, which the device then normalizes
  ours, whole   the same with every JPEG decoded whole (as without nvidia-nvimgcodec)
  ours + norm   to normalized floats on this core: all that the reference does""",
    ),
    "train": (
        "classification",
        "training steps of a classifier, beside torchvision's model",
        """\
A step is forward, loss, backward, and SGD on normalized images on the device. The reference is
torchvision's model in its default form: fp32, contiguous. On a GPU, torchvision's model (and
timm's, with --timm) also runs in our settings: channels_last, and bf16 if asked for. With --images,
a last measurement trains our model on batches from the loader, and prints images/s and the share of
the time that a step waits for data.""",
    ),
    "infer": (
        "classification",
        "forward passes of a classifier, beside torchvision's model",
        """\
Forward passes in inference mode on normalized, contiguous fp32 images on the device. All networks
have the same weights. Candidates:
  torchvision           the reference: its model in its default form
  ours, as built        build_model(...).eval(), nothing else
  ours, DTYPE, ENGINE   resnet_backbone.optimize_for_inference(model, dtype=..., engine=...)""",
    ),
    "fpn": (
        "pyramid",
        "the R-50-FPN backbone beside Detectron2's",
        """\
R-50-FPN with frozen BN, frozen stem and res2, and the same random weights, on one image. The
reference is Detectron2's build_resnet_fpn_backbone. Ours is build_paper_resnet_fpn_backbone, as
built and after resnet_backbone.optimize_for_inference. A training pass is forward and backward of
the backbone. Memory is measured in a fresh process for each candidate (Linux, CPU).""",
    ),
    "detect": (
        "detectors",
        "Faster R-CNN with FPN and C4 beside Detectron2's, on the CPU",
        """\
Faster R-CNN with 80 classes on one image of 800x1216. The reference is Detectron2's own model
in fp32. Ours is what our trainer builds, with the same settings and the same random weights:
  ours, fp32, as built   without any call
  ours, DTYPE, ENGINE    resnet_backbone.optimize_for_inference(model, dtype=..., engine=...)
  ours, bf16 autocast    training with SOLVER.AMP.ENABLED True, which works on CPUs
  ours, checkpointed     training with RESNET_BACKBONE.GRADIENT_CHECKPOINTING True
Inference is the call of the model, from the image to detections. A training step is forward,
backward, and SGD on 512 sampled regions. The proposal network does its work, but the region head
gets given boxes, the same for all models, because random weights propose nothing useful.
--proposals is their number: 1000 as in Detectron2, or 300 as in the paper. Outputs are compared
before the measurement: detections by class and overlap, losses with the same sampling. "Data" is
the time to read and augment one JPEG. Memory is measured in a fresh process for each candidate. On
two idle cores, a turn of C4 takes several minutes, and one of FPN about one minute.""",
    ),
    "profile": (
        "profile",
        "parts of a detector's training step, beside Detectron2's",
        """\
A training step as in `detect`, with 80 classes and random weights, of each config, and of
Detectron2's own detector if that has the same network. PyTorch's profiler gives the time of each
part, forward and backward: the median over the repeats. The profiler itself takes a few percent.
Only Faster R-CNN can be profiled.""",
    ),
    "data": (
        "datasets",
        "start of a training on COCO data, beside Detectron2's",
        """\
A start is all from the files to the first batch of one image, in a fresh process: reading the
instances file, Detectron2's records, and the sampler. Ours also looks at each image file, and a
later start uses what the first one kept in the cache. The set is random, with six boxes an image on
average and no masks; all images are links to one file, so the disk is not measured. Memory is the
process's peak above what it had before (Linux). The order of the candidates is fixed.""",
    ),
    "evaluate": (
        "datasets",
        "COCO and VOC evaluation beside pycocotools' and Detectron2's",
        """\
Random sets, with the detections in memory. COCO: from the content of an instances file and a list
of results to the twelve numbers, beside pycocotools. VOC: from the output of a model and the
annotation files to AP, beside Detectron2's evaluator, which rounds scores to three digits and
breaks ties differently. Both have read the files before.""",
    ),
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False)
        return super()._get_help_string(action) if has_default else action.help


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    loader, train, infer, fpn, detect, profile, data, evaluate = (
        commands.add_parser(name, description=text, formatter_class=Help, help=about)
        for name, (_, about, text) in COMMANDS.items()
    )
    add_loader_arguments(loader)
    add_model_arguments(train, infer)
    add_detector_arguments(fpn, detect, profile)
    add, sizes = data.add_argument, [1000, 10_000, 118_000]
    add("--set-images", nargs="+", type=positive, default=sizes, help="images of each set")
    for name, images, found in (("coco", 2000, 100), ("voc", 5000, 50)):
        add, number = evaluate.add_argument, dict(type=positive)
        add(f"--{name}-images", default=images, help="images of the set", **number)
        add(f"--{name}-detections", default=found, help="detections per image", **number)
    for one in (infer, fpn, detect):
        text = "engines for our inference"
        one.add_argument("--engines", nargs="+", default=["eager"], choices=ENGINES, help=text)
        text = "precisions of our inference; int8 is OpenVINO's"
        one.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help=text)
    for one in (loader, train, infer, fpn, detect, profile, data, evaluate):
        repeats = {loader: 7, train: 5, infer: 5, fpn: 5}.get(one, 3)
        one.add_argument("--repeats", type=positive, default=repeats, help="number of turns")
        one.add_argument("--output", type=Path, help="JSON file for all measurements")
    parser.set_defaults(device="cpu")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no GPU here")
    if args.command in ("train", "infer") and args.batch is None:
        size = 256 if args.device == "cuda" else 16
        args.batch = size if args.command == "train" else [1, size]
    return args


def add_loader_arguments(parser: argparse.ArgumentParser) -> None:
    add, text = parser.add_argument, "folder of JPEG files, or 'synthetic'"
    add("--images", required=True, default=argparse.SUPPRESS, help=text)
    add("--count", type=positive, default=300, help="number of images")
    add("--batch", type=positive, default=50, help="images per batch")


def add_model_arguments(train: argparse.ArgumentParser, infer: argparse.ArgumentParser) -> None:
    for parser in (train, infer):
        add = parser.add_argument
        add("--model", default="resnet50", help="name of the network")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto")
        add("--size", type=positive, default=224, help="size of the images")
        add("--steps", type=positive, default=3, help="steps per turn")
    dtypes = ["fp32", "bf16"]
    train.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="precisions")
    text = "images per batch (default: 16 on a CPU, 256 on a GPU"
    train.add_argument("--batch", type=positive, help=f"{text})")
    train.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    train.add_argument("--timm", action="store_true", help="also measure timm's model")
    train.add_argument("--images", help="folder of JPEG files to train on at the end")
    train.add_argument("--workers", type=int, default=8, help="loader processes for --images")
    infer.add_argument("--batch", type=positive, nargs="+", help=f"{text}, and 1)")


def add_detector_arguments(*parsers: argparse.ArgumentParser) -> None:
    fpn, detect, profile = parsers
    fpn.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for parser in parsers:
        parser.add_argument("--height", type=positive, default=800, help="height of the image")
        parser.add_argument("--width", type=positive, default=1216, help="width of the image")
    for parser in (fpn, detect):
        parser.add_argument("--no-memory", action="store_true", help="measure only the speed")
    for parser in (detect, profile):
        parser.add_argument("--batch", type=positive, default=1, help="images per batch")
    add, text = profile.add_argument, "detectors, by file or name"
    configs = ["coco/faster_rcnn_R_50_FPN"]
    add("--config-file", nargs="+", metavar="FILE", default=configs, help=text)
    dtypes = ["fp32", "bf16"]
    add("--dtype", nargs="+", choices=dtypes, default=dtypes, help="precisions of ours")
    fpn.add_argument("--steps", type=positive, default=1, help="steps per turn")
    add, kinds = detect.add_argument, ["inference", "training"]
    add("--arch", nargs="+", choices=("fpn", "c4"), default=["fpn", "c4"], help="detectors")
    add("--kind", nargs="+", choices=kinds, default=kinds, help="passes to measure")
    depths, text = (18, 34, 50, 101, 152), "depth of the backbone"
    add("--depth", type=int, choices=depths, default=50, help=text)
    add("--no-speed", action="store_true", help="measure only the memory")
    text = "boxes that the head gets in inference; one table for each number"
    add("--proposals", type=positive, nargs="+", default=[1000, 300], help=text)
    add("--regions", type=positive, default=512, help="sampled regions per image in training")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    about = {
        "command": command_line("benchmark", argv),
        "date": date(),
        **hardware(torch.device(args.device)),
        "cpus": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }
    module = importlib.import_module(f"{__name__}.{COMMANDS[args.command][0]}")
    result: dict[str, Any] = getattr(module, f"run_{args.command}")(args)
    about["threads"] = torch.get_num_threads()
    if args.output:
        write_json(args.output, {**about, **result}, indent=1)
        print(f"written: {args.output}")
