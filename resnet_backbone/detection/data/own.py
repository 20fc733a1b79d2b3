"""Reads custom boxes from annotation tools, splits them, and writes them as COCO JSON.

Supported are VOC's XML files (beside the images or in a separate folder), COCO's JSON, YOLO's text
files, and Roboflow's exports of these three, whose folders train, valid and test remain splits.
ImageNet's boxes work as well: the folders of DET and CLS-LOC, and ``LOC_*_solution.csv``.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.coco import scan_coco
from resnet_backbone.detection.data.formats.coco import CocoFile, clean_coco, read_coco
from resnet_backbone.detection.data.formats.voc import read_annotation
from resnet_backbone.detection.data.formats.yolo import (
    is_yolo_file,
    parse_yolo_line,
    read_yolo_names,
)
from resnet_backbone.detection.data.problems import (
    IMAGES,
    DataReport,
    files_below,
    fit_box,
    look_at_image,
    reading,
    unusable,
)
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import write_text

SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}  # folder -> split


def read_own(
    images: Path, annotations: Path, kind: str = ""
) -> tuple[dict[str, list[dict]], list[str], DataReport]:
    """Reads all annotated images below a folder.

    Args:
        images: folder of the images, including subfolders.
        annotations: folder of XML or text files, a COCO JSON, or ImageNet's CSV.
        kind: "voc", "coco", "yolo" or "imagenet"; "" detects it (XML is then VOC's).

    Returns:
        The records of each split (``{"": records}`` if folders name no splits), the class names,
        and the report of what was dropped. A record is a Detectron2 dict with XYXY_ABS boxes.
        VOC's difficult objects have ``iscrowd`` 1, so training skips them and evaluation ignores
        them, as in VOC.

    Raises:
        DataError: no such folder, no annotations or several kinds of them, or no usable image.
    """
    for path in (images, annotations):
        if not path.exists():
            raise DataError(f"{path} does not exist; give the folder of your files")
    report = DataReport(str(annotations))
    read = {"voc": _read_voc, "coco": _read_coco, "yolo": _read_yolo, "imagenet": _read_imagenet}
    with reading(annotations):
        records, names = read[_find_format(annotations, kind)](images, annotations, report)
    report.boxes.update(dict.fromkeys(names, 0))
    if not any(record["annotations"] for record in records):
        report.add_empty(str(annotations), "no image with a box")
        raise unusable(report.name, report.problems[-1:])
    splits = defaultdict(list)
    for record in records:
        folders = Path(record["file_name"]).relative_to(images).parts[:-1]
        splits[record.pop("split", "") or _split_name(folders)].append(record)
    are_named = {"train", "val"} <= set(splits)
    return dict(splits) if are_named else {"": records}, names, report


def _split_name(words: Iterable[str]) -> str:
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")


def split_records(
    records: Sequence[dict], share: float, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """Splits images into training and validation, with the same share of each class if possible.

    Images are grouped by their rarest class; each group is shuffled and divided. The same records,
    share and seed give the same split.

    Args:
        records: Detectron2 dicts.
        share: fraction of the images for validation, above 0 and below 1.

    Raises:
        DataError: a side would be empty.
    """
    number = Counter(one["category_id"] for record in records for one in record["annotations"])
    groups = defaultdict(list)
    for record in records:
        classes = {one["category_id"] for one in record["annotations"]}
        groups[min(classes, key=lambda c: (number[c], c), default=-1)].append(record)
    validation, owed = set(), 0.0
    for key in sorted(groups, key=lambda c: (number[c], c)):
        group = sorted(groups[key], key=lambda record: record["file_name"])
        random.Random(f"{seed} {key}").shuffle(group)
        owed += share * len(group)  # rounding errors carry over to the next group
        taken = min(round(owed), len(group))
        owed -= taken
        validation.update(record["file_name"] for record in group[:taken])
    train = [record for record in records if record["file_name"] not in validation]
    val = [record for record in records if record["file_name"] in validation]
    if not train or not val:
        raise DataError(f"{len(records)} images cannot be split with --val {share:g}: change it")
    return train, val


def count_boxes(split: str, records: Sequence[dict], names: Sequence[str]) -> DataReport:
    """Reports the boxes per class in a split; boxes that training skips count as difficult."""
    report = DataReport(split, len(records), boxes=Counter(dict.fromkeys(names, 0)))
    for one in (one for record in records for one in record["annotations"]):
        (report.difficult if one["iscrowd"] else report.boxes)[names[one["category_id"]]] += 1
    return report


def write_coco(path: Path, records: Sequence[dict], names: Sequence[str], root: Path) -> None:
    """Writes records as COCO JSON; file names are relative to ``root``, category ids start at 1."""
    images, annotations = {}, defaultdict(list)
    for record in records:
        name = Path(record["file_name"]).relative_to(root).as_posix()
        images[name] = {**record, "file_name": name}
        for one in record["annotations"]:
            box = BoxMode.convert(one["bbox"], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            annotations[name].append({**one, "bbox": box, "area": box[2] * box[3]})
    write_text(path, json.dumps(clean_coco(dict(enumerate(names)), images, annotations)))


def _find_format(annotations: Path, kind: str) -> str:
    """Returns the format of the annotations, which must exist; ``kind`` if it is given."""
    if annotations.is_file():
        kinds = {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".csv": "imagenet"}
        kind = kind or kinds.get(annotations.suffix.lower(), "")
        if kind not in ("", "voc"):
            return kind
        raise DataError(f"{annotations}: give a folder, a COCO .json, or a YOLO data.yaml")
    found = {
        "voc": next(files_below(annotations, ".xml"), None),
        "coco": next(files_below(annotations, ".json"), None),
        "yolo": next(filter(is_yolo_file, files_below(annotations, ".txt")), None),
    }
    if kind == "imagenet":
        found = {kind: found["voc"]}
    kinds = [one for one, file in found.items() if file and kind in ("", one)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        seen = ", ".join(str(found[one]) for one in kinds)
        raise DataError(f"{annotations} has several formats ({seen}); choose one with --format")
    about = {"voc": ".xml (VOC)", "coco": ".json (COCO)", "yolo": ".txt (YOLO) with boxes"}
    about["imagenet"] = ".xml (ImageNet)"
    wanted = ", ".join(about[one] for one in found if kind in ("", one))
    raise DataError(f"{annotations} has no {wanted}; give their folder with --annotations")


def _pair(
    annotations: Iterable[Path], images: Path, top: Path, report: DataReport
) -> Iterator[tuple[Path | None, Path]]:
    """Yields (annotation, image) pairs matched by path, else by name; None for no annotation."""
    by_path, by_name = {}, defaultdict(list)
    for image in files_below(images, *IMAGES):
        by_path.setdefault(image.relative_to(images).with_suffix("").as_posix(), image)
        by_name[image.stem].append(image)
    used = set()
    for file in annotations:
        path = file.relative_to(top).with_suffix("").as_posix()
        same_name = by_name[file.stem]
        image = by_path.get(path) or by_path.get(path.replace("labels", "images", 1))
        image = image or (same_name[0] if len(same_name) == 1 else None)
        if image:
            used.add(image)
            yield file, image
        else:
            why = f"{len(same_name)} images have this name" if same_name else f"none in {images}"
            report.add("missing-image", str(file), f"its image: {why}")
    yield from ((None, image) for image in sorted(set(by_path.values()) - used))


def image_record(image: Path, size, report: DataReport) -> dict | None:
    size = report.note_look(look_at_image(str(image), size, decode=True))
    if size is None:
        return None
    name = str(image)
    return dict(file_name=name, image_id=name, width=size[0], height=size[1], annotations=[])


def add_box(record: dict, category, box, report: DataReport, origin: int = 0, **more) -> None:
    """Adds the box (x0, y0, x1, y1) to a record, or a problem to the report."""
    size = record["width"], record["height"]
    box = fit_box(report, record["file_name"], str(category), box, size, origin)
    if box is None:
        return
    x0, y0, x1, y1 = box
    box = [max(x0 - origin, 0.0), max(y0 - origin, 0.0), min(x1, size[0]), min(y1, size[1])]
    one = {"category_id": category, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    record["annotations"].append({**one, **more})


def _read_voc(images: Path, annotations: Path, report: DataReport, first: int = 1):
    """Reads XML files with pixels counted from ``first`` and inclusive right and lower edges."""
    records = []
    for xml, image in _pair(list(files_below(annotations, ".xml")), images, annotations, report):
        if xml is None:
            report.add("missing-xml", str(image), "no .xml of this name")
            continue
        try:
            _, size, objects = read_annotation(str(xml))
        except (OSError, ValueError) as error:
            report.add("broken-xml", str(xml), str(error))
            continue
        record = image_record(image, size, report)
        if record is None:
            continue
        records.append(record)
        for name, box, difficult, problem in objects:
            if problem:
                report.add("bad-box", str(xml), problem)
            else:
                x0, y0, x1, y1 = box
                box = (x0, y0, x1 + 1 - first, y1 + 1 - first)
                add_box(record, name, box, report, origin=first, iscrowd=int(difficult))
    return records, number_classes(records)


def number_classes(records: list[dict]) -> list[str]:
    """Replaces class names by their positions in the sorted list, and returns that list."""
    names = sorted({one["category_id"] for record in records for one in record["annotations"]})
    for one in (one for record in records for one in record["annotations"]):
        one["category_id"] = names.index(one["category_id"])
    return names


def _read_coco(images: Path, annotations: Path, report: DataReport):
    files = [annotations] if annotations.is_file() else list(files_below(annotations, ".json"))
    records = []
    for file in files:
        content = read_coco(str(file))
        categories = list(content.categories.values())
        root = _image_root(file, images, content)
        found, of_file = scan_coco(str(file), root, decode=True, progress=True, found=content)
        report.problems += of_file.problems
        report.clipped += of_file.clipped
        report.notes = [*dict.fromkeys([*report.notes, *of_file.notes])]  # files share classes
        words = [*file.parent.parts[len(annotations.parts) :], *re.split(r"[\W\d_]+", file.stem)]
        for record in found:
            record["split"] = _split_name(words) if len(files) > 1 else ""
            for one in record["annotations"]:
                one["category_id"] = categories[one["category_id"]]
                one["bbox"] = BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS)
                one["bbox_mode"] = BoxMode.XYXY_ABS
        records += found
    return records, number_classes(records)


def _read_imagenet(images: Path, annotations: Path, report: DataReport):
    """Reads ILSVRC's XML files, or a table with "wnid xmin ymin xmax ymax" for each object."""
    if annotations.is_dir():
        return _read_voc(images, annotations, report, first=0)
    with open(annotations, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= set(rows[0]):
        raise DataError(f"{annotations} has no rows with ImageId and PredictionString")
    by_name = {path.stem: path for path in files_below(images, *IMAGES)}
    records = []
    for row in tqdm(rows, desc="reading", disable=None):
        where = f"{annotations}: {row['ImageId']}"
        image = by_name.get(row["ImageId"])
        if image is None:
            report.add("missing-image", where, f"none in {images}")
            continue
        record = image_record(image, None, report)
        if record is None:
            continue
        records.append(record)
        words = (row["PredictionString"] or "").split()
        for start in range(0, len(words), 5):
            wnid, *sides = words[start : start + 5]
            try:
                x0, y0, x1, y1 = map(float, sides)
            except ValueError:
                report.add("bad-box", where, f"{' '.join(sides)!r} is not four numbers")
                continue
            add_box(record, wnid, (x0, y0, x1 + 1, y1 + 1), report)
    return records, number_classes(records)


def read_class_names(path: Path) -> dict[str, str]:
    """Reads lines "wnid number name", as in ILSVRC's ``map_det.txt``, or "wnid name"."""
    names = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        wnid, *words = line.split() or [""]
        words = words[1:] if words and words[0].isdecimal() else words
        names[wnid] = " ".join(words).replace("_", " ") or wnid
    return names


def of_one_class(records: Sequence[dict]) -> list[dict]:
    """Returns the images with objects of exactly one class, as localization requires."""
    return [r for r in records if len({one["category_id"] for one in r["annotations"]}) == 1]


def _image_root(file: Path, images: Path, content: CocoFile) -> str:
    """Returns the folder that a COCO JSON's file names are relative to: its own or in `images`."""
    names = [image["file_name"] for image in list(content.images.values())[:100]]
    folders = [file.parent, images, *sorted(path for path in images.rglob("*") if path.is_dir())]
    folders = [folder for folder in folders if folder.is_relative_to(images)]
    return str(max(folders, key=lambda folder: sum((folder / n).is_file() for n in names)))


def _read_yolo(images: Path, annotations: Path, report: DataReport):
    top = annotations.parent if annotations.is_file() else annotations
    names = read_yolo_names(annotations, images)
    stems = {image.stem for image in files_below(images, *IMAGES)}
    texts = [f for f in files_below(top, ".txt") if f.stem in stems or is_yolo_file(f)]
    records, without = [], 0
    for text, image in tqdm(list(_pair(texts, images, top, report)), desc="reading", disable=None):
        record = image_record(image, None, report)
        if record is None:
            continue
        records.append(record)
        without += text is None
        with reading(text or image):
            lines = text.read_text(encoding="utf-8-sig").splitlines() if text else []
        size = record["width"], record["height"]
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                category, box, more = parse_yolo_line(line, len(names), size)
            except ValueError as error:
                report.add("bad-box", f"{text} line {number}", str(error))
            else:
                add_box(record, category, box, report, **more)
    if without:
        report.notes.append(f"images without a .txt, used as images without boxes: {without:,}")
    return records, names
