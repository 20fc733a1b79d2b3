"""Data sets in PASCAL VOC layout, VOC's own or a user's, as Detectron2 data sets."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence

from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode
from tqdm import tqdm

from resnet_backbone.detection.data.catalog import register_once
from resnet_backbone.detection.data.problems import (
    DataError,
    DataReport,
    apply_policy,
    box_problem,
    check_image,
)
from resnet_backbone.detection.data.voc_files import (
    NO_ANNOTATION,
    find_image,
    find_voc_dir,
    read_annotation,
    read_split,
    xml_path,
)


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
        root: the folder that holds `Annotations/`, or a VOCdevkit folder with one such inside.
        split: name of a file in `ImageSets/Main`, without `.txt`.
        class_names: position = category_id.
        use_difficult: keep boxes marked difficult. Detectron2 does; the paper, like Faster R-CNN,
            trains without.
        on_bad: "drop" logs what :func:`check_voc` finds and leaves it out, "refuse" raises.
        decode: also find (and leave out) images that are cut short; reads every pixel.

    Returns:
        One dict per image: file_name, image_id (str), height, width (pixels) and annotations,
        each with category_id, bbox [x0, y0, x1, y1] in continuous pixel coordinates (the XML's
        minima less 1, as Detectron2's own loader does), bbox_mode and difficult (0 or 1).

    Raises:
        DataError: no such folder or split, no usable image, or a problem with "refuse".
    """
    records, report = scan_voc(root, split, class_names, decode)
    apply_policy(report, on_bad)
    if not use_difficult:
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

    def load() -> list[dict]:
        return load_voc_instances(voc_dir, split, classes, **options)

    register_once(name, load, metadata)
