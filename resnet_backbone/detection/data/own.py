"""Reads custom boxes from annotation tools, splits them, and writes them as COCO JSON.

Supported are VOC's XML files (beside the images or in a separate folder), COCO's JSON, YOLO's text
files, and Roboflow's exports of these three, whose folders train, valid and test remain splits.
ImageNet's boxes work as well: the folders of DET and CLS-LOC, and ``LOC_*_solution.csv``.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import BoxMode

from resnet_backbone.detection.data.formats.coco import clean_coco
from resnet_backbone.detection.data.formats.readers import READERS, find_format, split_name
from resnet_backbone.detection.data.problems import DataReport, reading, unusable
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import write_text


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
    with reading(annotations):
        records, names = READERS[find_format(annotations, kind)](images, annotations, report)
    report.boxes.update(dict.fromkeys(names, 0))
    if not any(record["annotations"] for record in records):
        report.add_empty(str(annotations), "no image with a box")
        raise unusable(report.name, report.problems[-1:])
    splits = defaultdict(list)
    for record in records:
        folders = _below(record["file_name"], images).parts[:-1]
        splits[record.pop("split", "") or split_name(folders)].append(record)
    others = sorted(splits.keys() - {"", "train"})
    if others and "train" not in splits and "" in splits:
        splits["train"] = splits.pop("")
    if others and "train" in splits:
        return dict(splits), names, report
    if others or "train" in splits:
        known = " and ".join(sorted(splits.keys() - {""}))
        report.notes.append(f"only {known} is named as a split: all images are split anew")
    lists = sorted(images.glob("ImageSets/Main/*.txt"))
    if lists:
        report.notes.append(f"{lists[0].parent} is not used: prepare-data voc --own reads it")
    return {"": records}, names, report


def _below(file: str, root: Path) -> Path:
    """Returns a file's path relative to a folder; DataError if it is elsewhere."""
    try:
        return Path(os.path.abspath(file)).relative_to(os.path.abspath(root))
    except ValueError:
        raise DataError(f"{file} is not below {root}: give --images a folder above all") from None


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
        name = _below(record["file_name"], root).as_posix()
        images[name] = {**record, "file_name": name}
        for one in record["annotations"]:
            box = BoxMode.convert(one["bbox"], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            annotations[name].append({"area": box[2] * box[3], **one, "bbox": box})
    write_text(path, json.dumps(clean_coco(dict(enumerate(names)), images, annotations)))


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
