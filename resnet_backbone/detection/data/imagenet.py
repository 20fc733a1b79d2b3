"""ImageNet's data with boxes: the folders of DET, and LOC's tables ``LOC_*_solution.csv``.

ILSVRC counts pixels from 0 and its boxes include their last row and column.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from resnet_backbone.detection.data.own import (
    add_box,
    files_below,
    image_record,
    number_classes,
)
from resnet_backbone.detection.data.problems import DataReport
from resnet_backbone.detection.data.formats.voc import read_annotation
from resnet_backbone.runtime.errors import DataError

SUFFIXES = (".jpeg", ".jpg", ".png")


def read_det(root: Path, classes: Path | None = None) -> tuple[dict, list[str], DataReport]:
    """Reads ``Data/DET`` and ``Annotations/DET`` below ``root``, with train and val.

    Images without objects stay, as negatives; of the training set those without an annotation,
    which lack only one class each, do not.

    Args:
        classes: file of lines "wnid number name", such as the development kit's ``map_det.txt``.

    Returns:
        {"train": records, "val": records}, where each is there; the class names, without
        ``classes`` the sorted wnids; the report of what is left out.

    Raises:
        DataError: a folder is missing, or no image has an object.
    """
    images, annotations = root / "Data" / "DET", root / "Annotations" / "DET"
    for folder in (images, annotations):
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist; give ILSVRC's folder, which has Data/DET")
    report = DataReport(str(annotations))
    splits = {}
    for name in ("train", "val"):
        if (annotations / name).is_dir():
            splits[name] = list(_read_split(images / name, annotations / name, report))
    known = read_class_names(classes) if classes else {}
    found = {
        one["category_id"] for part in splits.values() for r in part for one in r["annotations"]
    }
    if not found:
        raise DataError(f"{annotations} has no annotations with objects in train or val")
    if known and found - set(known):
        raise DataError(f"{classes} does not name {min(found - set(known))}, which {root} has")
    wnids = list(known) or sorted(found)
    for record in (record for part in splits.values() for record in part):
        for one in record["annotations"]:
            one["category_id"] = wnids.index(one["category_id"])
    return splits, [known.get(wnid, wnid) for wnid in wnids], report


def _read_split(images: Path, annotations: Path, report: DataReport) -> Iterator[dict]:
    for xml in tqdm(list(files_below(annotations, ".xml")), desc=images.name, disable=None):
        stem = images / xml.relative_to(annotations).with_suffix("")
        image = next((p for s in SUFFIXES for p in _both_cases(stem, s) if p.is_file()), None)
        if image is None:
            report.add("missing-image", str(xml), f"no {stem}.JPEG")
            continue
        try:
            _, size, objects = read_annotation(str(xml))
        except (OSError, ValueError) as error:
            report.add("broken-xml", str(xml), str(error))
            continue
        record = image_record(image, size, report)
        if record is None:
            continue
        for name, box, _, problem in objects:
            if problem:
                report.add("bad-box", str(xml), problem)
            else:
                x0, y0, x1, y1 = box
                add_box(record, name, (x0, y0, x1 + 1, y1 + 1), report)
        yield record


def _both_cases(stem: Path, suffix: str) -> tuple[Path, Path]:
    return stem.with_name(stem.name + suffix.upper()), stem.with_name(stem.name + suffix)


def read_class_names(path: Path) -> dict[str, str]:
    """Lines "wnid number name" or "wnid name": the name of each wnid, in the order of the file."""
    names = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        wnid, *words = line.split()
        words = words[1:] if words and words[0].isdecimal() else words
        names[wnid] = " ".join(words) or wnid
    if not names:
        raise DataError(f"{path} is empty; it should have lines 'wnid number name'")
    return names


def read_val1(path: Path) -> set[str]:
    """The images that a list puts into val1, by the stems of their names."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return {Path(line.split()[0]).stem for line in lines if line.strip()}


def read_solution(images: Path, table: Path) -> tuple[list[dict], list[str], DataReport]:
    """Reads ``LOC_train_solution.csv`` or ``LOC_val_solution.csv`` and its images.

    A row is an image's name without suffix and "wnid xmin ymin xmax ymax" for each object.

    Raises:
        DataError: it is no such table, or no image of it lies below ``images``.
    """
    report = DataReport(str(table))
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= set(rows[0]):
        raise DataError(f"{table} has no columns ImageId and PredictionString with rows below them")
    by_stem = {path.stem: path for path in files_below(images, *SUFFIXES)}
    records = []
    for row in tqdm(rows, desc=table.name, disable=None):
        image = by_stem.get(row["ImageId"])
        if image is None:
            report.add("missing-image", f"{table}: {row['ImageId']}", f"none in {images}")
            continue
        record = image_record(image, None, report)
        if record is not None:
            records.append(record)
            _add_objects(record, row["PredictionString"].split(), f"{table}: {image.name}", report)
    if not any(record["annotations"] for record in records):
        raise DataError(f"{table}: none of its {len(rows)} images is in {images}")
    return records, number_classes(records), report


def _add_objects(record: dict, words: Sequence[str], where: str, report: DataReport) -> None:
    for start in range(0, len(words), 5):
        wnid, *sides = words[start : start + 5]
        try:
            x0, y0, x1, y1 = map(float, sides)
        except ValueError:
            report.add("bad-box", where, f"{' '.join(sides)!r} is not four numbers")
            continue
        add_box(record, wnid, (x0, y0, x1 + 1, y1 + 1), report)


def of_one_class(records: Sequence[dict]) -> list[dict]:
    """The images that show objects of exactly one class, as localization wants them."""
    return [r for r in records if len({one["category_id"] for one in r["annotations"]}) == 1]
