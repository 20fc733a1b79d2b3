"""Augmentation: the paper's, that of later recipes, and mixing of whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.classification.data.crops import (
    EncodedImage,
    center_corner,
    draw_crop,
    draw_inception_crop,
    resize_crop,
    resize_short_side,
    to_image,
)
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.seeding import make_rng

MIXING = 4  # the first word of a seed, beside those in `stream`, `loader` and `statistics`
NOISE_STRENGTH = 0.1  # standard deviation of each component's factor (AlexNet, section 4.1)

# Principal axes of ImageNet's RGB values, one a column; rows R, G, B (fb.resnet.torch,
# datasets/imagenet.lua).
AXES = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

# By what the factor is multiplied, in gray levels of 0..255. AlexNet's text says eigenvalues; the
# published programs differ by a square root.
SCALINGS: dict[str, tuple[float, float, float]] = {
    # standard deviations along the axes (cuda-convnet2, AlexNet's own program): noise of 12.2,
    # 3.7 and 2.0 gray levels
    "cuda_convnet": (121.78, 37.09, 19.72),
    # eigenvalues of the covariance of values in 0..1 (fb.resnet.torch): 5.5, 0.48 and 0.11
    "fb_resnet_torch": (0.2175 * 255, 0.0188 * 255, 0.0045 * 255),
}
COLOR_NOISES = (*SCALINGS, "none")


class Augmented(NamedTuple):
    """What training sees of an image.

    Attributes:
        image: uint8 (3, size, size), RGB.
        shift: float32 (3,) or None, see :class:`resnet_backbone.classification.data.stream.Batch`.
    """

    image: Tensor
    shift: np.ndarray | None = None


def check_color_noise(name: str) -> None:
    """DataError for an unknown name."""
    if name not in COLOR_NOISES:
        raise DataError(f"color noise is one of {', '.join(COLOR_NOISES)}, not {name!r}")


def color_shift(name: str, rng: np.random.Generator) -> np.ndarray | None:
    """AlexNet's color noise of one image, along the principal axes of ImageNet's colors.

    Args:
        name: "cuda_convnet" or "fb_resnet_torch", the two published scalings, or "none".

    Returns:
        float32 (3,), gray levels to add to R, G, B; None for "none".
    """
    if name == "none":
        return None
    return (AXES @ (rng.normal(0.0, NOISE_STRENGTH, 3) * SCALINGS[name])).astype(np.float32)


@dataclass(frozen=True)
class PaperAugmentation:
    """The paper's training augmentation (section 3.4): scale, crop, flip, color noise.

    Args:
        size: of the crop, pixels.
        short_side: first and last length of the short side.
        flip: probability of mirroring left to right.
        color_noise: "cuda_convnet", "fb_resnet_torch" or "none".
    """

    size: int = 224
    short_side: tuple[int, int] = (256, 480)
    flip: float = 0.5
    color_noise: str = "cuda_convnet"

    def __post_init__(self):
        check_color_noise(self.color_noise)
        shortest, longest = self.short_side
        if not self.size <= shortest <= longest:
            raise DataError(
                f"short sides of {shortest} to {longest} pixels hold no crop of {self.size}: "
                "size <= first <= last is needed"
            )

    def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Augmented:
        crop = draw_crop(image.height, image.width, rng, self.size, self.short_side)
        flip = rng.random() < self.flip
        shift = color_shift(self.color_noise, rng)
        return Augmented(to_image(resize_crop(image, crop, self.size), flip), shift)


@dataclass(frozen=True)
class CenterCrop:
    """Resizes the short side and cuts the center, as torchvision's ``Resize``, ``CenterCrop``."""

    size: int = 224
    short_side: int = 256

    def __post_init__(self):
        if self.short_side < self.size:
            raise DataError(f"a short side of {self.short_side} holds no crop of {self.size}")

    def __call__(self, image: EncodedImage, rng: np.random.Generator | None = None) -> Augmented:
        pixels = image.region(0, 0, image.height, image.width)
        resized = torch.from_numpy(resize_short_side(pixels, self.short_side)).permute(2, 0, 1)
        top, left = center_corner(*resized.shape[1:], self.size)
        return Augmented(
            to_image(resized[:, top : top + self.size, left : left + self.size], False)
        )


@dataclass(frozen=True)
class InceptionAugmentation:
    """Random-resized crop, flip, optional RandAugment and color noise.

    Args:
        size: of the crop, pixels.
        area, ratio: see :func:`draw_inception_crop`.
        flip: probability of mirroring left to right.
        randaugment: magnitude of torchvision's ``RandAugment`` (0..30), None for none.
        randaugment_ops: its number of operations.
        color_noise: "cuda_convnet", "fb_resnet_torch" or "none".
    """

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment: int | None = None
    randaugment_ops: int = 2
    color_noise: str = "none"

    def __post_init__(self):
        check_color_noise(self.color_noise)
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
        shift = color_shift(self.color_noise, rng)
        region = torch.from_numpy(image.region(*box)).permute(2, 0, 1)[None]
        shape = (self.size, self.size)
        pixels = F.interpolate(region, shape, mode="bilinear", antialias=True)[0]
        pixels = to_image(pixels, flip)
        if self.randaugment is not None:
            with _torch_seed(int(rng.integers(2**63))):
                pixels = self._transform(pixels)
        return Augmented(pixels, shift)

    @cached_property
    def _transform(self):
        from torchvision.transforms import v2  # seconds; most runs do without

        return v2.RandAugment(self.randaugment_ops, self.randaugment)


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Lets torchvision's transforms, which draw from torch's generator, depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class BatchMixer:
    """Mixes each batch by one of torchvision's ``MixUp`` and ``CutMix``, chosen at random.

    It comes after normalization, as in torchvision's references. What it draws is a function of
    the seed and the iteration, so a resumed run mixes the same way.

    Args:
        num_classes: of the soft labels.
        mixup, cutmix: the alpha of each (arXiv 1710.09412, 1905.04899); 0 leaves it out.
        seed: of the run; give each process its own, or all mix the same way.
    """

    def __init__(self, num_classes: int, mixup: float = 0.2, cutmix: float = 1.0, seed: int = 0):
        from torchvision.transforms import v2

        if mixup < 0 or cutmix < 0 or not (mixup or cutmix):
            raise DataError(f"mixup and cutmix are alphas >= 0, one of them > 0: {mixup}, {cutmix}")
        self.num_classes, self.seed = num_classes, seed
        self._transforms = []
        if mixup:
            self._transforms.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self._transforms.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, images: Tensor, labels: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Mixes a batch.

        Args:
            images: float (N, 3, H, W), normalized.
            labels: int64 (N,).
            iteration: counted from 0.

        Returns:
            (images of the same shape, soft labels float32 (N, num_classes)); a batch of one is
            returned unmixed.
        """
        if len(labels) < 2:
            return images, F.one_hot(labels, self.num_classes).float()
        seed = make_rng(self.seed, MIXING, iteration).integers(2**63)
        with _torch_seed(int(seed)):
            chosen = int(torch.randint(len(self._transforms), ()))
            return self._transforms[chosen](images, labels)
