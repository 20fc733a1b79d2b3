"""Evaluation images: each exactly once, for any number of processes.

files = EvaluationFiles(samples, *protocol.loading)
loader = EvaluationLoader(files, 64, workers=8, rank=world.rank, world=world.size)
result = evaluate([(model, normalizer)], protocol, loader, world=world)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_backbone.classification.data.augment import resize_short_side
from resnet_backbone.classification.data.loader import run_loader
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import BadImage, read_rgb


class BadSample(NamedTuple):
    """An image that cannot be read. Evaluation reports it and does not replace it."""

    index: int
    label: int
    name: str
    reason: str


class EvaluationItem(NamedTuple):
    """An image, uint8 (3, H, W) RGB at each short side, its class, and its index."""

    images: tuple[Tensor, ...]
    label: int
    index: int


class EvaluationBatch(NamedTuple):
    # for each short side uint8 (N, 3, H, W), or a list of N (3, H, W) if their sizes differ
    images: tuple[Tensor | list[Tensor], ...]
    labels: Tensor  # int64 (N,)
    indices: Tensor  # int64 (N,), in the data set
    bad: tuple[BadSample, ...] = ()  # not among the N


@dataclass(frozen=True)
class EvaluationFiles:
    """A map-style data set of image files; an unreadable one is a :class:`BadSample`."""

    samples: Sequence[tuple[str | Path, int]]  # (path, label) of each
    short_sides: Sequence[int | None] = (None,)  # in pixels; None: not resized
    prepare: Callable[[Tensor], Tensor] | None = None  # applied to each resized image, (3, H, W)
    interpolation: str = "bilinear"  # of the resize; or "bicubic"

    def __len__(self) -> int:
        return len(self.samples)

    def name_of(self, index: int) -> str:
        return str(self.samples[index][0])

    def __getitem__(self, index: int) -> EvaluationItem | BadSample:
        path, label = self.samples[index]
        try:
            return EvaluationItem(self.read(path), label, index)
        except BadImage as error:
            return BadSample(index, label, str(path), error.reason)

    def read(self, path: str | Path) -> tuple[Tensor, ...]:
        """Reads an image at each short side; BadImage if it is unreadable."""
        whole = torch.from_numpy(read_rgb(path)).permute(2, 0, 1)
        mode = self.interpolation
        images = (resize_short_side(whole, s, mode) if s else whole for s in self.short_sides)
        return tuple(map(self.prepare, images) if self.prepare else images)


@dataclass(frozen=True)
class EvaluationArrays:
    """Images in memory or on the device, not resized."""

    images: Tensor  # uint8 (N, 3, H, W), RGB
    labels: Tensor  # int64 (N,), on the CPU

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        return f"image {index}"

    def batch(self, indices: range) -> EvaluationBatch:
        part = slice(indices.start, indices.stop, indices.step)
        return EvaluationBatch((self.images[part],), self.labels[part], torch.tensor(indices))


class EvaluationLoader:
    """Batches of this process's part of a data set, in order.

    Process ``rank`` of ``world`` takes the images rank, rank + world, rank + 2 world, ... No image
    is repeated or dropped for equal parts, so numbers of batches may differ.

    Args:
        batch_size: images in a batch of this process; the last one may be smaller.
        workers: processes that read and resize images; 0 for this process. Arrays need none.

    Attributes:
        num_images: of the whole data set, over all processes.
        name_of: function from an index to an image's path, or its number.
    """

    def __init__(
        self,
        dataset: EvaluationFiles | EvaluationArrays,
        batch_size: int,
        *,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1 or workers < 0:
            raise DataError(
                f"batch size {batch_size}, {workers} workers: give at least 1 and at least 0"
            )
        if not len(dataset):
            raise DataError("the evaluation set has no images")
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.part = range(rank, len(dataset), world)
        self.num_images, self.name_of = len(dataset), dataset.name_of

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        if isinstance(self.dataset, EvaluationArrays):
            for first in range(0, len(self.part), self.batch_size):
                yield self.dataset.batch(self.part[first : first + self.batch_size])
            return
        workers = min(self.workers, len(self))
        made = run_loader(self.dataset, self.part, workers, self.batch_size, collate)
        with closing(made):
            for batch in made:
                yield batch._replace(images=tuple(map(_unpack, batch.images)))


def collate(items: Sequence[EvaluationItem | BadSample]) -> EvaluationBatch:
    """Makes a batch in a worker, with ``images`` packed for the transfer to the main process."""
    bad = tuple(item for item in items if isinstance(item, BadSample))
    good = [item for item in items if not isinstance(item, BadSample)]
    return EvaluationBatch(
        tuple(_pack(images) for images in zip(*(item.images for item in good), strict=True)),
        torch.tensor([item.label for item in good], dtype=torch.int64),
        torch.tensor([item.index for item in good], dtype=torch.int64),
        bad,
    )


# Images of different sizes are concatenated: one block of shared memory per batch, not many.
Packed = Tensor | tuple[Tensor, list[Sequence[int]]]


def _pack(images: Sequence[Tensor]) -> Packed:
    shapes = [image.shape for image in images]
    if len(set(shapes)) == 1:
        return torch.stack(images)
    return torch.cat([image.reshape(-1) for image in images]), shapes


def _unpack(images: Packed) -> Tensor | list[Tensor]:
    if isinstance(images, Tensor):
        return images
    flat, shapes = images
    parts = flat.split([math.prod(shape) for shape in shapes])  # pinned, a shape is a list
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
