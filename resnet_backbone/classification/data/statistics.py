"""Mean and standard deviation of a training set, and the input that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
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
from resnet_backbone.classification.data.imagenet import EncodedDataset
from resnet_backbone.classification.data.loader import BadImageReport, BatchMaker, read_batches
from resnet_backbone.classification.data.sources import MEAN_SUBSET
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.runtime.processes import World, make_rng
from resnet_backbone.weights import PREPROCESSINGS, Preprocessing

MEAN_BATCH = 64
INPUT_FILE = "input.safetensors"  # in the run folder: the mean, so that it is computed once
INPUT_KEY, MADE_FROM = "preprocessing", "made_from"


class MeanStatistics(NamedTuple):
    """Means over images, RGB, gray levels 0..255."""

    image: Tensor | None  # float32 (3, H, W), the per-pixel mean
    channels: tuple[float, ...]  # its means over the pixels
    std: tuple[float, ...]  # of each channel over all pixels
    num_images: int


def image_statistics(
    batches: Iterable[Tensor], shape: tuple[int, ...], world: World | None = None
) -> MeanStatistics:
    """Statistics of images, uint8 (N, 3, H, W). Sums are exact: batches and processes are free.

    Args:
        shape: (3, H, W).
        world: the processes that share the images, each of which gets the result.

    Raises:
        DataError: there are no images.
    """
    total = torch.zeros(*shape, dtype=torch.int64)
    squares, count = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for images in batches:
        total += images.sum(0, dtype=torch.int64)
        squares += images.to(torch.int32).square().sum((0, 2, 3))
        count += len(images)
    if world is not None:
        for sums in (total, squares, count):
            sums.copy_(world.sum(sums.to(world.device)))
    if not count:
        raise DataError("no image of the training set can be read, so it has no mean")
    mean = total.to(torch.float64) / count
    channels = mean.mean((1, 2))
    std = (squares.double() / (count * mean[0].numel()) - channels**2).clamp_min(0).sqrt()
    return MeanStatistics(mean.float(), tuple(channels.tolist()), tuple(std.tolist()), count.item())


def compute_mean(
    dataset: EncodedDataset,
    *,
    num_images: int,
    size: int,
    short_side: int,
    workers: int = 0,
    report: BadImageReport | None = None,
    world: World | None = None,
) -> MeanStatistics:
    """Averages the center crops of a training set (paper, section 3.4: "per-pixel mean").

    The paper does not say of which crops; these are its central ones at the smallest training
    scale, as in AlexNet. Bad images are left out and counted.

    Args:
        num_images: of a random subset. The error of a channel mean is about
            50 / sqrt(num_images) gray levels.
        size, short_side: of the crop and of the image it is cut from, pixels.
        workers: of each process.
        world: the processes that share the images, each of which gets the result.

    Raises:
        DataError: no image can be read, or more are bad than the report allows.
    """
    world, report = world or World(), report or BadImageReport()
    chosen = np.arange(len(dataset))
    if num_images < len(dataset):
        chosen = np.sort(make_rng(0, MEAN_SUBSET).choice(chosen, num_images, replace=False))
    mine = [(index, 0) for index in chosen[world.rank :: world.size].tolist()]
    parts = [mine[first : first + MEAN_BATCH] for first in range(0, len(mine), MEAN_BATCH)]
    maker = BatchMaker(dataset, CenterCrop(size, short_side), replace=False)

    def batches() -> Iterator[Tensor]:
        made = read_batches(maker, parts, workers)
        hidden = None if world.is_main else True
        for batch in tqdm(made, "mean image", len(parts), unit="batch", disable=hidden):
            report.add(*batch.notes)
            if len(batch.labels):
                yield batch.images

    return image_statistics(batches(), (3, size, size), world)


def preprocessing_from(data: DataConfig, found: MeanStatistics, where: str) -> Preprocessing:
    """The input that a config asks for.

    Args:
        found: of the training set.
        where: what it was computed from.
    """
    known = PREPROCESSINGS["torchvision"]
    mean, std, image = found.channels, found.std, found.image if data.mean == "pixel" else None
    if data.mean == "imagenet":
        mean, where = known.pixel_mean_255(), "torchvision's mean of ImageNet"
    if data.std == "one":
        std = (1.0, 1.0, 1.0)
    elif data.std == "imagenet":
        std = known.pixel_std_255()
    if data.channel_order == "BGR":
        mean, std = mean[::-1], std[::-1]
        image = None if image is None else image.flip(0)
    return Preprocessing(data.channel_order, 255.0, mean, std, source=where, mean_image=image)


def training_input(
    data: DataConfig, train: EncodedDataset, folder: Path, world: World, report: BadImageReport
) -> Preprocessing:
    """The input with the training set's mean, computed once by all processes together.

    It is kept in the run folder, and taken from there for the same data set and settings.
    """
    if data.mean == "imagenet" and data.std != "channel":
        return preprocessing_from(data, MeanStatistics(None, (), (), 0), "")
    short = data.short_side[0]
    settings = (data.class_list, data.channel_order, data.mean, data.std, data.crop, short)
    root = data.root if "://" in data.root else Path(data.root).resolve()
    made_from = f"{len(train)} images of {root}, {data.mean_samples} used, {settings}"
    kept = world.broadcast(_kept(folder, made_from) if world.is_main else None)
    if kept is not None:
        return kept
    found = compute_mean(
        train,
        num_images=data.mean_samples,
        size=data.crop,
        short_side=short,
        workers=data.workers,
        report=report,
        world=world,
    )
    made = preprocessing_from(data, found, f"center crops of {found.num_images} training images")
    if world.is_main:
        _keep(folder, made, made_from)
    return made


def _keep(folder: Path, preprocessing: Preprocessing, made_from: str) -> None:
    """Writes a computed preprocessing into the run folder, with what it was computed from."""
    image = preprocessing.mean_image
    tensors = {} if image is None else {"mean_image": image.contiguous()}
    with whole_file(folder / INPUT_FILE) as temporary:
        save_file(tensors, temporary, {INPUT_KEY: preprocessing.to_json(), MADE_FROM: made_from})


def _kept(folder: Path, made_from: str) -> Preprocessing | None:
    """The preprocessing that :func:`_keep` wrote; None if there is none of this origin."""
    path = folder / INPUT_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts[MADE_FROM] == made_from:
            return replace(Preprocessing.from_json(facts[INPUT_KEY]), **tensors)
    except Exception as error:
        raise DataError(
            f"{path} cannot be read ({error}); remove it, and it is computed again"
        ) from error
    return None
