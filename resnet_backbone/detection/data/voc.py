"""PASCAL VOC and custom data in its layout as Detectron2 data sets."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.formats.shapes import fit_box
from resnet_backbone.detection.data.formats.voc import (
    VocObject,
    find_image,
    find_voc_dir,
    read_annotation,
    read_split,
    xml_path,
)
from resnet_backbone.detection.data.problems import (
    DataProblem,
    DataReport,
    Look,
    Stamp,
    in_threads,
    look_at_image,
    reading,
    stamp_of,
)
from resnet_backbone.detection.data.records import BOX_COLUMNS, Records
from resnet_backbone.detection.data.scans import ScannedDataset, register_once
from resnet_backbone.runtime.errors import DataError


def find_voc_classes(root: str | os.PathLike, splits: Sequence[str]) -> list[str]:
    """Returns the class names in the XML files of `splits`, sorted.

    Pass the training and test splits together, so that both get the same class numbers. VOC's
    twenty classes are returned as `VOC_CLASSES`, in VOC's own order.

    Raises:
        DataError: no such folder or split, or no object has a name.
    """
    voc_dir = find_voc_dir(root)
    ids = list(dict.fromkeys(i for split in splits for i in read_split(voc_dir, split)))
    names, num_read = set(), 0
    for image_id in ids:
        try:
            _, _, objects = read_annotation(xml_path(voc_dir, image_id))
        except (OSError, ValueError):
            continue  # scan_voc reports it
        num_read += 1
        names.update(one.name for one in objects if one.name)
    if not names:
        example = f", such as {xml_path(voc_dir, ids[0])}" if ids else ""
        raise DataError(
            f"{voc_dir}, splits {', '.join(splits)}: no object with a class name; {num_read} of "
            f"{len(ids)} ids have a readable Annotations/ID.xml{example}"
        )
    return list(VOC_CLASSES) if names == set(VOC_CLASSES) else sorted(names)


def scan_voc(
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str],
    decode: bool = False,
    progress: bool = False,
) -> tuple[list[dict], DataReport]:
    """Reads and checks a split in one pass, for loader, check and evaluator.

    Args:
        root: the folder with `Annotations/`, or a VOCdevkit folder that contains one such folder.
        split: name of a file in `ImageSets/Main`, without `.txt`.
        class_names: the classes to train on; position = category_id.
        decode: decode every image, which finds truncated ones (minutes for VOC's 16,551).
        progress: show a progress bar on a terminal.

    Returns:
        One Detectron2 dict per usable image: file_name, image_id (str), height, width (pixels) and
        annotations, each with category_id, bbox [x0, y0, x1, y1] in continuous pixel coordinates
        (the XML's minima minus 1, as in Detectron2's own loader), bbox_mode and difficult (0 or 1).
        If no image of the split has an XML file (VOC 2012's test set), annotations are empty.

        Dropped are: missing or broken XML files; images that are missing, unreadable, or of another
        size than their XML states; boxes that are not finite, of zero or negative size, or outside
        the image (those that cross its edge are clipped); classes not in `class_names`; ids listed
        twice.

    Raises:
        DataError: no such folder or split.
    """
    voc_dir = find_voc_dir(root)
    report = DataReport(f"{voc_dir} split {split}")
    with reading(report.name):
        return list(_scan(report, voc_dir, split, class_names, decode, progress)), report


def _scan(
    report: DataReport,
    voc_dir: str,
    split: str,
    class_names: Sequence[str],
    decode: bool,
    progress: bool = False,
) -> Iterator[dict]:
    """Yields the records of :func:`scan_voc`; the report is complete after the last."""
    split_file = os.path.join(voc_dir, "ImageSets", "Main", f"{split}.txt")
    folders = (os.path.join(voc_dir, name) for name in ("Annotations", "JPEGImages"))
    for path in (split_file, *folders):
        report.watch(path)
    ids = Counter(read_split(voc_dir, split))
    report.num_images = len(ids)
    report.boxes.update(dict.fromkeys(class_names, 0))
    report.annotated = any(os.path.isfile(xml_path(voc_dir, image_id)) for image_id in ids)
    class_ids = {name: index for index, name in enumerate(class_names)}
    files = ((voc_dir, image_id, report.annotated, decode) for image_id in ids)
    entries = zip(ids, in_threads(_look_at, files), strict=True)
    bar = dict(desc=f"checking {split}", total=len(ids), disable=None if progress else True)
    kept, largest = 0, -math.inf
    for image_id, (stamp, objects, look) in tqdm(entries, **bar):
        if ids[image_id] > 1:
            report.add("duplicate-id", split_file, f"image {image_id!r} is listed again")
        xml = xml_path(voc_dir, image_id)
        report.files[xml] = stamp
        report.watch(os.path.dirname(look.path))
        size = report.note_look(look)
        if size is None:
            continue
        boxes = list(_scan_objects(objects, xml, size, class_ids, report))
        largest = max([largest, *(side for box in boxes for side in box["bbox"][2:])])
        sides, kept = {"height": size[1], "width": size[0]}, kept + 1
        yield {"file_name": look.path, "image_id": image_id, **sides, "annotations": boxes}
    if not kept:
        report.add_empty(split_file)
    report.note_shares(largest)


def _without_difficult(records: Records) -> Records:
    return records.select(boxes=records.store.boxes[:, BOX_COLUMNS.index("difficult")] == 0)


def _look_at(
    voc_dir: str, image_id: str, annotated: bool, decode: bool
) -> tuple[Stamp, Sequence[VocObject], Look]:
    """Returns the XML's stamp and objects, and the result for the image or a problem of the XML."""
    xml = xml_path(voc_dir, image_id)
    stamp, name, stated, objects = stamp_of(xml), "", None, []
    try:
        if annotated:
            name, stated, objects = read_annotation(xml)
    except FileNotFoundError:
        problem = DataProblem("missing-xml", xml, "no such file")
    except (OSError, ValueError) as error:
        problem = DataProblem("broken-xml", xml, str(error))
    else:
        return stamp, objects, look_at_image(find_image(voc_dir, image_id, name), stated, decode)
    return stamp, (), Look(xml, stamp, problem=problem)


def _scan_objects(objects, xml, size, class_ids, report) -> Iterator[dict]:
    """Yields the annotation of every usable object; adds the others to `report`."""
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


def register_voc(
    name: str,
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str] | None = None,
    use_difficult: bool = True,
    on_bad: str = "drop",
    decode: bool = False,
) -> None:
    """Registers a split under `name`; it is scanned when Detectron2 first asks for it.

    Metadata: thing_classes, dirname, split, year, evaluator_type "voc", and the last three options.

    Args:
        root, split, decode: see :func:`scan_voc`.
        class_names: None for the classes of this split; see :func:`find_voc_classes`.
        use_difficult: keep boxes marked difficult. Detectron2 does; the paper, like Faster R-CNN,
            trains without them.
        on_bad: "drop" logs and drops what is wrong, "refuse" raises a DataError.

    Raises:
        DataError: no such folder or split.
        ValueError: `name` is already registered with other arguments.
    """
    voc_dir = os.path.abspath(find_voc_dir(root))
    read_split(voc_dir, split)
    classes = list(class_names) if class_names is not None else find_voc_classes(root, [split])

    def scan() -> tuple[Iterator[dict], DataReport]:
        report = DataReport(f"{voc_dir} split {split}")
        return _scan(report, voc_dir, split, classes, decode), report

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
    select = None if use_difficult else _without_difficult
    key = {"voc_dir": voc_dir, "split": split, "classes": classes, "decode": decode}
    register_once(name, ScannedDataset(scan, on_bad, key, select), metadata)
