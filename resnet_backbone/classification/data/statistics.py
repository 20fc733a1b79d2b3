"""The mean image and channel means of a training set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_backbone.classification.data.augment import CentreCrop
from resnet_backbone.classification.data.bad_images import BadImageReport, ImageNote
from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.loader import BatchMaker, EncodedDataset, read_batches

BATCH = 64
MEAN_SUBSET = 3  # the first word of a seed, beside those in `stream` and `loader`


class MeanStatistics(NamedTuple):
    """Means over images, RGB, grey levels 0..255.

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
) -> MeanStatistics:
    """Averages the centre crops of a training set (paper, section 3.4: "per-pixel mean").

    The paper does not say of which crops; these are its central ones at the smallest training
    scale, as in AlexNet. Bad images are left out and counted. The sum is exact, so the number of
    workers changes nothing.

    Args:
        num_images: of a random subset, drawn by ``seed``; None for all. The error of a channel
            mean is about 50 / sqrt(num_images) grey levels.
        size, short_side: of the crop and of the image it is cut from, pixels.
        progress: whether to show a bar.

    Raises:
        DataError: no image can be read, or more are bad than the report allows.
    """
    from tqdm import tqdm

    chosen = _subset(len(dataset), num_images, seed)
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    maker = BatchMaker(dataset, CentreCrop(size, short_side), replace=False)
    report = BadImageReport() if report is None else report
    total = torch.zeros(3, size, size, dtype=torch.int64)
    squares = torch.zeros(3, dtype=torch.int64)
    count = 0
    batches = [[(index, 0) for index in part] for part in parts]
    with tqdm(total=len(chosen), desc="mean image", unit="img", disable=not progress) as bar:
        for made, part in zip(read_batches(maker, batches, workers), parts, strict=True):
            report.add(*(ImageNote(*note) for note in made.notes))
            if len(made.labels):
                total += made.images.sum(0, dtype=torch.int64)
                squares += made.images.to(torch.int32).square().sum((0, 2, 3))
                count += len(made.labels)
            bar.update(len(part))
    if not count:
        raise DataError("no image of the training set can be read, so it has no mean")
    mean = total.to(torch.float64) / count
    channels = mean.mean((1, 2))
    std = (squares / (count * size * size) - channels**2).clamp_min(0).sqrt()
    return MeanStatistics(mean.float(), tuple(channels.tolist()), tuple(std.tolist()), count)


def _subset(num_samples: int, num_images: int | None, seed: int) -> list[int]:
    if num_images is None or num_images >= num_samples:
        return list(range(num_samples))
    if num_images < 1:
        raise DataError(f"a mean of {num_images} images; ask for one at least")
    rng = np.random.default_rng([seed, MEAN_SUBSET])
    return np.sort(rng.choice(num_samples, num_images, replace=False)).tolist()
