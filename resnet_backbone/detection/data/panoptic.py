"""Panoptic and semantic ground truth made from COCO instances or COCO's panoptic format.

COCO's instances overlap and leave most of an image without a label. Here the smaller of two
instances lies on top, and every pixel without an instance is one "stuff" class, background. That
is enough to train and to try every segmentation model on instance annotations; it is no
annotation of stuff, and numbers on it compare only with each other.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm

from resnet_backbone.detection.data.coco import absent_keys, inspect_json
from resnet_backbone.detection.data.problems import list_problems
from resnet_backbone.runtime.errors import DataError

BACKGROUND = "background"
CLASSES_FILE = "classes.txt"
NOTE = (
    "Made from instances: the smaller of two overlapping instances lies on top, crowds lie below "
    "them, every other pixel is the one stuff class 'background'."
)
IGNORE = 255
"""Label of pixels that neither train nor count; Detectron2's ``SEM_SEG_HEAD.IGNORE_VALUE``."""

PANOPTIC_KEYS = {
    "categories": ("id", "name", "isthing"),
    "annotations": ("image_id", "file_name", "segments_info"),
}
SHOWN = 10  # problems in one message


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


def label_name(file_name: str) -> str:
    """Path of an image's label picture below the label folder: the same, as PNG."""
    return Path(file_name).with_suffix(".png").as_posix()


def read_instances(json_file: str) -> tuple[COCO, dict[int, str]]:
    """The indexed JSON and its categories by rising id, everything checked that labels need.

    Polygons of fewer than three points are left out, as by Detectron2's loader.

    Raises:
        DataError: not COCO's format, an annotation without a mask of its image, too many classes,
            file names that lead elsewhere, two images with one label name.
    """
    categories, problems = inspect_json(json_file)
    if problems:
        lines = list_problems(problems, SHOWN)
        raise DataError("\n".join([f"{json_file} cannot be used:", *lines]))
    if len(categories) >= IGNORE:
        raise DataError(f"{json_file}: {len(categories)} classes do not fit into 8-bit labels")
    with open(json_file, encoding="utf-8") as file, contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.load(file)
        coco.createIndex()
    check_names(json_file, (image["file_name"] for image in coco.dataset["images"]))
    _check_masks(json_file, coco)
    return coco, categories


def check_names(json_file: str, file_names: Iterable[Any]) -> None:
    """Refuses names under which nothing can be written below a folder, or not each by itself."""
    labels = Counter()
    for name in file_names:
        path = PurePath(name) if isinstance(name, str) else PurePath()
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{json_file}: file_name {name!r} does not lie below the image folder: write it "
                "relative to that folder, without '..'"
            )
        labels[label_name(name)] += 1
    name, times = labels.most_common(1)[0] if labels else ("", 0)
    if times > 1:
        raise DataError(f"{json_file}: {times} images would have the label picture {name}")


def _check_masks(json_file: str, coco: COCO) -> None:
    """Refuses annotations without a valid mask, and leaves useless polygons out."""
    problems = {}
    for entry in coco.dataset["annotations"]:
        image = coco.imgs[entry["image_id"]]
        problem = mask_problem(entry.get("segmentation"), image["height"], image["width"])
        if problem:
            problems[entry["id"]] = problem
        elif isinstance(entry["segmentation"], list):
            entry["segmentation"] = [p for p in entry["segmentation"] if _is_area(p)]
    if problems:
        number, problem = next(iter(problems.items()))
        raise DataError(
            f"{json_file}: {len(problems)} annotations have no usable mask, such as id {number}: "
            f"{problem}; mend them or take them out"
        )


def mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Why a COCO segmentation is not a valid mask of an image of this size, or None."""
    if not segmentation:
        return "it has no segmentation"
    if isinstance(segmentation, list):
        if not all(isinstance(p, list) and all(map(_is_coordinate, p)) for p in segmentation):
            return "its polygons are not lists of numbers"
        return None if any(map(_is_area, segmentation)) else "no polygon has three points"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "neither polygons nor run lengths with size and counts"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        return f"run lengths of size {size}, its image has height, width {[height, width]}"
    if isinstance(counts, list):
        whole = all(isinstance(n, int) and n >= 0 for n in counts) and sum(counts) == height * width
        return None if whole else f"its run lengths do not add up to {height * width} pixels"
    return None if counts and isinstance(counts, str) else "its counts are not run lengths"


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e6  # neither infinite nor NaN


def _is_area(polygon: list[float]) -> bool:
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def read_panoptic(panoptic_json: str) -> dict:
    """The content of a file in COCO's panoptic format.

    Raises:
        DataError: it is missing, no JSON, lacks something, or has segments of unknown categories.
    """
    try:
        with open(panoptic_json, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{panoptic_json} cannot be read as JSON: {error}") from error
    problem = next(_panoptic_problems(content), None)
    if problem:
        raise DataError(f"{panoptic_json} is not COCO's panoptic format: {problem}")
    return content


def _panoptic_problems(content: Any) -> Iterator[str]:
    absent = absent_keys(content, PANOPTIC_KEYS)
    if absent:
        yield absent[0]
        return
    categories = {category["id"] for category in content["categories"]}
    for position, entry in enumerate(content["annotations"]):
        where = f"annotations[{position}] ({entry['file_name']})"
        segments = entry["segments_info"]
        if absent_keys({"segments_info": segments}, {"segments_info": ("id", "category_id")}):
            yield f"{where}: segments_info is not a list of segments with id and category_id"
            return
        for segment in segments:
            if segment["category_id"] not in categories:
                yield (
                    f"{where}: segment {segment['id']} is of category {segment['category_id']}, "
                    "which is not in categories"
                )
