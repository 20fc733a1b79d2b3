"""Decoding a part of an image: of a JPEG only the rows and columns that a crop needs."""

from __future__ import annotations

import os
from functools import cache

import numpy as np

from resnet_backbone.classification.data.decode import BadImage, decode, is_plain_jpeg

END_OF_IMAGE = b"\xff\xd9"
MIN_PART_WIDTH = 32  # libjpeg smooths colour otherwise where less than two blocks are read
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
