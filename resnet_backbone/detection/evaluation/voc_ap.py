"""Average precision as in the PASCAL VOC devkit, and errors by kind. Needs only NumPy.

Rules of the devkit (VOCevaldet.m; also py-faster-rcnn's voc_eval.py):

* a detection is matched to the ground truth with the highest IoU in its image, taken or not;
* it is correct if that IoU is strictly above the threshold and no better-scored detection took
  the same ground truth, and wrong if one did (duplicate) or if the IoU is too small;
* it is ignored if that ground truth is difficult; difficult ones need not be found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COCO_IOU_THRESHOLDS = tuple(t / 100.0 for t in range(50, 100, 5))  # 0.5, 0.55, ... 0.95
CURVE_IOU = 0.5  # for the precision and recall arrays, and for errors by kind
WEAK_IOU = 0.1  # minimum IoU for a localization error or a confusion
# Keys of `voc_results.json`; the British spelling is kept for existing files.
KINDS = ("correct", "localisation", "confusion", "background", "duplicate")


def evaluate_voc(
    detections: Sequence[Mapping[str, Any]],
    ground_truth: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
) -> dict[str, Any]:
    """Computes the average precision of every class at every IoU threshold.

    Args:
        detections: one mapping per image: image_id; boxes (N, 4) as (xmin, ymin, xmax, ymax) in
            VOC's inclusive pixel coordinates (width = xmax - xmin + 1); scores (N,); classes (N,),
            integers that index `class_names`. Equal scores keep the order given here.
        ground_truth: one mapping per image of the set: image_id (unique), boxes (M, 4) likewise,
            classes (M,), difficult (M,) true or false.
        class_names, iou_thresholds: C names, T values in (0, 1).

    Returns:
        class_names, iou_thresholds; ap_area (C, T), the area under the precision envelope (VOC 2010
        and later), and ap_11point (C, T), the mean precision at recall 0, .1, ... 1 (VOC 2007),
        both 0..1; num_ground_truth, num_difficult, num_detections (C,); precision and recall, C
        arrays each, by descending score, at IoU 0.5. Without (non-difficult) ground truth, a
        class's AP and recall are nan: the devkit divides by zero there.

    Raises:
        ValueError: a detection's image is not in `ground_truth`, an image id occurs twice there, a
            class number is out of range, or the shapes of arrays disagree.
    """
    tables = read_boxes(detections, ground_truth, class_names)
    return score_boxes(*tables, class_names, iou_thresholds)


def score_boxes(
    truth: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
) -> dict[str, Any]:
    """:func:`evaluate_voc` for the tables of :func:`read_boxes`."""
    thresholds = np.asarray(iou_thresholds, dtype=np.float64)
    # the last row is for the curves, which do not depend on `iou_thresholds`
    all_thresholds = np.append(thresholds, CURVE_IOU)
    ap_area, ap_11point = np.full((2, len(class_names), len(thresholds)), np.nan)
    counts = np.zeros((3, len(class_names)), dtype=int)
    precisions, recalls = [], []
    for class_id in range(len(class_names)):
        difficult = truth["difficult"][truth["classes"] == class_id]
        detected = found["classes"] == class_id
        counts[:, class_id] = (~difficult).sum(), difficult.sum(), detected.sum()
        det = {key: found[key][detected] for key in ("scores", "iou", "match", "difficult")}
        precision, recall = _precision_recall(det, counts[0, class_id], all_thresholds)
        if counts[0, class_id]:
            curves = list(zip(recall, precision, strict=True))[:-1]
            ap_area[class_id] = [average_precision(*curve) for curve in curves]
            ap_11point[class_id] = [eleven_point_ap(*curve) for curve in curves]
        precisions.append(precision[-1])
        recalls.append(recall[-1])
    names = ("num_ground_truth", "num_difficult", "num_detections")
    return {
        "class_names": list(class_names),
        "iou_thresholds": thresholds,
        "ap_area": ap_area,
        "ap_11point": ap_11point,
        **dict(zip(names, counts, strict=True)),
        "precision": precisions,
        "recall": recalls,
    }


def read_boxes(detections, ground_truth, class_names) -> tuple[dict, dict]:
    """Converts the arguments of :func:`evaluate_voc` to tables of ground truth and detections.

    Both have boxes (N, 4), image (N,), an index into `ground_truth`, and classes (N,). The first
    has difficult. The second has scores, iou and match of :func:`match_boxes`, and difficult for
    that match. Errors are those of :func:`evaluate_voc`.
    """
    truth = _flatten(ground_truth, ("classes", "difficult"), len(class_names), "ground truth")
    found = _flatten(detections, ("classes", "scores"), len(class_names), "detections")
    known = [str(image["image_id"]) for image in ground_truth]
    place = {image: number for number, image in enumerate(known)}
    if len(place) != len(known):
        twice = next(image for number, image in enumerate(known) if place[image] != number)
        raise ValueError(f"ground truth has image {twice!r} twice; give each image once")
    detected = [str(image["image_id"]) for image in detections]
    strange = sorted(set(detected) - set(known))
    if strange:
        raise ValueError(
            f"detections in {len(strange)} images that the ground truth does not have, such as"
            f" {strange[0]!r}; evaluate on the split that was detected on"
        )
    found["image"] = np.array([place[image] for image in detected], dtype=int)[found["image"]]
    found["iou"], found["match"] = match_boxes(found, truth)
    found["difficult"] = np.append(truth["difficult"], False)[found["match"]]
    return truth, found


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Returns the area, 0..1, under the precision envelope; inputs (D,) by descending score."""
    return float(np.sum(np.diff(recall, prepend=0.0) * precision_envelope(precision)))


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Returns the mean over recall 0, .1, ... 1 of the best precision at or above it (VOC 2007)."""
    # exactly these floats, with 0.30000000000000004, break ties as in the devkit's Python port
    first = np.searchsorted(recall, np.arange(0.0, 1.1, 0.1), side="left")
    return float(np.append(precision_envelope(precision), 0.0)[first].sum() / 11.0)


def paired_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Returns the IoU (N,) of paired boxes (N, 4) in inclusive pixel coordinates."""
    left_top = np.maximum(boxes1[:, :2], boxes2[:, :2])
    right_bottom = np.minimum(boxes1[:, 2:], boxes2[:, 2:])
    intersection = np.maximum(right_bottom - left_top + 1.0, 0.0).prod(axis=1)
    areas1, areas2 = ((b[:, 2:] - b[:, :2] + 1.0).prod(axis=1) for b in (boxes1, boxes2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return intersection / (areas1 + areas2 - intersection)


def precision_envelope(precision: np.ndarray) -> np.ndarray:
    """Returns the best precision at each recall or a higher one."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def _flatten(images, keys, num_classes: int, what: str) -> dict[str, np.ndarray]:
    """Puts all boxes in one table: boxes (N, 4), image (N,) by index, and the columns `keys`."""
    boxes = [np.asarray(i["boxes"], dtype=np.float64).reshape(-1, 4) for i in images]
    table = {
        "boxes": np.concatenate(boxes) if boxes else np.zeros((0, 4)),
        "image": np.repeat(np.arange(len(images)), [len(b) for b in boxes]),
    }
    types = {"classes": np.int64, "difficult": bool, "scores": np.float64}
    for key in keys:
        columns = [np.asarray(i[key], dtype=types[key]).reshape(-1) for i in images]
        for image, column, box in zip(images, columns, boxes, strict=True):
            if len(column) != len(box):
                raise ValueError(
                    f"{what} of image {image['image_id']}: {len(box)} boxes but {len(column)} {key}"
                )
        table[key] = np.concatenate(columns) if columns else np.zeros(0, types[key])
    check_classes(table["classes"], num_classes, what)
    return table


def check_classes(classes: np.ndarray, num_classes: int, what: str) -> None:
    """Raises ValueError for class numbers that the data set does not have."""
    if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(
            f"{what}: class numbers {classes.min()}..{classes.max()} are not in"
            f" 0..{num_classes - 1}; is the model's number of classes that of the data set?"
        )


def _precision_recall(
    det: Mapping[str, np.ndarray], num_positive: int, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns precision and recall (T, D) of one class, by descending score."""
    order = np.argsort(-det["scores"], kind="stable")
    iou, match, difficult = (det[key][order] for key in ("iou", "match", "difficult"))
    over = iou[None, :] > thresholds[:, None]
    counted = over & ~difficult
    true = np.array([first_on_each(match, matched) for matched in counted]).reshape(over.shape)
    true_sum = true.cumsum(axis=1, dtype=np.float64)
    false_sum = (~over | (counted & ~true)).cumsum(axis=1, dtype=np.float64)
    recall = true_sum / num_positive if num_positive else np.full_like(true_sum, np.nan)
    # the sum is 0 as long as every detection matched a difficult ground truth
    precision = true_sum / np.maximum(true_sum + false_sum, np.finfo(np.float64).eps)
    return precision, recall


def first_on_each(match: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns which chosen detections (D,), by descending score, are first on their object."""
    places = np.flatnonzero(chosen)
    first = np.zeros(len(chosen), dtype=bool)
    first[places[np.unique(match[places], return_index=True)[1]]] = True
    return first


def match_boxes(det, gt, same_class: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Finds each detection's highest IoU in its image, with its class or with all others.

    Takes two tables, and returns the IoU (N,) and the row of that ground truth (N,), the first for
    ties; -inf and -1 if there is none.
    """
    iou = np.full(len(det["boxes"]), -np.inf)
    match = np.full(len(det["boxes"]), -1)
    rows, columns, overlaps = pair_boxes(det, gt, same_class)
    if not rows.size:
        return iou, match
    found, starts, counts = np.unique(rows, return_index=True, return_counts=True)
    iou[found] = np.maximum.reduceat(overlaps, starts)
    # the IoU of boxes without an area is nan, which is never above a threshold
    place = np.where(overlaps >= iou[rows], np.arange(len(rows)), len(rows))
    place = np.minimum(np.minimum.reduceat(place, starts), starts + counts - 1)
    match[found] = columns[place]
    return iou, match


def pair_boxes(det, gt, same_class: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all pairs of detection and object in an image: sorted rows in both tables, IoU (P,).

    The objects are of the detection's class, or of all other classes.
    """
    wanted, given = det["image"], gt["image"]
    if same_class:
        classes = 1 + max(gt["classes"].max(initial=0), det["classes"].max(initial=0))
        wanted, given = (table["image"] * classes + table["classes"] for table in (det, gt))
    order = np.argsort(given, kind="stable")
    first, end = (np.searchsorted(given[order], wanted, side) for side in ("left", "right"))
    rows = np.repeat(np.arange(len(wanted)), end - first)  # one pair of boxes for each
    within = np.arange(len(rows)) - np.repeat(np.cumsum(end - first) - (end - first), end - first)
    columns = order[first[rows] + within]
    if not same_class:
        pairs = det["classes"][rows] != gt["classes"][columns]
        rows, columns = rows[pairs], columns[pairs]
    return rows, columns, paired_iou(det["boxes"][rows], gt["boxes"][columns])


def count_errors(
    truth: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Counts errors by kind (Hoiem et al., ECCV 2012) with the devkit's matching at IoU 0.5.

    For a class with N objects (without difficult ones), the N best-scored detections are counted,
    so that classes and detectors are comparable. Detections on difficult objects are ignored. A
    detection that is not correct is a duplicate (IoU above 0.5 with an object that a better-scored
    one took), else a localization error (IoU of 0.1 or more with an object of its class), else a
    confusion (the same with an object of another class), else background.

    Takes the tables of :func:`read_boxes`. Returns for each class {"class", "objects", a count for
    each of :data:`KINDS`, "missed"}. The counts sum to at most the number of objects. "missed" are
    objects that no detection found, at any rank.
    """
    others, _ = match_boxes(found, truth, same_class=False)
    rows = []
    for class_id, name in enumerate(class_names):
        mine = np.flatnonzero(found["classes"] == class_id)
        mine = mine[np.argsort(-found["scores"][mine], kind="stable")]
        iou, match = found["iou"][mine], found["match"][mine]
        over = iou > CURVE_IOU
        first = first_on_each(match, over)
        ignored = over & found["difficult"][mine]
        kinds = np.select(
            [first, over, iou >= WEAK_IOU, others[mine] >= WEAK_IOU],
            [KINDS.index(kind) for kind in ("correct", "duplicate", "localisation", "confusion")],
            KINDS.index("background"),
        )
        counted = ~truth["difficult"] & (truth["classes"] == class_id)
        objects = int(counted.sum())
        counts = np.bincount(kinds[~ignored][:objects], minlength=len(KINDS)).tolist()
        row = {"class": name, "objects": objects, **dict(zip(KINDS, counts, strict=True))}
        rows.append({**row, "missed": objects - int((first & ~ignored).sum())})
    return rows
