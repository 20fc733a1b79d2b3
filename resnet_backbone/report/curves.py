"""Reading metrics files, and the training curves of Detectron2's `metrics.json`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from resnet_backbone.report.picture import save_png

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> iterations (N,), values (N,)

logger = logging.getLogger(__name__)

LOSS, AP50 = "total_loss", "bbox/AP50"


def load_metrics(path: str | os.PathLike) -> Metrics:
    """Read a metrics file: one JSON object per line, each with "iteration".

    Where a resumed run wrote an iteration again, its later value stands. Lines that are no JSON
    (the last one of a run that is writing or was killed) are passed over with a warning.

    Returns:
        For each number in the file (total_loss, lr, "bbox/AP50", ...): iterations (N,), rising,
        and values (N,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing in the file can be used.
    """
    series: dict[str, dict[int, float]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                iteration = int(entry["iteration"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s line %d is incomplete, passed over", path, number)
                continue
            for key, value in entry.items():
                if isinstance(value, (int, float)):
                    series.setdefault(key, {})[iteration] = value
    if not series:
        raise ValueError(f"{path} has no metrics; give the metrics file of a training run")
    return {key: _sorted_arrays(values) for key, values in series.items()}


def _sorted_arrays(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    iterations = sorted(values)
    return np.array(iterations), np.array([values[i] for i in iterations], dtype=np.float64)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values (fewer at the ends); nan is left out. Shape kept.

    Raises:
        ValueError: window below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; give 1 or more")
    good = np.isfinite(values)
    places = np.arange(len(values))
    start = np.maximum(places - (window - 1) // 2, 0)
    stop = np.minimum(places + window // 2 + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    with np.errstate(invalid="ignore"):
        return (total[stop] - total[start]) / (count[stop] - count[start])


def plot_training(
    metrics_jsonl_paths: Sequence[str], output_png: str, labels: Sequence[str] | None = None
) -> None:
    """Draw total loss (smoothed over a twentieth of the run, the raw one pale) and AP50 of runs.

    Args:
        metrics_jsonl_paths: `metrics.json` files of Detectron2, one per run.
        output_png: the picture, written in one go; its folder is made.
        labels: one per run; by default the name of the folder that holds the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no runs, another number of labels than of runs, or a file without metrics.
    """
    paths = [os.fspath(p) for p in metrics_jsonl_paths]
    if not paths:
        raise ValueError("no runs to draw; give at least one metrics.json")
    if labels is None:
        labels = [os.path.basename(os.path.dirname(os.path.abspath(p))) for p in paths]
    if len(labels) != len(paths):
        raise ValueError(f"{len(paths)} runs but {len(labels)} labels; give one label per run")
    figure = _draw([load_metrics(p) for p in paths], labels)
    save_png(figure, output_png)


def _draw(runs, labels: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7, 7), layout="constrained")
    loss_axes, ap_axes = figure.subplots(2, 1, sharex=True)
    for index, (metrics, label) in enumerate(zip(runs, labels, strict=True)):
        color = f"C{index % 10}"
        if LOSS in metrics:
            iterations, loss = metrics[LOSS]
            smoothed = smooth(loss, max(1, len(loss) // 20))
            loss_axes.plot(iterations, loss, color=color, alpha=0.25, linewidth=0.8)
            loss_axes.plot(iterations, smoothed, color=color, label=label)
        if AP50 in metrics:
            ap_axes.plot(*metrics[AP50], color=color, marker="o", markersize=4, label=label)
    loss_axes.set_ylabel("total loss")
    ap_axes.set_ylabel("AP50 (%)")
    ap_axes.set_xlabel("iteration")
    for axes in (loss_axes, ap_axes):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "not in these runs", ha="center", transform=axes.transAxes)
    return figure
