"""A few pictures to run two networks on, where nobody names any."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "chelsea")  # in colour


class Samples(NamedTuple):
    """Images and what they are.

    Attributes:
        images: uint8 (N, 3, size, size), RGB.
        text: for a person: "4 photographs of scikit-image".
    """

    images: Tensor
    text: str


def sample_images(size: int) -> Samples:
    """Photographs that lie inside scikit-image, or noise where it is not installed.

    Args:
        size: side in pixels.
    """
    try:
        from resnet_backbone.runtime.builtin import load_photograph

        squares = [np.array(_square(load_photograph(name), size)) for name in PHOTOGRAPHS]
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        shape = (len(PHOTOGRAPHS), 3, size, size)
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return Samples(
            noise, f"{len(noise)} images of noise, which is no picture: give --images DIR"
        )
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
    return Samples(images, f"{len(images)} photographs of scikit-image")


def _square(photograph, size: int):
    """The centre of a photograph, as PIL image."""
    side = min(photograph.size)
    left, top = ((extent - side) // 2 for extent in photograph.size)
    return photograph.resize((size, size), box=(left, top, left + side, top + side))
