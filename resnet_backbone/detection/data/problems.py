"""What can be wrong with a detection data set, what to do about it, and registering the rest.

A data set is scanned once: its loader and its evaluator share the records and the report of that
scan, so that a loader leaves out exactly what the report names.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from PIL import ExifTags, Image

from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import BadImage, read_rgb

logger = logging.getLogger(__name__)

PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes that are always read
# Kinds that cost one box; every other kind costs an image, or the whole data set.
BOX_KINDS = ("bad-box", "unknown-class")
# Kinds that make a data set unusable under any policy.
FATAL_KINDS = ("empty-split", "broken-json")


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
            lines.append(f"classes that differ in case alone: {', '.join(map(repr, spelled))}")
        if sum(self.difficult.values()) and not sum(self.boxes.values()):
            lines.append(
                "all objects are marked difficult, which training leaves out: "
                "RESNET_BACKBONE.TRAIN_ON_DIFFICULT True trains on them"
            )
        return lines

    def note_shares(self, sides: Iterable[Sequence[float]]) -> None:
        """Warns where all boxes lie in 0 to 1, which are shares of the image and no pixels."""
        sides = [side for box in sides for side in box]
        if sides and max(sides) <= 1:
            self.notes.append(
                "all boxes lie between 0 and 1: these are shares of the image, and pixels are "
                "needed"
            )

    def add_empty(self, file: str, what: str = "no usable image") -> None:
        """Append that nothing of the split is left, and why."""
        kinds = Counter(problem.kind for problem in self.bad_files)
        if kinds:
            first = next(p for p in self.bad_files if p.kind == kinds.most_common(1)[0][0])
            counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
            what += f": {counts}, such as {first.file} ({first.detail})"
        self.add("empty-split", file, what)


Scan = Callable[[], tuple[list[dict], DataReport]]
Select = Callable[[list[dict]], list[dict]]


def list_problems(problems: Sequence[DataProblem]) -> str:
    """The first ten problems, then how many more there are."""
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "; ".join(map(str, problems[:10])) + more


def apply_policy(report: DataReport, policy: str) -> None:
    """Acts on what a scan found: "drop" logs every problem, which is left out, "refuse" raises.

    Raises:
        DataError: listing the first 10 problems; by either policy where nothing usable would be
            left or the file cannot be loaded.
    """
    if policy not in ("refuse", "drop"):
        raise ValueError(f"bad-data policy {policy!r} is not known; use refuse or drop")
    fatal = [p for p in report.problems if p.kind in FATAL_KINDS]
    if fatal:
        raise DataError(f"{report.name} cannot be used: {list_problems(fatal)}")
    if report.problems and policy == "refuse":
        raise DataError(
            f"{report.name} has {len(report.problems)} problems; mend them, or train without these "
            f"boxes and images with `--bad-data drop`: {list_problems(report.problems)}"
        )
    for problem in report.problems:
        logger.warning("left out: %s", problem)
    for remark in report.remarks():
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


def is_turned(path: str) -> bool:
    """Whether the EXIF orientation of an image exchanges its sides."""
    with Image.open(path) as image:
        return _swaps_sides(image)


def check_image(
    report: DataReport, path: str, size: tuple[int, int] | None, decode: bool
) -> tuple[int, int] | None:
    """(width, height) in pixels; None, and a problem in the report, if the image cannot be used.

    Args:
        size: (width, height) that the annotation states; None where it states none.
        decode: see :func:`read_image_size`.
    """
    try:
        true_size = read_image_size(path, decode)
    except FileNotFoundError:
        report.add("missing-image", path, "no such file")
        return None
    except OSError as error:
        report.add("unreadable-image", path, str(error))
        return None
    if size is not None and size != true_size:
        detail = "annotation says {}x{}, the image is {}x{}".format(*size, *true_size)
        if size == true_size[::-1] and is_turned(path):
            detail += (
                " after the turn that its EXIF orientation asks for: annotate the turned image, or "
                "take the orientation out of the file (exiftool -Orientation= FILE)"
            )
        report.add("size-mismatch", path, detail)
        return None
    return true_size


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
    text = f"{name} box ({', '.join(f'{side:g}' for side in box)})"
    inside = (
        *(max(side, origin) for side in box[:2]),
        *(min(side, limit) for side, limit in zip(box[2:], size, strict=True)),
    )
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


def cached_by_version(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Decorator: a file is read again only after it has changed."""

    @cache
    def read_version(path: str, _version: tuple[int, int] | None) -> Any:
        return read(path)

    @wraps(read)
    def call(path: str) -> Any:
        found = os.stat(path) if os.path.exists(path) else None
        return read_version(path, found and (found.st_mtime_ns, found.st_size))

    return call


class ScannedDataset:
    """A registered data set: read and checked when it is first asked for, and only then.

    Called without arguments, as Detectron2's catalog does, it gives the records to use.
    """

    def __init__(self, scan: Scan, on_bad: str, select: Select):
        self._scan, self._on_bad, self._select = scan, on_bad, select
        self._pickled, self._report = b"", None

    def scan(self) -> tuple[list[dict], DataReport]:
        """New copies of all usable records, and the report; errors of :func:`apply_policy`."""
        if self._report is None:
            records, report = self._scan()
            apply_policy(report, self._on_bad)
            # smaller than the dicts, and nobody changes it
            self._pickled, self._report = pickle.dumps(records), report
        return pickle.loads(self._pickled), self._report

    def __call__(self) -> list[dict]:
        return self._select(self.scan()[0])


def register_once(
    name: str, scan: Scan, metadata: Mapping[str, Any], select: Select = list
) -> None:
    """Registers a :class:`ScannedDataset`; the same registration again does nothing.

    Args:
        scan: reads the data set: Detectron2's dicts of what is good in it, and the report.
        metadata: for Detectron2's catalog, with the policy under "on_bad".
        select: what the loader takes of the records; by default all of them.

    Raises:
        ValueError: `name` is registered with other metadata.
    """
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, ScannedDataset(scan, metadata["on_bad"], select))
        MetadataCatalog.get(name).set(**metadata)
        return
    known = MetadataCatalog.get(name)
    changed = [key for key, value in metadata.items() if known.get(key) != value]
    if changed:
        raise ValueError(
            f"data set {name!r} is registered already with another {', '.join(changed)};"
            " choose another name"
        )


def registered_scan(name: str) -> ScannedDataset | None:
    """The registered data set, whose scan others may share; None if other code registered it."""
    found = DatasetCatalog[name] if name in DatasetCatalog else None
    return found if isinstance(found, ScannedDataset) else None
