"""Geometry of images: the paper's training crop, and resizing as torchvision's transforms do it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.color import check_colour_noise, colour_shift
from resnet_backbone.classification.data.region import EncodedImage


class Augmented(NamedTuple):
    """What training sees of an image.

    Attributes:
        image: uint8 (3, size, size), RGB.
        shift: float32 (3,) or None, see :class:`resnet_backbone.classification.data.batch.Batch`.
    """

    image: Tensor
    shift: np.ndarray | None = None


class Span(NamedTuple):
    """One axis of a crop of a resized image.

    The crop begins ``skip`` pixels of the result after the pixel ``start`` of the image: the
    resizing filter of its first pixel does not look further back than ``start``.

    Attributes:
        start: pixel of the image, before resizing.
        skip: pixels of the result.
        scale: pixels of the image for one of the result.
    """

    start: int
    skip: int
    scale: float


class Crop(NamedTuple):
    """A square crop of a resized image."""

    y: Span
    x: Span

    def box(self, size: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of the image before resizing.

        Pillow's ``resize((size, size), BILINEAR, box=...)`` gives the same pixels, within a grey
        level or two.
        """
        left, top = (span.start + span.skip * span.scale for span in (self.x, self.y))
        return left, top, left + size * self.x.scale, top + size * self.y.scale


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) after the short side becomes ``size``; the long one truncated, as
    torchvision's ``Resize`` does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize_short_side(image: np.ndarray | Tensor, size: int) -> np.ndarray | Tensor:
    """Resizes like torchvision's ``Resize(size, antialias=True)`` of a uint8 tensor, bilinear.

    Args:
        image: uint8, numpy (H, W, 3) or torch (3, H, W).
        size: of the short side, pixels.

    Returns:
        uint8, of the same kind and layout; ``image`` itself where it has that size.
    """
    tensor = image if isinstance(image, Tensor) else torch.from_numpy(image).permute(2, 0, 1)
    shape = resized_shape(*tensor.shape[1:], size)
    if shape == tuple(tensor.shape[1:]):
        return image
    resized = F.interpolate(tensor[None], shape, mode="bilinear", antialias=True)[0]
    return resized if isinstance(image, Tensor) else resized.permute(1, 2, 0).contiguous().numpy()


def centre_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the centre crop, rounded as torchvision's ``CenterCrop`` does."""
    return round((height - size) / 2.0), round((width - size) / 2.0)


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    size: int = 224,
    short_side: tuple[int, int] = (256, 480),
) -> Crop:
    """A random crop of the image resized to a random short side (paper, section 3.4).

    The short side is uniform over the whole numbers of the range, the place uniform over those
    of the resized image. The corner is then moved to the nearest place, at most half a pixel of
    the image away, from which the crop can be resized without the rest of the image.
    """
    shape = resized_shape(height, width, int(rng.integers(short_side[0], short_side[1] + 1)))
    y = _draw_span(height, shape[0], size, rng)
    return Crop(y, _draw_span(width, shape[1], size, rng))


def _draw_span(length: int, resized: int, size: int, rng: np.random.Generator) -> Span:
    scale = length / resized
    place = int(rng.integers(0, resized - size + 1))
    # The bilinear filter reaches max(1, scale) pixels of the image from the centre of a result's
    # pixel; beyond `skip` of these it does not reach the pixel before `start`.
    skip = min(place, max(1, math.ceil(0.5 / scale - 0.5)))
    last = math.floor(length - (skip + size) * scale + 1e-6)
    return Span(min(round((place - skip) * scale), max(last, 0)), skip, scale)


def resize_crop(image: EncodedImage, crop: Crop, size: int = 224) -> Tensor:
    """The pixels of a crop: uint8 (3, size, size), antialiased bilinear.

    torch resizes from a whole pixel on and looks at nothing outside of what it is given. So a
    region is resized that begins a little before the crop, and that part is cut off.
    """
    bottom, right = _span_end(crop.y, size, image.height), _span_end(crop.x, size, image.width)
    region = image.region(crop.y.start, crop.x.start, bottom, right)
    shape = [
        _result_length(bottom - crop.y.start, crop.y, size),
        _result_length(right - crop.x.start, crop.x, size),
    ]
    resized = torch.ops.aten._upsample_bilinear2d_aa(
        torch.from_numpy(region).permute(2, 0, 1)[None],
        shape,
        False,
        1 / crop.y.scale,
        1 / crop.x.scale,
    )
    rows, columns = (slice(span.skip, span.skip + size) for span in crop)
    return resized[0, :, rows, columns]


def _span_end(span: Span, size: int, limit: int) -> int:
    """The end of the region: as far as the filter of the last pixel reaches."""
    last = (span.skip + size - 0.5) * span.scale
    return min(limit, span.start + math.ceil(last + max(1.0, span.scale)))


def _result_length(region: int, span: Span, size: int) -> int:
    # torch leaves out the resizing of an axis whose length stays the same, whatever the scale
    length = span.skip + size
    return length + 1 if region == length and span.scale != 1 else length


def to_image(pixels: Tensor, flip: bool) -> Tensor:
    """A contiguous copy of (3, H, W), mirrored left to right if asked."""
    return pixels.flip(2) if flip else pixels.contiguous()


@dataclass(frozen=True)
class PaperAugmentation:
    """The paper's training augmentation (section 3.4): scale, crop, flip, colour noise.

    Args:
        size: of the crop, pixels.
        short_side: first and last length of the short side.
        flip: probability of mirroring left to right.
        colour_noise: "cuda_convnet", "fb_resnet_torch" or "none".
    """

    size: int = 224
    short_side: tuple[int, int] = (256, 480)
    flip: float = 0.5
    colour_noise: str = "cuda_convnet"

    def __post_init__(self):
        check_colour_noise(self.colour_noise)
        shortest, longest = self.short_side
        if not self.size <= shortest <= longest:
            raise DataError(
                f"short sides of {shortest} to {longest} pixels hold no crop of {self.size}: "
                "size <= first <= last is needed"
            )

    def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Augmented:
        crop = draw_crop(image.height, image.width, rng, self.size, self.short_side)
        flip = rng.random() < self.flip
        shift = None if self.colour_noise == "none" else colour_shift(self.colour_noise, rng)
        return Augmented(to_image(resize_crop(image, crop, self.size), flip), shift)


@dataclass(frozen=True)
class CentreCrop:
    """Resizes the short side and cuts the centre, as torchvision's ``Resize``, ``CenterCrop``."""

    size: int = 224
    short_side: int = 256

    def __post_init__(self):
        if self.short_side < self.size:
            raise DataError(f"a short side of {self.short_side} holds no crop of {self.size}")

    def __call__(self, image: EncodedImage, rng: np.random.Generator | None = None) -> Augmented:
        pixels = image.region(0, 0, image.height, image.width)
        resized = torch.from_numpy(resize_short_side(pixels, self.short_side)).permute(2, 0, 1)
        top, left = centre_corner(*resized.shape[1:], self.size)
        return Augmented(
            to_image(resized[:, top : top + self.size, left : left + self.size], False)
        )
