"""Loader, training and inference of classifiers beside torchvision's transforms and models."""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import functional as TF

from resnet_backbone import build_model
from resnet_backbone.classification.data.augment import PaperAugmentation, color_shift
from resnet_backbone.classification.data.imagenet import ImageFiles
from resnet_backbone.classification.data.loader import LoaderSource
from resnet_backbone.classification.data.sources import SampleStream, sample_rng
from resnet_backbone.classification.networks import NetworkSpec
from resnet_backbone.classification.step import TrainStep, build_sgd
from resnet_backbone.cli.benchmark import turns
from resnet_backbone.fast.engines import relative_difference
from resnet_backbone.runtime.images import EncodedImage, find_pictures, partial_decoding, spread
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights import get_preprocessing
from resnet_backbone.weights.keymaps import from_torchvision
from resnet_backbone.weights.preprocessing import InputNormalizer

Forward = Callable[[Tensor], Tensor]
PREPROCESSING = get_preprocessing("torchvision")
PASSES = itertools.count(1)

# Loader


def run_loader(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    images = load_images(args.images, args.count)
    size = statistics.mean(map(len, images)) / 1000
    print(f"{len(images)} images of {size:.0f} kB on average: {args.images}")
    ours = partial(our_pass, images, args.batch)
    runs = {"reference": partial(reference_pass, images, args.batch), "ours": ours}
    if partial_decoding():
        runs["ours, whole"] = partial(ours, in_parts=False)
    else:
        print("nvidia-nvimgcodec is not installed: all JPEGs are decoded whole")
    runs["ours + norm"] = partial(ours, normalizer=InputNormalizer(PREPROCESSING))
    return {"rows": turns.measure(runs, len(images), args.repeats), "mean_kilobytes": size}


def load_images(source: str, count: int) -> list[bytes]:
    """Returns JPEG files in memory.

    Args:
        source: a folder, from which evenly spaced images are taken, or "synthetic" for images of
            500 x 375, noise smoothed to the file size of a photograph.
    """
    if source == "synthetic":
        return [_synthetic_jpeg(seed) for seed in range(count)]
    return [path.read_bytes() for path in spread(find_pictures([source]), count)]


def reference_sample(data: bytes, rng: Generator) -> Tensor:
    """Applies torchvision's v1 transforms to an image: normalized float32 (3, 224, 224)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = TF.resize(image, int(rng.integers(256, 481)))
    top, left = (int(rng.integers(n - 224 + 1)) for n in (image.height, image.width))
    image = TF.crop(image, top, left, 224, 224)
    if rng.random() < 0.5:
        image = TF.hflip(image)
    shift = color_shift(PaperAugmentation().color_noise, rng) / 255
    tensor = transforms.ToTensor()(image) + torch.from_numpy(shift)[:, None, None]
    return TF.normalize(tensor, PREPROCESSING.mean, PREPROCESSING.std)


def batches(images: Sequence[bytes], size: int) -> Iterator[list[tuple[bytes, Generator]]]:
    """Yields the batches of a pass over the images, with random numbers for image and pass."""
    number = next(PASSES)
    for first in range(0, len(images), size):
        part = enumerate(images[first : first + size], start=first)
        yield [(data, sample_rng(0, number, index)) for index, data in part]


def reference_pass(images: Sequence[bytes], batch: int) -> None:
    for part in batches(images, batch):
        torch.stack([reference_sample(data, rng) for data, rng in part])


def our_pass(
    images: Sequence[bytes],
    batch: int,
    normalizer: InputNormalizer | None = None,
    in_parts: bool = True,
) -> None:
    """Makes batches of bytes and color shifts, as copied to the device, or normalizes them."""
    augment = PaperAugmentation()
    for part in batches(images, batch):
        made = [augment(EncodedImage(data, partial=in_parts), rng) for data, rng in part]
        stacked = torch.stack([sample.image for sample in made])
        shift = torch.from_numpy(np.stack([sample.shift for sample in made]))
        if normalizer:
            normalizer(stacked, shift)


def _synthetic_jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((375, 500, 3))
    for cells, strength in ((6, 90), (40, 40), (160, 30)):  # large shapes, edges, texture
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=np.float64) - 128) * (strength / 128)
    stream = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


# Training


def variants(args: argparse.Namespace) -> Iterator[tuple[str, str, str, bool, str]]:
    """Yields (name, network, dtype, channels_last, compile mode), the reference first."""
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
    return TrainStep(model, optimizer, World(device=device), amp=amp, compile=compiled)


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    labels = torch.randint(0, 1000, (args.batch,), device=device)
    runs: dict[str, turns.Run] = {}
    steps = {}
    for name, network, dtype, channels_last, compiled in variants(args):
        steps[name] = build_step(network, dtype, channels_last, compiled, device)
        images = torch.randn(args.batch, 3, args.size, args.size, device=device)
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        runs[name] = turns.repeated(partial(steps[name], images, labels, 0), args.steps)
    rows = turns.measure(runs, args.batch * args.steps, args.repeats, device)
    if not args.images:
        return {"rows": rows}
    own = [row for row in rows if row["name"].startswith("ours")]
    name = max(own, key=lambda row: row["images_per_s"]["median"])["name"]
    found = real_data(steps[name], args, device)
    print(
        f"real data, {name}: {found['images_per_s']:.1f} images/s ({args.workers} workers), "
        f"{found['data_share']:.1%} of the time waiting for data"
    )
    return {"rows": rows, "real_data": {**found, "name": name}}


def real_data(step: TrainStep, args: argparse.Namespace, device) -> dict[str, float]:
    """Trains on batches from the loader; returns images/s and the share of time waiting for it."""
    names = [str(path.relative_to(args.images)) for path in find_pictures([args.images])]
    labels = [i % 1000 for i in range(len(names))]
    dataset = ImageFiles(args.images, names, labels, [str(i) for i in range(1000)])
    stream = SampleStream(len(dataset), args.batch)
    augment = PaperAugmentation(size=args.size)
    source = LoaderSource(dataset, stream, augment, workers=args.workers)
    normalizer = InputNormalizer(PREPROCESSING, device)
    warm_up, total = max(2, args.workers), args.steps * args.repeats
    waited = begin = 0.0
    batches = source.batches(0)
    for iteration in range(warm_up + total):
        start = time.perf_counter()
        if iteration == warm_up:
            begin, waited = start, 0.0
        batch = next(batches)
        waited += time.perf_counter() - start
        images = normalizer(batch.images, batch.shift)
        step(images, batch.labels.to(device, non_blocking=True), iteration)
        if device.type == "cuda":  # or queued kernels would distort the shares of time
            torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    batches.close()
    return {"images_per_s": total * args.batch / seconds, "data_share": waited / seconds}


# Inference


def run_infer(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    result: dict[str, Any] = {}
    forms = turns.forms_of(args)
    for batch in args.batch:
        torch.compiler.reset()  # each batch size gets its own code, without dynamic shapes
        images = torch.randn(batch, 3, args.size, args.size, device=device)
        found = candidates(args.model, forms, images)
        runs = {
            name: turns.repeated(partial(run, images), args.steps) for name, run in found.items()
        }
        size = batch * args.steps
        with torch.inference_mode():
            result[f"batch_{batch}"] = turns.compare_and_measure(
                f"batch {batch}", runs, relative_difference, size, args.repeats, device
            )
    return result


def build_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Builds torchvision's default model, and ours with the same weights, for inference."""
    torch.manual_seed(0)
    reference = NetworkSpec(f"torchvision/{name}", 1000).build().eval()
    turns.randomize_norms(reference)
    options = {} if name.startswith("vgg") else {"stride_in_1x1": False}
    ours = build_model(name, **options).eval()
    ours.load_state_dict(from_torchvision(reference.state_dict()))
    return reference, ours


def candidates(name: str, forms: list[tuple[str, str]], images: Tensor) -> dict[str, Forward]:
    """Returns name -> forward pass on normalized float32 images, the reference first."""
    reference, ours = (model.to(images.device) for model in build_pair(name))
    fast = turns.fast_forms(ours, forms, images)
    return {
        f"torchvision {name}, fp32": reference,
        "ours, fp32, as built": ours,
        **{name: make() for name, make in fast.items()},
    }
