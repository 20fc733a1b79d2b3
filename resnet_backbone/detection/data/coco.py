"""Data sets in COCO's JSON format, COCO's own or a user's."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.data.datasets.coco import load_coco_json
from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.problems import (
    DataProblem,
    DataReport,
    box_problem,
    cached_by_version,
    check_image,
    list_problems,
    register_once,
)
from resnet_backbone.runtime.errors import DataError

REQUIRED_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


class Inspected(NamedTuple):
    """What an instances JSON says of itself."""

    categories: dict[int, str]  # by rising id; none if the file is unusable
    problems: tuple[DataProblem, ...]
    annotated: bool  # False for lists of images without the key, such as COCO's image_info files


def scan_coco(
    json_file: str, image_root: str, decode: bool = False, progress: bool = False
) -> tuple[list[dict], DataReport]:
    """Read and check a COCO JSON in one pass; loader and evaluator both stand on this.

    Args:
        json_file: instances in COCO's format; category ids may be any integers.
        image_root: folder that its file_names are relative to.
        decode, progress: as in :func:`~resnet_backbone.detection.data.voc.scan_voc`.

    Returns:
        What `detectron2.data.datasets.load_coco_json` gives, category ids made contiguous in the
        order of the ids, less what is bad: images and boxes as in ``scan_voc``. A file without
        the list "annotations" (COCO's image_info, for its server) gives images without.

        The report also has "broken-json", which nothing can be left out of: missing keys, ids
        used twice, categories that are not there.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    found = inspect_json(json_file)
    report = DataReport(json_file, problems=list(found.problems), annotated=found.annotated)
    if not found.categories:
        return [], report
    names = list(found.categories.values())
    positions = {category_id: index for index, category_id in enumerate(found.categories)}
    records, kept = load_coco_json(json_file, image_root), []
    report.num_images = len(records)
    report.boxes.update(dict.fromkeys(names, 0))
    for record in tqdm(records, desc="checking", disable=None if progress else True):
        size = record["width"], record["height"]
        if check_image(report, record["file_name"], size, decode) is None:
            continue
        good = []
        for annotation in record["annotations"]:
            position = annotation["category_id"] = positions[annotation["category_id"]]
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            problem = box_problem(box, size)
            if problem:
                report.add("bad-box", record["file_name"], f"{names[position]} {problem}")
                continue
            report.boxes[names[position]] += 1
            good.append(annotation)
        kept.append({**record, "annotations": good})
    if not kept:
        report.add_empty(json_file)
    return kept, report


def register_coco(
    name: str, json_file: str, image_root: str, on_bad: str = "drop", decode: bool = False
) -> None:
    """Register a COCO JSON under `name`; its images are read when Detectron2 first asks for it.

    Metadata: thing_classes (from the JSON, by rising id), thing_dataset_id_to_contiguous_id,
    json_file, image_root, evaluator_type "coco", on_bad, decode.

    Args:
        json_file, image_root, decode: as in :func:`scan_coco`.
        on_bad: "drop" logs what is wrong and leaves it out, "refuse" raises a DataError.

    Raises:
        DataError: no such file, or it is not in COCO's format.
        ValueError: `name` is registered already with other arguments.
    """
    json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
    metadata = {
        **thing_metadata(json_file, image_root),
        "evaluator_type": "coco",
        "on_bad": on_bad,
        "decode": decode,
    }
    register_once(name, lambda: scan_coco(json_file, image_root, decode), metadata)


def thing_metadata(json_file: str, image_root: str) -> dict[str, Any]:
    """What Detectron2 keeps of an instances JSON, which must be in COCO's format."""
    categories, problems, _ = inspect_json(json_file)
    if not categories:
        raise DataError(f"{json_file} cannot be used: {list_problems(problems)}")
    return {
        "thing_classes": list(categories.values()),
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(categories)},
        "json_file": json_file,
        "image_root": image_root,
    }


def read_json(path: str) -> Any:
    """The content of a JSON file; a DataError if there is none, or it is not JSON."""
    if not os.path.isfile(path):
        raise DataError(f"{path} does not exist; give the path of a COCO annotation file")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


@cached_by_version
def inspect_json(json_file: str) -> Inspected:
    """Categories of an instances JSON, and what is wrong with it."""
    data = read_json(json_file)
    annotated = not isinstance(data, dict) or "annotations" in data
    if not annotated:
        data["annotations"] = []
    broken = list(_structure_problems(data))
    if broken:
        problems = (DataProblem("broken-json", json_file, detail) for detail in broken)
        return Inspected({}, tuple(problems), annotated)
    images = {image["id"] for image in data["images"]}
    orphans = [a for a in data["annotations"] if a["image_id"] not in images]
    detail = "annotation {id} is of image {image_id}, which is not in images"
    problems = (DataProblem("bad-box", json_file, detail.format(**a)) for a in orphans)
    categories = sorted((c["id"], c["name"]) for c in data["categories"])
    return Inspected(dict(categories), tuple(problems), annotated)


def absent_keys(data: Any, required: Mapping[str, Sequence[str]]) -> list[str]:
    """Which of these lists a JSON lacks, else which of these keys their entries lack."""
    lists = data if isinstance(data, dict) else {}
    missing = [section for section in required if not isinstance(lists.get(section), list)]
    if missing:
        return [f"no list {', '.join(missing)}, which COCO's format has"]
    found = []
    for section, keys in required.items():
        for position, entry in enumerate(data[section]):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                found.append(f"{section}[{position}] has no {', '.join(absent)}")
    return found


def _structure_problems(data: Any) -> Iterator[str]:
    """What would stop load_coco_json: absent keys, repeated ids, unknown categories, odd boxes."""
    absent = absent_keys(data, REQUIRED_KEYS)
    if absent:
        yield from absent
        return
    if not data["categories"]:
        yield "the list of categories is empty"
    for section in REQUIRED_KEYS:
        for repeated, times in Counter(e["id"] for e in data[section]).items():
            if times > 1:
                yield f"{section}: id {repeated} occurs {times} times"
    categories = {category["id"] for category in data["categories"]}
    for entry in data["annotations"]:
        where, box = f"annotation {entry['id']}", entry["bbox"]
        if entry["category_id"] not in categories:
            yield f"{where}: category_id {entry['category_id']} is not in categories"
        numbers = isinstance(box, list) and all(isinstance(v, (int, float)) for v in box)
        if not numbers or len(box) != 4:
            yield f"{where}: bbox {box!r} is not four numbers"
        if entry.get("ignore", 0) != 0:
            yield f'{where}: "ignore" is not supported by Detectron2'
