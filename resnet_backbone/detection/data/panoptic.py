"""Panoptic and semantic ground truth made from COCO instances or COCO's panoptic format.

Labels made from instances are enough to train and try every segmentation model. They do not
annotate stuff, so numbers on them compare only with each other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from resnet_backbone.detection.data.formats.coco import CocoFile, absent_keys, read_coco, read_json
from resnet_backbone.detection.data.problems import decoding, reads_file, unusable
from resnet_backbone.runtime.errors import DataError

BACKGROUND = "background"
CLASSES_FILE = "classes.txt"
NOTE = (
    "Made from instances: the smaller of two overlapping instances lies on top, crowds lie below "
    "them, every other pixel is the one stuff class 'background'."
)
IGNORE = 255
"""Label of pixels excluded from loss and metrics; Detectron2's ``SEM_SEG_HEAD.IGNORE_VALUE``."""

PANOPTIC_KEYS = {
    "categories": ("id", "name", "isthing"),
    "annotations": ("image_id", "file_name", "segments_info"),
}


def paint_instances(
    size: tuple[int, int], annotations: Sequence[dict], masks: Sequence[np.ndarray]
) -> np.ndarray:
    """Paints instances into one map: crowds at the bottom, then larger before smaller ones.

    Args:
        size: (H, W) of the image.
        annotations: COCO annotations of the image; only ``iscrowd`` is read.
        masks: bool or 0/1, (H, W) each.

    Returns:
        (H, W) int32: 0 for background, otherwise 1 + position in `annotations`.
    """
    painted = np.zeros(size, np.int32)
    ranks = [
        (not annotation.get("iscrowd", 0), -int(np.count_nonzero(mask)))
        for annotation, mask in zip(annotations, masks, strict=True)
    ]
    for position in sorted(range(len(ranks)), key=ranks.__getitem__):
        painted[masks[position].astype(bool)] = position + 1
    return painted


def panoptic_of(
    painted: np.ndarray, annotations: Sequence[dict], background_id: int
) -> tuple[np.ndarray, list[dict]]:
    """Converts a painted image to COCO's panoptic ids (H, W) int32 and ``segments_info``.

    Crowds of one class are one segment, as in COCO. Fully hidden instances have no segment.
    """
    keys = [("background", background_id, 0)]
    for position, annotation in enumerate(annotations):
        crowd = annotation.get("iscrowd", 0)
        keys.append(("crowd" if crowd else position, annotation["category_id"], crowd))
    ids, known, segments = np.zeros_like(painted), {}, []
    for value in np.unique(painted).tolist():
        ids[painted == value] = known.setdefault(keys[value], len(known) + 1)
    for (_, category, crowd), number in known.items():
        mask = mask_util.encode(np.asfortranarray(ids == number, np.uint8))
        segment = {"id": number, "category_id": category, "iscrowd": crowd}
        box = mask_util.toBbox(mask).astype(int).tolist()
        segments.append({**segment, "area": int(mask_util.area(mask)), "bbox": box})
    return ids, segments


def semantic_of(
    ids: np.ndarray,
    segments: Sequence[dict],
    labels: Mapping[int, int],
    ignore_crowds: bool = True,
) -> np.ndarray:
    """Returns labels (H, W) uint8 of a panoptic image; void (id 0) becomes :data:`IGNORE`.

    Args:
        ids, segments: as returned by :func:`panoptic_of`.
        labels: category id -> label.
        ignore_crowds: crowds become :data:`IGNORE` too.
    """
    present, positions = np.unique(ids, return_inverse=True)  # COCO's ids range up to 256 ** 3
    label = {
        segment["id"]: labels[segment["category_id"]]
        for segment in segments
        if not (ignore_crowds and segment["iscrowd"])
    }
    table = np.array([label.get(number, IGNORE) for number in present.tolist()], np.uint8)
    return table[positions].reshape(ids.shape)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Encodes segment ids (H, W) as COCO's RGB picture: id = R + 256 G + 65536 B."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=2).astype(np.uint8)


def decode_ids(picture: np.ndarray) -> np.ndarray:
    """The inverse of :func:`encode_ids`: (H, W, 3) uint8 -> (H, W) int32."""
    return picture.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


@reads_file
def make_labels(json_file: str, output: str) -> dict[str, int]:
    """Writes panoptic and semantic ground truth for an instances JSON.

    ``panoptic/`` and ``panoptic.json`` are in COCO's panoptic format. ``semantic/`` has label 0 for
    background and one label per class from 1; crowds are ignored. ``stuff/`` is the target of
    Panoptic FPN's semantic head: 0 things (with crowds), 1 background. ``classes.txt`` in both
    names the labels. Pictures are PNGs named like their images. Existing files are replaced.

    Returns:
        Counts: images, segments, hidden (instances fully covered by smaller ones).

    Raises:
        DataError: before anything is written: the file is not in COCO's format, annotations lack
            masks, there are too many classes, file names lead out of the folder, or two images
            share a label name; later: run lengths cannot be decoded.
    """
    found = read_instances(json_file)
    categories = found.categories
    root, background_id = Path(output), max(categories) + 1
    labels = {background_id: 0, **{category: i + 1 for i, category in enumerate(categories)}}
    stuff = {background_id: 1, **dict.fromkeys(categories, 0)}
    entries, hidden = [], 0
    for number, image in tqdm(found.images.items(), desc="labels", disable=None):
        annotations = found.annotations.get(number, [])
        masks = [_decode(one["segmentation"], image) for one in annotations]
        painted = paint_instances((image["height"], image["width"]), annotations, masks)
        ids, segments = panoptic_of(painted, annotations, background_id)
        name = label_name(image["file_name"])
        _save(root / "panoptic" / name, encode_ids(ids))
        _save(root / "semantic" / name, semantic_of(ids, segments, labels))
        _save(root / "stuff" / name, semantic_of(ids, segments, stuff, ignore_crowds=False))
        entries.append({"image_id": number, "file_name": name, "segments_info": segments})
        hidden += len(annotations) - len(np.unique(painted[painted > 0]))
    _write_names(root / "semantic", [BACKGROUND, *categories.values()])
    _write_names(root / "stuff", ["things", BACKGROUND])
    things = [{"id": i, "name": name, "isthing": 1} for i, name in categories.items()]
    content = {
        "info": {"description": NOTE},
        "images": [{"id": number, **image} for number, image in found.images.items()],
        "categories": [*things, {"id": background_id, "name": BACKGROUND, "isthing": 0}],
        "annotations": entries,
    }
    (root / "panoptic.json").write_text(json.dumps(content), encoding="utf-8")
    segments = sum(len(entry["segments_info"]) for entry in entries)
    return {"images": len(entries), "segments": segments, "hidden": hidden}


@reads_file
def make_stuff(panoptic_json: str, output: str, panoptic_root: str = "") -> int:
    """Writes Panoptic FPN's labels for COCO's panoptic format: 0 things, stuff from 1, void 255.

    The output is the same as that of Detectron2's ``prepare_panoptic_fpn.py``.

    Args:
        panoptic_root: folder of its pictures; empty for `panoptic_json` without ``.json``.

    Returns:
        The number of pictures.

    Raises:
        DataError: not COCO's panoptic format, names that lead out of the folder, or a missing
            picture.
    """
    content = read_panoptic(panoptic_json)
    root = Path(panoptic_root or panoptic_json.removesuffix(".json"))
    things, stuff = panoptic_categories(content)
    labels = dict.fromkeys(things, 0) | {category: i + 1 for i, category in enumerate(stuff)}
    if len(stuff) >= IGNORE:
        raise DataError(f"{panoptic_json}: {len(stuff)} classes of stuff do not fit into 8 bits")
    entries = content["annotations"]
    check_names(panoptic_json, (entry["file_name"] for entry in entries))
    for entry in tqdm(entries, desc="stuff", disable=None):
        try:
            with decoding(), Image.open(root / entry["file_name"]) as picture:
                ids = decode_ids(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise DataError(f"{root / entry['file_name']}: cannot be read ({error})") from error
        table = semantic_of(ids, entry["segments_info"], labels, ignore_crowds=False)
        _save(Path(output) / entry["file_name"], table)
    _write_names(Path(output), ["things", *stuff.values()])
    return len(entries)


def _decode(mask: list | dict, image: Mapping[str, Any]) -> np.ndarray:
    try:
        if isinstance(mask, list):
            polygons = mask_util.frPyObjects(mask, image["height"], image["width"])
            mask = mask_util.merge(polygons)
        return mask_util.decode(mask)
    except ValueError as error:
        raise DataError(
            f"{image['file_name']}: a mask's run lengths cannot be decoded ({error}); mend it or "
            "take it out"
        ) from error


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _write_names(folder: Path, names: Sequence[str]) -> None:
    (folder / CLASSES_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")


def label_name(file_name: str) -> str:
    """Returns the path of an image's label picture in the label folder: the same, as PNG."""
    return Path(file_name).with_suffix(".png").as_posix()


@reads_file
def read_instances(json_file: str) -> CocoFile:
    """Reads an instances JSON, and checks everything that labels need.

    Polygons of fewer than three points are dropped, as by Detectron2's loader.
    """
    found = read_coco(json_file)
    if found.problems:
        raise unusable(json_file, found.problems)
    if len(found.categories) >= IGNORE:
        number = len(found.categories)
        raise DataError(f"{json_file}: {number} classes do not fit into 8-bit labels")
    check_names(json_file, (image["file_name"] for image in found.images.values()))
    unsized = [image["file_name"] for image in found.images.values() if image["width"] is None]
    if unsized:
        raise DataError(f"{json_file}: {unsized[0]} has no width and height: add them")
    bare = [
        f"the box {one['bbox']} of {found.images[image]['file_name']}"
        for image, entries in found.annotations.items()
        for one in entries
        if "segmentation" not in one
    ]
    if bare:
        raise DataError(
            f"{json_file}: {len(bare)} annotations have no usable mask (polygons of 3 points or "
            f"more, or run lengths for all pixels), such as {bare[0]}: correct or remove them"
        )
    return found


def check_names(json_file: str, file_names: Iterable[Any]) -> None:
    """Refuses file names that lead out of a folder or that share a label picture."""
    labels = Counter()
    for name in file_names:
        path = PurePath(name) if isinstance(name, str) else PurePath()
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{json_file}: file_name {name!r} is not below the image folder: write it "
                "relative to that folder, without '..'"
            )
        labels[label_name(name)] += 1
    name, times = labels.most_common(1)[0] if labels else ("", 0)
    if times > 1:
        raise DataError(f"{json_file}: {times} images would have the same label image {name}")


@reads_file
def read_panoptic(panoptic_json: str) -> dict:
    """Reads a file in COCO's panoptic format; DataError if it is not valid."""
    content, where = read_json(panoptic_json), f"{panoptic_json} is not COCO's panoptic format"
    absent = absent_keys(content, PANOPTIC_KEYS)
    if absent:
        raise DataError(f"{where}: {absent[0]}")
    categories = {category["id"] for category in content["categories"]}
    for position, entry in enumerate(content["annotations"]):
        absent = absent_keys(entry, {"segments_info": ("id", "category_id")})
        unknown = {} if absent else {s["category_id"] for s in entry["segments_info"]} - categories
        if unknown:
            absent = [f"a segment is of category {min(unknown)}, which is not in categories"]
        if absent:
            raise DataError(f"{where}: annotations[{position}] ({entry['file_name']}): {absent[0]}")
    return content


def panoptic_categories(content: Mapping) -> tuple[dict[int, str], dict[int, str]]:
    """Returns things and stuff as {category id: name}, each by ascending id."""
    categories = sorted((c["id"], c["name"], bool(c["isthing"])) for c in content["categories"])
    things = {number: name for number, name, is_thing in categories if is_thing}
    return things, {number: name for number, name, is_thing in categories if not is_thing}
