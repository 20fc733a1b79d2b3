"""The files of a PASCAL VOC folder: where they are and what they say.

    ROOT/Annotations/ID.xml   ROOT/JPEGImages/ID.jpg   ROOT/ImageSets/Main/SPLIT.txt

VOC's own folders and those of annotation tools, which leave tags out and write other numbers.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from functools import cache
from typing import NamedTuple

from resnet_backbone.detection.data.problems import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


class VocObject(NamedTuple):
    """One `<object>`: box is (xmin, ymin, xmax, ymax) as in the file (1-based pixels)."""

    name: str
    box: tuple[float, ...] = ()
    difficult: int = 0  # or 1
    problem: str = ""  # why it has no name or no box; "" where it has


class VocAnnotation(NamedTuple):
    """One XML file: `image_name` and `size` (width, height) are None where it has none."""

    image_name: str | None
    size: tuple[int, int] | None
    objects: tuple[VocObject, ...]


NO_ANNOTATION = VocAnnotation(None, None, ())


def find_voc_dir(root: str) -> str:
    """The folder that holds `Annotations/`: `root` itself, or the only such folder inside it.

    Raises:
        DataError: there is none, or there are several to choose from (all are named).
    """
    root = os.fspath(root)
    if os.path.isdir(os.path.join(root, "Annotations")):
        return root
    parents = [root, os.path.join(root, "VOCdevkit")]
    inside = [
        os.path.join(p, d) for p in parents if os.path.isdir(p) for d in sorted(os.listdir(p))
    ]
    found = [d for d in inside if os.path.isdir(os.path.join(d, "Annotations"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{root} holds several VOC folders; give one of: {', '.join(found)}")
    raise DataError(
        f"{root} is no VOC folder: neither it nor a folder inside it has Annotations/;"
        " give the folder that holds Annotations/, JPEGImages/ and ImageSets/ (--voc-root, or for"
        " registered names DETECTRON2_DATASETS, the folder of VOC2007 and VOC2012)"
    )


def read_split(voc_dir: str, split: str) -> list[str]:
    """Image ids of `ImageSets/Main/SPLIT.txt`, in its order, repetitions included.

    Blank lines are skipped, and so is the second column (1, 0 or -1) of VOC's per-class lists.

    Raises:
        DataError: no such split; the message names those that exist.
    """
    folder = os.path.join(voc_dir, "ImageSets", "Main")
    path = os.path.join(folder, split + ".txt")
    if not os.path.isfile(path):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        splits = ", ".join(n[:-4] for n in names if n.endswith(".txt"))
        raise DataError(f"{path} does not exist; splits there: {splits or 'none'}")
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file if line.strip()]
    columns = [re.fullmatch(r"(.*\S)\s+[+-]?[01]", line) for line in lines]
    if lines and all(columns):
        return [column.group(1) for column in columns]
    return lines


def read_annotation(path: str) -> VocAnnotation:
    """Read one XML file; every tag but `<object>`'s name and bndbox may be missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not XML, or a size that is no number.
    """
    stat = os.stat(path)
    return _read_version(path, stat.st_mtime_ns, stat.st_size)


@cache  # a run reads the same files while it checks, loads and evaluates
def _read_version(path: str, _mtime: int, _size: int) -> VocAnnotation:
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise ValueError(f"not well-formed XML: {error}") from error
    width, height = (root.findtext(f"size/{side}") or "0" for side in ("width", "height"))
    size = int(float(width)), int(float(height))
    name = (root.findtext("filename") or "").strip() or None
    # some annotation tools write 0 for a size that they do not know
    objects = tuple(parse_object(element) for element in root.findall("object"))
    return VocAnnotation(name, size if min(size) > 0 else None, objects)


def parse_object(element: ET.Element) -> VocObject:
    """One `<object>`; what is wrong with it is in its `problem`."""
    parts = {child.tag: child for child in reversed(element)}  # the first of each name
    name = _text(parts.get("name")).strip()
    if not name:
        return VocObject("", problem="object without a class name")
    corners = {child.tag: _text(child) for child in reversed(parts.get("bndbox", ()))}
    if not corners.keys() >= set(CORNERS):
        return VocObject(name, problem=f"{name} without a complete <bndbox>")
    difficult = _text(parts.get("difficult")) or "0"
    try:
        box = tuple(float(corners[key]) for key in CORNERS)
        return VocObject(name, box, int(bool(float(difficult))))
    except ValueError as error:
        return VocObject(name, problem=f"{name}: {error}")


def _text(element: ET.Element | None) -> str:
    return "" if element is None else element.text or ""


def xml_path(voc_dir: str, image_id: str) -> str:
    """Where the annotation of an image lies."""
    return os.path.join(voc_dir, "Annotations", image_id + ".xml")


def find_image(voc_dir: str, image_id: str, image_name: str | None) -> str:
    """Path of the image: the suffix of `<filename>` first, then whichever exists."""
    stem = os.path.join(voc_dir, "JPEGImages", image_id)
    stated = os.path.splitext(image_name)[1] if image_name else ""
    paths = [stem + suffix for suffix in dict.fromkeys((stated or ".jpg", *IMAGE_SUFFIXES))]
    return next((path for path in paths if os.path.isfile(path)), paths[0])
