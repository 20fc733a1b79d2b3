"""Data sets in PASCAL VOC layout, VOC's own or a user's, as Detectron2 data sets.

    ROOT/Annotations/ID.xml   ROOT/JPEGImages/ID.jpg   ROOT/ImageSets/Main/SPLIT.txt

VOC's own folders and those of annotation tools, which leave tags out and write other numbers.
"""

from __future__ import annotations

import difflib
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.problems import (
    DataReport,
    ScannedDataset,
    box_problem,
    check_image,
    register_once,
)
from resnet_backbone.runtime.errors import DataError

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
        f"{root} is not a VOC folder: neither it nor a folder inside it has Annotations/;"
        " give the folder that holds Annotations/, JPEGImages/ and ImageSets/ (--voc-root, or for"
        " registered names DETECTRON2_DATASETS, the folder of VOC2007 and VOC2012), or turn images"
        " and boxes in another layout into a data set with `prepare-data own`"
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
        ValueError: not XML, or a size that is not a number.
    """
    stat = os.stat(path)
    return _read_version(path, stat.st_mtime_ns, stat.st_size)


@cache  # a run reads the same files for the classes and for the boxes
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


def find_voc_classes(root: str, splits: Sequence[str]) -> list[str]:
    """Class names that occur in the XML files of `splits`, sorted.

    Give the training and the test splits together, so that both get the same class numbers.
    If they are VOC's twenty, the list is `VOC_CLASSES` (VOC's own order).
    XML files that are missing or broken are passed over; `check_voc` reports them.

    Raises:
        DataError: no such folder or split, or no object with a name in any of them.
    """
    voc_dir = find_voc_dir(root)
    names = set()
    for image_id in dict.fromkeys(i for split in splits for i in read_split(voc_dir, split)):
        try:
            annotation = read_annotation(xml_path(voc_dir, image_id))
        except (OSError, ValueError):
            continue
        names.update(one.name for one in annotation.objects)
    names.discard("")
    if not names:
        raise DataError(f"{voc_dir}: no object with a class name in splits {', '.join(splits)}")
    return list(VOC_CLASSES) if names == set(VOC_CLASSES) else sorted(names)


def scan_voc(
    root: str,
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
        Detectron2 dicts of what is good (see :func:`load_voc_instances`), and what is not. Where
        no image of the split has an XML file (VOC 2012's test set) they have no annotations.

    Raises:
        DataError: no such folder or split.
    """
    voc_dir = find_voc_dir(root)
    ids = read_split(voc_dir, split)
    split_file = os.path.join(voc_dir, "ImageSets", "Main", split + ".txt")
    report = DataReport(f"{voc_dir} split {split}", num_images=len(set(ids)))
    report.boxes.update(dict.fromkeys(class_names, 0))
    report.annotated = any(os.path.isfile(xml_path(voc_dir, image_id)) for image_id in ids)
    class_ids = {name: index for index, name in enumerate(class_names)}
    records, seen = [], set()
    for image_id in tqdm(ids, desc=f"checking {split}", disable=None if progress else True):
        if image_id in seen:
            report.add("duplicate-id", split_file, f"image {image_id!r} is listed again")
            continue
        seen.add(image_id)
        record = _scan_image(voc_dir, image_id, class_ids, report, decode)
        if record is not None:
            records.append(record)
    if not records:
        report.add_empty(split_file)
    return records, report


def _scan_image(voc_dir, image_id, class_ids, report, decode) -> dict | None:
    """One Detectron2 dict, or None; adds to `report` what is wrong."""
    xml = xml_path(voc_dir, image_id)
    try:
        annotation = read_annotation(xml) if report.annotated else NO_ANNOTATION
    except FileNotFoundError:
        report.add("missing-xml", xml, "no such file")
        return None
    except (OSError, ValueError) as error:
        report.add("broken-xml", xml, str(error))
        return None
    image = find_image(voc_dir, image_id, annotation.image_name)
    size = check_image(report, image, annotation.size, decode)
    if size is None:
        return None
    return {
        "file_name": image,
        "image_id": image_id,
        "height": size[1],
        "width": size[0],
        "annotations": list(_scan_objects(annotation, xml, size, class_ids, report)),
    }


def _scan_objects(annotation, xml, size, class_ids, report) -> Iterator[dict]:
    """Yield the annotation of every good object; add the others to `report`."""
    for name, box, difficult, problem in annotation.objects:
        if problem:
            report.add("bad-box", xml, problem)
            continue
        if name not in class_ids:
            near = difflib.get_close_matches(name, class_ids, n=1, cutoff=0.0)
            hint = f", the nearest is {near[0]!r}" if near else ""
            report.add("unknown-class", xml, f"{name!r} is none of the classes{hint}")
            continue
        problem = box_problem(box, size, origin=1)
        if problem:
            report.add("bad-box", xml, f"{name} {problem}")
            continue
        report.count(name, bool(difficult))
        # VOC's pixel indices are 1-based and inclusive: xmin 1, xmax W covers the image, which is
        # (0, W) in continuous coordinates (as in detectron2.data.datasets.pascal_voc)
        xmin, ymin, xmax, ymax = box
        yield {
            "category_id": class_ids[name],
            "bbox": [xmin - 1.0, ymin - 1.0, xmax, ymax],
            "bbox_mode": BoxMode.XYXY_ABS,
            "difficult": difficult,
        }


def check_voc(
    root: str,
    split: str,
    class_names: Sequence[str],
    decode: bool = False,
    progress: bool = True,
) -> DataReport:
    """Find what is wrong with a split in VOC layout; the loader leaves out exactly this.

    Reported: XML that is missing or broken; images that are missing, no images, or of another
    size than their XML says; boxes of zero or negative size, not finite, or outside the image by
    more than a pixel; classes that are not in `class_names`; ids listed twice; an empty split.

    Args and errors are those of :func:`scan_voc`.
    """
    return scan_voc(root, split, class_names, decode, progress)[1]


def load_voc_instances(
    root: str,
    split: str,
    class_names: Sequence[str],
    use_difficult: bool = True,
    on_bad: str = "drop",
    decode: bool = False,
) -> list[dict]:
    """Load a split as Detectron2 dicts.

    Args:
        root, split, class_names: see :func:`scan_voc`.
        use_difficult: keep boxes marked difficult. Detectron2 does; the paper, like Faster R-CNN,
            trains without.
        on_bad: "drop" logs what :func:`check_voc` finds and leaves it out, "refuse" raises.
        decode: also find (and leave out) truncated images; reads every pixel.

    Returns:
        One dict per image: file_name, image_id (str), height, width (pixels) and annotations,
        each with category_id, bbox [x0, y0, x1, y1] in continuous pixel coordinates (the XML's
        minima less 1, as Detectron2's own loader does), bbox_mode and difficult (0 or 1).

    Raises:
        DataError: no such folder or split, no usable image, or a problem with "refuse".
    """
    return _dataset(root, split, class_names, use_difficult, on_bad, decode)()


def _dataset(
    root: str,
    split: str,
    class_names: Sequence[str],
    use_difficult: bool,
    on_bad: str,
    decode: bool,
) -> ScannedDataset:
    select = list if use_difficult else _without_difficult
    return ScannedDataset(lambda: scan_voc(root, split, class_names, decode), on_bad, select)


def _without_difficult(records: list[dict]) -> list[dict]:
    for record in records:
        record["annotations"] = [a for a in record["annotations"] if not a["difficult"]]
    return records


def register_voc(
    name: str,
    root: str,
    split: str,
    class_names: Sequence[str] | None = None,
    use_difficult: bool = True,
    on_bad: str = "drop",
    decode: bool = False,
) -> None:
    """Register a split under `name`; it is read when Detectron2 first asks for it.

    Args as :func:`load_voc_instances`, but `class_names` None takes those of this split: for a
    training and a test split give both the list of `find_voc_classes(root, [train, test])`.
    Metadata: thing_classes, dirname, split, year, evaluator_type "voc", and the loader's options.

    Raises:
        DataError: no such folder or split.
        ValueError: `name` is registered already with other arguments.
    """
    voc_dir = os.path.abspath(find_voc_dir(root))
    read_split(voc_dir, split)
    classes = list(class_names) if class_names is not None else find_voc_classes(root, [split])
    year = re.search(r"VOC(2007|2012)", voc_dir)
    options = {"use_difficult": use_difficult, "on_bad": on_bad, "decode": decode}
    metadata = {
        "thing_classes": classes,
        "dirname": voc_dir,
        "split": split,
        "year": int(year.group(1)) if year else 2007,
        "evaluator_type": "voc",
        **options,
    }
    register_once(name, _dataset(voc_dir, split, classes, **options), metadata)
