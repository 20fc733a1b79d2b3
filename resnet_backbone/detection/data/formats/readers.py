"""Reads images with boxes as annotation tools write them: VOC's XML, COCO's JSON, YOLO, ImageNet.

They return records and class names. A record is a Detectron2 dict with XYXY_ABS boxes, and its
split if the annotation file names one. What cannot be used is added to the report.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.coco import scan_coco
from resnet_backbone.detection.data.formats.coco import CocoFile, read_coco, unused_name
from resnet_backbone.detection.data.formats.shapes import fit_box
from resnet_backbone.detection.data.formats.voc import read_annotation
from resnet_backbone.detection.data.formats.yolo import (
    is_yolo_file,
    parse_yolo_line,
    read_yolo_data,
)
from resnet_backbone.detection.data.problems import (
    DataReport,
    files_below,
    is_turned,
    look_at_image,
    reading,
)
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import EXTENSIONS

NOTES = "notes.json"  # Label Studio's, beside YOLO's files
# Folders of annotations and of their images.
PAIRS = [("labels", "images"), ("annotations", "images"), ("Annotations", "JPEGImages")]
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # by folder
SPLITS |= dict.fromkeys(("valid", "val", "validation", "dev", "eval"), "val")


def split_name(words: Iterable[str]) -> str:
    """Returns the split that the first of the words names, such as "train2017", or ""."""
    plain = (word.lower().rstrip("0123456789") for word in words)
    return next((SPLITS[word] for word in plain if word in SPLITS), "")


def find_format(annotations: Path, kind: str) -> str:
    """Returns the format of the annotations, which must exist; ``kind`` if it is given."""
    if annotations.is_file():
        kinds = {".json": "coco", ".csv": "imagenet"}
        kinds |= dict.fromkeys((".yaml", ".yml", ".names"), "yolo")
        kind = kind or kinds.get(annotations.suffix.lower(), "")
        if kind not in ("", "voc"):
            return kind
        raise DataError(f"{annotations}: give a folder, a COCO .json, or a YOLO data.yaml")
    found = {
        "voc": next(files_below(annotations, ".xml"), None),
        "coco": next((f for f in files_below(annotations, ".json") if f.name != NOTES), None),
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
    for image in files_below(images, *EXTENSIONS):
        first = by_path.setdefault(image.relative_to(images).with_suffix("").as_posix(), image)
        if first is image:
            by_name[image.stem].append(image)
        else:
            report.add("duplicate-id", str(image), f"{first} has the same name")
    by_own_path, others = {}, []
    for file in annotations:
        path = file.relative_to(top).with_suffix("").as_posix()
        in_images = (path.replace(*pair, 1) for pair in PAIRS)
        image = next((by_path[one] for one in (path, *in_images) if one in by_path), None)
        if image and image not in by_own_path:
            by_own_path[image] = file
        else:
            others.append(file)
    yield from ((file, image) for image, file in by_own_path.items())
    used = dict(by_own_path)
    for file in others:
        same_name = by_name[file.stem]
        if len(same_name) != 1:
            why = f"none in {images}"
            if same_name:
                why = f"{len(same_name)} images have this name: give --images and --annotations "
                why += "with the same folders inside"
            report.add("missing-image", str(file), f"its image: {why}")
        elif same_name[0] in used:
            why = f"{same_name[0]} already has {used[same_name[0]]}"
            report.add("duplicate-id", str(file), f"its image: {why}")
        else:
            used[same_name[0]] = file
            yield file, same_name[0]
    yield from ((None, image) for image in sorted(by_path.values() - used.keys()))


def image_record(image: Path, size, report: DataReport) -> dict | None:
    name = str(image)
    if name.encode(errors="ignore").decode() != name:
        report.add("unreadable-image", name, "its name is not UTF-8: rename it")
        return None
    size = report.note_look(look_at_image(name, size, decode=True))
    if size is None:
        return None
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
    if {**one, **more} in record["annotations"]:
        report.add("bad-box", record["file_name"], f"{category} box {box} occurs again")
    else:
        record["annotations"].append({**one, **more})


def keep(records: list[dict], record: dict, stated: int, report: DataReport) -> None:
    """Keeps a record, unless none of its stated boxes can be used: it is no empty image."""
    if stated and not record["annotations"]:
        text = f"none of its {stated} boxes can be used: the image is left out"
        report.add("bad-entry", record["file_name"], text)
    else:
        records.append(record)


def read_voc_xml(images: Path, annotations: Path, report: DataReport, first: int = 1):
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
        for name, box, difficult, problem in objects:
            if problem:
                report.add("bad-box", str(xml), problem)
            else:
                x0, y0, x1, y1 = box
                box = (x0, y0, x1 + 1 - first, y1 + 1 - first)
                add_box(record, name, box, report, origin=first, iscrowd=int(difficult))
        keep(records, record, len(objects), report)
    return records, number_classes(records)


def number_classes(records: list[dict], names: Sequence[str] = ()) -> list[str]:
    """Replaces class names by their positions in a list (default: sorted), and returns the list."""
    used = {one["category_id"] for record in records for one in record["annotations"]}
    names = list(names) or sorted(used)
    for one in (one for record in records for one in record["annotations"]):
        one["category_id"] = names.index(one["category_id"])
    return names


def read_coco_json(images: Path, annotations: Path, report: DataReport):
    files = [annotations] if annotations.is_file() else list(files_below(annotations, ".json"))
    folders = [images, *sorted(path for path in images.rglob("*") if path.is_dir())]
    records, first, repeated = [], {}, 0
    for file in files:
        content = read_coco(str(file))
        categories = list(content.categories.values())
        words = [*file.parent.parts[len(annotations.parts) :], *re.split(r"[\W\d_]+", file.stem)]
        split = split_name(words) if len(files) > 1 else ""
        beside = [file.parent] if file.is_relative_to(images) else []
        root = _image_root([*beside, *folders], content, split, len(beside))
        if not root:
            root = str(images)
            _find_by_name(content, images, report, file)
        found, of_file = scan_coco(str(file), root, decode=True, progress=True, found=content)
        report.problems += of_file.problems
        report.clipped += of_file.clipped
        report.notes = [*dict.fromkeys([*report.notes, *of_file.notes])]  # files share classes
        for record in found:
            record["split"] = split
            for one in record["annotations"]:
                one["category_id"] = categories[one["category_id"]]
                one["bbox"] = BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS)
                one["bbox_mode"] = BoxMode.XYXY_ABS
            key = record["split"], record["file_name"]
            if key not in first:
                first[key] = record
                records.append(record)
                continue
            known = [(one["category_id"], one["bbox"]) for one in first[key]["annotations"]]
            boxes = record["annotations"]
            new = [one for one in boxes if (one["category_id"], one["bbox"]) not in known]
            first[key]["annotations"] += new
            repeated += len(boxes) - len(new)
    if repeated:
        report.notes.append(f"boxes that several entries have, used once: {repeated:,}")
    return records, number_classes(records)


def read_imagenet(images: Path, annotations: Path, report: DataReport):
    """Reads ILSVRC's XML files, or a table with "wnid xmin ymin xmax ymax" for each object."""
    if annotations.is_dir():
        return read_voc_xml(images, annotations, report, first=0)
    with open(annotations, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= set(rows[0]):
        raise DataError(f"{annotations} has no rows with ImageId and PredictionString")
    by_name = {path.stem: path for path in files_below(images, *EXTENSIONS)}
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


def _image_root(folders: Sequence[Path], content: CocoFile, split: str, beside: int) -> str:
    """Returns the folder that a COCO JSON's file names are relative to: with most of the images.

    Of several, it is the one beside the JSON (the first `beside` of the folders), else that of the
    file's split, such as "val"; DataError if there is neither. It is "" if no folder has any.
    """
    names = [image["file_name"] for image in list(content.images.values())[:100]]
    found = [sum((folder / name).is_file() for name in names) for folder in folders]
    most = max(found)
    best = [folder for folder, number in zip(folders, found, strict=True) if number == most]
    if not most:
        return ""
    if best[0] not in folders[:beside] and len(best) > 1:
        best = [folder for folder in best if split and split_name([folder.name]) == split] or best
        if len(best) > 1:
            first, second = best[:2]
            raise DataError(
                f"{names[0]} and others are in {first} and in {second}: give the annotations of "
                "each folder alone, with --images FOLDER"
            )
    return str(best[0])


def _find_by_name(content: CocoFile, images: Path, report: DataReport, file: Path) -> None:
    """Gives images that are not where a file has them the paths of those with the same names."""
    by_name, found = defaultdict(list), 0
    for path in files_below(images, *EXTENSIONS):
        by_name[path.name].append(path.relative_to(images).as_posix())
    for image in content.images.values():
        paths = by_name[image["file_name"].rpartition("/")[2]]
        if len(paths) == 1:
            image["file_name"], found = paths[0], found + 1
    if found:
        text = f"{file}: {found:,} images are found by their names, not where it has them"
        report.notes.append(text)


def read_yolo(images: Path, annotations: Path, report: DataReport):
    top = annotations.parent if annotations.is_file() else annotations
    given, splits = read_yolo_data(annotations, images)
    names: list[str] = []
    for number, name in enumerate(given):
        name, what = name or f"class {number}", f"class {number}"
        names.append(unused_name(name, names, what, report.notes))
    stems = {image.stem for image in files_below(images, *EXTENSIONS)}
    texts = [f for f in files_below(top, ".txt") if f.stem in stems or is_yolo_file(f)]
    records, empty, turned = [], 0, 0
    for text, image in tqdm(list(_pair(texts, images, top, report)), desc="reading", disable=None):
        record = image_record(image, None, report)
        if record is None:
            continue
        turned += is_turned(str(image))
        if splits:
            places = (image.resolve(), *image.resolve().parents)
            record["split"] = next((splits[one] for one in places if one in splits), "")
        with reading(text or image):
            lines = text.read_text(encoding="utf-8-sig").splitlines() if text else []
        lines = {number: line for number, line in enumerate(lines, 1) if line.strip()}
        empty += not lines
        for number, line in lines.items():
            try:
                size = record["width"], record["height"]
                category, box, more = parse_yolo_line(line, len(names), size)
            except ValueError as error:
                report.add("bad-box", f"{text} line {number}", str(error))
            else:
                add_box(record, names[category], box, report, **more)
        keep(records, record, len(lines), report)
    number_classes(records, names)
    if empty:
        report.notes.append(
            f"images without boxes: {empty:,}; training uses them with "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    if turned:
        report.notes.append(
            f"images that their EXIF orientation turns: {turned:,}; the boxes must be of the "
            "turned images: see the sheets"
        )
    return records, names


READERS = {
    "voc": read_voc_xml,
    "coco": read_coco_json,
    "yolo": read_yolo,
    "imagenet": read_imagenet,
}
"""Format -> function of (images, annotations, report)."""
