"""One image file to RGB bytes, whatever it holds; what cannot be read says why."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112
SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
MODE_NAMES = {"P": "palette", "1": "bitmap", "LA": "gray with alpha", "PA": "palette with alpha"}
MODE_NAMES |= dict.fromkeys(("I", "I;16", "I;16B", "I;16L"), "16-bit gray")
HARMLESS = "extraneous bytes before marker"  # libjpeg's warning about padding: nothing is lost


class BadImage(ValueError):
    """An image that cannot be read.

    Attributes:
        path: its file, or its name within a shard.
        reason: one line.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        self.path, self.reason = str(path), " ".join(str(reason).split())
        super().__init__(self.path, self.reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Decoded(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: uint8 (H, W, 3), RGB, upright.
        note: what was converted ("CMYK", "EXIF orientation 6"), empty for an ordinary image.
    """

    pixels: np.ndarray
    note: str = ""


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Reads an image file as uint8 (H, W, 3), RGB; see :func:`decode` for what is understood.

    Raises:
        BadImage: anything that is not a whole image.
    """
    return decode(read_bytes(path), path).pixels


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of an image file; BadImage where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error


def decode(data: bytes, name: str | os.PathLike = "<bytes>") -> Decoded:
    """Decodes an image of any format that Pillow knows.

    CMYK (Adobe's inverted form too), palettes, gray levels and bitmaps become RGB as by Pillow's
    ``convert``; transparency is dropped, as torchvision's ImageFolder does; of 16-bit gray levels
    the high byte is kept, as libpng does. The EXIF orientation is applied: what a person sees is
    what the network sees (torchvision's ImageFolder leaves such images lying on their side).

    Ordinary JPEGs take a short way, whose pixels equal Pillow's.

    Args:
        data: a whole file.
        name: for messages.

    Raises:
        BadImage: empty, truncated, damaged, or not an image.
    """
    if not data:
        raise BadImage(name, "the file is empty")
    if data[:2] == b"\xff\xd8" and is_plain_jpeg(data):
        pixels = decode_plain_jpeg(data, name)
        if pixels is not None:
            return Decoded(pixels)
    return _decode_by_pillow(data, name)


def decode_plain_jpeg(data: bytes, name: str | os.PathLike) -> np.ndarray | None:
    """Decodes a JPEG for which :func:`is_plain_jpeg` holds: uint8 (H, W, 3).

    Returns:
        None where the decoder passes, and Pillow is to judge.

    Raises:
        BadImage: libjpeg would fill the missing part with gray.
    """
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        message = str(error)
        if HARMLESS not in message and ("Premature end" in message or "Corrupt JPEG" in message):
            raise BadImage(name, f"truncated or damaged JPEG ({message})") from error
        return None


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG has 8-bit gray or RGB pixels that are stored upright.

    False also where the header is damaged: Pillow is to judge.
    """
    try:
        for marker, start, end in _header_segments(data):
            if marker in SOF_MARKERS:
                precision, height, _, components = struct.unpack_from(">BHHB", data, start)
                return precision == 8 and height > 0 and components in (1, 3)
            if marker == 0xE1 and not _is_upright(data[start:end]):
                return False
    except (struct.error, IndexError):
        pass
    return False


def _header_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment's content up to the first scan."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
        elif marker in STANDALONE_MARKERS:
            place += 2
        elif marker in (0xDA, 0xD9):
            return
        else:
            length = struct.unpack_from(">H", data, place + 2)[0]
            yield marker, place + 4, place + 2 + length
            place += 2 + length


def _is_upright(segment: bytes) -> bool:
    """Whether an APP1 segment (EXIF or XMP) leaves the image as it is stored."""
    if not segment.startswith(b"Exif\0\0"):
        return b"Orientation" not in segment
    if b"\x12\x01" not in segment and b"\x01\x12" not in segment:
        return True
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(EXIF_ORIENTATION, 1) == 1
    except Exception:  # damaged EXIF has many shapes; Pillow is to judge
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
            reason = str(error) or type(error).__name__
            raise BadImage(name, reason) from error


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
    if image.mode == "F":
        raise BadImage(name, "floating-point pixels have no known range; convert it to 8 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImage(name, "32-bit pixels have no known range; convert it to 8 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))
