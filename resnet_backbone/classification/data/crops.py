"""Parts of encoded images: only what a crop needs is decoded and resized.

Of an ordinary JPEG the rows and columns of the crop are decoded. Resizing gives what torchvision's
transforms give.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_backbone.classification.data.decode import BadImage, decode, is_plain_jpeg

TRIES = 10  # of a random rectangle, before the largest allowed one in the center
END_OF_IMAGE = b"\xff\xd9"
MIN_PART_WIDTH = 32  # libjpeg smooths color otherwise where less than two blocks are read
CPU_ONLY = -99999  # nvImageCodec's NVIMGCODEC_DEVICE_CPU_ONLY


class EncodedImage:
    """An image of known size, of which any rectangle can be decoded.

    With the package nvidia-nvimgcodec (its CPU decoder, which is libjpeg-turbo; no GPU is
    needed) ordinary JPEGs are decoded in part, which takes about half as long; everything else,
    and all images where it is not installed, is decoded whole. The pixels are the same.

    A partial decoder does not look below the rectangle, and is silent about damage that libjpeg
    can pass over. Files that lack their end, as truncated ones do, are therefore decoded whole
    and judged by :func:`decode`; damage in the middle of a whole file may go unnoticed here.

    Attributes:
        height, width: pixels, of the upright image.
        note: see :class:`~resnet_backbone.classification.data.decode.Decoded`; known once
            pixels were asked for.

    Args:
        data: a whole file.
        name: for messages.
        partial: False decodes every image whole.

    Raises:
        BadImage: here or from :meth:`region`.
    """

    def __init__(self, data: bytes, name: str | os.PathLike = "<bytes>", partial: bool = True):
        self._data, self._name = data, name
        self._pixels: np.ndarray | None = None
        self._stream = None
        self.note = ""
        if partial and _partial_decoder() is not None and _is_whole_plain_jpeg(data):
            self._stream = _open_stream(data)
        if self._stream is not None:
            self.height, self.width = self._stream.height, self._stream.width
        else:
            self.height, self.width = self._decode_whole().shape[:2]

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """The pixels [top, bottom) x [left, right): uint8 (bottom - top, right - left, 3), RGB."""
        partly = self._stream is not None and self._pixels is None
        if partly and right - left >= MIN_PART_WIDTH:
            pixels = _decode_part(self._stream, top, left, bottom, right)
            if pixels is not None:
                return pixels
            shape = self._decode_whole().shape[:2]  # raises, unless Pillow is more lenient
            if shape != (self.height, self.width):
                raise BadImage(self._name, f"the header says {self.width} x {self.height} pixels")
        return self._decode_whole()[top:bottom, left:right]

    def _decode_whole(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels, self.note = decode(self._data, self._name)
        return self._pixels


def partial_decoding() -> bool:
    """Whether JPEGs are decoded in part here: whether nvidia-nvimgcodec is installed."""
    return _partial_decoder() is not None


def _is_whole_plain_jpeg(data: bytes) -> bool:
    return (
        data[:2] == b"\xff\xd8"
        and data.rstrip(b"\0").endswith(END_OF_IMAGE)
        and is_plain_jpeg(data)
    )


def _partial_decoder():
    """This process's decoder, or None; one that was made before a fork is not used after it."""
    return _make_decoder(os.getpid())


@cache
def _make_decoder(_pid: int):
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # damaged files are reported by us
    try:
        with _QuietStandardError():  # it names the CUDA libraries that it does without
            from nvidia import nvimgcodec

            backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
            return nvimgcodec.Decoder(device_id=CPU_ONLY, max_num_cpu_threads=1, backends=backends)
    except ImportError:
        return None


class _QuietStandardError:
    """Discards what C libraries write to standard error."""

    def __enter__(self):
        self._saved = os.dup(2)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)

    def __exit__(self, *_):
        os.dup2(self._saved, 2)
        os.close(self._saved)


def _open_stream(data: bytes):
    from nvidia import nvimgcodec

    try:
        return nvimgcodec.CodeStream(data)
    except RuntimeError:  # a header it does not understand
        return None


def _decode_part(stream, top: int, left: int, bottom: int, right: int) -> np.ndarray | None:
    from nvidia import nvimgcodec

    region = nvimgcodec.Region(start=[top, left], end=[bottom, right])
    try:
        image = _partial_decoder().decode(stream.get_sub_code_stream(region=region))
    except RuntimeError:
        return None
    return None if image is None else np.asarray(image)


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

        Pillow's ``resize((size, size), BILINEAR, box=...)`` gives the same pixels, within a gray
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


def center_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the center crop, rounded as torchvision's ``CenterCrop`` does."""
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
    # The bilinear filter reaches max(1, scale) pixels of the image from the center of a result's
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


def draw_inception_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a random rectangle (Szegedy et al. 2015, section 6).

    The rules are those of torchvision's ``RandomResizedCrop``: ten tries, then the largest center
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
