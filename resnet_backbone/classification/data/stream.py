"""Which samples make up which iteration: a pure function, so that a run resumes anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.seeding import make_rng

ORDER, AUGMENTATION = 0, 1  # the first word of a seed: what the random numbers are for


class Batch(NamedTuple):
    """A training batch of one process.

    Attributes:
        images: uint8 (N, 3, H, W), RGB; augmented, not normalized.
        labels: int64 (N,).
        shift: float32 (N, 3) or None: color noise, gray levels to add to R, G, B of each image.
    """

    images: Tensor
    labels: Tensor
    shift: Tensor | None = None


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers that augment sample ``index`` in ``epoch``.

    They depend on nothing else: not on the worker that draws them, the number of workers or
    processes, or on what was drawn before. Resuming therefore needs no generator states.
    """
    return make_rng(seed, AUGMENTATION, epoch, index)


@dataclass(frozen=True)
class SampleStream:
    """All epochs of a data set, each in another random order, laid end to end and cut into batches.

    Iteration ``t`` takes the samples ``t * batch_size ... (t + 1) * batch_size - 1`` of this
    stream: every sample exactly once an epoch, no batch smaller than the others, no sample left
    out (a batch may hold the end of one epoch and the start of the next). Process ``rank`` of
    ``world`` takes its slice of each batch, so the stream is the same for any number of
    processes.

    Args:
        num_samples: of the data set.
        batch_size: of one iteration, over all processes.
        seed: of the run.
        group_sizes: sizes of consecutive runs of samples that lie together (tar shards), or
            empty. Then the order of groups is shuffled, and samples are shuffled within
            ``groups_together`` neighboring groups: reading stays sequential enough.
        shuffle: False gives the samples in order.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    group_sizes: tuple[int, ...] = ()
    groups_together: int = 8
    shuffle: bool = True
    _cached: object = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self):
        if self.num_samples < 1:
            raise DataError("the training set has no samples")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise DataError(
                f"batch size {self.batch_size} does not divide over {self.world} processes"
            )
        if self.group_sizes and sum(self.group_sizes) != self.num_samples:
            raise DataError(
                f"shards hold {sum(self.group_sizes)} samples, the data set {self.num_samples}"
            )
        object.__setattr__(self, "_cached", lru_cache(maxsize=2)(self._make_order))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_cached"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        object.__setattr__(self, "_cached", lru_cache(maxsize=2)(self._make_order))

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch: int64 (num_samples,)."""
        return self._cached(epoch)

    def _make_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
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
        """This process's part of an iteration (counted from 0).

        Returns:
            (indices of the samples, the epoch of each), int64 (batch_size / world,).
        """
        local = self.batch_size // self.world
        first = iteration * self.batch_size + self.rank * local
        epochs, places = np.divmod(np.arange(first, first + local), self.num_samples)
        indices = np.empty(local, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self.epoch_order(int(epoch))[places[chosen]]
        return indices, epochs
