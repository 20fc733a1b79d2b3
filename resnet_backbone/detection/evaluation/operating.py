"""Metrics at a score threshold, which AP does not have: F1 and the confusion matrix."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnet_backbone.detection.evaluation.voc import BoxEvaluator, voc_detections, voc_objects
from resnet_backbone.detection.evaluation.voc_ap import (
    CURVE_IOU,
    first_on_each,
    pair_boxes,
    read_boxes,
    score_boxes,
)
from resnet_backbone.runtime.errors import UsageError

logger = logging.getLogger(__name__)

OPERATING_POINTS = "operating_points.json"
THRESHOLDS = np.linspace(0, 1, 1001)
STEP = 50  # every 50th threshold's F1 is written
BACKGROUND = "background"

Table = Mapping[str, np.ndarray]


class OperatingPoints(BoxEvaluator):
    """Writes ``operating_points.json``, see :func:`operating_points`; returns no metrics.

    The ground truth is the loader's, in VOC layout, COCO's format, or registered by other code.
    Difficult objects and crowds are ignored. UsageError: the data set has no boxes.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        if not MetadataCatalog.get(dataset_name).get("thing_classes"):
            key = "RESNET_BACKBONE.TEST.OPERATING_POINTS"
            raise UsageError(f"{key}: {dataset_name} has no boxes to count, leave it False")
        super().__init__(dataset_name, output_dir)

    def score(self, found: Mapping[Any, tuple[np.ndarray, ...]]) -> OrderedDict:
        truth = voc_objects(DatasetCatalog.get(self.name))
        if not any(image["classes"] for image in truth):
            logger.warning("%s has no objects: no %s is written", self.name, OPERATING_POINTS)
            return OrderedDict()
        tables = read_boxes(voc_detections(found), truth, self.class_names)
        content = operating_points(*tables, self.class_names)
        text = "%s: the largest mean F1 over classes is %.3f, at a score of %.3f"
        logger.info(text, self.name, content["F1"], content["threshold"])
        self.write(OPERATING_POINTS, content)
        return OrderedDict()


def operating_points(truth: Table, found: Table, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the best score thresholds, and the confusion matrix at the best overall one.

    Takes the tables of :func:`read_boxes`. Returns {"F1", "threshold" (of the largest mean over
    classes), "classes": [{"class", "F1", "threshold", "precision", "recall", "curve"}, ...]
    (classes with objects, each at its best threshold; F1 at 0, 0.05, ... 1), "confusion":
    :func:`count_confusion` as lists, "labels": of its rows and columns}. All are 0..1, at IoU 0.5.
    """
    numbers = score_boxes(truth, found, class_names, (CURVE_IOU,))
    curves = f1_curves(numbers, found)
    rows, known = [], np.flatnonzero(numbers["num_ground_truth"])
    for number in known.tolist():
        threshold, best = best_threshold(curves[number])
        last = np.sum(found["scores"][found["classes"] == number] >= threshold) - 1
        row = {"class": class_names[number], "F1": best, "threshold": threshold}
        row["curve"] = curves[number][::STEP].round(4).tolist()
        for key in ("precision", "recall"):
            row[key] = float(numbers[key][number][last]) if last >= 0 else 0.0
        rows.append(row)
    threshold, best = best_threshold(curves[known].mean(axis=0)) if rows else (0.0, 0.0)
    confusion = count_confusion(truth, found, len(class_names), threshold).tolist()
    labels = [*class_names, BACKGROUND]
    content = {"F1": best, "threshold": threshold, "classes": rows}
    return content | {"labels": labels, "confusion": confusion}


def f1_curves(numbers: Mapping[str, Any], found: Table) -> np.ndarray:
    """Returns F1 (C, T), 0..1, of detections with scores at or above each of :data:`THRESHOLDS`.

    F1 is 2 P R / (P + R) with VOC's matching at IoU 0.5; 0 without detections, nan without objects.

    Args:
        numbers: result of :func:`score_boxes` for the detections in the table.
    """
    curves = []
    for number, objects in enumerate(numbers["num_ground_truth"]):
        pair = (numbers[key][number] for key in ("precision", "recall"))
        precision, recall = (np.append(0.0, values) for values in pair)
        scores = np.sort(found["scores"][found["classes"] == number])
        kept = len(scores) - np.searchsorted(scores, THRESHOLDS)  # number of top detections
        total = np.maximum(precision + recall, np.finfo(float).eps)
        curve = (2 * precision * recall / total)[kept]
        curves.append(curve if objects else np.full(len(THRESHOLDS), np.nan))
    return np.array(curves).reshape(-1, len(THRESHOLDS))


def best_threshold(curve: np.ndarray) -> tuple[float, float]:
    """Returns the threshold with the largest F1 (the middle one for ties), and that F1."""
    places = np.flatnonzero(curve == curve.max())
    return float(THRESHOLDS[places[len(places) // 2]]), float(curve.max())


def count_confusion(truth: Table, found: Table, num_classes: int, score: float) -> np.ndarray:
    """Counts objects by their class (rows) and the class they were detected as (columns).

    The last column, background, counts missed objects, and the last row detections on no object.
    Only detections with at least the given score count. First, correct detections by VOC's matching
    fill the diagonal. Then the remaining detections and objects of different classes are paired by
    descending IoU above 0.5, as in supervision's and Ultralytics' confusion matrices. Difficult
    objects, and detections that VOC's matching assigns to them, are ignored.

    Returns:
        (C + 1, C + 1), integers.
    """
    order = np.argsort(-found["scores"], kind="stable")
    order = order[found["scores"][order] >= score]
    found = {key: column[order] for key, column in found.items()}
    over = found["iou"] > CURVE_IOU
    counted = ~(over & found["difficult"])
    right = first_on_each(found["match"], over & counted)
    labels = np.append(truth["classes"], num_classes)  # row -1 stands for background
    on = np.where(right, found["match"], -1)
    free = ~truth["difficult"]
    free[found["match"][right]] = False
    rows, columns, overlaps = pair_boxes(found, truth, same_class=False)
    for pair in np.argsort(-overlaps, kind="stable").tolist():
        row, column = rows[pair], columns[pair]
        if overlaps[pair] > CURVE_IOU and counted[row] and on[row] < 0 and free[column]:
            on[row], free[column] = column, False
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    np.add.at(matrix, (labels[on[counted]], found["classes"][counted]), 1)
    np.add.at(matrix[:, -1], truth["classes"][free], 1)
    return matrix
