#!/usr/bin/env python
"""Measure the loader, a training step or inference against the programs people use today.

  python tools/benchmark.py loader                   # images/s of one core
  python tools/benchmark.py train --dtype bf16       # ResNet-50 steps beside torchvision's
  python tools/benchmark.py infer --batch 1 16

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
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

from resnet_backbone import build_model
from resnet_backbone.data.augment import PaperAugmentation
from resnet_backbone.data.batch import DataError
from resnet_backbone.data.imagenet import ImageFiles, list_images
from resnet_backbone.data.loader import LoaderSource
from resnet_backbone.data.reference import LoaderMethods, geometry_difference, load_images
from resnet_backbone.data.region import partial_decoding
from resnet_backbone.data.stream import SampleStream
from resnet_backbone.engine.distributed import World
from resnet_backbone.engine.networks import NetworkSpec
from resnet_backbone.engine.optimizer import build_sgd
from resnet_backbone.engine.step import StepOptions, TrainStep
from resnet_backbone.models.layers import ConvNorm
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
Forward passes without gradients on normalised images that lie on the device. "folded" has the
batch norms within the convolutions. The reference is torchvision's model in its default form."""

Run = Callable[[], int]  # processes some images and says how many


def interleave(runs: dict[str, Run], repeats: int, wait: Callable[[], None]) -> dict[str, list]:
    """Images/s of each candidate in each repeat, after one turn each that is not counted."""
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(repeats + 1) * len(names), desc="measuring", unit="turn") as bar:
        for repeat in range(repeats + 1):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = time.perf_counter()
                images = runs[name]()
                wait()
                if repeat:
                    rates[name].append(images / (time.perf_counter() - start))
                bar.update()
    return rates


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row for each candidate; the first one is the reference."""
    reference = next(iter(rates.values()))
    return [
        {
            "name": name,
            "images_per_s": spread(values),
            "ratio": spread([v / r for v, r in zip(values, reference, strict=True)]),
            "measurements": values,
        }
        for name, values in rates.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':34}{'images/s':>10}  {'range':19}{'ratio':>7}  range")
    for row in rows:
        speed, ratio = row["images_per_s"], row["ratio"]
        speeds = f"{speed['low']:.1f} ... {speed['high']:.1f}"
        ratios = f"{ratio['low']:.2f} ... {ratio['high']:.2f}"
        print(
            f"{row['name']:34}{speed['median']:10.1f}  {speeds:19}{ratio['median']:7.2f}  {ratios}"
        )


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
    here = Path(__file__).resolve().parents[1]
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


def random_images(batch: int, size: int, channels_last: bool, device) -> torch.Tensor:
    images = torch.randn(batch, 3, size, size, device=device)
    return images.to(memory_format=torch.channels_last) if channels_last else images


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
        images = random_images(args.batch, args.size, channels_last, device)
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


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Puts each batch norm into its convolution, in place; for evaluation."""
    for conv in model.modules():
        if isinstance(conv, ConvNorm) and isinstance(conv.norm, nn.BatchNorm2d):
            norm = conv.norm
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            conv.norm = None
    return model


@torch.inference_mode()
def forward(model: nn.Module, images, count: int) -> int:
    for _ in range(count):
        model(images)
    return count * len(images)


def run_infer(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    reference = NetworkSpec(f"torchvision/{args.model}", 1000).build().eval().to(device)
    models = {f"torchvision {args.model}, fp32": (reference, torch.float32, False)}
    for folded in (False, True):
        for dtype in args.dtype:
            model = build_model(args.model).eval()
            model = fold_batch_norms(model) if folded else model
            kind = torch.float32 if dtype == "fp32" else torch.bfloat16
            model = model.to(device, kind, memory_format=torch.channels_last)
            name = f"ours, {dtype}, channels_last" + (", folded" if folded else "")
            models[name] = (model, kind, True)
    if args.compile:
        for name, (model, *rest) in list(models.items())[1:]:
            models[f"{name}, compile"] = (torch.compile(model), *rest)
    result: dict[str, Any] = {}
    for batch in args.batch:
        runs = {}
        for name, (model, kind, channels_last) in models.items():
            images = random_images(batch, args.size, channels_last, device).to(kind)
            runs[name] = partial(forward, model, images, args.steps)
        rows = summarize(interleave(runs, args.repeats, waiter(device)))
        print(f"batch {batch}:")
        print_table(rows)
        result[f"batch_{batch}"] = rows
    return result


def waiter(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a number needs beside it."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg"):
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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_loader_arguments(commands)
    add_model_arguments(commands, "train", TRAIN_HELP)
    add_model_arguments(commands, "infer", INFER_HELP)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.command != "loader":
        if args.device == "auto":
            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda, but PyTorch sees no GPU here")
        if args.batch is None:
            size = 256 if args.device == "cuda" else 16
            args.batch = size if args.command == "train" else [1, size]
    return args


def add_loader_arguments(commands) -> None:
    loader = commands.add_parser(
        "loader",
        description=LOADER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="JPEG to a training crop, beside torchvision's PIL transforms",
    )
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
    parser = commands.add_parser(
        name,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help=text.partition(".")[0].replace("\n", " "),
    )
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
    add_common_arguments(parser, repeats=5)


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
    commands = {"loader": run_loader, "train": run_train, "infer": run_infer}
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
