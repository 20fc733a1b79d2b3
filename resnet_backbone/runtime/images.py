"""Decodes image files to RGB bytes, whole or in part, and reports unreadable ones."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from resnet_backbone.runtime.files import names_below

EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .avif .ppm .pgm .pbm".split()
)
EXIF_ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258  # a tag of TIFF
ORIENTATION_TAGS = (b"\x01\x12", b"\x12\x01", b"Orientation")  # EXIF of both byte orders, XMP
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
MODE_NAMES = {"P": "palette", "1": "bitmap", "LA": "gray with alpha", "PA": "palette with alpha"}
MODE_NAMES |= dict.fromkeys(("I", "I;16", "I;16B", "I;16L"), "16-bit gray")
HARMLESS = "extraneous bytes before marker"  # libjpeg's warning about padding; no data is lost
END_OF_IMAGE = b"\xff\xd9"
MIN_PART_WIDTH = 32  # libjpeg upsamples color differently if it reads less than two blocks
CPU_ONLY = -99999  # nvImageCodec's NVIMGCODEC_DEVICE_CPU_ONLY


class BadImage(ValueError):
    """An unreadable image, with its ``path``, which may be in a shard, and the ``reason``."""

    def __init__(self, path: str | os.PathLike, reason: str):
        self.path, self.reason = str(path), " ".join(str(reason).split())
        super().__init__(self.path, self.reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Decoded(NamedTuple):
    pixels: np.ndarray  # uint8 (H, W, 3), RGB, upright
    note: str = ""  # what was converted ("CMYK", "EXIF orientation 6")


def find_pictures(paths: Sequence[str | Path], option: str = "--images") -> list[Path]:
    """Returns the given files, and for a folder all images below it, see :func:`list_images`."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{option} {path}: no such file or folder")
        found += [path / name for name in list_images(path)] if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{option} {' '.join(map(str, paths))}: no images found")
    return found


def list_images(folder: str | os.PathLike) -> list[str]:
    """Returns the sorted names of the images below a folder, relative to it; not hidden ones."""
    return sorted(names_below(folder, *EXTENSIONS))


def is_image(name: str) -> bool:
    """Returns whether a file name has an image's extension and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def spread(files: list[Path], count: int) -> list[Path]:
    """Returns at most ``count`` of the files, evenly spaced."""
    number = min(count, len(files))
    return [files[index * len(files) // number] for index in range(number)]


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Reads an image file as uint8 (H, W, 3), RGB, see :func:`decode`; BadImage if unreadable."""
    return decode(read_bytes(path), path).pixels


def read_bytes(path: str | os.PathLike) -> bytes:
    """Reads the content of an image file; BadImage if this fails."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error


def decode(data: bytes, name: str | os.PathLike = "<bytes>") -> Decoded:
    """Decodes an image of any format that Pillow reads.

    CMYK (also Adobe's inverted form), palettes, gray levels and bitmaps become RGB as in Pillow's
    ``convert``. Transparency is dropped, as in torchvision's ImageFolder. 12 and 16-bit gray levels
    are reduced to their high byte, as in libpng. Floating-point levels are taken as 0 to 1, 255 or
    65,535. The EXIF orientation is applied, unlike in ImageFolder.

    Args:
        data: a whole file.
        name: for messages.

    Raises:
        BadImage: empty, truncated, damaged, or not an image.
    """
    if not data:
        raise BadImage(name, "the file is empty")
    if is_plain_jpeg(data):
        try:
            return Decoded(simplejpeg.decode_jpeg(data, "RGB"))
        except ValueError as error:
            lost = "Premature end" in str(error) or "Corrupt JPEG" in str(error)
            if lost and HARMLESS not in str(error):  # libjpeg fills missing parts with gray
                raise BadImage(name, f"truncated or damaged JPEG ({error})") from error
    return _decode_by_pillow(data, name)


def is_plain_jpeg(data: bytes) -> bool:
    """Returns whether this is a JPEG of 8-bit gray or RGB pixels that are stored upright.

    A damaged header also gives False, so that Pillow, which is slower, decides.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    place = 2
    try:
        while data[place] == 0xFF:
            marker, length = struct.unpack_from(">BH", data, place + 1)
            content = data[place + 4 : place + 2 + length]
            if marker in START_OF_FRAME:
                precision, height, _, components = struct.unpack_from(">BHHB", content)
                return precision == 8 and height > 0 and components in (1, 3)
            has_tag = marker == 0xE1 and any(tag in content for tag in ORIENTATION_TAGS)
            if has_tag and not _is_upright(data):
                return False
            place += 2 + length
    except (struct.error, IndexError):
        pass
    return False


def _is_upright(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _orientation(JpegImageFile(io.BytesIO(data))) == 1
        except Exception:  # damaged headers raise errors of many types
            return False


def _decode_by_pillow(data: bytes, name: str | os.PathLike) -> Decoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata, palettes with transparency
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                orientation = _orientation(image)
                return Decoded(_to_rgb(image, orientation, name), _note(image, orientation))
        except BadImage:
            raise
        except Image.UnidentifiedImageError as error:
            raise BadImage(name, "not an image of a known format") from error
        except Exception as error:  # Pillow's plugins raise errors of many types
            raise BadImage(name, str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not make the pixels bad
        return 1
    return value if value in range(1, 9) else 1


def _note(image: Image.Image, orientation: int) -> str:
    notes = [] if image.mode in ("RGB", "L") else [MODE_NAMES.get(image.mode, image.mode)]
    if orientation != 1:
        notes.append(f"EXIF orientation {orientation}")
    return ", ".join(notes)


def _to_rgb(image: Image.Image, orientation: int, name: str | os.PathLike) -> np.ndarray:
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(image, name))
    return np.array(image.convert("RGB"))


def _to_bytes(image: Image.Image, name: str | os.PathLike) -> np.ndarray:
    """Converts gray levels of more than 8 bits to uint8 (H, W), the high byte of their range."""
    levels = np.asarray(image).astype(np.float64)
    least, most = levels.min(), levels.max()
    if image.mode not in ("F", "I"):  # 16 bits, or the 12 that a TIFF file states
        stated = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
        whole = 4095 if stated in (12, (12,)) else 65535
    elif image.mode == "F" and most <= 1:
        whole = 1
    else:  # a PNG has 16 bits, however dark it is
        whole = 255 if most <= 255 and image.format != "PNG" else 65535
    if not (np.isfinite(levels).all() and least >= 0 and most <= whole):
        raise BadImage(
            name, f"pixels of {least:g} to {most:g} have no known range; convert it to 8 bits"
        )
    return (levels * 255 if whole == 1 else levels // ((whole + 1) / 256)).astype(np.uint8)


class EncodedImage:
    """An image whose size is known and whose parts can be decoded.

    With the package nvidia-nvimgcodec (its CPU decoder, libjpeg-turbo), plain JPEGs are decoded in
    part, to the same pixels in about half the time. A partial decoder does not see damage outside
    of the rectangle. Truncated files are decoded whole and checked by :func:`decode`, but damage
    in the middle of a complete file may go unnoticed.

    Attributes:
        height, width: pixels, of the upright image.
        note: see :class:`Decoded`; set after pixels were decoded.

    Args:
        data, name: see :func:`decode`, whose BadImage may also come from :meth:`region`.
        partial: False decodes every image whole.
    """

    def __init__(self, data: bytes, name: str | os.PathLike = "<bytes>", partial: bool = True):
        self._data, self._name = data, name
        self._pixels: np.ndarray | None = None
        self.note = ""
        ends = data.rstrip(b"\0").endswith(END_OF_IMAGE)
        in_part = partial and ends and partial_decoding() and is_plain_jpeg(data)
        self._stream = _open_stream(data) if in_part else None
        if self._stream is not None:
            self.height, self.width = self._stream.height, self._stream.width
        else:
            self.height, self.width = self._decode_whole().shape[:2]

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """Decodes [top, bottom) x [left, right): uint8 (bottom - top, right - left, 3), RGB."""
        in_part = self._stream is not None and self._pixels is None
        if in_part and right - left >= MIN_PART_WIDTH:
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
    """Returns whether JPEGs can be decoded in part, that is, nvidia-nvimgcodec is installed."""
    return _decoder(os.getpid()) is not None


@cache
def _decoder(_pid: int):
    """Returns this process's decoder, or None; a forked process makes its own."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # damaged files are reported by us
    try:
        with _quiet_standard_error():  # it lists missing CUDA libraries
            from nvidia import nvimgcodec

            backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
            return nvimgcodec.Decoder(device_id=CPU_ONLY, max_num_cpu_threads=1, backends=backends)
    except ImportError:
        return None


@contextmanager
def _quiet_standard_error() -> Iterator[None]:
    """Discards output of C libraries to standard error."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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
        image = _decoder(os.getpid()).decode(stream.get_sub_code_stream(region=region))
    except RuntimeError:
        return None
    return None if image is None else np.asarray(image)
