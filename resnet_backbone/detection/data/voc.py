"""Data sets in PASCAL VOC layout, VOC's own or a user's, as Detectron2 data sets.

    ROOT/Annotations/ID.xml   ROOT/JPEGImages/ID.jpg   ROOT/ImageSets/Main/SPLIT.txt

VOC's own folders and those of annotation tools, which leave tags out and write other numbers.
"""

from __future__ import annotations

import codecs
import difflib
import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.problems import (
    DataReport,
    apply_policy,
    cached_by_version,
    check_image,
    fit_box,
    register_once,
)
from resnet_backbone.runtime.errors import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
CLASS_COLUMN = re.compile(r"(.*\S)\s+[+-]?[01]")  # of a line in one of VOC's lists per class


class VocObject(NamedTuple):
    """One `<object>`: box is (xmin, ymin, xmax, ymax) as in the file (1-based pixels)."""

    name: str
    box: tuple[float, ...] = ()
    difficult: int = 0  # or 1
    problem: str = ""  # why it has no name or no box; "" where it has


def find_voc_folders(root: str | os.PathLike) -> list[str]:
    """`root` if it holds `Annotations/`, else the folders that do in it and in its VOCdevkit.

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
            "registered names DETECTRON2_DATASETS, the folder of VOC2007 and VOC2012), --archives "
            "to unpack, or turn images and boxes in another layout into a data set with "
            "`prepare-data own`"
        )
    return [str(found.parent) for found in inside]


def find_voc_dir(root: str | os.PathLike) -> str:
    """The one folder of :func:`find_voc_folders`; a DataError that names all if there are more."""
    found = find_voc_folders(root)
    if len(found) > 1:
        raise DataError(f"{root} holds several VOC folders; give one of: {', '.join(found)}")
    return found[0]


def read_split(voc_dir: str, split: str) -> list[str]:
    """Image ids of `ImageSets/Main/SPLIT.txt`, in its order, repetitions included.

    Blank lines are skipped, and so is the second column (1, 0 or -1) of VOC's per-class lists.
    A DataError names the splits that exist.
    """
    path = Path(voc_dir, "ImageSets", "Main", f"{split}.txt")
    if not path.is_file():
        splits = ", ".join(list_splits(voc_dir))
        raise DataError(f"{path} does not exist; splits there: {splits or 'none'}")
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    columns = [CLASS_COLUMN.fullmatch(line) for line in lines]
    words = [column[1] for column in columns] if all(columns) else lines
    known = {entry.stem for entry in Path(voc_dir, "Annotations").glob("*.xml")}
    if known.issuperset(words):
        return words
    in_lower_case = {name.lower(): name for name in known}
    return [_find_id(word, known, in_lower_case) for word in words]


def _find_id(word: str, known: set[str], in_lower_case: Mapping[str, str]) -> str:
    """The id that an entry means, which may have a suffix, a path, or another case."""
    name = word.replace("\\", "/").rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    is_image = bool(dot) and f".{suffix.lower()}" in (*IMAGE_SUFFIXES, ".xml")
    choices = [word, name, *([stem] if is_image else [])]
    found = next((choice for choice in choices if choice in known), None)
    found = found or next((c for c in choices if c.lower() in in_lower_case), None)
    if found is None:
        return choices[-1]
    return found if found in known else in_lower_case[found.lower()]


def _read_text(path: Path) -> str:
    """A list of ids in UTF-8, UTF-16 by its byte order mark, or an older one-byte encoding."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def list_splits(voc_dir: str | os.PathLike) -> list[str]:
    """The names in `ImageSets/Main`, less VOC's lists per class."""
    files = sorted(Path(voc_dir, "ImageSets", "Main").glob("*.txt"))
    firsts = {file.stem: _read_text(file).partition("\n")[0] for file in files}
    return [name for name, first in firsts.items() if not CLASS_COLUMN.fullmatch(first.strip())]


@cached_by_version  # a run reads the same files for the classes and for the boxes
def read_annotation(path: str) -> tuple[str, tuple[int, int] | None, list[VocObject]]:
    """The image's name, "" for none, its size (width, height), if it is stated, and its objects.

    Raises:
        OSError: no such file.
        ValueError: not XML.
    """
    root = _parse_xml(Path(path).read_bytes())
    # some annotation tools write 0, or text, for a size that they do not know
    sides = [_to_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    size = (int(sides[0]), int(sides[1])) if min(sides) >= 1 else None
    image_name = (root.findtext("filename") or "").strip()
    return image_name, size, [_parse_object(element) for element in root.findall("object")]


def _parse_xml(data: bytes) -> ET.Element:
    """The root of an annotation, without namespaces; the declared encoding may be unknown."""
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
    """A finite number; 0 for anything else."""
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


def _xml_path(voc_dir: str, image_id: str) -> str:
    return os.path.join(voc_dir, "Annotations", image_id + ".xml")


def _find_image(voc_dir: str, image_id: str, image_name: str) -> str:
    """Path of the image: the suffix of `<filename>` first, then whichever exists."""
    stem = os.path.join(voc_dir, "JPEGImages", image_id)
    stated = os.path.splitext(image_name)[1] or ".jpg"
    paths = [stem + suffix for suffix in (stated, *IMAGE_SUFFIXES)]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def find_voc_classes(root: str | os.PathLike, splits: Sequence[str]) -> list[str]:
    """Class names that occur in the XML files of `splits`, sorted.

    Give the training and the test splits together, so that both get the same class numbers.
    If they are VOC's twenty, the list is `VOC_CLASSES` (VOC's own order).

    Raises:
        DataError: no such folder or split, or no object with a name in any of them.
    """
    voc_dir = find_voc_dir(root)
    ids = list(dict.fromkeys(i for split in splits for i in read_split(voc_dir, split)))
    names, num_read = set(), 0
    for image_id in ids:
        try:
            _, _, objects = read_annotation(_xml_path(voc_dir, image_id))
        except (OSError, ValueError):
            continue  # scan_voc reports it
        num_read += 1
        names.update(one.name for one in objects if one.name)
    where = f"{voc_dir}, splits {', '.join(splits)}"
    if not num_read:
        example = f", such as {_xml_path(voc_dir, ids[0])}" if ids else ""
        raise DataError(f"{where}: 0 of {len(ids)} ids have a readable Annotations/ID.xml{example}")
    if not names:
        raise DataError(f"{where}: no object with a class name in {num_read} XML files")
    return list(VOC_CLASSES) if names == set(VOC_CLASSES) else sorted(names)


def scan_voc(
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str],
    decode: bool = False,
    progress: bool = False,
) -> tuple[list[dict], DataReport]:
    """Read and check a split in one pass; loader, check and evaluator all stand on this.

    Args:
        root: the folder that holds `Annotations/`, or a VOCdevkit folder with one such inside.
        split: name of a file in `ImageSets/Main`, without `.txt`.
        class_names: the classes to train on; position = category_id.
        decode: decode every image, which finds truncated ones (minutes for VOC's 16,551).
        progress: show a progress bar on a terminal.

    Returns:
        One Detectron2 dict per good image: file_name, image_id (str), height, width (pixels) and
        annotations, each with category_id, bbox [x0, y0, x1, y1] in continuous pixel coordinates
        (the XML's minima less 1, as Detectron2's own loader does), bbox_mode and difficult (0 or
        1). Where no image of the split has an XML file (VOC 2012's test set) there are none.

        What is left out: XML that is missing or broken; images that are missing, no images, or of
        another size than their XML says; boxes of zero or negative size, not finite, or outside
        the image (those that run past its edge are clipped); classes not in `class_names`; ids
        listed twice.

    Raises:
        DataError: no such folder or split.
    """
    voc_dir = find_voc_dir(root)
    ids = Counter(read_split(voc_dir, split))
    split_file = os.path.join(voc_dir, "ImageSets", "Main", f"{split}.txt")
    report = DataReport(f"{voc_dir} split {split}", num_images=len(ids))
    report.boxes.update(dict.fromkeys(class_names, 0))
    report.annotated = any(os.path.isfile(_xml_path(voc_dir, image_id)) for image_id in ids)
    class_ids = {name: index for index, name in enumerate(class_names)}
    records = []
    for image_id in tqdm(ids, desc=f"checking {split}", disable=None if progress else True):
        if ids[image_id] > 1:
            report.add("duplicate-id", split_file, f"image {image_id!r} is listed again")
        record = _scan_image(voc_dir, image_id, class_ids, report, decode)
        if record is not None:
            records.append(record)
    if not records:
        report.add_empty(split_file)
    report.note_shares(one["bbox"][2:] for record in records for one in record["annotations"])
    return records, report


def load_voc_instances(
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str],
    use_difficult: bool = True,
    on_bad: str = "drop",
    decode: bool = False,
) -> list[dict]:
    """The records of :func:`scan_voc`, after :func:`apply_policy`.

    Args:
        use_difficult, on_bad: see :func:`register_voc`.
    """
    records, report = scan_voc(root, split, class_names, decode)
    apply_policy(report, on_bad)
    return records if use_difficult else _without_difficult(records)


def check_voc(
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str],
    decode: bool = False,
    progress: bool = True,
) -> DataReport:
    """The report of :func:`scan_voc`: a loader leaves out exactly what it names."""
    return scan_voc(root, split, class_names, decode, progress)[1]


def _scan_image(voc_dir, image_id, class_ids, report, decode) -> dict | None:
    """One Detectron2 dict, or None; adds to `report` what is wrong."""
    xml = _xml_path(voc_dir, image_id)
    try:
        name, stated, objects = read_annotation(xml) if report.annotated else ("", None, [])
    except FileNotFoundError:
        report.add("missing-xml", xml, "no such file")
        return None
    except (OSError, ValueError) as error:
        report.add("broken-xml", xml, str(error))
        return None
    image = _find_image(voc_dir, image_id, name)
    size = check_image(report, image, stated, decode)
    if size is None:
        return None
    return {
        "file_name": image,
        "image_id": image_id,
        "height": size[1],
        "width": size[0],
        "annotations": list(_scan_objects(objects, xml, size, class_ids, report)),
    }


def _scan_objects(objects, xml, size, class_ids, report) -> Iterator[dict]:
    """Yield the annotation of every good object; add the others to `report`."""
    for name, box, difficult, problem in objects:
        if not problem and name not in class_ids:
            near = difflib.get_close_matches(name, class_ids, n=1, cutoff=0.0)
            hint = f", the nearest is {near[0]!r}" if near else ""
            report.add("unknown-class", xml, f"{name!r} is none of the classes{hint}")
            continue
        if problem:
            report.add("bad-box", xml, problem)
            continue
        box = fit_box(report, xml, name, box, size, origin=1)
        if box is None:
            continue
        (report.difficult if difficult else report.boxes)[name] += 1
        # VOC's pixel indices are 1-based and inclusive: xmin 1, xmax W covers the image, which is
        # (0, W) in continuous coordinates (as in detectron2.data.datasets.pascal_voc)
        xmin, ymin, xmax, ymax = box
        yield {
            "category_id": class_ids[name],
            "bbox": [xmin - 1.0, ymin - 1.0, xmax, ymax],
            "bbox_mode": BoxMode.XYXY_ABS,
            "difficult": difficult,
        }


def _without_difficult(records: list[dict]) -> list[dict]:
    for record in records:
        record["annotations"] = [a for a in record["annotations"] if not a["difficult"]]
    return records


def register_voc(
    name: str,
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str] | None = None,
    use_difficult: bool = True,
    on_bad: str = "drop",
    decode: bool = False,
) -> None:
    """Register a split under `name`; it is read when Detectron2 first asks for it.

    Metadata: thing_classes, dirname, split, year, evaluator_type "voc", and the last three options.

    Args:
        root, split, decode: see :func:`scan_voc`.
        class_names: None takes those of this split; see :func:`find_voc_classes`.
        use_difficult: keep boxes marked difficult. Detectron2 does; the paper, like Faster R-CNN,
            trains without.
        on_bad: "drop" logs what is wrong and leaves it out, "refuse" raises a DataError.

    Raises:
        DataError: no such folder or split.
        ValueError: `name` is registered already with other arguments.
    """
    voc_dir = os.path.abspath(find_voc_dir(root))
    read_split(voc_dir, split)
    classes = list(class_names) if class_names is not None else find_voc_classes(root, [split])
    year = re.search(r"VOC(2007|2012)", voc_dir)
    metadata = {
        "thing_classes": classes,
        "dirname": voc_dir,
        "split": split,
        "year": int(year.group(1)) if year else 2007,
        "evaluator_type": "voc",
        "use_difficult": use_difficult,
        "on_bad": on_bad,
        "decode": decode,
    }
    select = list if use_difficult else _without_difficult
    register_once(name, lambda: scan_voc(voc_dir, split, classes, decode), metadata, select)
