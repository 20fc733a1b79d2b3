"""What can be wrong with a detection data set, what to do about it, and registering the rest.

A data set is scanned once: its check, its loader and its evaluator share the records and the report
of that scan, so that a loader leaves out exactly what the check reports.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tabulate import tabulate

from resnet_backbone.runtime.errors import DataError

logger = logging.getLogger(__name__)

Scan = Callable[[], tuple[list[dict], "DataReport"]]
"""Reads a data set: Detectron2's dicts of what is good in it, and the report of what is not."""

BOX_KINDS = ("bad-box", "unknown-class")
"""Kinds that cost one box; every other kind costs an image, or the whole data set."""

FATAL_KINDS = ("empty-split", "broken-json")
"""Kinds that make a data set unusable under any policy."""

POLICIES = ("refuse", "drop")

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class DataProblem:
    """One thing wrong in a data set.

    Attributes:
        kind: "missing-image", "unreadable-image", "size-mismatch", "missing-xml", "broken-xml",
            "missing-label", "missing-panoptic", "duplicate-id", "bad-box", "unknown-class",
            "empty-split" or "broken-json".
        file: the file to look at: the image, its XML, the split file or the JSON.
        detail: what is wrong there, in words and numbers.
    """

    kind: str
    file: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.detail}"


@dataclass
class DataReport:
    """The outcome of checking one split.

    Attributes:
        name: what was checked, for messages.
        num_images: images named by the split, duplicates counted once.
        problems: everything that is wrong, in the order of the split.
        boxes: good boxes per class that are not difficult, classes without any included.
        difficult: good boxes per class that are marked difficult (VOC only).
        annotated: False for a split none of whose images has an XML file, such as VOC 2012's test
            set, and for COCO's lists of images alone: there is nothing to train on and nothing to
            compare with.
    """

    name: str
    num_images: int = 0
    problems: list[DataProblem] = field(default_factory=list)
    boxes: Counter[str] = field(default_factory=Counter)
    difficult: Counter[str] = field(default_factory=Counter)
    annotated: bool = True

    @property
    def bad_boxes(self) -> list[DataProblem]:
        """Problems that cost one box each."""
        return [p for p in self.problems if p.kind in BOX_KINDS]

    @property
    def bad_files(self) -> list[DataProblem]:
        """Problems that cost an image (or, for "duplicate-id", its repetition)."""
        return [p for p in self.problems if p.kind not in BOX_KINDS]

    def add(self, kind: str, file: str, detail: str) -> None:
        """Append a :class:`DataProblem`."""
        self.problems.append(DataProblem(kind, str(file), detail))

    def add_empty(self, file: str, what: str = "no usable image") -> None:
        """Append that nothing of the split is left, and why."""
        kinds = Counter(problem.kind for problem in self.bad_files)
        if kinds:
            first = next(p for p in self.bad_files if p.kind == kinds.most_common(1)[0][0])
            counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
            what += f": {counts}, such as {first.file} ({first.detail})"
        self.add("empty-split", file, what)

    def count(self, class_name: str, difficult: bool = False) -> None:
        """Count one good box."""
        (self.difficult if difficult else self.boxes)[class_name] += 1

    def summary(self, max_problems: int = 10) -> str:
        """Text: a headline, the class histogram, the first `max_problems` problems."""
        kinds = Counter(p.kind for p in self.problems)
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "no problems"
        total, difficult = sum(self.boxes.values()), sum(self.difficult.values())
        lines = [
            f"{self.name}: {self.num_images} images, {total} boxes and {difficult} difficult ones,"
            f" {found}"
        ]
        rows = [(c, self.boxes[c], self.difficult[c]) for c in self.boxes]
        lines.append(tabulate(rows, headers=("class", "boxes", "difficult")))
        return "\n".join(lines + list_problems(self.problems, max_problems))


def list_problems(problems: Sequence[DataProblem], limit: int) -> list[str]:
    """One indented line for each of the first `limit` problems, then how many more there are."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return lines


def apply_policy(report: DataReport, policy: str) -> None:
    """Act on what a check found.

    Args:
        report: of :func:`check_voc` or :func:`check_coco`.
        policy: "refuse" raises if anything is wrong; "drop" logs every problem and returns, for
            the loaders leave the bad boxes and images out.

    Raises:
        DataError: by "refuse", listing the first 10 problems; by either policy where nothing
            usable would be left or the file cannot be loaded.
        ValueError: unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"bad-data policy {policy!r} is not known; use one of {POLICIES}")
    fatal = [p for p in report.problems if p.kind in FATAL_KINDS]
    if fatal:
        more = f"; and {len(fatal) - 10} more" if len(fatal) > 10 else ""
        listed = "; ".join(map(str, fatal[:10]))
        raise DataError(f"{report.name} cannot be used: {listed}{more}")
    if report.problems and policy == "refuse":
        head = (
            f"{report.name} has {len(report.problems)} problems;"
            " mend them, or train without these boxes and images with `--bad-data drop`:"
        )
        raise DataError("\n".join([head, *list_problems(report.problems, 10)]))
    for problem in report.problems:
        logger.warning("left out: %s", problem)


def read_image_size(path: str, decode: bool = False) -> tuple[int, int]:
    """Width and height of an image as Detectron2 will load it, in pixels.

    Detectron2 turns an image by its EXIF orientation, so a turned image's sides change places.

    Args:
        path: the image file.
        decode: decode every pixel too, which finds truncated files (slower, about 5 ms an image).

    Raises:
        OSError: the file is missing, is not an image, or is truncated.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if decode:
                image.load()
            if _exif_orientation(image) in (5, 6, 7, 8):
                width, height = height, width
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error
    return width, height


def _exif_orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data; Detectron2 leaves the image as it is, too
        return None


def check_image(
    report: DataReport, path: str, size: tuple[int, int] | None, decode: bool
) -> tuple[int, int] | None:
    """Report a missing, unreadable or differently sized image.

    Args:
        report: gets the problem.
        path: the image file.
        size: (width, height) that the annotation states; None where it states none.
        decode: see :func:`read_image_size`.

    Returns:
        (width, height) in pixels, or None if the image cannot be used.
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
        report.add("size-mismatch", path, detail)
        return None
    return true_size


def box_problem(box: Sequence[float], size: tuple[int, int], origin: int = 0) -> str | None:
    """Why a box is unusable, or None.

    Args:
        box: (xmin, ymin, xmax, ymax) in pixels.
        size: (width, height) of the image.
        origin: coordinate of the image's left and upper edge, 0 (COCO) or 1 (VOC).
    """
    x1, y1, x2, y2 = box
    text = "box ({:g}, {:g}, {:g}, {:g})".format(*box)
    if not all(math.isfinite(v) for v in box):
        return f"{text} is not finite"
    if x2 <= x1 or y2 <= y1:
        return f"{text} has zero or negative size"
    if min(x1, y1) < origin - 1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        return f"{text} lies outside the {size[0]}x{size[1]} image"
    return None


class ScannedDataset:
    """A registered data set: read and checked when it is first asked for, and only then.

    Called without arguments, as Detectron2's catalog does, it gives the records to use.

    Args:
        scan: reads the data set.
        on_bad: policy for what is wrong, see :func:`apply_policy`.
        select: what the loader takes of the records; by default all of them.
    """

    def __init__(
        self,
        scan: Scan,
        on_bad: str = "drop",
        select: Callable[[list[dict]], list[dict]] = list,
    ):
        self._scan, self._on_bad, self._select = scan, on_bad, select
        self._pickled, self._report, self._accepted = b"", None, False

    def scan(self) -> tuple[list[dict], DataReport]:
        """New copies of all usable records, and the report."""
        if self._report is None:
            records, self._report = self._scan()
            self._pickled = pickle.dumps(records)  # smaller than the dicts, and nobody changes it
        return pickle.loads(self._pickled), self._report

    def __call__(self) -> list[dict]:
        """New copies of the records that the loader takes.

        Raises:
            DataError: see :func:`apply_policy`.
        """
        records, report = self.scan()
        if not self._accepted:
            apply_policy(report, self._on_bad)
            self._accepted = True
        return self._select(records)


def register_once(name: str, dataset: ScannedDataset, metadata: Mapping[str, Any]) -> None:
    """Registers `name` with Detectron2's catalogs; the same registration again does nothing.

    Raises:
        ValueError: `name` is registered with other metadata.
    """
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        changed = [key for key, value in metadata.items() if known.get(key) != value]
        if changed:
            raise ValueError(
                f"data set {name!r} is registered already with another {', '.join(changed)};"
                " choose another name"
            )
        return
    DatasetCatalog.register(name, dataset)
    MetadataCatalog.get(name).set(**metadata)


def registered_scan(name: str) -> ScannedDataset | None:
    """The registered data set, whose scan others may share; None if other code registered it."""
    found = DatasetCatalog[name] if name in DatasetCatalog else None
    return found if isinstance(found, ScannedDataset) else None
