"""A picture of a VOC evaluation: precision-recall curves, and errors by kind."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from resnet_backbone.detection.evaluation.voc_errors import KINDS

COLOURS = ("#2e7d32", "#f9a825", "#ef6c00", "#616161", "#1565c0")  # of KINDS


def draw_voc(
    numbers: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
    """Writes the picture.

    Args:
        numbers: of :func:`.voc_ap.evaluate_voc`.
        errors: of :func:`.voc_errors.analyse_errors`.
        path: image file; its suffix says the format.
    """
    shown = [row for row in errors if row["objects"]]
    figure = Figure(figsize=(12, max(4.0, 1.5 + 0.25 * len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = colormaps["tab20"](np.linspace(0, 1, 20))
    for number, name in enumerate(numbers["class_names"]):
        recall, precision = numbers["recall"][number], numbers["precision"][number]
        if len(recall) and not np.isnan(recall).any():
            left.plot(recall, precision, color=colours[number % 20], linewidth=1, label=name)
    left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision, IoU 0.5")
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=7, ncols=2)
    names = [f"{row['class']} ({row['objects']})" for row in shown]
    start = np.zeros(len(shown))
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        share = np.array([row[kind] / row["objects"] for row in shown])
        right.barh(names, share, left=start, color=colour, label=kind)
        start = start + share
    right.set(xlim=(0, 1), xlabel="of as many best-scored detections as there are objects")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.legend(fontsize=7, ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)
