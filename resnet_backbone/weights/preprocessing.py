"""What weights expect of their input, facts whose mismatch is otherwise silent; the normalizer."""

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
# End of the key in a detector's state dict that says which input its backbone was trained on.
INPUT_SETTINGS = "input_settings"
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling, as in preprocessor_config.json
USUAL_TEST = (256, 224)  # shorter side and crop; written where the weights do not say theirs


class WeightsError(ValueError):
    """Weights that cannot be used as asked; the message says what to change."""


def one_line(error: Exception | str, limit: int = 400) -> str:
    """A text for a message: what a file says may be long, and have line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextmanager
def named(source: str | os.PathLike) -> Iterator[None]:
    """Turns a ValueError into one line that names the source."""
    try:
        yield
    except ValueError as error:
        raise WeightsError(f"{source}: {one_line(error)}") from error


class JsonRecord:
    """A dataclass that travels as a JSON object of its fields."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JsonRecord:
        """ValueError or TypeError if the text is not what :meth:`to_json` writes."""
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return cls(**found)


@dataclass(frozen=True)
class Preprocessing(JsonRecord):
    """The input that a network was trained on, and the two settings its tensors do not show.

    Attributes:
        channel_order: "RGB" or "BGR".
        value_range: the largest pixel value before normalization, 1.0 or 255.0.
        mean, std: per channel, in that order and range; input = (pixel - mean) / std.
        stride_in_1x1: where bottlenecks have their stride; ``None`` where there are none.
        bn_eps: epsilon of the batch norms.
        resize_size: shorter side in pixels of the center-crop test that the published accuracy
            belongs to, before cropping; None where it is not known.
        crop_size: side in pixels of that test's square center crop; None where it is not known.
        interpolation: of that resize, "bilinear" or "bicubic"; "" where it is not known.
        source: where these values are written down.
        mean_image: (3, H, W) or None: the per-pixel mean in ``channel_order`` and
            ``value_range``, subtracted in place of ``mean`` from images of exactly this size
            (paper, section 3.4). It is not part of the JSON form or of equality; weight files
            hold it as a tensor.
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
        """Mean for pixels in 0..255, in ``channel_order``: Detectron2's MODEL.PIXEL_MEAN."""
        return self.with_range(255.0).mean

    def pixel_std_255(self) -> tuple[float, ...]:
        """Standard deviation for pixels in 0..255: Detectron2's MODEL.PIXEL_STD."""
        return self.with_range(255.0).std

    def reversed_channels(self) -> Preprocessing:
        """The same input in the other channel order."""
        return replace(
            self,
            channel_order=self.channel_order[::-1],
            mean=self.mean[::-1],
            std=self.std[::-1],
            mean_image=None if self.mean_image is None else self.mean_image.flip(0),
        )

    def with_range(self, value_range: float) -> Preprocessing:
        """The same input with mean and std in 0..value_range."""
        mean, std = (
            tuple(value * value_range / self.value_range for value in values)
            for values in (self.mean, self.std)
        )
        image = self.mean_image
        image = None if image is None else image * (value_range / self.value_range)
        return replace(self, value_range=value_range, mean=mean, std=std, mean_image=image)

    def center_crop(self) -> tuple[int, int]:
        """(shorter side, center crop) in pixels of the test; the usual one if it is not known."""
        if self.resize_size is None or self.crop_size is None:
            return USUAL_TEST
        return self.resize_size, self.crop_size

    def same_input(self, other: Preprocessing) -> bool:
        """Whether both ask for the same tensors and network: all but source and test resize.

        Means and standard deviations are compared in 0..255, up to their rounding to half
        precision; a stride that one of them does not state is no difference.
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
        """The entry ``INPUT_SETTINGS`` of a detector's state dict.

        Returns:
            float32 (8,): 0 for RGB or 1 for BGR, mean and std in 0..255, stride (-1: not known).
        """
        stride = -1.0 if self.stride_in_1x1 is None else float(self.stride_in_1x1)
        order = float(ORDERS.index(self.channel_order))
        return torch.tensor([order, *self.pixel_mean_255(), *self.pixel_std_255(), stride])

    @classmethod
    def from_tensor(cls, values: Tensor) -> Preprocessing:
        """What :meth:`to_tensor` wrote, also if it was rounded to half precision since.

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
        resize_size=256,  # "resize the shorter side to 256", README; with which filter is not said
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
    """A published convention by name, "msra", "caffe_vgg" or "torchvision"; or the given one."""
    if isinstance(name, Preprocessing):
        return name
    if name not in PREPROCESSINGS:
        raise WeightsError(
            f"unknown preprocessing {name!r}: use one of {', '.join(PREPROCESSINGS)}"
        )
    return PREPROCESSINGS[name]


def known_filter(name: Any) -> str:
    """A resize filter's name, "" for one that :class:`Preprocessing` does not have."""
    return name if name in FILTERS.values() else ""


def same_mean(first: Sequence[float], second: Sequence[float]) -> bool:
    """Equality of means in 0..255 within one gray level.

    Detectron2's default (103.53, ...) and Caffe's (103.939, ...) are one convention; channels in
    the wrong order differ by 20.
    """
    return len(first) == len(second) and np.allclose(first, second, rtol=0, atol=1)


def same_std(first: Sequence[float], second: Sequence[float]) -> bool:
    """Equality of standard deviations within 2 %."""
    return len(first) == len(second) and np.allclose(first, second, rtol=0.02, atol=0)


class InputNormalizer:
    """Turns RGB bytes into a network's input, on the device where the network runs.

    Color noise, channel order, mean and standard deviation are one affine map per image and
    channel, so bytes travel to the device and only one pass is made over the floats.

    Args:
        preprocessing: what the weights expect. Its ``mean_image`` is subtracted from images of
            exactly that size (the paper's per-pixel mean), its channel means from all others.
        device: where images are normalized.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device | str = "cpu"):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.order = ["RGB".index(c) for c in preprocessing.channel_order]
        mean, std = preprocessing.pixel_mean_255(), preprocessing.pixel_std_255()
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(3, 1, 1)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32, device=self.device).view(3, 1, 1)
        image, scale = preprocessing.mean_image, 255.0 / preprocessing.value_range
        self.mean_image = None if image is None else (image.float() * scale).to(self.device)

    def __call__(self, images: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalizes a batch.

        Args:
            images: uint8 (N, 3, H, W), RGB.
            shift: float32 (N, 3), gray levels (0..255) added to the channels R, G, B of each
                image: the color noise of training.

        Returns:
            float32 (N, 3, H, W) in the weights' channel order, channels_last.
        """
        images = images.to(self.device, non_blocking=True)
        mean = self.mean
        if self.mean_image is not None and self.mean_image.shape[1:] == images.shape[2:]:
            mean = self.mean_image
        if shift is not None:
            shift = shift.to(self.device, non_blocking=True)
            mean = mean - shift[:, self.order, None, None]
        if self.order != [0, 1, 2]:
            images = images[:, self.order]
        images = images.to(torch.float32, memory_format=torch.channels_last)
        if mean.shape[-2:] != (1, 1):
            return images.sub_(mean).mul_(self.scale)
        # Rows of whole pixels: three values that repeat, broadcast, are several times slower.
        count, _, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).view(count, height, width * 3)
        torch.addcmul(_row(-mean * self.scale, width), rows, _row(self.scale, width), out=rows)
        return images


def _row(values: Tensor, width: int) -> Tensor:
    """(..., 3, 1, 1) -> (..., 1, width * 3): the values of one row of pixels."""
    return values.reshape(-1, 1, 3).expand(-1, width, 3).reshape(-1, 1, width * 3)
