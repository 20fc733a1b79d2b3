"""How long a detector takes for an image while it is evaluated."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn


class Speed(NamedTuple):
    """Of one process.

    Attributes:
        seconds_per_image: mean, from the input in memory to the detections.
        images_at_a_time: of the largest batch.
    """

    seconds_per_image: float
    images_at_a_time: int


class Timed(nn.Module):
    """A detector that measures its seconds per image; the first batch, which warms up, apart."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, model.training
        self.batches: list[tuple[float, int]] = []  # seconds, images

    def forward(self, inputs: list[dict]) -> list[dict]:
        start = self._now()
        outputs = self.model(inputs)
        self.batches.append((self._now() - start, len(inputs)))
        return outputs

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def speed(self) -> Speed | None:
        """None where it saw no image."""
        counted = self.batches[1:] or self.batches
        if not counted:
            return None
        seconds, images = map(sum, zip(*counted, strict=True))
        return Speed(seconds / images, max(count for _, count in counted))
