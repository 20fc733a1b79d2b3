"""What a set of weights expects of its input: the facts whose mismatch is otherwise silent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor


class WeightsError(ValueError):
    """Weights that cannot be used as asked; the message says what to change."""


def one_line(error: Exception, limit: int = 400) -> str:
    """An error's text for a message: what a file says may be long, and have line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


@dataclass(frozen=True)
class Preprocessing:
    """The input that a network was trained on, and the two settings its tensors do not show.

    Attributes:
        channel_order: "RGB" or "BGR".
        value_range: the largest pixel value before normalisation, 1.0 or 255.0.
        mean, std: per channel, in that order and range; input = (pixel - mean) / std.
        stride_in_1x1: where bottlenecks have their stride; ``None`` where there are none.
        bn_eps: epsilon of the batch norms.
        resize_size: shorter side in pixels of the centre-crop test that the published accuracy
            belongs to, before cropping; None where it is not known.
        crop_size: side in pixels of that test's square centre crop; None where it is not known.
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
        if self.channel_order not in ("RGB", "BGR"):
            raise WeightsError(f"channel_order is RGB or BGR, not {self.channel_order!r}")
        for name in ("mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for problem, wrong in self._problems():
            if wrong:
                raise WeightsError(f"preprocessing: {problem}")

    def _problems(self) -> Iterator[tuple[str, bool]]:
        """What each value must be, and whether it is not."""
        numbers = (*self.mean, *self.std, self.value_range, self.bn_eps)
        yield "mean and std have three numbers", len(self.mean) != 3 or len(self.std) != 3
        yield "all numbers are finite", not all(map(math.isfinite, numbers))
        positive = (*self.std, self.value_range, self.bn_eps)
        yield "std, value_range and bn_eps are positive", min(positive) <= 0
        strides = (True, False, None)
        yield (
            "stride_in_1x1 is true, false or null",
            all(self.stride_in_1x1 is not x for x in strides),
        )
        for name in ("resize_size", "crop_size"):
            size = getattr(self, name)
            yield (
                f"{name} is a whole number above 0 or null",
                size is not None and (type(size) is not int or size <= 0),
            )
        filters = ("bilinear", "bicubic", "")
        yield f"interpolation is one of {filters}", self.interpolation not in filters
        yield "source is text", not isinstance(self.source, str)

    def pixel_mean_255(self) -> tuple[float, ...]:
        """Mean for pixels in 0..255, in ``channel_order``: Detectron2's MODEL.PIXEL_MEAN."""
        return tuple(value * 255.0 / self.value_range for value in self.mean)

    def pixel_std_255(self) -> tuple[float, ...]:
        """Standard deviation for pixels in 0..255: Detectron2's MODEL.PIXEL_STD."""
        return tuple(value * 255.0 / self.value_range for value in self.std)

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
            and _close(self.pixel_mean_255(), other.pixel_mean_255(), rel_tol=1e-3, abs_tol=1e-3)
            and _close(self.pixel_std_255(), other.pixel_std_255(), rel_tol=1e-3)
        )

    def to_json(self) -> str:
        values = asdict(replace(self, mean_image=None))
        del values["mean_image"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        try:
            return cls(**json.loads(text))
        except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"unreadable preprocessing metadata: {one_line(error)}") from error


PREPROCESSINGS: dict[str, Preprocessing] = {
    "msra": Preprocessing(
        "BGR",
        255.0,
        (103.939, 116.779, 123.68),
        (1.0, 1.0, 1.0),
        stride_in_1x1=True,
        source="KaimingHe/deep-residual-networks (Caffe); channel means in place of the mean image",
        resize_size=256,  # "resize the shorter side to 256", README; with which filter is not said
        crop_size=224,
    ),
    "caffe_vgg": Preprocessing(
        "BGR",
        255.0,
        (103.939, 116.779, 123.68),
        (1.0, 1.0, 1.0),
        source="arXiv 1409.1556, released Caffe models",
    ),
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


def same_mean(first: Sequence[float], second: Sequence[float]) -> bool:
    """Equality of means in 0..255 within one grey level.

    Detectron2's default (103.53, ...) and Caffe's (103.939, ...) are one convention; channels in
    the wrong order differ by 20.
    """
    return _close(first, second, abs_tol=1.0)


def same_std(first: Sequence[float], second: Sequence[float]) -> bool:
    """Equality of standard deviations within 2 %."""
    return _close(first, second, rel_tol=0.02)


def _close(first, second, **tolerance) -> bool:
    if len(first) != len(second):
        return False
    return all(math.isclose(a, b, **tolerance) for a, b in zip(first, second, strict=True))
