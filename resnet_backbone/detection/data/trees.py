"""Checks whole VOC and COCO folders, official ones or custom data in the same layout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm.contrib.concurrent import process_map

from resnet_backbone.detection.data.archives import COUNTS, Counts, archive_of, coco_image_folder
from resnet_backbone.detection.data.coco import scan_coco
from resnet_backbone.detection.data.formats.voc import list_splits, read_split
from resnet_backbone.detection.data.problems import (
    BOX_KINDS,
    DataReport,
    files_below,
    look_at_image,
    read_image,
)
from resnet_backbone.detection.data.voc import VOC_CLASSES, find_voc_classes, scan_voc
from resnet_backbone.detection.inference.pictures import (
    contact_sheet,
    draw_ground_truth,
    save_image,
)
from resnet_backbone.report.plots import COLORS, save_png
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import EXTENSIONS

SAMPLES = 20  # images per split in a contact sheet
SHOWN = 5  # problems printed per kind
GONE = ("missing-image", "missing-xml")


@dataclass
class SplitCheck:
    """The contents of one split."""

    name: str  # file in ImageSets/Main or in annotations, without its suffix
    report: DataReport
    files: list[str]  # images that can be opened
    samples: list[dict]  # some of Detectron2's dicts
    official: Counts | None = None  # published counts; None for a split that is not official

    @property
    def counts(self) -> Counts:
        """Counts of images and usable boxes."""
        report = self.report
        if not report.annotated:
            return Counts(report.num_images)
        return Counts(report.num_images, report.boxes.total(), report.difficult.total() or None)

    def miscounts(self) -> list[str]:
        """Returns deviations from the published counts, e.g. "2,400 images, officially 2,501"."""
        found, bad = [], len(self.report.bad_boxes)
        units = ("images", "boxes", "difficult boxes")
        for unit, number, wanted in zip(units, self.counts, self.official or (), strict=False):
            slack = bad if unit != "images" else 0
            if wanted is not None and not wanted - slack <= (number or 0) <= wanted:
                found.append(f"{number or 0:,} {unit}, officially {wanted:,}")
        return found

    def verdict(self) -> str:
        if not self.official:
            return "no such split"
        return "differs" if self.miscounts() else "as published"


@dataclass
class TreeCheck:
    """The contents of one VOC or COCO folder."""

    folder: str
    kind: str  # "voc" or "coco"
    official: str = ""  # its official name, "VOC2007", "VOC2012" or "coco"; "" for custom data
    splits: list[SplitCheck] = field(default_factory=list)  # those that could be read
    absent: list[str] = field(default_factory=list)  # missing folders and files, how to fix this
    unlisted: list[str] = field(default_factory=list)  # images that are in no split
    decoded: int = 0  # number of decoded images; 0 if only headers were read

    @property
    def damaged(self) -> bool:
        """Whether something is missing or corrupt, or counts differ from the published ones."""
        return bool(self.absent) or any(s.report.bad_files or s.miscounts() for s in self.splits)

    def add_split(self, name: str, records: list[dict], report: DataReport) -> None:
        drawn = [record for record in records if record["annotations"]] or records
        samples = drawn[:: max(1, len(drawn) // SAMPLES)][:SAMPLES]
        files, official = [record["file_name"] for record in records], (self.official, name)
        self.splits.append(SplitCheck(name, report, files, samples, COUNTS.get(official)))

    def finish(self, folders: Iterable[Path], listed: set[str], workers: int) -> TreeCheck:
        """Finds images that are in no split, and decodes the others in parallel processes."""
        images = {str(file) for place in folders for file in files_below(place, *EXTENSIONS)}
        self.unlisted = sorted(images - listed)
        files = list(dict.fromkeys(file for split in self.splits for file in split.files))
        if not workers or not files:
            return self
        options = dict(chunksize=64, desc="decoding", unit="img", disable=None)
        decode = partial(look_at_image, stated=None, decode=True)
        looks = process_map(decode, files, max_workers=workers, **options)
        broken, self.decoded = {one.path: one.problem for one in looks if one.problem}, len(files)
        for split in self.splits:
            split.report.problems += [broken[file] for file in split.files if file in broken]
            split.samples = [one for one in split.samples if one["file_name"] not in broken]
        return self


def check_voc_tree(
    folder: str | os.PathLike, own: bool = False, splits: Sequence[str] = (), workers: int = 0
) -> TreeCheck:
    """Checks a folder in VOC layout.

    Args:
        folder: contains Annotations/, JPEGImages/ and ImageSets/Main/.
        own: treat it as custom data even if the folder is called VOC2007 or VOC2012.
        splits: names in ImageSets/Main; () for all but VOC's per-class lists.
        workers: number of processes that decode every image; 0 reads headers only.

    Raises:
        DataError: a split does not exist, or none has a class.
    """
    folder = Path(folder)
    name, images, lists = folder.resolve().name, folder / "JPEGImages", folder / "ImageSets/Main"
    tree = TreeCheck(str(folder), "voc", "" if own or name not in ("VOC2007", "VOC2012") else name)
    tree.absent = [f"{part} does not exist" for part in (images, lists) if not part.is_dir()]
    splits = splits or list_splits(folder)
    if not splits:
        tree.absent.append(f"{lists} has no split, a file NAME.txt with ids")
        return tree
    classes = list(VOC_CLASSES) if tree.official else find_voc_classes(folder, splits)
    for split in splits:
        tree.add_split(split, *scan_voc(folder, split, classes, progress=True))
    stems = {images / image_id for split in splits for image_id in read_split(folder, split)}
    listed = {str(f) for f in files_below(images, *EXTENSIONS) if f.with_suffix("") in stems}
    return tree.finish([images], listed, workers)


def check_coco_tree(
    root: str | os.PathLike, own: bool = False, splits: Sequence[str] = (), workers: int = 0
) -> TreeCheck:
    """Checks a folder in COCO's layout: annotations/instances_NAME.json with the images in NAME/.

    Args:
        root: this folder, or its parent if it is called coco/.
        own: treat it as custom data even with COCO's names.
        splits: "instances_val2017", ...; () for all instances_* and image_info_*.

    Raises:
        DataError: there is no annotations/, or a file in it does not exist or is not JSON.
    """
    folder = next(
        (p for p in (Path(root), Path(root, "coco")) if (p / "annotations").is_dir()), None
    )
    if folder is None:
        raise DataError(
            f"neither {root} nor {Path(root, 'coco')} has annotations/: give the folder that "
            "holds it, --archives to unpack, or --coco-json and --image-root"
        )
    tree = TreeCheck(str(folder), "coco", "" if own else "coco")
    annotations = folder / "annotations"
    found = sorted(file.stem for file in annotations.glob("*.json"))
    names = splits or [name for name in found if name.startswith(("instances_", "image_info_"))]
    if not names:
        tree.absent.append(f"{annotations} has no instances_*.json or image_info_*.json")
    pairs = []
    for name in names:
        images = folder / coco_image_folder(name)
        if images.is_dir():
            pairs.append((annotations / f"{name}.json", images))
            continue
        archive = archive_of(tree.official, name, images=True)
        tree.absent.append(
            f"{images}, the images of {name}, does not exist: "
            f"{f'unpack {archive}' if archive else 'add it'}, or name the splits that you have "
            "with --splits"
        )
    return check_coco_files(pairs, workers, tree)


def check_coco_files(
    pairs: Iterable[tuple[str, str]], workers: int = 0, tree: TreeCheck | None = None
) -> TreeCheck:
    """Checks custom files in COCO's format at any location.

    Args:
        pairs: (JSON file, folder of its images) each.
        tree: receives the results; a new one by default.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    pairs = [(Path(file), Path(images)) for file, images in pairs]
    tree = tree or TreeCheck(", ".join(str(file) for file, _ in pairs), "coco")
    unique, listed = len({file.stem for file, _ in pairs}) == len(pairs), set()
    for file, images in pairs:
        name = file.stem if unique else f"{file.parent.name}_{file.stem}"
        records, report = scan_coco(str(file), str(images), progress=True)
        tree.add_split(name, records, report)
        listed.update(record["file_name"] for record in records)
        listed.update(problem.file for problem in report.problems)
    return tree.finish({images for _, images in pairs}, listed, workers)


def summary(tree: TreeCheck) -> str:
    """Returns a text on the splits, the boxes per class, all problems and their fixes."""
    how = f"as the official {tree.official}" if tree.official else "as data of your own"
    read = f"{tree.decoded:,} images decoded" if tree.decoded else "only the headers of images read"
    lines = [f"{tree.folder}, checked {how}: {read}", "", *tables(tree)]
    if tree.unlisted:
        number, first = len(tree.unlisted), tree.unlisted[0]
        lines += ["", f"{number:,} images are in no split and are not used; the first is {first}"]
    lines += [f"missing: {line}" for line in tree.absent]
    for split in tree.splits:
        lines += [f"count: {split.name}: {line}" for line in split.miscounts()]
    for kind, problems in problems_by_kind(tree).items():
        lines.append(f"{kind}: {len(problems):,}")
        lines += [f"  {problem.file}: {problem.detail}" for problem in list(problems)[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"  ... and {len(problems) - SHOWN:,} more")
    said = [(line, split.name) for split in tree.splits for line in split.report.remarks()]
    for line in dict(said):
        lines.append(f"note: {', '.join(name for one, name in said if one == line)}: {line}")
    lines += [f"to mend: {line}" for line in dict.fromkeys(_mending(tree))]
    lines.append("something is missing or corrupt" if tree.damaged else "complete and readable")
    if tree.official:
        place = Path(tree.folder).resolve()
        rename = "" if place.name == tree.official else f"rename this folder to {tree.official}, "
        lines.append(f"for the configs: {rename}export DETECTRON2_DATASETS={place.parent}")
    return "\n".join(lines)


def problems_by_kind(tree: TreeCheck) -> dict[str, dict]:
    """Returns kind -> problem -> the first split that has it."""
    found: dict[str, dict] = {}
    for split in tree.splits:
        for problem in split.report.problems:
            found.setdefault(problem.kind, {}).setdefault(problem, split.name)
    return dict(sorted(found.items()))


def to_json(tree: TreeCheck) -> dict[str, Any]:
    """Returns the whole check for JSON: counts, official counts, boxes per class, problems."""
    splits = {}
    for split in tree.splits:
        splits[split.name] = {
            **split.counts._asdict(),
            "official": split.official._asdict() if split.official else None,
            "miscounts": split.miscounts(),
            "boxes_per_class": dict(split.report.boxes),
            "difficult_per_class": dict(split.report.difficult),
            "problems": [problem._asdict() for problem in split.report.problems],
            "remarks": split.report.remarks(),
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


def tables(tree: TreeCheck) -> Iterator[str]:
    """Yields a table of splits, and one of boxes per class and split without difficult ones."""
    columns = {"split": [split.name for split in tree.splits]}
    for unit in Counts._fields:
        numbers = [getattr(split.counts, unit) for split in tree.splits]
        if any(number is not None for number in numbers):
            columns[unit] = numbers
    if tree.official:
        columns["official"] = [split.verdict() for split in tree.splits]
    yield tabulate(columns, "keys", intfmt=",", missingval="-", disable_numparse=[0])
    shown = [split for split in tree.splits if split.report.annotated]
    names = dict.fromkeys(name for split in shown for name in split.report.boxes)
    rows = [(name, *(split.report.boxes[name] for split in shown)) for name in names]
    yield "\n" + tabulate(rows, ["boxes of", *(split.name for split in shown)], intfmt=",")


def _mending(tree: TreeCheck) -> Iterator[str]:
    """Yields how to fix each problem; lines repeat."""
    root = Path(tree.folder).parent
    for kind, problems in problems_by_kind(tree).items():
        for split in problems.values():
            archive = archive_of(tree.official, split, images=kind.endswith("-image"))
            again = f"resnet-backbone prepare-data {tree.kind} {root} --archives {archive}"
            if kind in BOX_KINDS:
                yield f"{kind}: training leaves these boxes out; correct them to keep them"
            elif archive:
                first = "" if kind in GONE else "delete these files, then "
                yield f"{kind}: {first}{again} (existing files stay)"
            else:
                yield f"{kind}: add or correct these files, or remove them from {split}"
    if any(split.miscounts() for split in tree.splits):
        yield "count: unpack the official archives, or give --own for your own data or a subset"


def draw_classes(tree: TreeCheck, path: Path) -> bool:
    """Writes a bar chart (PNG) of the boxes per class; returns False without annotations."""
    united = ("train", "val") if "trainval" in [split.name for split in tree.splits] else ()
    shown = [split for split in tree.splits if split.report.annotated and split.name not in united]
    names = list(dict.fromkeys(name for split in shown for name in split.report.boxes))
    if not names:
        return False
    height = 1.2 + 0.1 * len(names) * max(2, len(shown))
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
    """Writes a sheet of images with their boxes and classes; returns False without images.

    Rows have fewer wide images, so that class names stay legible.
    """
    pictures = []
    for record in split.samples:
        found, image = record["annotations"], read_image(record["file_name"], "RGB")
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in found]
        classes = [a["category_id"] for a in found]
        pictures.append(draw_ground_truth(image, boxes, classes, list(split.report.boxes)))
    if pictures:
        captions = [Path(record["file_name"]).name for record in split.samples]
        ratio = np.median([picture.shape[1] / picture.shape[0] for picture in pictures])
        columns = max(1, min(4, round(8 / ratio)))
        save_image(path, contact_sheet(pictures, columns, captions, tile=1920 // columns))
    return bool(pictures)
