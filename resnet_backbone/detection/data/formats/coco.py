"""Reads COCO's JSON format as annotation tools write it, and writes clean files.

Tools write ids as text, empty fields, and masks of two points. Each entry is read as far as
possible. Only the unusable parts are dropped, and each is reported.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from resnet_backbone.detection.data.formats.shapes import mask_area, read_mask
from resnet_backbone.detection.data.problems import DataProblem, Stamp, reads_file, stamp_of
from resnet_backbone.detection.data.records import collector_at_rest
from resnet_backbone.runtime.errors import DataError

Id = int | str
FILE_NAME = re.compile(rb'"file_name"\s*:\s*"([^"\\]+)"')
LONGEST_ID = 100  # digits; Python refuses to read thousands


class CocoFile(NamedTuple):
    """The usable contents of an instances JSON."""

    categories: dict[Id, str]  # by ascending id; empty if the file is unusable
    images: dict[Id, dict[str, Any]]  # file_name, width, height (None if not stated)
    # image -> category_id, bbox (x, y, width, height), area, iscrowd, segmentation, keypoints
    annotations: dict[Id, list[dict[str, Any]]]
    annotated: bool  # False without the key "annotations", as in COCO's image_info files
    problems: tuple[DataProblem, ...]
    notes: tuple[str, ...]
    stamp: Stamp = (-1, -1)  # the file's, before it was read


def check_file(path: str) -> None:
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise DataError(f"{path} {what}; give the path of a COCO annotation file")


def read_json(path: str) -> Any:
    """Reads a JSON file in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        DataError: no such file, or it is not JSON.
    """
    check_file(path)
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def first_images(json_file: str) -> list[str]:
    """Returns the file_names in the first MiB, found without parsing; skips those with escapes.

    Raises:
        DataError: no such file.
    """
    check_file(json_file)
    with open(json_file, "rb") as file:
        return [os.fsdecode(name) for name in FILE_NAME.findall(file.read(1 << 20))]


@reads_file
def read_coco(json_file: str) -> CocoFile:
    """Reads an instances JSON; DataError if there is no such file or it is not JSON."""
    stamp = stamp_of(json_file)
    with collector_at_rest():
        return _Parser(json_file).parse(read_json(json_file))._replace(stamp=stamp)


def clean_coco(
    categories: Mapping[Id, str],
    images: Mapping[Id, Mapping[str, Any]],
    annotations: Mapping[Id, Sequence[Mapping[str, Any]]],
    annotated: bool = True,
) -> dict[str, Any]:
    """Returns a data set as valid COCO JSON with ids from 1.

    Args:
        categories, images, annotations: as in a :class:`CocoFile`.
        annotated: False omits the list of annotations.
    """
    places = number_from_one(categories)
    entries = []
    for number, image in enumerate(images, start=1):
        for one in annotations.get(image, ()):
            entry = {
                "id": len(entries) + 1,
                "image_id": number,
                "category_id": places[one["category_id"]],
                "bbox": [float(side) for side in one["bbox"]],
                "area": float(one["area"]),
                "iscrowd": int(one["iscrowd"]),
            }
            mask = one.get("segmentation")
            if isinstance(mask, dict) and isinstance(mask["counts"], bytes):
                mask = {**mask, "counts": mask["counts"].decode("ascii")}
            if mask:
                entry["segmentation"] = mask
            points = one.get("keypoints")
            if points:  # from Detectron2's coordinates back to COCO's pixel indices
                entry["keypoints"] = [p if k % 3 == 2 else p - 0.5 for k, p in enumerate(points)]
                entry["num_keypoints"] = sum(visible > 0 for visible in points[2::3])
            entries.append(entry)
    content: dict[str, Any] = {
        "info": {},
        "images": [
            {
                "id": number,
                "file_name": images[one]["file_name"],
                "width": images[one]["width"] or 1,
                "height": images[one]["height"] or 1,
            }
            for number, one in enumerate(images, start=1)
        ],
        "categories": [{"id": number, "name": categories[one]} for one, number in places.items()],
    }
    if annotated:
        content["annotations"] = entries
    return content


def number_from_one(ids: Iterable[Id]) -> dict[Id, int]:
    """Returns id -> its number in :func:`clean_coco`."""
    return {one: number for number, one in enumerate(ids, start=1)}


def unused_name(name: str, taken: Collection[str], what: str, notes: list[str]) -> str:
    """Returns a class name, with the first number from 2 on if it is taken, which a note says."""
    if name not in taken:
        return name
    new = next(f"{name} {n}" for n in count(2) if f"{name} {n}" not in taken)
    notes.append(f"{what} is a second {name!r}: it is called {new!r}")
    return new


def absent_keys(data: Any, required: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns messages on lists that a JSON lacks, else on keys that their entries lack."""
    lists = data if isinstance(data, dict) else {}
    missing = [section for section in required if not isinstance(lists.get(section), list)]
    if missing:
        return [f"it has no list of {' or '.join(missing)}, which COCO's format needs"]
    found = []
    for section, keys in required.items():
        for position, entry in enumerate(data[section]):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                found.append(f"{section}[{position}] has no {', '.join(absent)}")
    return found


class _Parser:
    """Collects the usable entries and the problems of one file."""

    def __init__(self, where: str):
        self.where, self.problems, self.notes = where, [], []

    def bad(self, kind: str, detail: str) -> None:
        self.problems.append(DataProblem(kind, self.where, detail))

    def parse(self, data: Any) -> CocoFile:
        annotated = not isinstance(data, dict) or "annotations" in data
        lists = ("categories", "images", "annotations")[: 2 + annotated]
        categories: dict[Id, str] = {}
        images: dict[Id, dict] = {}
        annotations: dict[Id, list[dict]] = {}
        for detail in absent_keys(data, dict.fromkeys(lists, ())):
            self.bad("broken-json", detail)
        if not self.problems:
            entries = data["annotations"] if annotated else []
            categories = self.categories(data["categories"])
            images = self.images(data["images"])
            annotations = self.annotations(entries, categories, images)
            self.drop_root(categories, data["categories"], annotations)
            if not categories:
                self.bad("broken-json", "it has no usable category")
        order = sorted(categories, key=lambda one: (isinstance(one, str), one))
        categories = {one: categories[one] for one in order}
        found = tuple(self.problems), tuple(self.notes)
        return CocoFile(categories, images, annotations, annotated, *found)

    def categories(self, entries: Iterable[Any]) -> dict[Id, str]:
        found: dict[Id, str] = {}
        for position, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {}
            number, name = read_id(entry.get("id")), entry.get("name")
            if number is None or name is None or not str(name).strip():
                self.bad("bad-entry", f"categories[{position}] has no id or no name")
                continue
            if not isinstance(name, str):
                self.notes.append(
                    f"the name of category {number} is not a text: it is called '{name}'"
                )
            name = str(name).strip()
            if number in found:
                self.bad("duplicate-id", f"category id {number} occurs again, named {name!r}")
                continue
            found[number] = unused_name(name, found.values(), f"category {number}", self.notes)
        return found

    def images(self, entries: Iterable[Any]) -> dict[Id, dict]:
        found: dict[Id, dict] = {}
        for position, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {}
            number, name = read_id(entry.get("id")), entry.get("file_name")
            if number is None or not isinstance(name, str) or not name:
                what = "no id" if number is None else f"the file_name {name!r}, which is not a text"
                self.bad("bad-entry", f"images[{position}] has {what}")
            elif number in found:
                self.bad("duplicate-id", f"image id {number} occurs again, with {name}")
            else:
                size = [read_number(entry.get(side)) for side in ("width", "height")]
                known = all(side and math.isfinite(side) and side >= 1 for side in size)
                width, height = map(int, size) if known else (None, None)
                path = name.replace("\\", "/")
                found[number] = {"file_name": path, "width": width, "height": height}
        return found

    def annotations(
        self, entries: Iterable[Any], categories: Mapping[Id, str], images: Mapping[Id, dict]
    ) -> dict[Id, list[dict]]:
        found = defaultdict(list)
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.bad("bad-box", f"annotations[{position}] is not an annotation")
                continue
            where = f"annotation {entry.get('id', f'at {position}')}"
            image, category = read_id(entry.get("image_id")), read_id(entry.get("category_id"))
            box = entry.get("bbox")
            sides = [read_number(side) for side in box] if isinstance(box, list) else []
            if image not in images:
                image = entry.get("image_id")
                self.bad("bad-box", f"{where} is of image {image!r}, which is not in images")
            elif category not in categories:
                category = entry.get("category_id")
                self.bad("bad-box", f"{where}: category_id {category!r} is not in categories")
            elif len(sides) != 4 or None in sides:
                self.bad("bad-box", f"{where}: bbox {box!r} is not four numbers")
            else:
                size = images[image]["height"], images[image]["width"]
                found[image].append(_annotation(entry, category, sides, size))
        used = [one for boxes in found.values() for one in boxes]
        longest = max((len(one.get("keypoints", ())) for one in used), default=0)
        for one in used if longest else ():
            one.setdefault("keypoints", [0.5, 0.5, 0] * (longest // 3))  # none is labeled
        return dict(found)

    def drop_root(self, categories: dict[Id, str], entries: Iterable[Any], annotations) -> None:
        """Drops Roboflow's first category, which has no boxes and is the parent of all others."""
        used = {one["category_id"] for boxes in annotations.values() for one in boxes}
        parents = {
            read_id(entry.get("id")): entry.get("supercategory")
            for entry in entries
            if isinstance(entry, dict)
        }
        for number, name in list(categories.items()):
            others = [parents.get(other) for other in categories if other != number]
            is_root = others and parents.get(number) in (None, "", "none")
            if is_root and number not in used and all(parent == name for parent in others):
                del categories[number]
                self.notes.append(
                    f"category {name!r} is left out: it has no box and is the parent of the others"
                )
                return


def _annotation(
    entry: Mapping[str, Any], category: Id, box: list[float], size: tuple[int | None, int | None]
) -> dict[str, Any]:
    area, mask = read_number(entry.get("area")), read_mask(entry.get("segmentation"), size)
    if area is None:
        area = mask_area(mask) if mask else box[2] * box[3]
    crowd = any(read_number(entry.get(key)) for key in ("iscrowd", "ignore"))
    used = {
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": int(crowd),
    }
    if mask:
        used["segmentation"] = mask
    points = entry.get("keypoints")
    points = [read_number(one) for one in points] if isinstance(points, list) else []
    if points and len(points) % 3 == 0 and None not in points:
        # COCO has pixel indices, Detectron2 continuous coordinates
        used["keypoints"] = [p if k % 3 == 2 else p + 0.5 for k, p in enumerate(points)]
    return used


def read_id(value: Any) -> Id | None:
    """Returns an id as an integer, even if written as text or float, else as text, or None."""
    if isinstance(value, str):
        text = value.strip()
        is_number = text.removeprefix("-").isdecimal() and len(text) < LONGEST_ID
        return int(text) if is_number else text or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_number(value: Any) -> float | None:
    """Returns a number, even if written as text; None for others and for float overflow."""
    if not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, str) else value
