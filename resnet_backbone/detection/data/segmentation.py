"""Data sets with label pictures: semantic segmentation from folders, panoptic from COCO's format.

A label picture is an 8-bit gray PNG of its image's size and name whose pixels are class numbers;
255 is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from resnet_backbone.detection.data.coco import inspect_json, scan_coco
from resnet_backbone.detection.data.panoptic import (
    CLASSES_FILE,
    IGNORE,
    label_name,
    read_panoptic,
)
from resnet_backbone.detection.data.problems import (
    DataReport,
    ScannedDataset,
    read_image_size,
    register_once,
)
from resnet_backbone.runtime.errors import DataError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LABELS = (".png",)
SAMPLE = 200
"""Labels whose pixels are read when a data set is loaded, spread over it; of others the header."""


def read_class_names(label_root: str) -> list[str]:
    """Names of the labels 0, 1, ... from ``classes.txt`` in a label folder.

    Raises:
        DataError: no such file, no names, or more than fit.
    """
    path = Path(label_root) / CLASSES_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: write the classes, one a line, label 0 first")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    if not 1 < len(names) <= IGNORE:
        raise DataError(f"{path} names {len(names)} classes; 2 to {IGNORE} are possible")
    return names


def register_semantic(
    name: str,
    image_root: str,
    label_root: str,
    on_bad: str = "drop",
    decode: bool = False,
    shared_images: bool = False,
) -> None:
    """Registers images and label pictures of the same names (and sub-folders) under `name`.

    One folder may hold both (every PNG there is a label), or have the other inside it.
    Metadata: stuff_classes (from ``classes.txt``), ignore_label 255, evaluator_type "sem_seg".

    Args:
        on_bad, decode: as :func:`resnet_backbone.detection.data.load_coco_instances`.
        shared_images: other data sets have images in `image_root` too, so that images without a
            label picture are not reported.

    Raises:
        DataError: a folder or ``classes.txt`` is missing; when the data set is loaded, what
            `on_bad` says, two images of one label picture, and pixels that are not a class.
    """
    image_root, label_root = os.path.abspath(image_root), os.path.abspath(label_root)
    for folder in (image_root, label_root):
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder")
    classes = read_class_names(label_root)
    options = {"on_bad": on_bad, "decode": decode, "shared_images": shared_images}
    metadata = {
        "stuff_classes": classes,
        "image_root": image_root,
        "sem_seg_root": label_root,
        "ignore_label": IGNORE,
        "evaluator_type": "sem_seg",
        **options,
    }

    def scan() -> tuple[list[dict], DataReport]:
        report = DataReport(label_root)
        records = _pair(image_root, label_root, report, shared_images)
        records = drop_bad_labels(records, len(classes), report, decode)
        if not records:
            report.add_empty(label_root, "no usable image with a label picture")
        return records, report

    register_once(name, ScannedDataset(scan, on_bad), metadata)


def _pair(image_root: str, label_root: str, report: DataReport, shared_images: bool) -> list[dict]:
    """A record for every label picture that has an image."""
    labels = _list_files(label_root, LABELS, image_root)
    images: dict[str, Path] = {}
    for path in _list_files(image_root, IMAGES, label_root):
        if image_root == label_root and path.suffix.lower() in LABELS:
            continue
        name = label_name(path.relative_to(image_root).as_posix())
        if name in images:
            raise DataError(
                f"{images[name]} and {path} would have one label picture, {name}: rename one"
            )
        images[name] = path
    records = []
    for path in labels:
        image = images.pop(label_name(path.relative_to(label_root).as_posix()), None)
        if image is None:
            report.add("missing-image", str(path), f"no image of this name in {image_root}")
            continue
        records.append({"file_name": str(image), "sem_seg_file_name": str(path)})
    for name, path in images.items() if not shared_images else ():
        report.add("missing-label", str(path), f"no label picture {name} in {label_root}")
    return records


def _list_files(root: str, suffixes: Sequence[str], other: str) -> list[Path]:
    """Files below a folder by their suffix, less those of the other folder if it lies inside."""
    inside = Path(root) in Path(other).parents
    return [
        path
        for path in sorted(Path(root).rglob("*"))
        if path.suffix.lower() in suffixes and not (inside and Path(other) in path.parents)
    ]


def drop_bad_labels(
    records: Sequence[dict], num_classes: int, report: DataReport, decode: bool = False
) -> list[dict]:
    """Leaves out images and labels that cannot be read or are of different sizes.

    Args:
        records: with ``file_name`` and ``sem_seg_file_name``; not changed.
        report: gets the problems and the number of images.
        decode: also find images that are cut short.

    Returns:
        Records with ``height``, ``width`` and ``image_id``.

    Raises:
        DataError: label pictures in color or with a palette, which Detectron2 would turn into
            other numbers without a warning, or pixels that are not a class.
    """
    report.num_images += len(records)
    kept, step = [], max(1, len(records) // SAMPLE)
    for number, record in enumerate(tqdm(records, desc="checking labels", disable=None)):
        try:
            width, height = read_image_size(record["file_name"], decode)
            size = check_label(record["sem_seg_file_name"], num_classes, number % step == 0)
        except OSError as error:
            report.add("unreadable-image", record["file_name"], f"image or its label: {error}")
            continue
        if size != (width, height):
            detail = f"the image is {width}x{height}, its label {size[0]}x{size[1]}"
            report.add("size-mismatch", record["file_name"], detail)
            continue
        kept.append({"image_id": number, **record, "height": height, "width": width})
    return kept


def check_label(path: str, num_classes: int, pixels: bool) -> tuple[int, int]:
    """Width and height of a label picture.

    Raises:
        OSError: it is missing or broken.
        DataError: it is not 8-bit gray, or (with `pixels`) has a value that is not a class.
    """
    with Image.open(path) as label:
        size, mode = label.size, label.mode
        values = np.unique(np.asarray(label)) if pixels and mode == "L" else np.empty(0)
    if mode != "L":
        raise DataError(
            f"{path} is a picture of mode {mode}: labels are 8-bit gray, mode L, pixel = class "
            "number (a palette picture p: Image.fromarray(numpy.asarray(p)).save(path))"
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
    """Registers what Panoptic FPN trains on: instances, "stuff" labels, and COCO's panoptic format.

    It is Detectron2's "separated" form. Metadata: that of :func:`register_coco`, and
    stuff_classes ("things" first), stuff_dataset_id_to_contiguous_id, panoptic_json,
    panoptic_root, ignore_label 255, evaluator_type "coco_panoptic_seg".

    Args:
        label_root: label pictures: 0 things, then the stuff classes by rising category id
            (Detectron2's ``prepare_panoptic_fpn.py``; tools/prepare_data.py labels).
        panoptic_root: its pictures; empty: `panoptic_json` without ``.json``, as COCO has it.

    Raises:
        DataError: a missing file or folder, or JSON files that do not belong together.
    """
    paths = [json_file, image_root, label_root, panoptic_json]
    json_file, image_root, label_root, panoptic_json = map(os.path.abspath, paths)
    panoptic_root = os.path.abspath(panoptic_root or panoptic_json.removesuffix(".json"))
    content = read_panoptic(panoptic_json)
    things, stuff = panoptic_categories(json_file, panoptic_json, content)
    pictures = {entry["image_id"]: entry["file_name"] for entry in content["annotations"]}
    for folder in (image_root, label_root, panoptic_root):
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder")
    classes, options = ["things", *stuff.values()], {"on_bad": on_bad, "decode": decode}
    metadata = {
        "thing_classes": list(things.values()),
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(things)},
        "stuff_classes": classes,
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{c: i + 1 for i, c in enumerate(stuff)}},
        "json_file": json_file,
        "image_root": image_root,
        "sem_seg_root": label_root,
        "panoptic_json": panoptic_json,
        "panoptic_root": panoptic_root,
        "ignore_label": IGNORE,
        "evaluator_type": "coco_panoptic_seg",
        **options,
    }

    def scan() -> tuple[list[dict], DataReport]:
        records, report = scan_coco(json_file, image_root, decode)
        for record in records:
            relative = os.path.relpath(record["file_name"], image_root)
            record["sem_seg_file_name"] = os.path.join(label_root, label_name(relative))
        report.num_images = 0  # counted again
        records = drop_bad_labels(records, len(classes), report)
        records = _drop_without_panoptic(records, panoptic_json, panoptic_root, pictures, report)
        if not records:
            report.add_empty(panoptic_json, "no usable image with its two label pictures")
        return records, report

    register_once(name, ScannedDataset(scan, on_bad), metadata)


def _drop_without_panoptic(
    records: Sequence[dict],
    panoptic_json: str,
    panoptic_root: str,
    pictures: Mapping[int, str],
    report: DataReport,
) -> list[dict]:
    """Leaves out images that panoptic quality could not be measured on.

    Args:
        pictures: file name of each image id, below `panoptic_root`.
    """
    kept = []
    for record in records:
        problem = f"image id {record['image_id']} is not in annotations of {panoptic_json}"
        if record["image_id"] in pictures:
            path = os.path.join(panoptic_root, pictures[record["image_id"]])
            problem = _picture_problem(path, (record["width"], record["height"]))
        if problem:
            report.add("missing-panoptic", record["file_name"], problem)
        else:
            kept.append(record)
    return kept


def _picture_problem(path: str, size: tuple[int, int]) -> str | None:
    try:
        found = read_image_size(path)
    except OSError as error:
        return f"panoptic picture: {error}"
    if found == size:
        return None
    return "the image is {}x{}, its panoptic picture {}x{}".format(*size, *found)


def panoptic_categories(
    json_file: str, panoptic_json: str, content: Mapping
) -> tuple[dict[int, str], dict[int, str]]:
    """Things and stuff {category id: name}, each by rising id.

    Args:
        content: of `panoptic_json`.

    Raises:
        DataError: no stuff, or other things than the instances have.
    """
    things, _ = inspect_json(json_file)
    categories = content["categories"]
    entries = sorted((c["id"], c["name"], bool(c["isthing"])) for c in categories)
    found = {number: name for number, name, is_thing in entries if is_thing}
    stuff = {number: name for number, name, is_thing in entries if not is_thing}
    if found != things or not stuff:
        raise DataError(
            f"{panoptic_json} has {len(found)} classes of things and {len(stuff)} of stuff, "
            f"{json_file} has {len(things)} things: they need the same things, and some stuff"
        )
    return things, stuff
