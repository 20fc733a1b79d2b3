"""COCO and custom data in COCO's JSON format as Detectron2 data sets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.formats.coco import CocoFile, read_coco
from resnet_backbone.detection.data.formats.shapes import fit_box
from resnet_backbone.detection.data.problems import (
    DataReport,
    in_threads,
    look_at_image,
    reading,
    unusable,
)
from resnet_backbone.detection.data.scans import ScannedDataset, register_once

Complete = Callable[[list[dict], DataReport], list[dict]]


def scan_coco(
    json_file: str,
    image_root: str,
    decode: bool = False,
    progress: bool = False,
    found: CocoFile | None = None,
) -> tuple[list[dict], DataReport]:
    """Reads and checks a COCO JSON in one pass, for both loader and evaluator.

    Args:
        json_file: instances in COCO's format; ids may be integers or strings.
        image_root: folder that its file_names are relative to.
        decode, progress: as in :func:`~resnet_backbone.detection.data.voc.scan_voc`.
        found: the file's content, if already read.

    Returns:
        The records of `detectron2.data.datasets.load_coco_json`, with each annotation's area.
        Category ids are contiguous, in the order of the ids. Boxes are clipped to their image.
        Annotations lose masks that cannot be used. Without a list "annotations" (COCO's image_info
        files for its server), the annotations are empty.

        The report lists what was dropped: images and boxes as in ``scan_voc``, incomplete entries,
        and duplicate ids. "broken-json" means that nothing in the file can be used.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    found = found or read_coco(json_file)
    report = _new_report(json_file, found)
    with reading(json_file):
        return list(_scan(found, report, image_root, decode, progress)), report


def _new_report(json_file: str, found: CocoFile) -> DataReport:
    """Creates a report with the outcome of reading the file."""
    report = DataReport(json_file, problems=list(found.problems), notes=list(found.notes))
    report.annotated, report.files[json_file] = found.annotated, found.stamp
    report.num_images = len(found.images) if found.categories else 0
    report.category_ids = list(found.categories)
    report.boxes.update(dict.fromkeys(found.categories.values(), 0))
    boxes = (one["bbox"] for entries in found.annotations.values() for one in entries)
    report.note_shares(max(map(max, boxes), default=-math.inf))
    return report


def _scan(
    found: CocoFile, report: DataReport, image_root: str, decode: bool, progress: bool
) -> Iterator[dict]:
    """Yields the records of :func:`scan_coco`; the report is complete after the last."""
    if not found.categories:
        return
    positions = {category: place for place, category in enumerate(found.categories)}
    names, kept = list(found.categories.values()), 0
    files = (
        (
            os.path.join(image_root, image["file_name"]),
            (image["width"], image["height"]) if image["width"] else None,
            decode,
        )
        for image in found.images.values()
    )
    looks = zip(found.images, in_threads(look_at_image, files), strict=True)
    bar = dict(desc="checking", total=len(found.images), disable=None if progress else True)
    for image_id, look in tqdm(looks, **bar):
        size = report.note_look(look)
        if size is None:
            continue
        good = []
        for entry in found.annotations.get(image_id, ()):
            position, (x, y, width, height) = positions[entry["category_id"]], entry["bbox"]
            whole = (x, y, x + width, y + height)
            box = fit_box(report, look.path, names[position], whole, size)
            if box is None:
                continue
            used = {**entry, "category_id": position, "bbox_mode": BoxMode.XYWH_ABS}
            if box != whole:
                used["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            report.boxes[names[position]] += 1
            good.append(used)
        kept += 1
        sides = {"height": size[1], "width": size[0]}
        yield {"file_name": look.path, **sides, "image_id": image_id, "annotations": good}
    if not kept:
        report.add_empty(report.name)


def register_coco(
    name: str, json_file: str, image_root: str, on_bad: str = "drop", decode: bool = False
) -> None:
    """Registers a COCO JSON under `name`; images are scanned when Detectron2 first asks for it.

    Metadata: thing_classes (from the JSON, by ascending id), thing_dataset_id_to_contiguous_id,
    json_file, image_root, evaluator_type "coco", on_bad, decode.

    Args:
        json_file, image_root, decode: as in :func:`scan_coco`.
        on_bad: "drop" logs and drops what is wrong, "refuse" raises a DataError.

    Raises:
        DataError: no such file, or it is not in COCO's format.
        ValueError: `name` is already registered with other arguments.
    """
    dataset, metadata = scanned_coco(json_file, image_root, on_bad, decode)
    register_once(name, dataset, {**metadata, "evaluator_type": "coco"})


def scanned_coco(
    json_file: str,
    image_root: str,
    on_bad: str,
    decode: bool,
    complete: Complete | None = None,
    **more: Any,
) -> tuple[ScannedDataset, dict[str, Any]]:
    """Returns a data set, not yet registered, and its metadata for Detectron2.

    Args:
        complete: extends the records and the report of the scan.
        more: everything that `complete` depends on.
    """
    json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
    parsed: list[CocoFile] = []

    def scan() -> tuple[Iterator[dict], DataReport]:
        found = parsed.pop() if parsed else read_coco(json_file)
        report = _new_report(json_file, found)
        records = _scan(found, report, image_root, decode, False)
        return (complete(list(records), report) if complete else records), report

    key = {"json_file": json_file, "image_root": image_root, "decode": decode, **more}
    dataset = ScannedDataset(scan, on_bad, key=key)
    kept = dataset.kept()
    if kept:
        ids, names = kept[1].category_ids, list(kept[1].boxes)
    else:
        found = read_coco(json_file)
        if not found.categories:
            raise unusable(json_file, found.problems)
        ids, names = list(found.categories), list(found.categories.values())
        parsed.append(found)
    return dataset, {
        "thing_classes": names,
        "thing_dataset_id_to_contiguous_id": {one: place for place, one in enumerate(ids)},
        "json_file": json_file,
        "image_root": image_root,
        "on_bad": on_bad,
        "decode": decode,
    }
