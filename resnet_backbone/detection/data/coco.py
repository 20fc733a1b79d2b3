"""Data sets in COCO's JSON format, COCO's own or a user's."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from detectron2.data.datasets.coco import load_coco_json
from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.problems import (
    DataProblem,
    DataReport,
    ScannedDataset,
    box_problem,
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


def scan_coco(
    json_file: str, image_root: str, decode: bool = False, progress: bool = False
) -> tuple[list[dict], DataReport]:
    """Read and check a COCO JSON in one pass; loader and check both stand on this.

    Returns:
        Detectron2 dicts of what is good (see :func:`load_coco_instances`), and what is not. A file
        without the list "annotations" (COCO's image_info, for its server) gives images without.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    categories, problems = inspect_json(json_file)
    report = DataReport(json_file, problems=list(problems), annotated=is_annotated(json_file))
    if not categories:
        return [], report
    records = load_coco_json(json_file, image_root)
    ids = {category_id: index for index, category_id in enumerate(categories)}
    for annotation in (a for r in records for a in r["annotations"]):
        annotation["category_id"] = ids[annotation["category_id"]]
    records = drop_bad(records, list(categories.values()), report, decode, progress)
    if not records:
        report.add_empty(json_file)
    return records, report


def drop_bad(
    dataset_dicts: Sequence[dict],
    class_names: Sequence[str],
    report: DataReport,
    decode: bool = False,
    progress: bool = False,
) -> list[dict]:
    """Leave out unusable images and invalid boxes.

    Args:
        dataset_dicts: Detectron2 dicts with contiguous category ids; not changed.
        class_names: position = category_id.
        report: gets one problem for each thing left out, and the counts of what stays.
        decode: also find images that are cut short; reads every pixel.
        progress: show a progress bar on a terminal.

    Returns:
        New dicts of the good images with their good boxes. An image may end up without boxes.
    """
    report.num_images += len(dataset_dicts)
    report.boxes.update(dict.fromkeys(class_names, 0))
    kept = []
    for record in tqdm(dataset_dicts, desc="checking", disable=None if progress else True):
        size = record["width"], record["height"]
        if check_image(report, record["file_name"], size, decode) is None:
            continue
        good = []
        for annotation in record["annotations"]:
            name = class_names[annotation["category_id"]]
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            problem = box_problem(box, size)
            if problem:
                report.add("bad-box", record["file_name"], f"{name} {problem}")
                continue
            report.count(name)
            good.append(annotation)
        kept.append({**record, "annotations": good})
    return kept


def check_coco(
    json_file: str, image_root: str, decode: bool = False, progress: bool = True
) -> DataReport:
    """Find what is wrong with a COCO JSON; the loader leaves out exactly this.

    Reported: images and boxes as in ``check_voc``; and as "broken-json", which nothing can be left
    out of: missing keys, ids used twice, categories that are not there.

    Args:
        json_file: instances in COCO's format.
        image_root: folder that its file_names are relative to.
        decode, progress: as in ``check_voc``.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    return scan_coco(json_file, image_root, decode, progress)[1]


def load_coco_instances(
    json_file: str, image_root: str, on_bad: str = "drop", decode: bool = False
) -> list[dict]:
    """Load a COCO JSON as Detectron2 dicts.

    Args:
        json_file: instances in COCO's format; category ids may be any integers.
        image_root: folder that its file_names are relative to.
        on_bad: "drop" logs what :func:`check_coco` finds and leaves it out, "refuse" raises.
        decode: also find (and leave out) images that are cut short; reads every pixel.

    Returns:
        What `detectron2.data.datasets.load_coco_json` gives, category ids made contiguous in the
        order of the ids, less what is bad.

    Raises:
        DataError: no such file, not COCO's format, no usable image, or a problem with "refuse".
    """
    return _dataset(json_file, image_root, on_bad, decode)()


def _dataset(json_file: str, image_root: str, on_bad: str, decode: bool) -> ScannedDataset:
    return ScannedDataset(lambda: scan_coco(json_file, image_root, decode), on_bad)


def register_coco(
    name: str, json_file: str, image_root: str, on_bad: str = "drop", decode: bool = False
) -> None:
    """Register a COCO JSON under `name`; its images are read when Detectron2 first asks for it.

    Args as :func:`load_coco_instances`. Metadata: thing_classes (from the JSON, by rising id),
    thing_dataset_id_to_contiguous_id, json_file, image_root, evaluator_type "coco".

    Raises:
        DataError: no such file, or it is not in COCO's format.
        ValueError: `name` is registered already with other arguments.
    """
    json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
    categories, problems = inspect_json(json_file)
    if not categories:
        raise DataError("\n".join([f"{json_file} cannot be used:", *list_problems(problems, 10)]))
    options = {"on_bad": on_bad, "decode": decode}
    metadata = {
        "thing_classes": list(categories.values()),
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(categories)},
        "json_file": json_file,
        "image_root": image_root,
        "evaluator_type": "coco",
        **options,
    }
    register_once(name, _dataset(json_file, image_root, **options), metadata)


def inspect_json(json_file: str):
    """Categories {id: name} by rising id, and problems; no categories if the file is unusable."""
    return _inspect(json_file)[:2]


def is_annotated(json_file: str) -> bool:
    """False for a list of images without the key "annotations", such as COCO's image_info files.

    There is nothing in it to train on and nothing to compare detections with.
    """
    return _inspect(json_file)[2]


def _inspect(json_file: str):
    if not os.path.isfile(json_file):
        raise DataError(f"{json_file} does not exist; give the path of a COCO annotation file")
    stat = os.stat(json_file)
    return _inspect_version(json_file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _inspect_version(json_file: str, _mtime: int, _size: int):
    try:
        with open(json_file, encoding="utf-8") as file:
            data = json.load(file)
    except ValueError as error:
        raise DataError(f"{json_file} is not JSON: {error}") from error
    annotated = not isinstance(data, dict) or "annotations" in data
    if not annotated:
        data["annotations"] = []
    problems = list(_structure_problems(data))
    if problems:
        found = tuple(DataProblem("broken-json", json_file, detail) for detail in problems)
        return {}, found, annotated
    images = {image["id"] for image in data["images"]}
    orphans = [a for a in data["annotations"] if a["image_id"] not in images]
    detail = "annotation {id} is of image {image_id}, which is not in images"
    problems = [DataProblem("bad-box", json_file, detail.format(**a)) for a in orphans]
    categories = sorted((c["id"], c["name"]) for c in data["categories"])
    return dict(categories), tuple(problems), annotated


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
    yield from _annotation_problems(data)


def _annotation_problems(data: dict[str, list]) -> Iterator[str]:
    categories = {category["id"] for category in data["categories"]}
    for entry in data["annotations"]:
        where = f"annotation {entry['id']}"
        if entry["category_id"] not in categories:
            yield f"{where}: category_id {entry['category_id']} is not in categories"
        box = entry["bbox"]
        numbers = isinstance(box, list) and all(isinstance(v, (int, float)) for v in box)
        if not numbers or len(box) != 4:
            yield f"{where}: bbox {box!r} is not four numbers"
        if entry.get("ignore", 0) != 0:
            yield f'{where}: "ignore" is not supported by Detectron2'
