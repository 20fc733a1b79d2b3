"""Problems of detection data sets: how they are found, reported and handled."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import detection_utils as utils
from PIL import ExifTags, Image

from resnet_backbone.runtime.errors import DataError, UsageError
from resnet_backbone.runtime.files import names_below
from resnet_backbone.runtime.images import BadImage, read_rgb

logger = logging.getLogger(__name__)

PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes that can always be read
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Kinds that drop one box; every other kind drops an image or the whole data set.
BOX_KINDS = ("bad-box", "unknown-class")
# Kinds that make a data set unusable under any policy.
FATAL_KINDS = ("empty-split", "broken-json")
THREADS, CHUNK = 16, 64  # files are read in threads, since network disks have high latency
_said: set[str] = set()  # remarks already logged by this process
Stamp = tuple[int, int]  # a file's size and modification time (ns); -1 if it does not exist


class DataProblem(NamedTuple):
    """One thing wrong in a data set.

    The kind is "missing-image", "unreadable-image", "size-mismatch", "missing-xml", "broken-xml",
    "missing-label", "missing-panoptic", "duplicate-id", "bad-entry", "bad-box", "unknown-class",
    "empty-split" or "broken-json".
    """

    kind: str
    file: str  # the image, its XML, the split file or the JSON
    detail: str  # what is wrong there

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.detail}"


@dataclass
class DataReport:
    """The outcome of checking one split.

    A split is not annotated if none of its images has an XML file (VOC 2012's test set), or if a
    COCO file has only a list of images. Then there is nothing to train on or to compare with.
    """

    name: str  # what was checked, for messages
    num_images: int = 0  # named by the split, duplicates counted once
    problems: list[DataProblem] = field(default_factory=list)  # in the order of the split
    boxes: Counter[str] = field(default_factory=Counter)  # good, not difficult; every class
    difficult: Counter[str] = field(default_factory=Counter)  # good boxes marked difficult (VOC)
    annotated: bool = True
    clipped: list[str] = field(default_factory=list)  # boxes that ran past the edge
    notes: list[str] = field(default_factory=list)  # what is used differently than written
    category_ids: list[int | str] = field(default_factory=list)  # COCO's, in the order of `boxes`
    # all files and folders that were read, as they were before
    files: dict[str, Stamp] = field(default_factory=dict, repr=False)

    @property
    def bad_boxes(self) -> list[DataProblem]:
        """Problems that drop one box each."""
        return [p for p in self.problems if p.kind in BOX_KINDS]

    @property
    def bad_files(self) -> list[DataProblem]:
        """Problems that drop an image (or, for "duplicate-id", its repetition)."""
        return [p for p in self.problems if p.kind not in BOX_KINDS]

    def add(self, kind: str, file: str, detail: str) -> None:
        texts = (text.encode(errors="backslashreplace").decode() for text in (file, detail))
        self.problems.append(DataProblem(kind, *texts))  # names of files may not be UTF-8

    def watch(self, path: str) -> None:
        """Records the current stamp of a file, or a folder's list of files, before it is read."""
        if path not in self.files:
            self.files[path] = stamp_of(path)

    def note_look(self, look: Look) -> tuple[int, int] | None:
        """Records the result for an image; returns its size, or None if it cannot be used."""
        self.files.setdefault(look.path, look.stamp)
        if look.problem:
            self.problems.append(look.problem)
        return look.size

    def remarks(self) -> list[str]:
        """Returns what a user should know about the data that are used, one line each."""
        lines = list(self.notes)
        if self.clipped:
            many = len(self.clipped) > self.boxes.total() / 4
            hint = " (are they corners, where width and height are expected?)" if many else ""
            lines.append(
                f"{len(self.clipped)} boxes ran past the edge of their image and were clipped"
                f"{hint}, the first: {self.clipped[0]}"
            )
        same = Counter(name.lower() for name in self.boxes)
        for name in (name for name, times in same.items() if times > 1):
            spelled = [one for one in self.boxes if one.lower() == name]
            lines.append(f"classes that differ only in case: {', '.join(map(repr, spelled))}")
        if sum(self.difficult.values()) and not sum(self.boxes.values()):
            lines.append(
                "all objects are marked difficult, which training leaves out: "
                "RESNET_BACKBONE.TRAIN_ON_DIFFICULT True trains on them"
            )
        return lines

    def note_shares(self, largest: float) -> None:
        """Adds a note if all boxes lie in 0 to 1: fractions of the image instead of pixels.

        Args:
            largest: the largest coordinate; minus infinity without boxes.
        """
        if -math.inf < largest <= 1:
            self.notes.append(
                "all boxes lie between 0 and 1: these are shares of the image, and pixels are "
                "needed"
            )

    def add_empty(self, file: str, what: str = "no usable image") -> None:
        """Adds the problem that nothing of the split is left, and why."""
        bad = self.bad_files or self.problems
        kinds = Counter(problem.kind for problem in bad)
        if kinds:
            first = next(p for p in bad if p.kind == kinds.most_common(1)[0][0])
            words = (
                f"{kind.replace('-', ' ')} {number:,}x" for kind, number in kinds.most_common()
            )
            what += f" ({', '.join(words)}), such as {first.file}: {first.detail}"
        self.add("empty-split", file, what)


def unusable(name: str, problems: Sequence[DataProblem]) -> DataError:
    """Returns an error for a data set that cannot be used at all."""
    return DataError(f"{name} cannot be used: {_first_ten(one.detail for one in problems)}")


def _first_ten(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f"; and {len(texts) - 10} more" if len(texts) > 10 else ""
    return "; ".join(texts[:10]) + more


def apply_policy(report: DataReport, policy: str) -> None:
    """Acts on the problems of a scan: "drop" logs each dropped item, "refuse" raises.

    Raises:
        DataError: lists the first 10 problems; under either policy if nothing usable would be left
            or the file cannot be loaded.
    """
    if policy not in ("refuse", "drop"):
        raise ValueError(f"unknown bad-data policy {policy!r}; use refuse or drop")
    fatal = [p for p in report.problems if p.kind in FATAL_KINDS]
    if fatal:
        raise unusable(report.name, fatal)
    if report.problems and policy == "refuse":
        raise DataError(
            f"{report.name} has {len(report.problems)} problems; correct them, or leave them "
            f"out of training with `--bad-data drop`: {_first_ten(map(str, report.problems))}"
        )
    for problem in report.problems:
        logger.warning("left out: %s", problem)
    for remark in (one for one in report.remarks() if one not in _said):
        _said.add(remark)  # only once, since the files of a data set share their classes
        logger.warning("%s: %s", report.name, remark)


@contextmanager
def decoding() -> Iterator[None]:
    """Turns what Pillow's decoders raise on damaged files, of many types, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_image_size(path: str, decode: bool = False) -> tuple[int, int]:
    """Returns an image's width and height in pixels, after rotation by its EXIF orientation.

    Args:
        decode: decode every pixel too, which finds truncated files (about 5 ms per image).

    Raises:
        OSError: the file is missing, is not an image, or is truncated.
    """
    with decoding():
        with Image.open(path) as image:
            is_plain = image.mode in PLAIN
            size = image.size[::-1] if _orientation(image) in SWAPPED else image.size
        if is_plain and not decode:
            return size
        height, width, _ = read_image(path, "RGB").shape  # as training and evaluation do
        return width, height


def read_image(path: str, image_format: str) -> np.ndarray:
    """Reads an image as in training, evaluation and demo: uint8 (H, W, C), upright.

    RGB and BGR images are read by :func:`resnet_backbone.runtime.images.decode`, other formats by
    Detectron2.

    Raises:
        OSError: the file is missing, truncated, or not an image.
    """
    if image_format not in ("RGB", "BGR"):
        return utils.read_image(path, image_format)
    try:
        pixels = read_rgb(path)
    except BadImage as error:
        raise OSError(error.reason) from error
    return pixels if image_format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def is_turned(path: str) -> bool:
    """Whether an image's EXIF orientation turns or mirrors it."""
    with Image.open(path) as image:
        return _orientation(image) in range(2, 9)


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # damaged EXIF data
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


class Look(NamedTuple):
    """The result of checking one image file."""

    path: str
    stamp: Stamp
    size: tuple[int, int] | None = None  # (width, height); None if the file cannot be used
    problem: DataProblem | None = None


def look_at_image(path: str, stated: tuple[int, int] | None, decode: bool) -> Look:
    """Checks whether an image can be used.

    Args:
        stated: (width, height) from the annotation; None if it states none.
        decode: see :func:`read_image_size`.
    """
    stamp = stamp_of(path)
    try:
        size = read_image_size(path, decode)
    except FileNotFoundError:
        return Look(path, stamp, None, DataProblem("missing-image", path, "no such file"))
    except OSError as error:
        return Look(path, stamp, None, DataProblem("unreadable-image", path, str(error)))
    if stated is None or stated == size:
        return Look(path, stamp, size)
    detail = "the annotation states {}x{}, but the image is {}x{}".format(*stated, *size)
    if is_turned(path) and stated == size[::-1]:
        detail += (
            " after the turn that its EXIF orientation asks for: annotate the turned image, or "
            "take the orientation out of the file (exiftool -Orientation= FILE)"
        )
    else:
        detail += ": give the image that was annotated, or scale the boxes"
    return Look(path, stamp, None, DataProblem("size-mismatch", path, detail))


def stamp_of(path: str) -> Stamp:
    """Returns a stamp that changes with a file or with a folder's list of files."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # an invalid name, such as one with a NUL
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


def files_below(folder: Path, *suffixes: str) -> Iterator[Path]:
    """Yields the files below a folder, see :func:`~resnet_backbone.runtime.files.names_below`."""
    return (folder / name for name in names_below(folder, *suffixes))


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Context that turns unexpected errors into a DataError that names the file.

    RESNET_BACKBONE_TRACEBACK shows where they came from; see :mod:`resnet_backbone.runtime.errors`.
    """
    try:
        yield
    except (UsageError, OSError):  # these already say what is wrong
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read ({reason}): check the file") from error


def reads_file(function: Callable) -> Callable:
    """Decorator that runs a function within :func:`reading` of its first argument."""

    @wraps(function)
    def call(path: str | os.PathLike, *args, **kwargs) -> Any:
        with reading(path):
            return function(path, *args, **kwargs)

    return call


def in_threads(work: Callable, arguments: Iterable[tuple]) -> Iterator[Any]:
    """Yields ``work(*one)`` for each of the arguments, in order."""
    arguments = list(arguments)
    chunks = [arguments[start : start + CHUNK] for start in range(0, len(arguments), CHUNK)]
    # warning filters are global to the process, so threads would restore each other's changes
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(lambda chunk: [work(*one) for one in chunk], chunks):
            yield from results
