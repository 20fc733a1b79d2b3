"""Files of an evaluation: predictions, errors of each class, confusion matrix and its picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from resnet_backbone.report.picture import save_png

MOST_NUMBERS = 25  # classes up to which the picture's cells have numbers
MOST_NAMES = 60  # ... and its axes have names


def write_evaluation(
    folder: Path, result: Any, class_names: Sequence[str], name_of: Callable[[int], str]
) -> list[Path]:
    """Writes predictions.csv, per_class.csv, confusion.csv and confusion.png.

    Args:
        folder: made if it is not there.
        result: an ``EvaluationResult`` of the engine.
        class_names: one for each of the network's classes.
        name_of: index of an image -> its path.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "predictions.csv": prediction_rows(result.predictions, class_names, name_of),
        "per_class.csv": per_class_rows(result, class_names),
        "confusion.csv": confusion_rows(result.confusion.numpy(), class_names),
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        (folder / name).write_text(text.getvalue(), encoding="utf-8")
    save_png(plot_confusion(result.confusion.numpy(), class_names), folder / "confusion.png")
    return [folder / name for name in (*tables, "confusion.png")]


def prediction_rows(
    predictions: Any, class_names: Sequence[str], name_of: Callable[[int], str]
) -> Iterable[list]:
    """A row for each readable image: its label, then its best classes with their scores."""
    best = predictions.classes.shape[1]
    columns = [f"{kind}{rank + 1}" for rank in range(best) for kind in ("class", "name", "score")]
    yield ["index", "image", "label", "label_name", *columns]
    columns = (predictions.indices, predictions.labels, predictions.classes, predictions.scores)
    for index, label, classes, scores in zip(*(c.tolist() for c in columns), strict=True):
        row = [index, name_of(index), label, class_names[label]]
        for number, score in zip(classes, scores, strict=True):
            row += [number, class_names[number], f"{score:.6g}"]
        yield row


def per_class_rows(result: Any, class_names: Sequence[str]) -> Iterable[list]:
    """A row for each class with images: their number and the top-1 error in percent."""
    yield ["class", "name", "images", "top1_error"]
    bad = np.bincount([bad.label for bad in result.bad], minlength=result.num_classes)
    counts = result.confusion.sum(1).numpy() + bad
    for number, error in enumerate(result.per_class_error):
        if error is not None:
            yield [number, class_names[number], int(counts[number]), f"{error:.4f}"]


def confusion_rows(confusion: np.ndarray, class_names: Sequence[str]) -> Iterable[list]:
    """Counts: a row for each class with images, a column for each class in the matrix."""
    rows = np.flatnonzero(confusion.sum(1))
    columns = np.flatnonzero(confusion.sum(1) + confusion.sum(0))
    yield ["label \\ predicted", *(class_names[column] for column in columns)]
    for row in rows:
        yield [class_names[row], *(int(confusion[row, column]) for column in columns)]


def plot_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """The confusion matrix of the classes with images, percent of each row.

    What was predicted as a class without images is in the last column, "others".
    """
    present = np.flatnonzero(confusion.sum(1))
    counts = confusion[np.ix_(present, present)]
    totals = confusion[present].sum(1, keepdims=True)
    others = totals - counts.sum(1, keepdims=True)
    names = [class_names[number] for number in present]
    columns = [*names, "others"] if others.any() else names
    if others.any():
        counts = np.hstack([counts, others])
    share = 100.0 * counts / totals
    side = min(12.0, 4 + 0.3 * len(names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="% of the label's images", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(share):
            if counts[row, column]:
                color = "white" if value > 50 else "black"
                text = f"{value:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    return figure
