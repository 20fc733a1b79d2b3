"""ImageNet's two box tasks: detection (DET) and localization (LOC).

Boxes are continuous (x0, y0, x1, y1) as everywhere in Detectron2. ILSVRC's inclusive pixels, with
widths of xmax - xmin + 1, have the same areas and overlaps.
"""

from __future__ import annotations

import csv
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from torchvision.ops import box_iou

from resnet_backbone.detection.evaluation.voc import BoxEvaluator
from resnet_backbone.detection.evaluation.voc_ap import average_precision
from resnet_backbone.runtime.errors import DataError

logger = logging.getLogger(__name__)

TOLERANCE = 10.0  # pixels by which a box may be larger than a small object
TOP = 5  # number of guessed classes
IOU = 0.5
TRUE_CLASS, TOP1, TOP5 = "true_class_error", "top1_error", "top5_error"
# Error -> the last rank of the true class among the guesses with which an image can be right
LAST_RANK = {TRUE_CLASS: math.inf, TOP1: 1, TOP5: TOP}
LOC_RESULTS, LOCALIZATIONS = "loc_results.json", "localizations.json"


class DETEvaluator(BoxEvaluator):
    """Average precision as in ILSVRC's development kit for DET (``eval_detection.m``).

    Returns {"bbox": {"AP50": the mean over classes, "AP50-<class>"}} in percent. Classes without
    objects are NaN and not in the mean. `output_dir` gets ``det_results.json`` and
    ``detections.json``.
    """

    def score(self, found) -> OrderedDict:
        self.write_detections(found)
        none = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
        images = ((found.get(r["image_id"], none), objects) for r, *objects in self.objects())
        numbers = score_det(images, len(self.class_names))
        rows = {name: 100 * value for name, value in zip(self.class_names, numbers, strict=True)}
        known = [value for value in rows.values() if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        logger.info("%s: %.2f %% AP over %d classes with objects", self.name, mean, len(known))
        shown = {name: None if math.isnan(value) else value for name, value in rows.items()}
        self.write("det_results.json", {"AP50": mean if known else None, "classes": shown})
        return OrderedDict(bbox={"AP50": mean} | {f"AP50-{k}": v for k, v in rows.items()})


def score_det(images: Iterable[tuple[Sequence, Sequence]], num_classes: int) -> list[float]:
    """Returns each class's average precision by the rules of DET, 0..1; NaN without objects.

    `images` has detections (boxes, scores, classes) and objects (boxes, classes) of each image.
    """
    scores, classes, right = [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, bool)]
    counts = np.zeros(num_classes, int)
    for found, (objects, object_classes) in images:
        counts += np.bincount(object_classes, minlength=num_classes)
        scores.append(found[1])
        classes.append(found[2])
        right.append(match_small(*found, objects, object_classes))
    return det_precisions(*map(np.concatenate, (scores, classes, right)), counts)


def small_thresholds(boxes: np.ndarray) -> np.ndarray:
    """Returns IoU thresholds (M,) of objects (M, 4): min(0.5, w h / ((w + 10) (h + 10)))."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.minimum(IOU, sides.prod(1) / (sides + TOLERANCE).prod(1))


def match_small(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    objects: np.ndarray,
    object_classes: np.ndarray,
) -> np.ndarray:
    """Returns which detections (N,) of an image are correct by the rules of DET.

    In order of descending score, each takes the free object of its class with the highest IoU,
    among objects whose own threshold the IoU reaches. All other detections are wrong.
    """
    iou = overlaps(boxes, objects)
    reached = (iou >= small_thresholds(objects)) & (classes[:, None] == object_classes[None])
    right = np.zeros(len(boxes), bool)
    free = np.ones(len(objects), bool)
    for place in np.argsort(-scores, kind="stable"):
        choices = np.flatnonzero(reached[place] & free)
        if len(choices):
            right[place] = True
            free[choices[iou[place, choices].argmax()]] = False
    return right


def det_precisions(
    scores: np.ndarray, classes: np.ndarray, right: np.ndarray, objects: np.ndarray
) -> list[float]:
    """Returns each class's area under the precision envelope, 0..1; NaN without objects."""
    found = []
    for number, count in enumerate(objects):
        mine = classes == number
        hits = right[mine][np.argsort(-scores[mine], kind="stable")].cumsum()
        precision = hits / np.arange(1, len(hits) + 1)
        found.append(average_precision(hits / count, precision) if count else math.nan)
    return found


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the IoU (N, M) of boxes (N, 4) and (M, 4) in double precision."""
    return box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy()


class LOCEvaluator(BoxEvaluator):
    """Localization errors, in percent of the images (paper, Tables 13 and 14).

    Every image shows one class; the highest-scored detection of each class counts. With the true
    class given, an image is wrong unless that class's box has an IoU of 0.5 or more with an object.
    The top-1 and top-5 errors use guesses: an image is wrong unless one is the true class with such
    a box. Returns {"localization": {"true_class_error", "top1_error", "top5_error"}}, the last two
    only with guesses. `output_dir` gets ``loc_results.json``, and ``localizations.json`` with the
    true class's box of each image.

    Args:
        guesses: stem of an image's file name -> its classes, best first; see :func:`read_guesses`.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        guesses: Mapping[str, Sequence[int]] | None = None,
    ):
        super().__init__(dataset_name, output_dir)
        self.guesses = guesses or {}
        for record in DatasetCatalog.get(dataset_name) if guesses else ():
            if Path(record["file_name"]).stem not in guesses:
                raise DataError(
                    f"{dataset_name}: no guess for {record['file_name']}: give the predictions.csv "
                    "of evaluate-classifier --predict on all of its images"
                )

    def score(self, found) -> OrderedDict:
        rows = []
        for record, objects, classes in self.objects():
            image = record["image_id"]
            if len(set(classes)) != 1:
                raise DataError(
                    f"{self.name}: image {image} shows {len(set(classes))} classes, localization "
                    "is of one: make the data set with `prepare-data own --one-class`"
                )
            label, path = int(classes[0]), record["file_name"]
            row = {"image": path, "class": self.class_names[label], "objects": objects.tolist()}
            row |= best_box(found.get(image), objects, label)
            guesses = self.guesses.get(Path(path).stem, ())
            row["rank"] = guesses.index(label) + 1 if label in guesses else None
            rows.append(row)
        names = LAST_RANK if self.guesses else [TRUE_CLASS]
        wrong = wrong_images(rows)
        errors = {name: 100 * float(wrong[name].sum()) / max(1, len(rows)) for name in names}
        text = ", ".join(f"{name} {value:.2f} %" for name, value in errors.items())
        logger.info("%s, %d images: %s", self.name, len(rows), text)
        self.write(LOC_RESULTS, {"images": len(rows), **errors})
        self.write(LOCALIZATIONS, rows, indent=None)
        return OrderedDict(localization=errors)


def best_box(found: Sequence | None, objects: np.ndarray, label: int) -> dict[str, Any]:
    """Returns box, score and IoU of a class's highest-scored detection; None without one."""
    boxes, scores, classes = found or (np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    mine = np.flatnonzero(classes == label)
    if not len(mine):
        return {"box": None, "score": None, "iou": 0.0}
    best = mine[scores[mine].argmax()]
    iou = float(overlaps(boxes[best : best + 1], objects).max())
    return {"box": boxes[best].tolist(), "score": float(scores[best]), "iou": iou}


def wrong_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns whether each image of ``localizations.json`` is wrong, (N,), for each error."""
    ious = np.array([row["iou"] for row in rows])
    ranks = np.array([row["rank"] or math.inf for row in rows])
    return {name: (ious < IOU) | (ranks > last) for name, last in LAST_RANK.items()}


def read_guesses(path: str, class_names: Sequence[str]) -> dict[str, list[int]]:
    """Reads guesses by image from ``evaluate-classifier``'s ``predictions.csv``; none for "".

    Raises:
        DataError: the file is not such a table, or has classes that the data set lacks.
    """
    if not path:
        return {}
    numbers = {name: number for number, name in enumerate(class_names)}
    found = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                names = [row[f"name{rank}"] for rank in range(1, TOP + 1) if f"name{rank}" in row]
                image = Path(row["image"]).stem
                if image in found:
                    raise DataError(f"{path}: two images are named {image}: give each its own name")
                found[image] = [numbers[name] for name in names]
    except (KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: {error} is no column of a predictions.csv of evaluate-classifier, or no class"
            f" of the data set, whose classes are {', '.join(class_names[:5])}, ..."
        ) from error
    if not found:
        raise DataError(f"{path} has no predictions")
    return found
