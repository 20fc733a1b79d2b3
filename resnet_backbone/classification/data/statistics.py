"""Mean and standard deviation of a training set, and the input that follows from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from resnet_backbone.classification.config import DataConfig
from resnet_backbone.classification.data.augment import CenterCrop
from resnet_backbone.classification.data.bad_images import BadImageReport, ImageNote
from resnet_backbone.classification.data.loader import BatchMaker, EncodedDataset, read_batches
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import put_in_place
from resnet_backbone.runtime.processes import World
from resnet_backbone.runtime.seeding import make_rng
from resnet_backbone.weights import PREPROCESSINGS, Preprocessing

BATCH = 64
MEAN_SUBSET = 3  # the first word of a seed, beside those in `stream` and `loader`
INPUT_FILE = "input.safetensors"  # in the run folder: the mean, so that it is computed once
INPUT_KEY, MADE_FROM = "preprocessing", "made_from"


class MeanStatistics(NamedTuple):
    """Means over images, RGB, gray levels 0..255.

    Attributes:
        image: float32 (3, size, size), the per-pixel mean.
        channels: its means over the pixels.
        std: standard deviation of each channel over all pixels.
        num_images: how many were averaged: fewer than asked for where some cannot be read.
    """

    image: Tensor
    channels: tuple[float, float, float]
    std: tuple[float, float, float]
    num_images: int


def compute_mean(
    dataset: EncodedDataset,
    *,
    num_images: int | None = None,
    size: int = 224,
    short_side: int = 256,
    seed: int = 0,
    workers: int = 0,
    report: BadImageReport | None = None,
    progress: bool = True,
    world: World | None = None,
) -> MeanStatistics:
    """Averages the center crops of a training set (paper, section 3.4: "per-pixel mean").

    The paper does not say of which crops; these are its central ones at the smallest training
    scale, as in AlexNet. Bad images are left out and counted. The sum is exact, so the numbers of
    workers and of processes change nothing.

    Args:
        num_images: of a random subset, drawn by ``seed``; None for all. The error of a channel
            mean is about 50 / sqrt(num_images) gray levels.
        size, short_side: of the crop and of the image it is cut from, pixels.
        workers: of each process.
        progress: whether to show a bar.
        world: the processes that share the images, each of which gets the result; None: this one
            alone.

    Raises:
        DataError: no image can be read, or more are bad than the report allows.
    """
    world = World() if world is None else world
    chosen = _subset(len(dataset), num_images, seed)[world.rank :: world.size]
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    maker = BatchMaker(dataset, CenterCrop(size, short_side), replace=False)
    report = BadImageReport() if report is None else report
    total = torch.zeros(3, size, size, dtype=torch.int64)
    squares, count = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    batches = [[(index, 0) for index in part] for part in parts]
    with tqdm(total=len(chosen), desc="mean image", unit="img", disable=not progress) as bar:
        for made, part in zip(read_batches(maker, batches, workers), parts, strict=True):
            report.add(*(ImageNote(*note) for note in made.notes))
            if len(made.labels):
                total += made.images.sum(0, dtype=torch.int64)
                squares += made.images.to(torch.int32).square().sum((0, 2, 3))
                count += len(made.labels)
            bar.update(len(part))
    for sums in (total, squares, count):
        sums.copy_(world.sum(sums.to(world.device)))
    num_read = int(count)
    if not num_read:
        raise DataError("no image of the training set can be read, so it has no mean")
    mean = total.to(torch.float64) / num_read
    channels = mean.mean((1, 2))
    std = (squares / (num_read * size * size) - channels**2).clamp_min(0).sqrt()
    return MeanStatistics(mean.float(), tuple(channels.tolist()), tuple(std.tolist()), num_read)


def _subset(num_samples: int, num_images: int | None, seed: int) -> list[int]:
    if num_images is None or num_images >= num_samples:
        return list(range(num_samples))
    if num_images < 1:
        raise DataError(f"a mean of {num_images} images; ask for one at least")
    rng = make_rng(seed, MEAN_SUBSET)
    return np.sort(rng.choice(num_samples, num_images, replace=False)).tolist()


def mean_image(images: Tensor) -> Tensor:
    """The per-pixel mean of uint8 images (N, 3, H, W): float32 (3, H, W), 0..255."""
    total = torch.zeros(images.shape[1:], dtype=torch.float64)
    for part in images.split(4096):
        total += part.to(torch.float64).sum(0)
    return (total / len(images)).float()


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, 0..255."""
    first = torch.zeros(images.shape[1], dtype=torch.float64)
    second = torch.zeros_like(first)
    for part in images.split(4096):
        values = part.to(torch.float64)
        first += values.sum((0, 2, 3))
        second += (values**2).sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = first / count
    std = (second / count - mean**2).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def preprocessing_from(
    data: DataConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image: Tensor | None,
    where: str,
) -> Preprocessing:
    """The input that a config asks for.

    Args:
        mean, std: of the training set's channels R, G, B, 0..255.
        image: its per-pixel mean (3, H, W), R, G, B, 0..255, or None.
        where: what they were computed from.
    """
    known = PREPROCESSINGS["torchvision"]
    if data.mean == "imagenet":
        mean, image, where = known.pixel_mean_255(), None, "torchvision's mean of ImageNet"
    if data.std == "one":
        std = (1.0, 1.0, 1.0)
    elif data.std == "imagenet":
        std = known.pixel_std_255()
    if data.channel_order == "BGR":
        mean, std = mean[::-1], std[::-1]
        image = None if image is None else image.flip(0)
    return Preprocessing(data.channel_order, 255.0, mean, std, source=where, mean_image=image)


def keep_input(folder: Path, preprocessing: Preprocessing, made_from: str) -> None:
    """Writes a computed preprocessing into the run folder, with what it was computed from."""
    image = preprocessing.mean_image
    tensors = {} if image is None else {"mean_image": image.contiguous()}
    temporary = folder / f"{INPUT_FILE}.{os.getpid()}.tmp"
    save_file(tensors, temporary, {INPUT_KEY: preprocessing.to_json(), MADE_FROM: made_from})
    put_in_place(temporary, folder / INPUT_FILE)


def kept_input(folder: Path, made_from: str) -> Preprocessing | None:
    """The preprocessing that :func:`keep_input` wrote; None if there is none of this origin."""
    path = folder / INPUT_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            if file.metadata()[MADE_FROM] != made_from:
                return None
            found = Preprocessing.from_json(file.metadata()[INPUT_KEY])
            image = file.get_tensor("mean_image") if "mean_image" in file.keys() else None  # noqa: SIM118
    except Exception as error:
        raise DataError(
            f"{path} cannot be read ({error}); remove it, and it is computed again"
        ) from error
    return Preprocessing(**{**found.__dict__, "mean_image": image})
