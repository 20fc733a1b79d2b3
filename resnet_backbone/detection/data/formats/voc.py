"""PASCAL VOC's layout as annotation tools write it: folders, lists and XML files.

    ROOT/Annotations/ID.xml   ROOT/JPEGImages/ID.jpg   ROOT/ImageSets/Main/SPLIT.txt

Tools omit tags and write numbers differently from VOC.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from resnet_backbone.detection.data.problems import Stamp, stamp_of
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import EXTENSIONS

CORNERS = ("xmin", "ymin", "xmax", "ymax")
IMAGE_SUFFIXES = (*EXTENSIONS, *map(str.upper, EXTENSIONS))
CLASS_COLUMN = re.compile(r"(.*\S)\s+[+-]?[01]")  # a line in one of VOC's per-class lists


class VocObject(NamedTuple):
    """One `<object>`: box is (xmin, ymin, xmax, ymax) as in the file (1-based pixels)."""

    name: str
    box: tuple[float, ...] = ()
    difficult: int = 0  # or 1
    problem: str = ""  # why it has no name or no box, or ""


def find_voc_folders(root: str | os.PathLike) -> list[str]:
    """Returns `root` if it contains `Annotations/`, else such folders in it or its VOCdevkit.

    Raises:
        DataError: there is none.
    """
    root = Path(root)
    if (root / "Annotations").is_dir():
        return [str(root)]
    inside = [*sorted(root.glob("*/Annotations")), *sorted(root.glob("VOCdevkit/*/Annotations"))]
    if not inside:
        raise DataError(
            f"{root} is not a VOC folder: neither it nor a folder inside it has Annotations/; give "
            "the folder that holds Annotations/, JPEGImages/ and ImageSets/ (--voc-root, or for "
            "registered names DETECTRON2_DATASETS, the folder of VOC2007 and VOC2012); unpack "
            "archives with `prepare-data voc`; turn images and boxes in another layout into a data "
            "set with `prepare-data own`; a JSON of COCO's format is for --coco-json"
        )
    return [str(found.parent) for found in inside]


def find_voc_dir(root: str | os.PathLike) -> str:
    """Returns the only folder of :func:`find_voc_folders`; DataError if there are several."""
    found = find_voc_folders(root)
    if len(found) > 1:
        raise DataError(f"{root} holds several VOC folders; give one of: {', '.join(found)}")
    return found[0]


def read_split(voc_dir: str, split: str) -> list[str]:
    """Reads the image ids in `ImageSets/Main/SPLIT.txt`, in file order with repetitions.

    Blank lines and the second column (1, 0 or -1) of VOC's per-class lists are ignored.
    DataError: no such split; the message lists those that exist.
    """
    path = Path(voc_dir, "ImageSets", "Main", f"{split}.txt")
    if not path.is_file():
        splits = ", ".join(list_splits(voc_dir))
        raise DataError(f"{path} does not exist; splits there: {splits or 'none'}")
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    columns = [CLASS_COLUMN.fullmatch(line) for line in lines]
    words = [column[1] for column in columns] if all(columns) else lines
    folder = Path(voc_dir, "Annotations")  # ids may have folders, as in Datumaro's exports
    known = {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.xml")}
    if known.issuperset(words):
        return words
    in_lower_case = {name.lower(): name for name in known}
    return [_find_id(word, known, in_lower_case) for word in words]


def _find_id(word: str, known: set[str], in_lower_case: Mapping[str, str]) -> str:
    """Returns the id of an entry, which may have a suffix, a path, or another case."""
    path = word.replace("\\", "/")
    stem, suffix = os.path.splitext(path)
    paths = [path, stem] if suffix.lower() in (*EXTENSIONS, ".xml") else [path]
    choices = [word]
    while paths:  # without more and more of the leading folders
        choices += paths
        paths = [one.partition("/")[2] for one in paths if "/" in one]
    for choice in choices:
        if choice in known or choice.lower() in in_lower_case:
            return choice if choice in known else in_lower_case[choice.lower()]
    return choices[-1]


def _read_text(path: Path) -> str:
    """Reads a list of ids in UTF-8, UTF-16 with a byte order mark, or Latin-1."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def list_splits(voc_dir: str | os.PathLike) -> list[str]:
    """Returns the names in `ImageSets/Main` without VOC's per-class lists."""
    files = sorted(Path(voc_dir, "ImageSets", "Main").glob("*.txt"))
    firsts = {file.stem: _read_text(file).partition("\n")[0] for file in files}
    return [name for name, first in firsts.items() if not CLASS_COLUMN.fullmatch(first.strip())]


def read_annotation(path: str) -> tuple[str, tuple[int, int] | None, list[VocObject]]:
    """Returns the image's name or "", its stated size (width, height) or None, and its objects.

    Results are cached until the file changes, since classes and boxes are read separately.

    Raises:
        OSError: no such file.
        ValueError: not XML.
    """
    return _read_version(path, stamp_of(path))


@lru_cache(maxsize=50_000)  # more than VOC 07+12 and its test sets; bounds the memory
def _read_version(path: str, _stamp: Stamp) -> tuple:
    root = _parse_xml(Path(path).read_bytes())
    # some annotation tools write 0 or text for an unknown size
    sides = [_to_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    size = (int(sides[0]), int(sides[1])) if min(sides) >= 1 else None
    image_name = (root.findtext("filename") or "").strip()
    return image_name, size, [_parse_object(element) for element in root.findall("object")]


def _parse_xml(data: bytes) -> ET.Element:
    """Parses an annotation without namespaces; the declared encoding may be unknown."""
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:
        declared = re.match(rb"\s*<\?xml[^>]*encoding[^>]*\?>", data)
        if not declared:
            raise ValueError(f"not well-formed XML: {error}") from error
        text = data[declared.end() :]
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            text = text.decode("latin-1")
        try:
            root = ET.fromstring(text)
        except (ET.ParseError, ValueError):
            raise ValueError(f"not well-formed XML: {error}") from error
    for element in root.iter():
        element.tag = str(element.tag).rpartition("}")[2]
    return root


def _to_number(text: str | None) -> float:
    """Returns a finite number; 0 for anything else."""
    try:
        number = float(text or 0)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _parse_object(element: ET.Element) -> VocObject:
    name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
    if not name:
        return VocObject("", problem="object without a class name")
    corners = [None if box is None else box.findtext(key) for key in CORNERS]
    if None in corners:
        return VocObject(name, problem=f"{name} without a complete <bndbox>")
    try:
        difficult = int(bool(_to_number(element.findtext("difficult"))))
        return VocObject(name, tuple(map(float, corners)), difficult)
    except ValueError as error:
        return VocObject(name, problem=f"{name}: {error}")


def xml_path(voc_dir: str, image_id: str) -> str:
    return os.path.join(voc_dir, "Annotations", image_id + ".xml")


def find_image(voc_dir: str, image_id: str, image_name: str) -> str:
    """Returns the image's path: with the suffix of `<filename>`, else any that exists."""
    stem = os.path.join(voc_dir, "JPEGImages", image_id)
    stated = os.path.splitext(image_name)[1] or ".jpg"
    paths = [stem + suffix for suffix in (stated, *IMAGE_SUFFIXES)]
    return next((path for path in paths if os.path.isfile(path)), paths[0])
