#!/usr/bin/env python
"""Measure loader, training, inference, detectors and evaluation beside what people use today.

  python tools/benchmark.py loader                   # images/s of one core
  python tools/benchmark.py train --dtype bf16       # ResNet-50 steps beside torchvision's
  python tools/benchmark.py infer --batch 1 16       # forward passes beside torchvision's
  python tools/benchmark.py fpn --compile            # R-50-FPN beside Detectron2's
  python tools/benchmark.py detect --arch fpn c4     # Faster R-CNN steps beside Detectron2's
  python tools/benchmark.py evaluate                 # COCO and VOC AP beside the references

All candidates take turns within one run, in an order that rotates, so that a machine that slows
down does so for all of them. Printed are the median and the range of images/s over the repeats,
and the median and range of the ratio to the reference within the same repeat. --output FILE.json
keeps all single measurements with the command, date, hardware and versions.

Nothing else should run on the machine. `python tools/benchmark.py COMMAND --help` says what lies
within each timing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from resnet_backbone.classification.data.augment import PaperAugmentation
from resnet_backbone.classification.data.crops import partial_decoding
from resnet_backbone.classification.data.imagenet import ImageFiles, list_images
from resnet_backbone.classification.data.loader import LoaderSource
from resnet_backbone.classification.data.stream import DataError, SampleStream
from resnet_backbone.classification.networks import NetworkSpec
from resnet_backbone.classification.optimizer import build_sgd
from resnet_backbone.classification.step import StepOptions, TrainStep
from resnet_backbone.cli.benchmark.interleaved import (
    Run,
    interleave,
    print_table,
    random_images,
    relative_difference,
    summarize,
    waiter,
)
from resnet_backbone.cli.benchmark.loader_reference import (
    LoaderMethods,
    geometry_difference,
    load_images,
)
from resnet_backbone.runtime.distributed import World
from resnet_backbone.weights import get_preprocessing
from resnet_backbone.weights.inputs import InputNormalizer

LOADER_HELP = """\
Images are files in memory, in one process on one thread. Candidates:
  reference     Pillow and torchvision's v1 transforms: decode, Resize(short side in 256..480),
                crop of 224, flip, ToTensor, colour noise, Normalize, stack: normalised floats
  ours          to stacked bytes and colour shifts: what goes to the device, which normalises them
  ours, whole   the same with every JPEG decoded whole (as without nvidia-nvimgcodec)
  ours + norm   to normalised floats, by the device's own code on this core: all that the
                reference does
The geometry check compares our crops with Pillow's resize of the same boxes."""

TRAIN_HELP = """\
A step is forward, loss, backward and SGD on normalised images that lie on the device. The
reference is torchvision's model in its default form: fp32, contiguous. On a GPU torchvision's
(and, with --timm, timm's) model also runs in our settings: channels_last, and bf16 if asked.
With --images a last measurement trains our model on batches from the loader: images/s, and the
share of the time that the step waits for data."""

INFER_HELP = """\
Forward passes in inference mode on normalised fp32 images that lie on the device, contiguous. All
networks have the same weights. Candidates:
  torchvision           the reference: its model in its default form
  ours, as built        build_model(...).eval(), nothing else
  optimized             resnet_backbone.optimize_for_inference, in fp32 and bf16
  compile               the same with torch.compile; compilation is not timed
  onnxruntime, OpenVINO with --runtimes: the network that tools/export.py writes, on the CPU"""

FPN_HELP = """\
R-50-FPN with frozen BN, stem and res2 frozen, one image, random equal weights. The reference is
Detectron2's build_resnet_fpn_backbone as it comes; ours is build_paper_resnet_fpn_backbone as it
comes, and after resnet_backbone.optimize_for_inference. A training pass is forward and backward of
the backbone. Memory is that of a fresh process for each candidate (Linux, CPU)."""

DETECT_HELP = """\
Faster R-CNN R-50 with 80 classes on one image of 800x1216. The reference is Detectron2's own model
(its backbone, its heads, fp32, as it comes); ours is what our trainer builds, with the same
settings and the same random weights, in these forms:
  ours, fp32, as built   nothing has to be done
  ours, fp32, optimized  resnet_backbone.optimize_for_inference(model)
  ours, bf16, optimized  the same with dtype=torch.bfloat16
  ours, bf16 autocast    training with SOLVER.AMP.ENABLED True, which works on CPUs
Inference is the call of the model, from the image to detections. A training step is forward,
backward and SGD, of 512 sampled regions. In all of them the proposal network does its work, and
then the region head gets the same given boxes, since random weights propose nothing sensible; by
--proposals 1000 (Detectron2's number) and 300 (the paper's). Outputs are compared before the
measurement: detections by class and overlap, losses with the same sampling. Data is the time to
read and augment one JPEG, beside a step. Memory is that of a fresh process for each candidate.

On two quiet cores a turn of C4 takes two to three minutes and one of FPN half a minute."""

EVALUATE_HELP = """\
Random sets, their detections in memory. COCO: the twelve numbers from the content of an instances
file and a result list, by the engine that the evaluator takes, beside pycocotools. VOC: from what
the model returns and the annotation files to all AP, beside Detectron2's evaluator, which rounds
scores to three digits and breaks the ties differently. Both read the files once, in a first turn
that is not counted."""


def run_loader(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = None if args.images == "synthetic" else args.images or default_images()
    images = load_images(folder, args.count, args.jpeg_quality)
    size = statistics.mean(map(len, images)) / 1000
    print(f"{len(images)} images of {size:.0f} kB on average, from {folder or 'noise'}")
    methods = LoaderMethods(images, args.batch)
    runs = {"reference": methods.reference, "ours": methods.ours}
    if partial_decoding():
        runs["ours, whole"] = methods.whole
    else:
        print("nvidia-nvimgcodec is not installed: all JPEGs are decoded whole")
    runs["ours + norm"] = methods.normalized
    rows = summarize(interleave(runs, args.repeats, lambda: None))
    print_table(rows)
    geometry = geometry_difference(images)
    print(
        f"geometry: {geometry['mean']:.4f} grey levels mean, {geometry['max']} at most, from "
        "Pillow's resize of the same boxes"
    )
    return {"rows": rows, "geometry": geometry, "mean_kilobytes": size}


def default_images() -> str:
    """The VOC images that the tests use."""
    here = Path(__file__).resolve().parents[3]
    root = Path(os.environ.get("RESNET_BACKBONE_DATA", here.parent / "shared" / "data"))
    folder = root / "VOCdevkit" / "VOC2007" / "JPEGImages"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give --images DIR, or --images synthetic")
    return str(folder)


def variants(args: argparse.Namespace) -> Iterator[tuple[str, str, str, bool, str]]:
    """(name, network, dtype, channels_last, compile mode); the first is the reference."""
    yield f"torchvision {args.model}, fp32", f"torchvision/{args.model}", "fp32", False, "none"
    libraries = [("ours", args.model)]
    if args.device == "cuda":
        libraries.append(("torchvision", f"torchvision/{args.model}"))
    if args.timm:
        libraries.append(("timm", f"timm/{args.model}"))
    for library, network in libraries:
        for dtype in args.dtype:
            name = f"{library}, {dtype}, channels_last"
            yield name, network, dtype, True, "none"
            if args.compile:
                yield f"{name}, compile", network, dtype, True, "default"


def build_step(network: str, dtype: str, channels_last: bool, compiled: str, device) -> TrainStep:
    model = NetworkSpec(network, 1000).build().to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_sgd(model, 0.9, 1e-4)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    amp = "none" if dtype == "fp32" else dtype
    return TrainStep(model, optimizer, StepOptions(amp=amp, compile=compiled), World(device=device))


def train_steps(step: TrainStep, images, labels, count: int) -> int:
    for iteration in range(count):
        step(images, labels, iteration)
    return count * len(images)


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    labels = torch.randint(0, 1000, (args.batch,), device=device)
    runs: dict[str, Run] = {}
    steps = {}
    for name, network, dtype, channels_last, compiled in variants(args):
        step = build_step(network, dtype, channels_last, compiled, device)
        images = random_images((args.batch, 3, args.size, args.size), channels_last, device)
        runs[name] = partial(train_steps, step, images, labels, args.steps)
        steps[name] = step
    rows = summarize(interleave(runs, args.repeats, waiter(device)))
    print_table(rows)
    result: dict[str, Any] = {"rows": rows}
    if args.images:
        ours = max(
            (row for row in rows if row["name"].startswith("ours")),
            key=lambda row: row["images_per_s"]["median"],
        )
        result["real_data"] = real_data(steps[ours["name"]], args, device)
        result["real_data"]["name"] = ours["name"]
        print(
            f"real data, {ours['name']}: {result['real_data']['images_per_s']:.1f} images/s "
            f"({args.workers} workers), {result['real_data']['data_share']:.1%} of the time "
            "waiting for data"
        )
    return result


def real_data(step: TrainStep, args: argparse.Namespace, device) -> dict[str, float]:
    """Trains on batches from the loader: images/s and the share of time that waits for them."""
    names = list_images(Path(args.images))
    if not names:
        raise DataError(f"{args.images} holds no images")
    labels = [i % 1000 for i in range(len(names))]
    dataset = ImageFiles(args.images, names, labels, [str(i) for i in range(1000)])
    stream = SampleStream(len(dataset), args.batch)
    source = LoaderSource(
        dataset, stream, PaperAugmentation(size=args.size), workers=args.workers, prefetch=4
    )
    normalizer, wait = InputNormalizer(get_preprocessing("torchvision"), device), waiter(device)
    warm_up, total = max(2, args.workers), args.steps * args.repeats
    waited = begin = 0.0
    batches = source.batches(0)
    for iteration in range(warm_up + total):
        if iteration == warm_up:
            wait()
            begin, waited = time.perf_counter(), 0.0
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        images = normalizer(batch.images, batch.shift)
        step(images, batch.labels.to(device, non_blocking=True), iteration)
        if device.type == "cuda":  # else the queue would hide where the time goes
            torch.cuda.current_stream().synchronize()
    wait()
    seconds = time.perf_counter() - begin
    batches.close()
    return {"images_per_s": total * args.batch / seconds, "data_share": waited / seconds}


def passes(run: Callable, images: torch.Tensor, count: int) -> int:
    for _ in range(count):
        run(images)
    return count * len(images)


forward = torch.inference_mode()(passes)


def run_infer(args: argparse.Namespace) -> dict[str, Any]:
    from resnet_backbone.cli.benchmark import inference

    device = torch.device(args.device)
    if args.runtimes and device.type != "cpu":
        raise ValueError("--runtimes measures CPUs: add --device cpu")
    result: dict[str, Any] = {}
    for batch in args.batch:
        torch.compiler.reset()  # each batch size gets its own code, without dynamic shapes
        found = inference.candidates(args.model, args.dtype, args.compile, device)
        if args.runtimes:
            found |= inference.runtimes(args.model, args.dtype, torch.get_num_threads())
        images = torch.randn(batch, 3, args.size, args.size, device=device)
        differences = output_differences(found, images)
        runs = {name: partial(forward, run, images, args.steps) for name, run in found.items()}
        rows = summarize(interleave(runs, args.repeats, waiter(device)))
        print(f"batch {batch}:")
        print_table(rows)
        print_differences(differences)
        result[f"batch_{batch}"] = {"rows": rows, "differences": differences}
    return result


@torch.inference_mode()
def output_differences(found: dict[str, Callable], images: torch.Tensor) -> dict[str, float]:
    """Largest relative difference of each candidate's outputs from those of the first."""
    (_, reference), *others = found.items()
    expected = reference(images)
    return {name: relative_difference(run(images), expected) for name, run in others}


def print_differences(differences: dict[str, float]) -> None:
    for name, value in differences.items():
        print(f"{name:34}differs by {value:.1e} of the largest value")


def run_fpn(args: argparse.Namespace) -> dict[str, Any]:
    from resnet_backbone.cli.benchmark import fpn

    device = torch.device(args.device)
    images = torch.randn(1, 3, args.height, args.width, device=device)
    differences = fpn.compare_both(device, images)
    for precision, values in differences.items():
        text = ", ".join(f"{name} {value:.1e}" for name, value in values.items())
        print(f"ours differs from Detectron2's, relatively, in {precision}: {text}")
    result: dict[str, Any] = {"differences": differences}
    found = fpn.build_candidates(device, args.compile)
    for kind in ("inference", "training"):
        names = [name for name in found if name.startswith(kind)]
        runs = {name: partial(passes, found[name], images, args.steps) for name in names}
        rows = summarize(interleave(runs, args.repeats, waiter(device)))
        print_table(rows)
        result[kind] = rows
    if device.type == "cpu" and not args.no_memory:
        result["memory_mb"] = {
            name: fpn.measure_memory(name, tuple(images.shape))
            for name in tqdm(found, desc="memory", unit="process")
            if not name.endswith("compile")
        }
        print("memory of a process that does one pass, MB (compiled ones are not measured):")
        for name, value in result["memory_mb"].items():
            print(f"{name:44}{value['peak']:8.0f} at most, {value['before']:.0f} before the pass")
    return result


def run_detect(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from resnet_backbone.cli.benchmark import detect
        from resnet_backbone.cli.benchmark import detectors as measured
    except ImportError as error:
        raise ValueError(str(error)) from error
    result: dict[str, Any] = {}
    for arch in args.arch:
        size = args.regions, args.height, args.width, args.batch
        settings = [detect.Setting(arch, number, *size) for number in args.proposals]
        theirs, ours = detect.build_pair(max(settings, key=lambda setting: setting.proposals))
        for setting in settings if "inference" in args.kind else ():
            title = f"{arch}, inference, {setting.proposals} proposals"
            passes = dict(detect.build_passes(setting, theirs, ours, "inference"))
            result[title] = measure_detectors(title, passes, measured.detections_differ, args)
        if "training" in args.kind:
            title = f"{arch}, training step, {args.regions} regions"
            passes = dict(detect.build_passes(settings[0], theirs, ours, "training"))
            result[title] = measure_detectors(title, passes, detect.losses_differ, args)
            with TemporaryDirectory() as folder:
                seconds = measured.mapper_seconds(Path(folder))
            step = 1 / max(row["images_per_s"]["median"] for row in result[title]["rows"])
            print(
                f"data: {1000 * seconds:.0f} ms an image, {seconds / step:.1%} of the fastest step"
            )
            result[title]["data_seconds"] = seconds
        if not args.no_memory:
            del theirs, ours
            result[f"{arch}, memory_mb"] = detectors_memory(detect, settings[0], args.kind)
    return result


def measure_detectors(title: str, passes: dict, compare: Callable, args) -> dict[str, Any]:
    """Compares the outputs of all passes with those of the first, then lets them take turns."""
    (_, reference), *others = passes.items()
    expected = reference()
    differences = {name: compare(run(), expected) for name, run in others}

    def timed(run: Callable) -> int:
        run()
        return args.batch

    rates = interleave({n: partial(timed, run) for n, run in passes.items()}, args.repeats, int)
    rows = summarize(rates)
    print(f"{title}:")
    print_seconds(rows)
    for name, values in differences.items():
        text = ", ".join(f"{key} {value:.1e}" for key, value in values.items())
        print(f"{name} differs from the reference by: {text}")
    return {"rows": rows, "differences": differences}


def print_seconds(rows: list[dict[str, Any]]) -> None:
    print(f"{'':34}{'s/image':>9}{'ratio':>8}  range")
    for row in rows:
        seconds, ratio = 1 / row["images_per_s"]["median"], row["ratio"]
        spread = f"{ratio['low']:.2f} ... {ratio['high']:.2f}"
        print(f"{row['name']:34}{seconds:9.3f}{ratio['median']:8.2f}  {spread}")


def detectors_memory(detect, setting, kinds: list[str]) -> dict[str, dict[str, float]]:
    names = {"inference": detect.INFERENCE, "training": detect.TRAINING}
    places = [(kind, name) for kind in kinds for name in (detect.REFERENCE, *names[kind])]
    found = {}
    for kind, name in tqdm(places, desc="memory", unit="process"):
        found[f"{kind}: {name}"] = detect.measure_memory(setting, kind, name)
    print(f"{setting.arch}: memory of a process that does one pass, MB:")
    for name, value in found.items():
        print(f"{name:44}{value['peak']:8.0f} at most, {value['before']:.0f} before the pass")
    return found


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from resnet_backbone.cli.benchmark.evaluation import coco_runs, quietly, voc_runs
    except ImportError as error:
        raise ValueError(str(error)) from error

    def measure(runs: dict[str, Callable], images: int) -> dict[str, Any]:
        last: dict[str, dict[str, float]] = {}

        def timed(name: str) -> int:
            last[name] = quietly(runs[name])
            return images

        rates = interleave({name: partial(timed, name) for name in runs}, args.repeats, lambda: 0)
        rows = summarize(rates)
        expected, *others = last.values()
        print_table(rows)
        for name, numbers in zip(list(last)[1:], others, strict=True):
            differences = (abs(numbers[key] - expected[key]) for key in expected)
            print(f"{name}: numbers differ by {max(differences):.1e} at most")
        return {"rows": rows, "numbers": last}

    coco = coco_runs(args.coco_images, 80, args.coco_detections)
    result = {"coco": measure(coco, args.coco_images)}
    with TemporaryDirectory() as folder:
        with voc_runs(Path(folder) / "VOC", args.voc_images, 20, args.voc_detections) as voc:
            result["voc"] = measure(voc, args.voc_images)
    return result


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a number needs beside it."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for part in importlib.metadata.distributions():
        if part.name.startswith("nvidia-nvimgcodec"):
            versions[part.name] = part.version
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join(["python", "tools/benchmark.py", *args.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "versions": versions,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


VERSIONS = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "simplejpeg",
    "detectron2",
    "onnxruntime",
    "openvino",
    "hotcoco",
    "pycocotools",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_loader_arguments(commands)
    add_model_arguments(commands, "train", TRAIN_HELP)
    add_model_arguments(commands, "infer", INFER_HELP)
    add_fpn_arguments(commands)
    add_detect_arguments(commands)
    add_evaluate_arguments(commands)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.command not in ("loader", "detect", "evaluate"):
        if args.device == "auto":
            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda, but PyTorch sees no GPU here")
        if args.command == "fpn":
            return args
        if args.batch is None:
            size = 256 if args.device == "cuda" else 16
            args.batch = size if args.command == "train" else [1, size]
    return args


def add_command(commands, name: str, text: str, about: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help=about,
    )


def add_loader_arguments(commands) -> None:
    about = "JPEG to a training crop, beside torchvision's PIL transforms"
    loader = add_command(commands, "loader", LOADER_HELP, about)
    loader.add_argument(
        "--images",
        help="folder of JPEG files, or 'synthetic' (default: VOC's in $RESNET_BACKBONE_DATA or "
        "../shared/data)",
    )
    loader.add_argument("--count", type=positive, default=300, help="images (default: 300)")
    loader.add_argument(
        "--jpeg-quality",
        type=int,
        help="encode the images anew, to see how file size matters (default: as they are)",
    )
    loader.add_argument("--batch", type=positive, default=50, help="images stacked (default: 50)")
    add_common_arguments(loader, repeats=7)


def add_model_arguments(commands, name: str, text: str) -> None:
    parser = add_command(commands, name, text, text.partition(".")[0].replace("\n", " "))
    parser.add_argument("--model", default="resnet50", help="default: resnet50")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of ours"
    )
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--size", type=positive, default=224, help="of the images (default: 224)")
    parser.add_argument("--steps", type=positive, default=3, help="of one turn (default: 3)")
    text = "images (default: 16 on a CPU, 256 on a GPU{})"
    if name == "train":
        parser.add_argument("--batch", type=positive, help=text.format(""))
        parser.add_argument("--timm", action="store_true", help="timm's model too")
        parser.add_argument("--images", help="folder of JPEG files to train on at the end")
        parser.add_argument("--workers", type=int, default=8, help="of --images (default: 8)")
    else:
        parser.add_argument("--batch", type=positive, nargs="+", help=text.format(", and 1"))
        parser.add_argument(
            "--runtimes", action="store_true", help="onnxruntime and OpenVINO too (CPU)"
        )
    add_common_arguments(parser, repeats=5)


def add_fpn_arguments(commands) -> None:
    parser = add_command(commands, "fpn", FPN_HELP, "the R-50-FPN backbone beside Detectron2's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--height", type=positive, default=800, help="default: 800")
    parser.add_argument("--width", type=positive, default=1216, help="default: 1216")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="speed alone")
    parser.add_argument("--steps", type=positive, default=1, help="of one turn (default: 1)")
    add_common_arguments(parser, repeats=5)


def add_detect_arguments(commands) -> None:
    about = "Faster R-CNN R-50-FPN and R-50-C4 beside Detectron2's, on the CPU"
    parser = add_command(commands, "detect", DETECT_HELP, about)
    parser.add_argument("--arch", nargs="+", choices=("fpn", "c4"), default=["fpn", "c4"])
    parser.add_argument(
        "--kind", nargs="+", choices=("inference", "training"), default=["inference", "training"]
    )
    text = "boxes that the head gets in inference, a table each (default: 1000 300)"
    parser.add_argument("--proposals", type=positive, nargs="+", default=[1000, 300], help=text)
    parser.add_argument(
        "--regions", type=positive, default=512, help="of an image in training (default: 512)"
    )
    parser.add_argument("--height", type=positive, default=800, help="default: 800")
    parser.add_argument("--width", type=positive, default=1216, help="default: 1216")
    parser.add_argument("--batch", type=positive, default=1, help="images (default: 1)")
    parser.add_argument("--no-memory", action="store_true", help="speed alone")
    add_common_arguments(parser, repeats=3)


def add_evaluate_arguments(commands) -> None:
    about = "COCO and VOC evaluation beside pycocotools' and Detectron2's"
    parser = add_command(commands, "evaluate", EVALUATE_HELP, about)
    for data, images, detections in (("coco", 2000, 100), ("voc", 5000, 50)):
        for what, number in (("images", images), ("detections", detections)):
            text = "per image " if what == "detections" else ""
            parser.add_argument(
                f"--{data}-{what}", type=positive, default=number, help=f"{text}({number})"
            )
    add_common_arguments(parser, repeats=3)


def add_common_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument(
        "--repeats", type=positive, default=repeats, help=f"turns (default: {repeats})"
    )
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 at least")
    return number


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    commands = {
        "loader": run_loader,
        "train": run_train,
        "infer": run_infer,
        "fpn": run_fpn,
        "detect": run_detect,
        "evaluate": run_evaluate,
    }
    about = provenance(args)
    try:
        result = commands[args.command](args)
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    about["threads"] = torch.get_num_threads()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**about, **result}, indent=1) + "\n")
        print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
