"""Reading what label pictures are made from: COCO's instances and its panoptic format, checked."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from pycocotools.coco import COCO

from resnet_backbone.detection.data.coco import absent_keys, inspect_json
from resnet_backbone.detection.data.problems import DataError, list_problems

IGNORE = 255
"""Label of pixels that neither train nor count; Detectron2's ``SEM_SEG_HEAD.IGNORE_VALUE``."""

PANOPTIC_KEYS = {
    "categories": ("id", "name", "isthing"),
    "annotations": ("image_id", "file_name", "segments_info"),
}
SHOWN = 10  # problems in one message


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
    """Refuses annotations whose segmentation is no mask, and leaves useless polygons out."""
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
    """Why a COCO segmentation is no mask of an image of this size, or None."""
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
    return None if counts and isinstance(counts, str) else "its counts are no run lengths"


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
            yield f"{where}: segments_info is no list of segments with id and category_id"
            return
        for segment in segments:
            if segment["category_id"] not in categories:
                yield (
                    f"{where}: segment {segment['id']} is of category {segment['category_id']}, "
                    "which is not in categories"
                )
