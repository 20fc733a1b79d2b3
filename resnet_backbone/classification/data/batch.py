"""What every source of training data hands to the trainer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what, where and how to mend it."""


class Batch(NamedTuple):
    """A training batch of one process.

    Attributes:
        images: uint8 (N, 3, H, W), RGB; augmented, not normalised.
        labels: int64 (N,).
        shift: float32 (N, 3) or None: colour noise, grey levels to add to R, G, B of each image.
    """

    images: Tensor
    labels: Tensor
    shift: Tensor | None = None
