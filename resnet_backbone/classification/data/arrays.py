"""Small data sets that lie in memory, on the device where the network runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from resnet_backbone.classification.data.batch import Batch, DataError
from resnet_backbone.classification.data.stream import AUGMENTATION, SampleStream

PAD = 4  # pixels on each side (paper, section 4.2)


class ArraySource:
    """Training batches cut from arrays that stay on the device: one gather a batch.

    Args:
        images: uint8 (N, 3, H, W), RGB.
        labels: int64 (N,).
        stream: which samples make up an iteration.
        class_names: one per class.
        augmentation: "pad_crop" (the paper's CIFAR augmentation: 4 pixels of padding on each side,
            a random crop of the image's size, horizontal flip), "shift" (the same without flip,
            for digits) or "none".
        padding: pixels (3, H, W) or (3, 1, 1), RGB, 0..255, that a crop shows where it leaves the
            image. With the training set's mean the padding is zero once the mean is subtracted, to
            half a grey level, as in fb.resnet.torch. None: black.
        device: where the arrays lie and batches are made.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        stream: SampleStream,
        class_names: Sequence[str],
        *,
        augmentation: str = "pad_crop",
        padding: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        if augmentation not in ("pad_crop", "shift", "none"):
            raise DataError(f"unknown augmentation {augmentation!r}: use pad_crop, shift or none")
        self.stream, self.class_names = stream, tuple(class_names)
        self.augmentation, self.device = augmentation, torch.device(device)
        self.size = tuple(images.shape[2:])
        # rows of whole pixels: a gather reads three bytes in a row and gives channels_last
        self.pixels = images.permute(0, 2, 3, 1).contiguous().to(self.device)
        fill = torch.zeros(3, 1, 1) if padding is None else padding
        fill = fill.round().to(torch.uint8).permute(1, 2, 0)
        self.padding = fill.expand(*self.size, 3).to(self.device)
        self.labels = labels.to(self.device)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batches(self, first_iteration: int = 0) -> Iterator[Batch]:
        """Batches without end, from any iteration on."""
        iteration = first_iteration
        while True:
            yield self.batch(iteration)
            iteration += 1

    def batch(self, iteration: int) -> Batch:
        """This process's part of one iteration: uint8 (n, 3, H, W), labels."""
        indices = torch.from_numpy(self.stream.batch(iteration)[0])
        rows, columns = self._windows(iteration, len(indices))
        indices, rows, columns = (t.to(self.device) for t in (indices, rows, columns))
        height, width = self.size
        inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        pixels = self.pixels[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        pixels = torch.where(inside[..., None], pixels, self.padding)
        return Batch(pixels.permute(0, 3, 1, 2), self.labels[indices])

    def _windows(self, iteration: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows (n, H) and columns (n, W) of each image's crop; outside the image is padding."""
        height, width = self.size
        stream = self.stream
        rows = np.broadcast_to(np.arange(height), (count, height))
        columns = np.broadcast_to(np.arange(width), (count, width))
        if self.augmentation != "none":
            # drawn for the whole batch, so that any number of processes sees the same images
            rng = np.random.default_rng([stream.seed, AUGMENTATION, iteration])
            top, left = rng.integers(-PAD, PAD + 1, size=(2, stream.batch_size))
            flip = rng.random(stream.batch_size) < 0.5
            mine = slice(stream.rank * count, (stream.rank + 1) * count)
            rows = rows + top[mine, None]
            if self.augmentation == "pad_crop":
                columns = np.where(flip[mine, None], columns[:, ::-1], columns)
            columns = columns + left[mine, None]
        return torch.from_numpy(np.ascontiguousarray(rows)), torch.from_numpy(columns.copy())


def _within(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)


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
