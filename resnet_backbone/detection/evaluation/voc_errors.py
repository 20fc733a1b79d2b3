"""What a detector gets wrong, counted and drawn beside its precision-recall curves.

The kinds of errors (localization, confusion, background, duplicate) are those of Hoiem et al.,
Diagnosing Error in Object Detectors (ECCV 2012), with the devkit's matching (:mod:`.voc_ap`) at
IoU 0.5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU, match_boxes

KINDS = ("correct", "localisation", "confusion", "background", "duplicate")
"""Keys of `voc_results.json`; the British spelling is that of files that exist."""
COLORS = ("#2e7d32", "#f9a825", "#ef6c00", "#616161", "#1565c0")  # of KINDS
WEAK_IOU = 0.1
"""Overlap from which on a wrong detection has to do with an object."""


def count_errors(
    truth: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Counts of each kind of error, for each class.

    Of a class with N objects (difficult ones not counted) the N best-scored detections are
    looked at, so that classes and detectors compare. Those on difficult objects count neither
    way. A detection that is not correct is a duplicate (IoU above 0.5 with an object that a
    better-scored one took), else a localization error (IoU of 0.1 or more with an object of its
    class), else a confusion (the same with an object of another class), else background.

    Args:
        truth, found: tables of :func:`.voc_ap.read_boxes`.

    Returns:
        For each class {"class", "objects", one count for each of :data:`KINDS`, "missed"}: the
        counts add up to at most the objects, and missed are the objects that none of the
        detections found, however many there are.
    """
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


def draw_voc(
    numbers: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
    """Writes the picture.

    Args:
        numbers: of :func:`.voc_ap.evaluate_voc`.
        errors: of :func:`count_errors`.
        path: image file; its suffix says the format.
    """
    shown = [row for row in errors if row["objects"]]
    figure = Figure(figsize=(12, max(4.0, 1.5 + 0.25 * len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = colormaps["tab20"](np.linspace(0, 1, 20))
    for number, name in enumerate(numbers["class_names"]):
        recall, precision = numbers["recall"][number], numbers["precision"][number]
        if len(recall) and not np.isnan(recall).any():
            left.plot(recall, precision, color=colors[number % 20], linewidth=1, label=name)
    left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision, IoU 0.5")
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=7, ncols=2)
    names = [f"{row['class']} ({row['objects']})" for row in shown]
    start = np.zeros(len(shown))
    for kind, color in zip(KINDS, COLORS, strict=True):
        share = np.array([row[kind] / row["objects"] for row in shown])
        right.barh(names, share, left=start, color=color, label=kind)
        start = start + share
    right.set(xlim=(0, 1), xlabel="of as many best-scored detections as there are objects")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.legend(fontsize=7, ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)
