"""Augmentation of the paper and of later recipes, and mixing of whole batches.

Only the part of an image that a crop needs is decoded and resized. Resizing matches torchvision's
transforms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.classification.data.sources import MIXING
from resnet_backbone.runtime.images import EncodedImage
from resnet_backbone.runtime.processes import make_rng

NOISE_STRENGTH = 0.1  # standard deviation of each component's factor (AlexNet, section 4.1)
TRIES = 10  # for a random rectangle, before the largest allowed one in the center
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random rectangle, as in torchvision

# Principal axes of ImageNet's RGB values as columns; rows R, G, B (fb.resnet.torch,
# datasets/imagenet.lua).
AXES = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

# What the factor is multiplied by, in gray levels 0..255. AlexNet's text says eigenvalues; the
# published programs differ by a square root.
SCALINGS: dict[str, tuple[float, float, float]] = {
    # standard deviations along the axes (cuda-convnet2, AlexNet's own program): noise of 12.2,
    # 3.7 and 2.0 gray levels
    "cuda_convnet": (121.78, 37.09, 19.72),
    # eigenvalues of the covariance of values in 0..1 (fb.resnet.torch): 5.5, 0.48 and 0.11
    "fb_resnet_torch": (0.2175 * 255, 0.0188 * 255, 0.0045 * 255),
}


class Span(NamedTuple):
    """One axis of a crop of a resized image, which begins ``skip`` pixels after ``start``.

    The resizing filter of the crop's first pixel does not reach beyond ``start``.
    """

    start: int  # pixel of the original image
    skip: int  # pixels of the resized image
    scale: float  # original pixels per resized pixel


class Crop(NamedTuple):
    """A square crop of a resized image."""

    y: Span
    x: Span

    def box(self, size: int) -> tuple[float, float, float, float]:
        """Returns (left, top, right, bottom) in pixels of the original image, as Pillow's box."""
        left, top = (span.start + span.skip * span.scale for span in (self.x, self.y))
        return left, top, left + size * self.x.scale, top + size * self.y.scale


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns (height, width) for a short side of ``size``; truncated as in torchvision."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize_short_side(image: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    """Resizes uint8 (3, H, W) like torchvision's ``Resize(size, mode, antialias=True)``."""
    shape = resized_shape(*image.shape[1:], size)
    if shape == tuple(image.shape[1:]):
        return image
    return F.interpolate(image[None], shape, mode=mode, antialias=True)[0]


def center_crop(image: Tensor, size: int) -> Tensor:
    """Crops the center of (..., H, W), rounded as in torchvision; ValueError if it is smaller."""
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise ValueError(
            f"an image of {height}x{width} has no {size}x{size} crop: use a larger resize"
        )
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[..., top : top + size, left : left + size]


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    size: int = 224,
    short_side: tuple[int, int] = (256, 480),
) -> Crop:
    """Draws a random crop of the image resized to a random short side (paper, section 3.4).

    The short side is a uniform integer of the range, and the position is uniform in the resized
    image. The corner is then moved, by at most half an original pixel, to a position from which the
    crop can be resized without the rest of the image.
    """
    shape = resized_shape(height, width, int(rng.integers(short_side[0], short_side[1] + 1)))
    y = _draw_span(height, shape[0], size, rng)
    return Crop(y, _draw_span(width, shape[1], size, rng))


def _draw_span(length: int, resized: int, size: int, rng: np.random.Generator) -> Span:
    scale = length / resized
    place = int(rng.integers(0, resized - size + 1))
    # The bilinear filter reaches max(1, scale) original pixels from the center of a resized pixel.
    # After `skip` resized pixels it does not reach the pixel before `start`.
    skip = min(place, max(1, math.ceil(0.5 / scale - 0.5)))
    last = math.floor(length - (skip + size) * scale + 1e-6)
    return Span(min(round((place - skip) * scale), max(last, 0)), skip, scale)


def resize_crop(image: EncodedImage, crop: Crop, size: int = 224) -> Tensor:
    """Resizes a crop to uint8 (3, size, size), antialiased bilinear.

    torch starts resizing at a whole pixel and sees only its input. So the resized region begins a
    little before the crop, and this margin is cut off.
    """
    bottom, right = _span_end(crop.y, size, image.height), _span_end(crop.x, size, image.width)
    region = image.region(crop.y.start, crop.x.start, bottom, right)
    shape = [
        _result_length(bottom - crop.y.start, crop.y, size),
        _result_length(right - crop.x.start, crop.x, size),
    ]
    pixels, scales = torch.from_numpy(region).permute(2, 0, 1), (1 / crop.y.scale, 1 / crop.x.scale)
    resized = torch.ops.aten._upsample_bilinear2d_aa(pixels[None], shape, False, *scales)
    rows, columns = (slice(span.skip, span.skip + size) for span in crop)
    return resized[0, :, rows, columns]


def _span_end(span: Span, size: int, limit: int) -> int:
    """Returns the end of the region, as far as the filter of the last pixel reaches."""
    last = (span.skip + size - 0.5) * span.scale
    return min(limit, span.start + math.ceil(last + max(1.0, span.scale)))


def _result_length(region: int, span: Span, size: int) -> int:
    # torch does not resize an axis whose length stays the same, whatever the scale
    length = span.skip + size
    return length + 1 if region == length and span.scale != 1 else length


def draw_inception_crop(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws (top, left, bottom, right) of a random rectangle (Szegedy et al. 2015, section 6).

    As in torchvision's ``RandomResizedCrop``: ten tries with an area uniform in 8 to 100 % and a
    log-uniform aspect ratio, then the largest center crop with an allowed ratio.
    """
    for _ in range(TRIES):
        target = height * width * rng.uniform(*AREA)
        shape = math.exp(rng.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return top, left, top + h, left + w
    h = min(height, max(1, round(width / RATIO[0])))
    w = min(width, max(1, round(height * RATIO[1])))
    top, left = (height - h) // 2, (width - w) // 2
    return top, left, top + h, left + w


class Augmented(NamedTuple):
    image: Tensor  # uint8 (3, size, size), RGB
    shift: np.ndarray | None = None  # float32 (3,), see `sources.Batch`


def color_shift(name: str, rng: np.random.Generator) -> np.ndarray | None:
    """Draws AlexNet's color noise for an image, along the principal axes of ImageNet's colors.

    Returns:
        float32 (3,), gray levels to add to R, G, B; None for the scaling "none".
    """
    if name == "none":
        return None
    return (AXES @ (rng.normal(0.0, NOISE_STRENGTH, 3) * SCALINGS[name])).astype(np.float32)


def _flipped(pixels: Tensor, flip: bool) -> Tensor:
    """Returns contiguous (3, H, W), mirrored left to right if ``flip``."""
    return pixels.flip(2) if flip else pixels.contiguous()


@dataclass(frozen=True)
class PaperAugmentation:
    """The paper's augmentation (section 3.4): scale, crop, flip, color noise."""

    size: int = 224  # of the crop, pixels
    short_side: tuple[int, int] = (256, 480)  # first and last, pixels; at least `size`
    flip: float = 0.5  # probability of mirroring left to right
    color_noise: str = "cuda_convnet"  # or fb_resnet_torch, none

    def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Augmented:
        crop = draw_crop(image.height, image.width, rng, self.size, self.short_side)
        flip = rng.random() < self.flip
        shift = color_shift(self.color_noise, rng)
        return Augmented(_flipped(resize_crop(image, crop, self.size), flip), shift)


@dataclass(frozen=True)
class CenterCrop:
    """Resizes the short side and crops the center, as torchvision's ``Resize``, ``CenterCrop``."""

    size: int = 224
    short_side: int = 256

    def __call__(self, image: EncodedImage, rng: np.random.Generator | None = None) -> Augmented:
        pixels = torch.from_numpy(image.region(0, 0, image.height, image.width)).permute(2, 0, 1)
        crop = center_crop(resize_short_side(pixels, self.short_side), self.size)
        return Augmented(crop.contiguous())


@dataclass(frozen=True)
class InceptionAugmentation:
    """Random-resized crop, flip, optional RandAugment and color noise."""

    size: int = 224  # of the crop, pixels
    flip: float = 0.5  # probability of mirroring left to right
    randaugment: int | None = None  # magnitude of torchvision's (0..30); None for none
    color_noise: str = "none"  # or cuda_convnet, fb_resnet_torch

    def __post_init__(self):
        if self.randaugment is not None:
            import torchvision.transforms.v2  # noqa: F401 - slow, so not in each worker

    def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Augmented:
        box = draw_inception_crop(image.height, image.width, rng)
        flip = rng.random() < self.flip
        shift = color_shift(self.color_noise, rng)
        region = torch.from_numpy(image.region(*box)).permute(2, 0, 1)[None]
        shape = (self.size, self.size)
        pixels = F.interpolate(region, shape, mode="bilinear", antialias=True)[0]
        pixels = _flipped(pixels, flip)
        if self.randaugment is not None:
            from torchvision.transforms import v2

            with _torch_seed(int(rng.integers(2**63))):
                pixels = v2.RandAugment(magnitude=self.randaugment)(pixels)
        return Augmented(pixels, shift)


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Seeds torch's generator, from which torchvision's transforms draw, within the block."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class BatchMixer:
    """Mixes each batch with torchvision's ``MixUp`` or ``CutMix``, chosen at random.

    Random numbers depend on the seed, which each process needs of its own, and on the iteration.

    Args:
        num_classes: of the soft labels.
        mixup, cutmix: the alpha of each (arXiv 1710.09412, 1905.04899); 0 disables it.
    """

    def __init__(self, num_classes: int, mixup: float = 0.2, cutmix: float = 1.0, seed: int = 0):
        from torchvision.transforms import v2

        self.num_classes, self.seed = num_classes, seed
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._transforms = [kind(alpha=a, num_classes=num_classes) for kind, a in kinds if a]

    def __call__(self, images: Tensor, labels: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Returns mixed images and soft labels, float32 (N, num_classes); one image is not mixed.

        Args:
            images, labels: float (N, 3, H, W), normalized; int64 (N,).
        """
        if len(labels) < 2:
            return images, F.one_hot(labels, self.num_classes).float()
        with _torch_seed(int(make_rng(self.seed, MIXING, iteration).integers(2**63))):
            chosen = int(torch.randint(len(self._transforms), ()))
            return self._transforms[chosen](images, labels)
