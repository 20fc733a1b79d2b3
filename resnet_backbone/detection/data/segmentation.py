"""Data sets with label pictures: semantic segmentation from folders, panoptic from COCO's format.

A label picture is an 8-bit grayscale PNG with its image's size and name, whose pixels are class
numbers; 255 is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from resnet_backbone.detection.data.coco import scanned_coco
from resnet_backbone.detection.data.panoptic import (
    CLASSES_FILE,
    IGNORE,
    label_name,
    panoptic_categories,
    read_panoptic,
)
from resnet_backbone.detection.data.problems import (
    DataProblem,
    DataReport,
    Look,
    decoding,
    files_below,
    in_threads,
    look_at_image,
    reading,
    reads_file,
    stamp_of,
)
from resnet_backbone.detection.data.scans import ScannedDataset, register_once
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import EXTENSIONS

LABELS = (".png",)


@reads_file
def read_class_names(label_root: str) -> list[str]:
    """Reads the names of labels 0, 1, ... from ``classes.txt`` in a label folder."""
    path = Path(label_root) / CLASSES_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: write the classes, one per line, label 0 first")
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not 1 < len(names) <= IGNORE:
        raise DataError(f"{path} names {len(names)} classes; give 2 to {IGNORE}")
    return names


def register_semantic(
    name: str,
    image_root: str,
    label_root: str,
    on_bad: str = "drop",
    decode: bool = False,
    shared_images: bool = False,
) -> None:
    """Registers images and label pictures with matching names (and subfolders) under `name`.

    Both may share one folder (every PNG is then a label), or one folder may contain the other.
    Metadata: stuff_classes (from ``classes.txt``), ignore_label 255, evaluator_type "sem_seg".

    Args:
        on_bad, decode: as in :func:`resnet_backbone.detection.data.register_coco`.
        shared_images: other data sets use these images too, so missing labels are not reported.

    Raises:
        DataError: a folder or ``classes.txt`` is missing; when the data set is loaded, if two
            images share a label picture, or if pixels are not a class.
    """
    image_root, label_root = os.path.abspath(image_root), os.path.abspath(label_root)
    _check_folders(image_root, label_root)
    classes = read_class_names(label_root)
    metadata = {
        "stuff_classes": classes,
        "image_root": image_root,
        "sem_seg_root": label_root,
        "ignore_label": IGNORE,
        "evaluator_type": "sem_seg",
        "on_bad": on_bad,
        "decode": decode,
        "shared_images": shared_images,
    }

    def scan() -> tuple[list[dict], DataReport]:
        report = DataReport(label_root)
        for folder in (image_root, label_root):
            for place, _, _ in os.walk(folder, followlinks=True):
                report.watch(place)
        records = _pair(image_root, label_root, report, shared_images)
        report.num_images = len(records)
        records = _drop_bad_labels(records, len(classes), report, decode)
        if not records:
            report.add_empty(label_root, "no usable image with a label image")
        return records, report

    register_once(name, ScannedDataset(scan, on_bad, key=metadata), metadata)


def _check_folders(*folders: str) -> None:
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder")


def _pair(image_root: str, label_root: str, report: DataReport, shared_images: bool) -> list[dict]:
    """Returns a record for every label picture that has an image."""
    images: dict[str, str] = {}
    for name, path in _list_files(image_root, EXTENSIONS, label_root):
        if image_root == label_root and path.lower().endswith(LABELS):
            continue
        if name in images:
            raise DataError(
                f"{images[name]} and {path} would have the same label image, {name}: rename one"
            )
        images[name] = path
    records = []
    for name, path in _list_files(label_root, LABELS, image_root):
        image = images.pop(name, None)
        if image is None:
            report.add("missing-image", path, f"no image of this name in {image_root}")
        else:
            records.append({"file_name": image, "sem_seg_file_name": path})
    for name, path in images.items() if not shared_images else ():
        report.add("missing-label", path, f"no label image {name} in {label_root}")
    return records


def _list_files(root: str, suffixes: Sequence[str], other: str) -> list[tuple[str, str]]:
    """Returns label name and path of files by suffix, except in the folder `other` inside."""
    inside = Path(root) in Path(other).parents
    return [
        (label_name(str(path.relative_to(root))), str(path))
        for path in sorted(files_below(Path(root), *suffixes))
        if not (inside and Path(other) in path.parents)
    ]


def _drop_bad_labels(
    records: Sequence[dict], num_classes: int, report: DataReport, decode: bool = False
) -> list[dict]:
    """Adds height, width and image_id; drops unreadable files and pairs of different sizes."""
    files = [(one["file_name"], one["sem_seg_file_name"]) for one in records]
    for _, label in files:
        report.watch(label)
    looks, kept = in_threads(_look_at_pair, ((*pair, num_classes, decode) for pair in files)), []
    pairs = zip(records, looks, strict=True)
    bar = dict(desc="checking labels", total=len(files), disable=None)
    for number, (record, look) in enumerate(tqdm(pairs, **bar)):
        size = report.note_look(look)
        if size:
            sides = {"height": size[1], "width": size[0]}
            kept.append({"image_id": number, **record, **sides})
    return kept


def _look_at_pair(image: str, label: str, num_classes: int, decode: bool) -> Look:
    try:
        size = check_label(label, num_classes)
    except OSError as error:
        problem = DataProblem("unreadable-image", image, f"its label: {error}")
        return Look(image, stamp_of(image), problem=problem)
    return look_at_image(image, size, decode)


def check_label(path: str, num_classes: int) -> tuple[int, int]:
    """Returns the width and height of a label picture.

    Raises:
        OSError: it cannot be read.
        DataError: it has color or a palette, which Detectron2 would silently convert to other
            numbers, or a value that is not a class.
    """
    with decoding(), Image.open(path) as label:
        size, mode = label.size, label.mode
        values = np.unique(np.asarray(label)) if mode == "L" else np.empty(0)
    if mode != "L":
        raise DataError(
            f"{path} is an image of mode {mode}: labels are 8-bit gray, mode L, pixel = class "
            "number (a palette image p: Image.fromarray(numpy.asarray(p)).save(path))"
        )
    wrong = values[(values >= num_classes) & (values != IGNORE)]
    if len(wrong):
        raise DataError(f"{path} has label {wrong[0]}; there are {num_classes} classes from 0")
    return size


def register_panoptic(
    name: str,
    json_file: str,
    image_root: str,
    label_root: str,
    panoptic_json: str,
    panoptic_root: str = "",
    on_bad: str = "drop",
    decode: bool = False,
) -> None:
    """Registers data for Panoptic FPN: instances, "stuff" labels, and COCO's panoptic format.

    This is Detectron2's "separated" form. Metadata: as in :func:`register_coco`, stuff_classes
    ("things" first), stuff_dataset_id_to_contiguous_id, the paths, ignore_label 255, and
    evaluator_type "coco_panoptic_seg".

    Args:
        label_root: label pictures: 0 for things, then the stuff classes by ascending category id
            (Detectron2's ``prepare_panoptic_fpn.py``; tools/prepare_data.py labels).
        panoptic_root: folder of its pictures; empty for `panoptic_json` without ``.json``.

    Raises:
        DataError: a file or folder is missing, or the JSON files do not belong together.
    """
    paths = [json_file, image_root, label_root, panoptic_json]
    json_file, image_root, label_root, panoptic_json = map(os.path.abspath, paths)
    panoptic_root = os.path.abspath(panoptic_root or panoptic_json.removesuffix(".json"))
    _check_folders(image_root, label_root, panoptic_root)
    stamp, content = stamp_of(panoptic_json), read_panoptic(panoptic_json)

    def complete(records: list[dict], report: DataReport) -> list[dict]:
        report.files[panoptic_json] = stamp
        for record in records:
            relative = os.path.relpath(record["file_name"], image_root)
            record["sem_seg_file_name"] = os.path.join(label_root, label_name(relative))
        records = _drop_bad_labels(records, len(classes), report)
        records = _drop_without_panoptic(records, panoptic_json, pictures, report)
        if not records:
            report.add_empty(panoptic_json, "no usable image with its two label images")
        return records

    options = dict(labels=label_root, panoptic=panoptic_json, pictures=panoptic_root)
    found = json_file, image_root, on_bad, decode, complete
    dataset, instances = scanned_coco(*found, **options)
    entries = content["annotations"]
    with reading(panoptic_json):
        stuff = _stuff_of(panoptic_json, content, instances)
        pictures = {e["image_id"]: os.path.join(panoptic_root, e["file_name"]) for e in entries}
    classes = ["things", *stuff.values()]
    metadata = {
        **instances,
        "stuff_classes": classes,
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{c: i + 1 for i, c in enumerate(stuff)}},
        "sem_seg_root": label_root,
        "panoptic_json": panoptic_json,
        "panoptic_root": panoptic_root,
        "ignore_label": IGNORE,
        "evaluator_type": "coco_panoptic_seg",
    }
    register_once(name, dataset, metadata)


def _drop_without_panoptic(
    records: Sequence[dict], panoptic_json: str, pictures: Mapping[int, str], report: DataReport
) -> list[dict]:
    """Drops images without panoptic ground truth."""
    kept = []
    for record in records:
        picture = pictures.get(record["image_id"])
        problem: str | None = (
            f"image id {record['image_id']} is not in annotations of {panoptic_json}"
        )
        if picture:
            look = look_at_image(picture, (record["width"], record["height"]), decode=False)
            report.files[picture] = look.stamp
            problem = look.problem and f"panoptic image {picture}: {look.problem.detail}"
        if problem:
            report.add("missing-panoptic", record["file_name"], problem)
        else:
            kept.append(record)
    return kept


def _stuff_of(panoptic_json: str, content: Mapping, instances: Mapping) -> dict[int, str]:
    """Returns the stuff classes as {category id: name}, by ascending id."""
    ids, names = instances["thing_dataset_id_to_contiguous_id"], instances["thing_classes"]
    things, stuff = panoptic_categories(content)
    if things != dict(zip(ids, names, strict=True)) or not stuff:
        raise DataError(
            f"{panoptic_json} has {len(things)} classes of things and {len(stuff)} of stuff, but "
            f"{instances['json_file']} has {len(ids)} things: they need the same things, and some "
            "stuff"
        )
    return stuff
