"""The input that weights expect, where a mismatch would be silent, and the normalizer for it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

ORDERS = ("RGB", "BGR")
# The last part of the key that holds the input of a detector's backbone in its state dict.
INPUT_SETTINGS = "input_settings"
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling, as in preprocessor_config.json
USUAL_TEST = (256, 224)  # shorter side and crop, for weights that do not state theirs


class WeightsError(ValueError):
    """Weights that cannot be used as requested; the message says what to change."""


def one_line(error: Exception | str, limit: int = 400) -> str:
    """Returns a text without line breaks, cut after ``limit`` characters, for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextmanager
def named(source: str | os.PathLike) -> Iterator[None]:
    """Turns a ValueError into a WeightsError of one line that names the source."""
    try:
        yield
    except ValueError as error:
        raise WeightsError(f"{source}: {one_line(error)}") from error


class JsonRecord:
    """A dataclass that is stored as a JSON object of its fields."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JsonRecord:
        """Reads what :meth:`to_json` wrote. Raises ValueError or TypeError: any other text."""
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return cls(**found)


@dataclass(frozen=True)
class Preprocessing(JsonRecord):
    """The input that a network was trained on, and two settings that its tensors do not show.

    Attributes:
        channel_order: "RGB" or "BGR".
        value_range: the largest pixel value before normalization, 1.0 or 255.0.
        mean, std: per channel, in this order and range; input = (pixel - mean) / std.
        stride_in_1x1: whether bottlenecks stride in their first 1x1 convolution, not in the 3x3;
            None if there are none, or if it is unknown.
        bn_eps: epsilon of the batch norms.
        resize_size: shorter side in pixels, before the center crop, in the test of the published
            accuracy; None if unknown.
        crop_size: side in pixels of this test's square center crop; None if unknown.
        interpolation: of this resize, "bilinear" or "bicubic"; "" if unknown.
        source: where these values are documented.
        mean_image: (3, H, W) or None: the per-pixel mean in ``channel_order`` and ``value_range``,
            subtracted instead of ``mean`` from images of exactly this size (paper, section 3.4).
            It is not in the JSON or compared by ``==``; weight files store it as a tensor.
    """

    channel_order: str
    value_range: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stride_in_1x1: bool | None = None
    bn_eps: float = 1e-5
    source: str = ""
    resize_size: int | None = None
    crop_size: int | None = None
    interpolation: str = ""
    mean_image: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.channel_order not in ORDERS:
            raise WeightsError(f"channel_order must be RGB or BGR, not {self.channel_order!r}")
        for name in ("mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        sizes = [size for size in (self.resize_size, self.crop_size) if size is not None]
        positive = (*self.std, self.value_range, self.bn_eps)
        filters = (*FILTERS.values(), "")
        right = {
            "mean and std must have three numbers": len(self.mean) == len(self.std) == 3,
            "all numbers must be finite": all(map(math.isfinite, (*self.mean, *positive))),
            "std, value_range, and bn_eps must be positive": min(positive) > 0,
            "stride_in_1x1 must be true, false, or null": isinstance(
                self.stride_in_1x1, bool | None
            ),
            "resize_size and crop_size must be whole numbers above 0, or null": all(
                type(size) is int and size > 0 for size in sizes
            ),
            f"interpolation must be one of {filters}": self.interpolation in filters,
            "source is text": isinstance(self.source, str),
        }
        for problem in (text for text, is_right in right.items() if not is_right):
            raise WeightsError(f"preprocessing: {problem}")

    def pixel_mean_255(self) -> tuple[float, ...]:
        """Returns the mean for pixels in 0..255, in ``channel_order``: MODEL.PIXEL_MEAN."""
        return self.with_range(255.0).mean

    def pixel_std_255(self) -> tuple[float, ...]:
        """Returns the standard deviation for pixels in 0..255: Detectron2's MODEL.PIXEL_STD."""
        return self.with_range(255.0).std

    def reversed_channels(self) -> Preprocessing:
        """Returns the same input in the other channel order."""
        return replace(
            self,
            channel_order=self.channel_order[::-1],
            mean=self.mean[::-1],
            std=self.std[::-1],
            mean_image=None if self.mean_image is None else self.mean_image.flip(0),
        )

    def with_range(self, value_range: float) -> Preprocessing:
        """Returns the same input for pixels in 0..value_range."""
        mean, std = (
            tuple(value * value_range / self.value_range for value in values)
            for values in (self.mean, self.std)
        )
        image = self.mean_image
        image = None if image is None else image * (value_range / self.value_range)
        return replace(self, value_range=value_range, mean=mean, std=std, mean_image=image)

    def center_crop(self) -> tuple[int, int]:
        """Returns the test's (shorter side, center crop) in pixels; (256, 224) if unknown."""
        if self.resize_size is None or self.crop_size is None:
            return USUAL_TEST
        return self.resize_size, self.crop_size

    def same_input(self, other: Preprocessing) -> bool:
        """Returns whether both mean the same input and network; source and test may differ.

        Means and standard deviations are compared in 0..255, up to the rounding of half precision.
        A stride that only one of them states is no difference.
        """
        strides = self.stride_in_1x1, other.stride_in_1x1
        return (
            self.channel_order == other.channel_order
            and self.bn_eps == other.bn_eps
            and (None in strides or strides[0] == strides[1])
            and np.allclose(self.pixel_mean_255(), other.pixel_mean_255(), rtol=1e-3, atol=1e-3)
            and np.allclose(self.pixel_std_255(), other.pixel_std_255(), rtol=1e-3, atol=0)
        )

    def to_json(self) -> str:
        values = asdict(replace(self, mean_image=None))
        del values["mean_image"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        try:
            return super().from_json(text)
        except WeightsError:
            raise
        except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
            raise WeightsError(f"unreadable preprocessing metadata: {one_line(error)}") from error

    def to_tensor(self) -> Tensor:
        """Encodes this input as the entry ``INPUT_SETTINGS`` of a detector's state dict.

        Returns:
            float32 (8,): 0 for RGB or 1 for BGR, mean and std in 0..255, stride (-1: unknown).
        """
        stride = -1.0 if self.stride_in_1x1 is None else float(self.stride_in_1x1)
        order = float(ORDERS.index(self.channel_order))
        return torch.tensor([order, *self.pixel_mean_255(), *self.pixel_std_255(), stride])

    @classmethod
    def from_tensor(cls, values: Tensor) -> Preprocessing:
        """Decodes what :meth:`to_tensor` wrote, even after rounding to half precision.

        Raises WeightsError: any other tensor.
        """
        order, *numbers, stride = values.float().tolist() if values.shape == (8,) else (-1.0, -1.0)
        strides = {-1.0: None, 0.0: False, 1.0: True}
        if order not in (0.0, 1.0) or stride not in strides or not all(map(math.isfinite, numbers)):
            raise WeightsError(f"a checkpoint's {INPUT_SETTINGS} is not what this package writes")
        stated = dict(stride_in_1x1=strides[stride], source="a detector's checkpoint")
        return cls(ORDERS[int(order)], 255.0, numbers[:3], numbers[3:], **stated)


CAFFE = ("BGR", 255.0, (103.939, 116.779, 123.68), (1.0, 1.0, 1.0))
PREPROCESSINGS: dict[str, Preprocessing] = {
    "msra": Preprocessing(
        *CAFFE,
        stride_in_1x1=True,
        source="KaimingHe/deep-residual-networks (Caffe); channel means in place of the mean image",
        resize_size=256,  # "resize the shorter side to 256", README; it does not name the filter
        crop_size=224,
    ),
    "caffe_vgg": Preprocessing(*CAFFE, source="arXiv 1409.1556, released Caffe models"),
    "torchvision": Preprocessing(
        "RGB",
        1.0,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        stride_in_1x1=False,
        source="torchvision.models documentation, ResNet and VGG weights V1 and V2",
        resize_size=256,  # of V1; V2 is tested at 232
        crop_size=224,
        interpolation="bilinear",
    ),
}


def get_preprocessing(name: str | Preprocessing) -> Preprocessing:
    """Returns a published convention, "msra", "caffe_vgg" or "torchvision", or a given one."""
    if isinstance(name, Preprocessing):
        return name
    if name not in PREPROCESSINGS:
        raise WeightsError(
            f"unknown preprocessing {name!r}: use one of {', '.join(PREPROCESSINGS)}"
        )
    return PREPROCESSINGS[name]


def known_filter(name: Any) -> str:
    """Returns a resize filter's name, or "" if :class:`Preprocessing` does not have it."""
    return name if name in FILTERS.values() else ""


def same_mean(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether means in 0..255 are equal within one gray level.

    Detectron2's default (103.53, ...) and Caffe's (103.939, ...) count as one convention; channels
    in the wrong order differ by 20.
    """
    return len(first) == len(second) and np.allclose(first, second, rtol=0, atol=1)


def same_std(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether standard deviations are equal within 2 %."""
    return len(first) == len(second) and np.allclose(first, second, rtol=0.02, atol=0)


class InputNormalizer:
    """Turns RGB bytes into a network's input, on the device where the network runs.

    Color noise, channel order, mean and standard deviation are one affine map per image and
    channel. So images are copied to the device as bytes, and one pass is made over the floats.

    Args:
        preprocessing: what the weights expect. Its ``mean_image`` (the paper's per-pixel mean) is
            subtracted from images of exactly its size, its channel means from all others.
        device: where images are normalized.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device | str = "cpu"):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.flips = preprocessing.channel_order == "BGR"
        mean, std = preprocessing.pixel_mean_255(), preprocessing.pixel_std_255()
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(3, 1, 1)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32, device=self.device).view(3, 1, 1)
        image, scale = preprocessing.mean_image, 255.0 / preprocessing.value_range
        self.mean_image = None if image is None else (image.float() * scale).to(self.device)

    def __call__(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalizes a batch.

        Args:
            images: uint8 (N, 3, H, W), RGB.
            shift: float32 (N, 3), the color noise of training: gray levels (0..255) added to the
                channels R, G, B of each image.

        Returns:
            float32 (N, 3, H, W) in the weights' channel order, channels_last.

        Raises:
            TypeError: images of another type, such as floats in 0..1.
            ValueError: images of another shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"expected images as bytes (torch.uint8, 0..255), not {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"expected RGB images (N, 3, H, W), not {tuple(images.shape)}")
        images = images.to(self.device, non_blocking=True)
        mean = self.mean
        if self.mean_image is not None and self.mean_image.shape[1:] == images.shape[2:]:
            mean = self.mean_image
        if shift is not None:
            shift = shift.to(self.device, non_blocking=True)
            mean = mean - (shift.flip(1) if self.flips else shift)[..., None, None]
        if self.flips:
            images = images.flip(1)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        if mean.shape[-2:] != (1, 1):
            return images.sub_(mean).mul_(self.scale)
        # Whole rows of pixels: broadcasting three values is several times slower.
        count, _, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).view(count, height, width * 3)
        torch.addcmul(_row(-mean * self.scale, width), rows, _row(self.scale, width), out=rows)
        return images


def _row(values: Tensor, width: int) -> Tensor:
    """(..., 3, 1, 1) -> (..., 1, width * 3): repeats the values for a row of pixels."""
    return values.reshape(-1, 1, 3).expand(-1, width, 3).reshape(-1, 1, width * 3)
