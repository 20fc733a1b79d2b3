"""Augmentation of later recipes: Inception's random-resized crop and RandAugment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.classification.data.augment import Augmented, to_image
from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.color import check_colour_noise, colour_shift
from resnet_backbone.classification.data.region import EncodedImage

TRIES = 10


def draw_inception_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a random rectangle (Szegedy et al. 2015, section 6).

    The rules are those of torchvision's ``RandomResizedCrop``: ten tries, then the largest centre
    rectangle of an allowed shape.

    Args:
        area: of the rectangle, as parts of the image's; uniform.
        ratio: of width to height; uniform in its logarithm.
    """
    for _ in range(TRIES):
        target = height * width * rng.uniform(*area)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return top, left, top + h, left + w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    top, left = (height - h) // 2, (width - w) // 2
    return top, left, top + h, left + w


@dataclass(frozen=True)
class InceptionAugmentation:
    """Random-resized crop, flip, optional RandAugment and colour noise.

    Args:
        size: of the crop, pixels.
        area, ratio: see :func:`draw_inception_crop`.
        flip: probability of mirroring left to right.
        randaugment: magnitude of torchvision's ``RandAugment`` (0..30), None for none.
        randaugment_ops: its number of operations.
        colour_noise: "cuda_convnet", "fb_resnet_torch" or "none".
    """

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment: int | None = None
    randaugment_ops: int = 2
    colour_noise: str = "none"

    def __post_init__(self):
        check_colour_noise(self.colour_noise)
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise DataError(f"area is 0 < first <= last <= 1, not {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"ratio is 0 < first <= last, not {self.ratio}")
        if self.randaugment is not None and not 0 <= self.randaugment <= 30:
            raise DataError(f"RandAugment's magnitude is 0..30, not {self.randaugment}")
        if self.randaugment is not None:
            _ = self._transform  # imported here, not by every worker

    def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Augmented:
        box = draw_inception_crop(image.height, image.width, rng, self.area, self.ratio)
        flip = rng.random() < self.flip
        shift = None if self.colour_noise == "none" else colour_shift(self.colour_noise, rng)
        region = torch.from_numpy(image.region(*box)).permute(2, 0, 1)[None]
        shape = (self.size, self.size)
        pixels = F.interpolate(region, shape, mode="bilinear", antialias=True)[0]
        pixels = to_image(pixels, flip)
        if self.randaugment is not None:
            pixels = self._randaugment(pixels, int(rng.integers(2**63)))
        return Augmented(pixels, shift)

    @cached_property
    def _transform(self):
        from torchvision.transforms import v2

        return v2.RandAugment(self.randaugment_ops, self.randaugment)

    def _randaugment(self, pixels: Tensor, seed: int) -> Tensor:
        """Applies RandAugment, which draws from torch's generator, as a function of ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._transform(pixels)
