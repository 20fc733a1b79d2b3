"""The order of samples, and data sets in memory: CIFAR-10, digits, synthetic.

The order is a pure function, so a run can resume at any iteration.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_backbone.runtime.builtin import digit_indices, draw_digit_crop, load_scans
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.processes import make_rng

# The purpose of random numbers: the word after the run's seed.
ORDER, AUGMENTATION, REPLACEMENT, MEAN_SUBSET, MIXING = range(5)
PAD = 4  # pixels on each side (paper, section 4.2)
CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # one label byte, then the R, G and B planes
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)
HELD_OUT = 5000  # the paper's validation images (section 4.2); here the last of the 50,000
COPIES = {"train": 4, "test": 2}  # drawings of each scanned digit


class Batch(NamedTuple):
    images: Tensor  # uint8 (N, 3, H, W), RGB; augmented, not normalized
    labels: Tensor  # int64 (N,)
    shift: Tensor | None = None  # float32 (N, 3): color noise, gray levels to add to R, G, B


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Returns the random numbers for a sample's augmentation, a function of the arguments."""
    return make_rng(seed, AUGMENTATION, epoch, index)


@dataclass(frozen=True)
class SampleStream:
    """The epochs of a data set, each in its own random order, concatenated and cut into batches.

    Every sample occurs exactly once an epoch. All batches have the same size, so one may span two
    epochs. Process ``rank`` of ``world`` takes its slice of each batch, so the stream is the same
    for any number of processes. If samples are stored in groups (tar shards), groups are shuffled,
    then samples within a few neighboring groups, which keeps reading mostly sequential.
    """

    num_samples: int  # of the data set
    batch_size: int  # of one iteration, over all processes
    seed: int = 0  # of the run
    rank: int = 0
    world: int = 1
    group_sizes: tuple[int, ...] = ()  # samples of each group, in order
    groups_together: int = 8  # groups whose samples are shuffled together

    def __post_init__(self):
        if self.num_samples < 1:
            raise DataError("the training set has no samples")
        if self.batch_size % self.world:
            raise DataError(
                f"batch size {self.batch_size} cannot be divided among {self.world} processes"
            )

    @lru_cache(maxsize=2)  # noqa: B019 - equal streams share their orders
    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns the permutation of an epoch: int64 (num_samples,)."""
        rng = make_rng(self.seed, ORDER, epoch)
        if not self.group_sizes:
            return rng.permutation(self.num_samples)
        starts = np.cumsum([0, *self.group_sizes[:-1]])
        groups = rng.permutation(len(starts))
        parts = []
        for first in range(0, len(groups), self.groups_together):
            together = groups[first : first + self.groups_together]
            samples = [starts[g] + np.arange(self.group_sizes[g]) for g in together]
            parts.append(rng.permutation(np.concatenate(samples)))
        return np.concatenate(parts)

    def batch(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns indices and epochs, int64 (batch_size / world,), of this process's part."""
        local = self.batch_size // self.world
        first = iteration * self.batch_size + self.rank * local
        epochs, places = np.divmod(np.arange(first, first + local), self.num_samples)
        indices = np.empty(local, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self.epoch_order(int(epoch))[places[chosen]]
        return indices, epochs


class ArraySource:
    """Training batches from arrays on the device, with one gather per batch.

    Args:
        images, labels: uint8 (N, 3, H, W), RGB; int64 (N,).
        augmentation: "pad_crop" (the paper's CIFAR augmentation: 4 pixels of padding on each side,
            a random crop of the image's size, horizontal flip), "shift" (the same without flip,
            for digits) or "none".
        padding: pixels (3, H, W) or (3, 1, 1), RGB, 0..255, outside of the image. The mean, rounded
            to a gray level, is zero once normalized (as in fb.resnet.torch). None: black.
        device: where the arrays are stored and batches are made.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        stream: SampleStream,
        *,
        augmentation: str = "pad_crop",
        padding: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        self.stream, self.augmentation = stream, augmentation
        self.device = torch.device(device)
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

    def batches(self, first_iteration: int = 0) -> Iterator[Batch]:
        return map(self.batch, itertools.count(first_iteration))

    def batch(self, iteration: int) -> Batch:
        """Returns this process's part of an iteration: uint8 (n, 3, H, W), labels."""
        indices = torch.from_numpy(self.stream.batch(iteration)[0])
        rows, columns = self._windows(iteration, len(indices))
        indices, rows, columns = (t.to(self.device) for t in (indices, rows, columns))
        height, width = self.size
        rows_inside, columns_inside = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        inside = (rows == rows_inside)[:, :, None] & (columns == columns_inside)[:, None, :]
        place = indices[:, None, None], rows_inside[:, :, None], columns_inside[:, None, :]
        pixels = torch.where(inside[..., None], self.pixels[place], self.padding)
        return Batch(pixels.permute(0, 3, 1, 2), self.labels[indices])

    def _windows(self, iteration: int, count: int) -> tuple[Tensor, Tensor]:
        """Returns rows (n, H) and columns (n, W) of each crop; outside the image is padding."""
        height, width = self.size
        stream = self.stream
        rows = np.broadcast_to(np.arange(height), (count, height))
        columns = np.broadcast_to(np.arange(width), (count, width))
        if self.augmentation != "none":
            # drawn for the whole batch, so that any number of processes sees the same images
            rng = make_rng(stream.seed, AUGMENTATION, iteration)
            top, left = rng.integers(-PAD, PAD + 1, size=(2, stream.batch_size))
            flip = rng.random(stream.batch_size) < 0.5
            mine = slice(stream.rank * count, (stream.rank + 1) * count)
            rows = rows + top[mine, None]
            if self.augmentation == "pad_crop":
                columns = np.where(flip[mine, None], columns[:, ::-1], columns)
            columns = columns + left[mine, None]
        return torch.from_numpy(np.ascontiguousarray(rows)), torch.from_numpy(columns.copy())


@dataclass(frozen=True)
class SyntheticSource:
    """Repeats one batch of this process; ``num_samples`` count as an epoch."""

    batch: Batch
    num_samples: int

    def batches(self, first_iteration: int = 0) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


def read_cifar10(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Reads the training or test set, in the binary or the Python version.

    Args:
        root: the folder of the files, or its parent if the folder has its official name.

    Returns:
        (images, uint8 (N, 3, 32, 32), RGB; labels, int64 (N,)), in the official order.

    Raises:
        DataError: a missing, short or damaged file.
    """
    folder, suffix = _find(Path(root))
    names = TRAIN_FILES if train else TEST_FILES
    parts = [_read_file(folder / f"{name}{suffix}") for name in names]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _find(root: Path) -> tuple[Path, str]:
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for suffix in (".bin", ""):
            if (folder / f"{TRAIN_FILES[0]}{suffix}").is_file():
                return folder, suffix
    raise DataError(
        f"{root}: no CIFAR-10 here; data.root must hold data_batch_1.bin (binary "
        "version) or data_batch_1 (Python version) and the other files"
    )


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        pixels, labels = _read_binary(path) if path.suffix else _read_python(path)
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), RECORD - 1):
            raise ValueError(f"{pixels.dtype} {pixels.shape} are not its images")
    except Exception as error:  # damaged pickles raise errors of many types
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a file of CIFAR-10 ({reason}); fetch it again") from error
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise DataError(f"{path}: labels reach {labels.max()}; is it CIFAR-100? Give CIFAR-10")
    return pixels.reshape(-1, *SHAPE), labels.astype(np.int64)


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    records = np.fromfile(path, np.uint8)
    if not len(records) or len(records) % RECORD:
        raise ValueError(f"{len(records)} bytes are not a whole number of records")
    records = records.reshape(-1, RECORD)
    return records[:, 1:], records[:, 0]


class _Unpickler(pickle.Unpickler):
    """Reads only arrays, bytes and lists; nothing in the file is executed."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        table = _Unpickler(file, encoding="bytes").load()
    return np.asarray(table[b"data"]), np.asarray(table[b"labels"])


@cache
def read_digits(train: bool) -> tuple[Tensor, Tensor]:
    """Draws the built-in digits, each on a crop of a photograph, once, and keeps them in memory.

    Scan, position, size, rotation, color and photograph vary. The same library versions give the
    same pixels. Train and test share neither scan nor photograph.

    Returns:
        (images uint8 (N, 3, 64, 64), RGB; labels int64 (N,), indices into
        ``runtime.builtin.CLASS_NAMES``); N is 5,032 for training and 1,078 for testing. Callers
        share the tensors and must not change them.
    """
    split = "train" if train else "test"
    chosen = [index for _ in range(COPIES[split]) for index in digit_indices(split)]
    crops = [draw_digit_crop(split, number, index) for number, index in enumerate(chosen)]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(load_scans()[1][chosen].astype(np.int64))
