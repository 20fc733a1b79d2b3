"""Built-in classification data: one handwritten digit on each piece of a photograph.

Drawn as the digits of the built-in detection scenes are (:mod:`resnet_backbone.runtime.builtin`),
at the same scale and from the same scans and photographs, so that a network pre-trained here knows
what the detector is going to look at.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from resnet_backbone.runtime.builtin import (
    BACKGROUNDS,
    CLASS_NAMES,
    crop_photograph,
    digit_indices,
    draw_ink,
    load_scans,
    render_ink,
)

__all__ = ["CLASS_NAMES", "CROP", "read_digits"]

CROP = 64  # pixels; a digit of the detection scenes with what surrounds it
DIGIT_PIXELS = (36, 54)  # of the scan's 8x8 cells; the scenes have 24 to 72
OFF_CENTRE = 6  # pixels at most, in each direction
COPIES = {"train": 4, "test": 2}  # drawings of each scan


def read_digits(train: bool) -> tuple[Tensor, Tensor]:
    """The set, drawn on the first call and kept in memory.

    Scan, place, size, turn, colour and photograph differ from drawing to drawing; the same
    library versions give the same pixels. Train and test share neither scan nor photograph.

    Returns:
        (images uint8 (N, 3, 64, 64), RGB; labels int64 (N,), indices into ``CLASS_NAMES``);
        N is 5,032 for training and 1,078 for testing. Shared with other callers: not to be changed.

    Raises:
        ImportError: scikit-learn or scikit-image is missing.
    """
    return _draw_all("train" if train else "test")


@cache
def _draw_all(split: str) -> tuple[Tensor, Tensor]:
    chosen = [index for _ in range(COPIES[split]) for index in digit_indices(split)]
    crops = [draw_crop(split, number, index) for number, index in enumerate(chosen)]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(load_scans()[1][chosen].astype(np.int64))


def draw_crop(split: str, number: int, index: int) -> np.ndarray:
    """Picture ``number`` of a split: scan ``index`` near the middle of a photograph.

    Returns:
        uint8 (64, 64, 3), RGB.
    """
    rng = np.random.default_rng([list(BACKGROUNDS).index(split), number])
    photograph = crop_photograph(str(rng.choice(sorted(BACKGROUNDS[split]))), CROP, rng)
    ink = render_ink(index, rng, DIGIT_PIXELS)
    top, left = (_place(extent, rng) for extent in ink.shape)
    canvas, _ = draw_ink(photograph.astype(np.float32), ink, left, top, rng)
    return canvas.round().astype(np.uint8)


def _place(extent: int, rng: np.random.Generator) -> int:
    """Where ink of some height or width begins: near the middle, and inside the crop."""
    middle = (CROP - extent) // 2
    off = min(OFF_CENTRE, middle)
    return middle + int(rng.integers(-off, off + 1))
