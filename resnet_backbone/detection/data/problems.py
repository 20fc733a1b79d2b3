"""What can be wrong with a detection data set, and what to do about it."""

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
from resnet_backbone.runtime.images import BadImage, read_rgb

logger = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")  # suffixes
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes that are always read
# Kinds that cost one box; every other kind costs an image, or the whole data set.
BOX_KINDS = ("bad-box", "unknown-class")
# Kinds that make a data set unusable under any policy.
FATAL_KINDS = ("empty-split", "broken-json")
THREADS, CHUNK = 16, 64  # files are read in threads: a network's disks answer slowly
_said: set[str] = set()  # remarks, in this process
Stamp = tuple[int, int]  # of a file: its size and the time of its last change; -1 where it is not


class DataProblem(NamedTuple):
    """One thing wrong in a data set.

    The kind is "missing-image", "unreadable-image", "size-mismatch", "missing-xml", "broken-xml",
    "missing-label", "missing-panoptic", "duplicate-id", "bad-entry", "bad-box", "unknown-class",
    "empty-split" or "broken-json".
    """

    kind: str
    file: str  # to look at: the image, its XML, the split file or the JSON
    detail: str  # what is wrong there, in words and numbers

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.detail}"


@dataclass
class DataReport:
    """The outcome of checking one split.

    Not annotated are a split none of whose images has an XML file, such as VOC 2012's test set, and
    COCO's lists of images alone: there is nothing to train on and nothing to compare with.
    """

    name: str  # what was checked, for messages
    num_images: int = 0  # named by the split, duplicates counted once
    problems: list[DataProblem] = field(default_factory=list)  # in the order of the split
    boxes: Counter[str] = field(default_factory=Counter)  # good, not difficult; every class
    difficult: Counter[str] = field(default_factory=Counter)  # good boxes marked difficult (VOC)
    annotated: bool = True
    clipped: list[str] = field(default_factory=list)  # boxes that ran past the edge
    notes: list[str] = field(default_factory=list)  # what is used, and not as it is written
    category_ids: list[int | str] = field(default_factory=list)  # COCO's, in the order of `boxes`
    # the files and folders that all of this was read from, as they were before
    files: dict[str, Stamp] = field(default_factory=dict, repr=False)

    @property
    def bad_boxes(self) -> list[DataProblem]:
        """Problems that cost one box each."""
        return [p for p in self.problems if p.kind in BOX_KINDS]

    @property
    def bad_files(self) -> list[DataProblem]:
        """Problems that cost an image (or, for "duplicate-id", its repetition)."""
        return [p for p in self.problems if p.kind not in BOX_KINDS]

    def add(self, kind: str, file: str, detail: str) -> None:
        self.problems.append(DataProblem(kind, file, detail))

    def watch(self, path: str) -> None:
        """Takes down what will be read, a file or a folder's list of files, as it is now."""
        if path not in self.files:
            self.files[path] = stamp_of(path)

    def note_look(self, look: Look) -> tuple[int, int] | None:
        """Takes down what a look at an image gave; its size, None if it cannot be used."""
        self.files.setdefault(look.path, look.stamp)
        if look.problem:
            self.problems.append(look.problem)
        return look.size

    def remarks(self) -> list[str]:
        """What a user should know of the data that are used, a line each."""
        lines = list(self.notes)
        if self.clipped:
            lines.append(
                f"{len(self.clipped)} boxes ran past the edge of their image and were clipped, the "
                f"first: {self.clipped[0]}"
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
        """Warns where all boxes lie in 0 to 1, which are shares of the image and no pixels.

        Args:
            largest: of all coordinates; minus infinity where there is no box.
        """
        if -math.inf < largest <= 1:
            self.notes.append(
                "all boxes lie between 0 and 1: these are shares of the image, and pixels are "
                "needed"
            )

    def add_empty(self, file: str, what: str = "no usable image") -> None:
        """Append that nothing of the split is left, and why."""
        kinds = Counter(problem.kind for problem in self.bad_files)
        if kinds:
            first = next(p for p in self.bad_files if p.kind == kinds.most_common(1)[0][0])
            words = (
                f"{kind.replace('-', ' ')} {number:,}x" for kind, number in kinds.most_common()
            )
            what += f" ({', '.join(words)}), such as {first.file}: {first.detail}"
        self.add("empty-split", file, what)


def unusable(name: str, problems: Sequence[DataProblem]) -> DataError:
    """Of what is wrong with a data set as a whole."""
    return DataError(f"{name} cannot be used: {_first_ten(one.detail for one in problems)}")


def _first_ten(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f"; and {len(texts) - 10} more" if len(texts) > 10 else ""
    return "; ".join(texts[:10]) + more


def apply_policy(report: DataReport, policy: str) -> None:
    """Acts on what a scan found: "drop" logs every problem, which is left out, "refuse" raises.

    Raises:
        DataError: listing the first 10 problems; by either policy where nothing usable would be
            left or the file cannot be loaded.
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
        _said.add(remark)  # once, for the files of one data set share their classes
        logger.warning("%s: %s", report.name, remark)


def read_image_size(path: str, decode: bool = False) -> tuple[int, int]:
    """Width and height in pixels as an image is loaded, turned by its EXIF orientation.

    Args:
        decode: decode every pixel too, which finds truncated files (slower, about 5 ms an image).

    Raises:
        OSError: the file is missing, is not an image, or is truncated.
    """
    try:
        with Image.open(path) as image:
            is_plain = image.mode in PLAIN
            size = image.size[::-1] if _swaps_sides(image) else image.size
        if is_plain and not decode:
            return size
        height, width, _ = read_rgb(path).shape  # as training and evaluation do
        return width, height
    except OSError:
        raise
    except BadImage as error:
        raise OSError(error.reason) from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_image(path: str, image_format: str) -> np.ndarray:
    """An image as training, evaluation and demo see it: uint8 (H, W, C), upright.

    Pictures of RGB and BGR are read by :func:`resnet_backbone.runtime.images.decode`, others by
    Detectron2.

    Raises:
        OSError: missing, truncated, or not an image.
    """
    if image_format not in ("RGB", "BGR"):
        return utils.read_image(path, image_format)
    try:
        pixels = read_rgb(path)
    except BadImage as error:
        raise OSError(error.reason) from error
    return pixels if image_format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def _swaps_sides(image: Image.Image) -> bool:
    with suppress(Exception):  # damaged EXIF data
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return False


class Look(NamedTuple):
    """What one look at an image file gave."""

    path: str
    stamp: Stamp
    size: tuple[int, int] | None = None  # (width, height); None where the file cannot be used
    problem: DataProblem | None = None


def look_at_image(path: str, stated: tuple[int, int] | None, decode: bool) -> Look:
    """Whether an image can be used.

    Args:
        stated: (width, height) that the annotation states; None where it states none.
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
    with Image.open(path) as image:
        is_turned = _swaps_sides(image)
    if is_turned and stated == size[::-1]:
        detail += (
            " after the turn that its EXIF orientation asks for: annotate the turned image, or "
            "take the orientation out of the file (exiftool -Orientation= FILE)"
        )
    return Look(path, stamp, None, DataProblem("size-mismatch", path, detail))


def stamp_of(path: str) -> Stamp:
    """By which a change of a file, or of a folder's list of files, is noticed."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name that cannot be one, such as with a NUL
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


def files_below(folder: Path, *suffixes: str) -> Iterator[Path]:
    """Files below a folder with one of these suffixes in any case, in the order of their names."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(place, name)


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Inside, errors that nobody expected become a DataError that names what was read.

    RESNET_BACKBONE_TRACEBACK shows where they came from; see :mod:`resnet_backbone.runtime.errors`.
    """
    try:
        yield
    except (UsageError, OSError):  # which say what is wrong
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read ({reason}): check the file") from error


def reads_file(function: Callable) -> Callable:
    """Decorator: the whole function is in :func:`reading` of its first argument."""

    @wraps(function)
    def call(path: str | os.PathLike, *args, **kwargs) -> Any:
        with reading(path):
            return function(path, *args, **kwargs)

    return call


def in_threads(work: Callable, arguments: Iterable[tuple]) -> Iterator[Any]:
    """``work(*one)`` for each of the arguments, in their order."""
    arguments = list(arguments)
    chunks = [arguments[start : start + CHUNK] for start in range(0, len(arguments), CHUNK)]
    # the filters of warnings are the process's, so threads that change them undo one another
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(lambda chunk: [work(*one) for one in chunk], chunks):
            yield from results


def fit_box(
    report: DataReport,
    file: str,
    name: str,
    box: Sequence[float],
    size: tuple[int, int],
    origin: int = 0,
) -> tuple[float, ...] | None:
    """A box as it is used: clipped by its image, or None and a problem in the report.

    Args:
        name: of the class, for messages.
        box: (xmin, ymin, xmax, ymax) in pixels.
        size: (width, height) of the image.
        origin: coordinate of the image's left and upper edge, 0 (COCO) or 1 (VOC).
    """
    x0, y0, x1, y1 = box
    if origin <= x0 < x1 <= size[0] and origin <= y0 < y1 <= size[1]:
        return tuple(box)
    text = f"{name} box ({', '.join(f'{side:g}' for side in box)})"
    inside = (max(x0, origin), max(y0, origin), min(x1, size[0]), min(y1, size[1]))
    problem = ""
    if not all(math.isfinite(side) for side in box):
        problem = "is not finite"
    elif box[2] <= box[0] or box[3] <= box[1]:
        problem = "has zero or negative size"
    elif inside[2] <= inside[0] or inside[3] <= inside[1]:
        problem = f"lies outside the {size[0]}x{size[1]} image"
    if problem:
        report.add("bad-box", file, f"{text} {problem}")
        return None
    if all(abs(new - old) <= 1 for new, old in zip(inside, box, strict=True)):
        return tuple(box)  # within a pixel: tools round differently
    report.clipped.append(f"{file}: {text} runs past the edge of the {size[0]}x{size[1]} image")
    return inside
