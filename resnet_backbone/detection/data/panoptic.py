"""Panoptic and semantic ground truth made from COCO instances.

COCO's instances overlap and leave most of an image without a label. Here the smaller of two
instances lies on top, and every pixel without an instance is one "stuff" class, background. That
is enough to train and to try every segmentation model on instance annotations; it is no
annotation of stuff, and numbers on it compare only with each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm

from resnet_backbone.detection.data.panoptic_files import (
    IGNORE,
    check_names,
    label_name,
    read_instances,
    read_panoptic,
)
from resnet_backbone.detection.data.problems import DataError

BACKGROUND = "background"
CLASSES_FILE = "classes.txt"
NOTE = (
    "Made from instances: the smaller of two overlapping instances lies on top, crowds lie below "
    "them, every other pixel is the one stuff class 'background'."
)


def paint_instances(annotations: Sequence[dict], masks: Sequence[np.ndarray]) -> np.ndarray:
    """Resolves overlaps: crowds at the bottom, then larger before smaller instances.

    Args:
        annotations: COCO annotations of one image, at least one; only ``iscrowd`` is read.
        masks: bool or 0/1, (H, W) each.

    Returns:
        (H, W) int32: 0 where there is nothing, otherwise 1 + position in `annotations`. Of two
        instances of the same size the later one lies on top.
    """
    painted = np.zeros(masks[0].shape, np.int32)
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
    """COCO's panoptic format of a painted image.

    Crowds of one class are one segment, as COCO has it; what is wholly hidden has none.

    Returns:
        Segment ids (H, W) int32 from 1, and their ``segments_info``: id, category_id, iscrowd,
        area in pixels, bbox (x, y, width, height).
    """
    keys = [("background", background_id, 0)]
    for position, annotation in enumerate(annotations):
        crowd = annotation.get("iscrowd", 0)
        keys.append(("crowd" if crowd else position, annotation["category_id"], crowd))
    ids, known = np.zeros_like(painted), {}
    for value in np.unique(painted).tolist():
        ids[painted == value] = known.setdefault(keys[value], len(known) + 1)
    segments = [
        {"id": number, "category_id": category, "iscrowd": crowd, **_extent(ids == number)}
        for (_, category, crowd), number in known.items()
    ]
    return ids, segments


def _extent(mask: np.ndarray) -> dict:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    return {"area": int(mask.sum()), "bbox": box}


def semantic_of(
    ids: np.ndarray,
    segments: Sequence[dict],
    labels: Mapping[int, int],
    ignore_crowds: bool = True,
) -> np.ndarray:
    """Labels (H, W) uint8 of a panoptic image; void (id 0) becomes :data:`IGNORE`.

    Args:
        ids, segments: as :func:`panoptic_of` gives them.
        labels: label of each category id.
        ignore_crowds: crowds become :data:`IGNORE` too.
    """
    present, positions = np.unique(ids, return_inverse=True)  # COCO's ids go up to 256 ** 3
    label = {
        segment["id"]: labels[segment["category_id"]]
        for segment in segments
        if not (ignore_crowds and segment["iscrowd"])
    }
    table = np.array([label.get(number, IGNORE) for number in present.tolist()], np.uint8)
    return table[positions].reshape(ids.shape)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) as COCO's RGB picture: id = R + 256 G + 65536 B."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=2).astype(np.uint8)


def decode_ids(picture: np.ndarray) -> np.ndarray:
    """The inverse of :func:`encode_ids`: (H, W, 3) uint8 -> (H, W) int32."""
    red, green, blue = np.moveaxis(picture.astype(np.int32), 2, 0)
    return red + 256 * green + 65536 * blue


def make_labels(json_file: str, output: str, progress: bool = True) -> dict[str, int]:
    """Writes panoptic and semantic ground truth for an instances JSON.

    ``panoptic/`` and ``panoptic.json`` are COCO's panoptic format. ``semantic/`` has label 0 for
    background and one label per class from 1; crowds are ignored. ``stuff/`` is what Panoptic
    FPN's semantic head learns: 0 things (crowds too), 1 background. Both name their labels in
    ``classes.txt``. Pictures have the names of their images, as PNG.

    Args:
        json_file: COCO's instances format.
        output: folder to write to; files there are replaced.

    Returns:
        Counts: images, segments, hidden (instances wholly covered by smaller ones).

    Raises:
        DataError: what :func:`read_instances` refuses, before anything is written; run lengths
            that cannot be decoded.
    """
    coco, categories = read_instances(json_file)
    root, background_id = Path(output), max(categories) + 1
    labels = {background_id: 0, **{category: i + 1 for i, category in enumerate(categories)}}
    stuff = {background_id: 1, **dict.fromkeys(categories, 0)}
    counts, entries = dict(images=0, segments=0, hidden=0), []
    for image in tqdm(coco.dataset["images"], desc="labels", disable=None if progress else True):
        annotations = coco.imgToAnns[image["id"]]
        painted = _paint(coco, image, annotations)
        ids, segments = panoptic_of(painted, annotations, background_id)
        name = label_name(image["file_name"])
        _save(root / "panoptic" / name, encode_ids(ids))
        _save(root / "semantic" / name, semantic_of(ids, segments, labels))
        _save(root / "stuff" / name, semantic_of(ids, segments, stuff, ignore_crowds=False))
        entries.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
        counts["images"] += 1
        counts["segments"] += len(segments)
        counts["hidden"] += len(annotations) - len(np.unique(painted[painted > 0]))
    _write_names(root / "semantic", [BACKGROUND, *categories.values()])
    _write_names(root / "stuff", ["things", BACKGROUND])
    things = [{"id": i, "name": name, "isthing": 1} for i, name in categories.items()]
    content = {
        "info": {"description": NOTE},
        "images": coco.dataset["images"],
        "categories": [*things, {"id": background_id, "name": BACKGROUND, "isthing": 0}],
        "annotations": entries,
    }
    (root / "panoptic.json").write_text(json.dumps(content), encoding="utf-8")
    return counts


def make_stuff(
    panoptic_json: str, output: str, panoptic_root: str = "", progress: bool = True
) -> int:
    """Writes Panoptic FPN's labels for COCO's panoptic format: 0 things, stuff from 1, void 255.

    Detectron2's ``prepare_panoptic_fpn.py`` writes the same.

    Args:
        panoptic_root: its pictures; empty: `panoptic_json` without ``.json``.

    Returns:
        The number of pictures.

    Raises:
        DataError: not COCO's panoptic format, file names that lead elsewhere, too many classes,
            or a picture is missing.
    """
    content = read_panoptic(panoptic_json)
    root = Path(panoptic_root or panoptic_json.removesuffix(".json"))
    stuff = sorted((c["id"], c["name"]) for c in content["categories"] if not c["isthing"])
    labels = {entry["id"]: 0 for entry in content["categories"]}
    labels |= {category: i + 1 for i, (category, _) in enumerate(stuff)}
    if len(stuff) >= IGNORE:
        raise DataError(f"{panoptic_json}: {len(stuff)} classes of stuff do not fit into 8 bits")
    entries = content["annotations"]
    check_names(panoptic_json, (entry["file_name"] for entry in entries))
    for entry in tqdm(entries, desc="stuff", disable=None if progress else True):
        try:
            with Image.open(root / entry["file_name"]) as picture:
                ids = decode_ids(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise DataError(f"{root / entry['file_name']}: cannot be read ({error})") from error
        table = semantic_of(ids, entry["segments_info"], labels, ignore_crowds=False)
        _save(Path(output) / entry["file_name"], table)
    _write_names(Path(output), ["things", *(name for _, name in stuff)])
    return len(entries)


def _paint(coco: COCO, image: dict, annotations: Sequence[dict]) -> np.ndarray:
    if not annotations:
        return np.zeros((image["height"], image["width"]), np.int32)
    return paint_instances(annotations, [_decode(coco, entry) for entry in annotations])


def _decode(coco: COCO, annotation: dict) -> np.ndarray:
    try:
        return coco.annToMask(annotation)
    except ValueError as error:
        name = coco.imgs[annotation["image_id"]]["file_name"]
        raise DataError(
            f"annotation {annotation['id']} of {name}: its run lengths cannot be decoded "
            f"({error}); mend it or take it out"
        ) from error


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _write_names(folder: Path, names: Sequence[str]) -> None:
    (folder / CLASSES_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
