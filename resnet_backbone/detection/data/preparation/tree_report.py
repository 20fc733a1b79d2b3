"""What a check of a whole folder found: as text, as JSON, as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.detection_utils import read_image
from matplotlib.figure import Figure
from tabulate import tabulate

from resnet_backbone.detection.data.preparation.official import Counts, archive_of
from resnet_backbone.detection.data.problems import BOX_KINDS, DataProblem, DataReport
from resnet_backbone.detection.inference.pictures import (
    contact_sheet,
    draw_ground_truth,
    save_image,
)
from resnet_backbone.report.plots import COLORS, save_png

SHOWN = 5  # problems of a kind that are printed
GONE = ("missing-image", "missing-xml")
OF_IMAGES = ("missing-image", "unreadable-image")
COLUMNS = 4
PARTS = {"trainval": ("train", "val")}  # splits that another one unites


@dataclass
class SplitCheck:
    """What one split holds.

    Attributes:
        name: file in ImageSets/Main or in annotations, without its suffix.
        report: what is good in it and what is not.
        class_names: position = category_id.
        files: images that can be opened.
        samples: some of them as (file, boxes as x0 y0 x1 y1 in pixels, category ids).
        official: what it should hold; None for a split that is not official.
    """

    name: str
    report: DataReport
    class_names: list[str]
    files: list[str]
    samples: list[tuple[str, list, list[int]]]
    official: Counts | None = None

    @property
    def counts(self) -> Counts:
        """What it holds; boxes are good ones."""
        if not self.report.annotated:
            return Counts(self.report.num_images)
        boxes, difficult = (
            sum(kind.values()) for kind in (self.report.boxes, self.report.difficult)
        )
        return Counts(self.report.num_images, boxes, difficult or None)

    def miscounts(self) -> list[str]:
        """Where it is not what it should be: "2,400 images, officially 2,501"."""
        if self.official is None:
            return []
        bad, found = len(self.report.bad_boxes), []
        for what, slack in (("images", 0), ("boxes", bad), ("difficult", bad)):
            number, wanted = getattr(self.counts, what), getattr(self.official, what)
            if wanted is None or (number is not None and wanted - slack <= number <= wanted):
                continue
            unit = "difficult boxes" if what == "difficult" else what
            found.append(f"{number or 0:,} {unit}, officially {wanted:,}")
        return found


@dataclass
class TreeCheck:
    """What one VOC folder or one COCO folder holds.

    Attributes:
        folder: its path.
        kind: "voc" or "coco".
        official: its official name, "VOC2007", "VOC2012" or "coco"; "" for a user's own data.
        splits: those that could be read.
        absent: what is missing as a whole, a line each that says how to mend it.
        unlisted: images that are in no split.
        decoded: how many images were decoded; 0 where only their headers were read.
    """

    folder: str
    kind: str
    official: str = ""
    splits: list[SplitCheck] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    decoded: int = 0

    @property
    def damaged(self) -> bool:
        """Whether something is missing, corrupt, or not as many as it should be."""
        return bool(self.absent) or any(
            split.report.bad_files or split.miscounts() for split in self.splits
        )


def summary(tree: TreeCheck) -> str:
    """Text: what was checked, the splits, the boxes per class, what is wrong, how to mend it."""
    how = f"as the official {tree.official}" if tree.official else "as data of your own"
    read = f"{tree.decoded:,} images decoded" if tree.decoded else "only the headers of images read"
    lines = [f"{tree.folder}, checked {how}: {read}", "", _split_table(tree), "", class_table(tree)]
    if tree.unlisted:
        number, first = len(tree.unlisted), tree.unlisted[0]
        lines += ["", f"{number:,} images are in no split (left alone), the first is {first}"]
    lines += [f"missing: {line}" for line in tree.absent]
    for split in tree.splits:
        lines += [f"count: {split.name}: {line}" for line in split.miscounts()]
    for kind, problems in problems_by_kind(tree).items():
        lines.append(f"{kind}: {len(problems):,}")
        lines += [f"  {problem.file}: {problem.detail}" for problem, _ in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"  ... and {len(problems) - SHOWN:,} more")
    lines += [f"to mend: {line}" for line in dict.fromkeys(_mending(tree))]
    lines.append("something is missing or corrupt" if tree.damaged else "complete and readable")
    if tree.official:
        place = Path(tree.folder).resolve()
        rename = "" if place.name == tree.official else f"rename this folder to {tree.official}, "
        lines.append(f"for the configs: {rename}export DETECTRON2_DATASETS={place.parent}")
    return "\n".join(lines)


def class_table(tree: TreeCheck) -> str:
    """Good boxes per class and split; VOC's difficult ones are not counted."""
    shown = [split for split in tree.splits if split.report.annotated]
    names = dict.fromkeys(name for split in shown for name in split.class_names)
    rows = [(name, *(split.report.boxes[name] for split in shown)) for name in names]
    return tabulate(rows, ["boxes of", *(split.name for split in shown)], intfmt=",")


def problems_by_kind(tree: TreeCheck) -> dict[str, list[tuple[DataProblem, str]]]:
    """Problems and the first split that each is in; one of several splits is named once."""
    found: dict[str, dict[DataProblem, str]] = {}
    for split in tree.splits:
        for problem in split.report.problems:
            found.setdefault(problem.kind, {}).setdefault(problem, split.name)
    return {kind: list(found[kind].items()) for kind in sorted(found)}


def to_json(tree: TreeCheck) -> dict[str, Any]:
    """The whole check, for files: counts, official counts, boxes per class, every problem."""
    splits = {}
    for split in tree.splits:
        splits[split.name] = {
            **asdict(split.counts),
            "official": asdict(split.official) if split.official else None,
            "miscounts": split.miscounts(),
            "boxes_per_class": dict(split.report.boxes),
            "difficult_per_class": dict(split.report.difficult),
            "problems": [asdict(problem) for problem in split.report.problems],
        }
    return {
        "folder": tree.folder,
        "kind": tree.kind,
        "official": tree.official or None,
        "damaged": tree.damaged,
        "absent": tree.absent,
        "unlisted_images": tree.unlisted,
        "decoded_images": tree.decoded,
        "splits": splits,
    }


def _split_table(tree: TreeCheck) -> str:
    rows = []
    for split in tree.splits:
        numbers = ["-" if n is None else f"{n:,}" for n in asdict(split.counts).values()]
        verdict = "no such split" if tree.official else "-"
        if split.official:
            verdict = "differs" if split.miscounts() else "as published"
        rows.append((split.name, *numbers, verdict))
    headers = ("split", "images", "boxes", "difficult", "official")
    return tabulate(rows, headers, colalign=("left", "right", "right", "right", "left"))


def _mending(tree: TreeCheck) -> Iterator[str]:
    """What to do about each problem; lines repeat."""
    root = Path(tree.folder).parent
    for kind, problems in problems_by_kind(tree).items():
        for _, split in problems:
            archive = archive_of(tree.official, split, images=kind in OF_IMAGES)
            again = f"python tools/prepare_data.py {tree.kind} {root} --archives {archive}"
            if kind in BOX_KINDS:
                yield f"{kind}: training leaves these boxes out; correct them to keep them"
            elif archive and kind in GONE:
                yield f"{kind}: {again} (what is there stays)"
            elif archive:
                yield f"{kind}: delete these files, then {again}"
            elif kind in GONE:
                yield f"{kind}: bring these files back, or take them out of {split}"
            else:
                yield f"{kind}: replace or correct these files, or take them out of {split}"
    if any(split.miscounts() for split in tree.splits):
        yield "count: unpack the official archives, or give --own for data of your own or a part"


def draw_classes(tree: TreeCheck, path: Path) -> bool:
    """Writes a bar chart (PNG) of the boxes per class, one bar for each annotated split.

    Returns:
        False where no split is annotated, and nothing is written.
    """
    annotated = {split.name: split for split in tree.splits if split.report.annotated}
    united = [part for whole, parts in PARTS.items() if whole in annotated for part in parts]
    shown = [split for name, split in annotated.items() if name not in united]
    names = list(dict.fromkeys(name for split in shown for name in split.class_names))
    if not names:
        return False
    height = 1.2 + 0.2 * len(names) * max(1, 0.5 * len(shown))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for number, split in enumerate(shown):
        counts = [split.report.boxes[name] for name in names]
        places = np.arange(len(names)) + (number - (len(shown) - 1) / 2) * width
        label = f"{split.name}: {sum(counts):,} boxes"
        axes.barh(places, counts, width, label=label, color=COLORS[number % len(COLORS)])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xscale="symlog", xlabel="boxes (logarithmic)", ylim=(len(names) - 0.4, -0.6))
    axes.set_title(tree.folder, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower left")
    save_png(figure, path)
    return True


def draw_samples(split: SplitCheck, path: Path) -> bool:
    """Writes a sheet of images of a split with their boxes and classes; the suffix says the format.

    Returns:
        False where no image can be shown, and nothing is written.
    """
    pictures = [
        draw_ground_truth(read_image(file, "RGB"), boxes, classes, split.class_names)
        for file, boxes, classes in split.samples
    ]
    if not pictures:
        return False
    captions = [Path(file).name for file, _, _ in split.samples]
    save_image(path, contact_sheet(pictures, COLUMNS, captions))
    return True
