"""What a detector gets wrong: localisation, confusion, background, duplicates, missed objects.

The kinds are those of Hoiem et al., Diagnosing Error in Object Detectors (ECCV 2012), with the
devkit's matching (:mod:`.voc_ap`) at IoU 0.5. Needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU, match_boxes, read_boxes

KINDS = ("correct", "localisation", "confusion", "background", "duplicate")
WEAK_IOU = 0.1
"""Overlap from which on a wrong detection has to do with an object."""


def analyse_errors(
    detections: Sequence[Mapping[str, Any]],
    ground_truth: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
) -> list[dict[str, Any]]:
    """Counts of each kind of error, for each class.

    Of a class with N objects (difficult ones not counted) the N best-scored detections are
    looked at, so that classes and detectors compare. Those on difficult objects count neither
    way. A detection that is not correct is a duplicate (IoU above 0.5 with an object that a
    better-scored one took), else a localisation error (IoU of 0.1 or more with an object of its
    class), else a confusion (the same with an object of another class), else background.

    Args:
        detections, ground_truth, class_names: as for :func:`.voc_ap.evaluate_voc`.

    Returns:
        For each class {"class", "objects", one count for each of :data:`KINDS`, "missed"}: the
        counts add up to at most the objects, and missed are the objects that none of the
        detections found, however many there are.

    Raises:
        ValueError: as :func:`.voc_ap.evaluate_voc`.
    """
    return count_errors(*read_boxes(detections, ground_truth, class_names), class_names)


def count_errors(
    truth: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """:func:`analyse_errors` for the tables of :func:`.voc_ap.read_boxes`."""
    others, _ = match_boxes(found, truth, same_class=False)
    rows = []
    for class_id, name in enumerate(class_names):
        mine = np.flatnonzero(found["classes"] == class_id)
        mine = mine[np.argsort(-found["scores"][mine], kind="stable")]
        iou, match = found["iou"][mine], found["match"][mine]
        over = iou > CURVE_IOU
        first = np.zeros(len(mine), dtype=bool)
        places = np.flatnonzero(over)
        first[places[np.unique(match[places], return_index=True)[1]]] = True
        ignored = over & found["difficult"][mine]
        kinds = np.select(
            [first, over, iou >= WEAK_IOU, others[mine] >= WEAK_IOU],
            [KINDS.index(kind) for kind in ("correct", "duplicate", "localisation", "confusion")],
            KINDS.index("background"),
        )
        counted = ~truth["difficult"] & (truth["classes"] == class_id)
        objects = int(counted.sum())
        best = kinds[~ignored][:objects]
        taken = np.unique(match[first & ~ignored]).size
        counts = np.bincount(best, minlength=len(KINDS)).tolist()
        row = {"class": name, "objects": objects, **dict(zip(KINDS, counts, strict=True))}
        rows.append({**row, "missed": objects - taken})
    return rows
