"""Error curves of classification runs, in the style of the paper's Fig. 4 and 6."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnet_backbone.report.curves import Metrics, smooth
from resnet_backbone.report.picture import assign_colors, save_png
from resnet_backbone.report.runs import METRICS, Run

TRAIN, TEST, RATE = "train_error", "val_top1_error", "lr"
X_UNIT = 10_000  # iterations: the paper's axes count in 1e4
FEW = 4  # points of a line that also get markers, below
LEAST_DROP = 1.9  # a learning rate divided by this or more is a drop of the schedule
PANELS = {"plain": "plain networks", "ResNet": "residual networks"}


def lr_drops(metrics: Metrics) -> list[int]:
    """Last logged iterations before each drop of the learning rate."""
    if RATE not in metrics:
        return []
    iterations, rate = metrics[RATE]
    with np.errstate(divide="ignore", invalid="ignore"):
        falls = rate[:-1] / rate[1:] >= LEAST_DROP
    return [int(iteration) for iteration in iterations[:-1][falls]]


def smooth_between(
    iterations: np.ndarray, values: np.ndarray, cuts: Sequence[int], window: int
) -> np.ndarray:
    """Running mean that does not reach over the cuts, so that a drop stays a step."""
    places = np.searchsorted(iterations, list(cuts), side="right")
    return np.concatenate([smooth(part, window) for part in np.split(values, places)])


def error_range(finals: Sequence[float]) -> tuple[float, float]:
    """Limits of the error axis, in %, for runs that end at these errors.

    (0, 20) for the paper's CIFAR-10 runs, as in Fig. 6; about (20, 50) for ImageNet; more where
    a run is short or fails, so that every curve ends within the picture.
    """
    good = [value for value in finals if math.isfinite(value)]
    if not good:
        return 0.0, 100.0
    top = min(100.0, max(20.0, 5.0 * math.ceil(1.4 * max(good) / 5)))
    bottom = 0.0 if min(good) < 15 else 10.0 * math.floor(0.85 * min(good) / 10)
    return bottom, top


def plot_errors(
    runs: Sequence[Run],
    output_png: str | os.PathLike,
    labels: Sequence[str | None] | None = None,
    together: bool = False,
) -> None:
    """Draws error against iterations: training dashed and thin, test bold, one colour a network.

    The training error is the error of the augmented images while they train, averaged over the
    logging windows and smoothed between drops of the learning rate (dotted lines). Plain and
    residual networks get a panel each, as in the paper, where both are given. Runs of the same
    label, such as several seeds, share colour and legend entry, which gives their mean last test
    error.

    Args:
        runs: with metrics.jsonl.
        output_png: the picture, written in one go; its folder is made.
        labels: one per run or None; by default the network's name.
        together: one panel for all.

    Raises:
        FileNotFoundError: a run without metrics.jsonl.
        ValueError: no runs, another number of labels than of runs, or metrics without errors.
    """
    if not runs:
        raise ValueError("no runs to draw; give at least one run folder")
    labels = list(labels or [None] * len(runs))
    if len(labels) != len(runs):
        raise ValueError(f"{len(runs)} runs but {len(labels)} labels; give one label per run")
    labels = [label or run.network.title for run, label in zip(runs, labels, strict=True)]
    series = [run.metrics() for run in runs]
    for run, metrics in zip(runs, series, strict=True):
        if TEST not in metrics and TRAIN not in metrics:
            raise ValueError(
                f"{run.folder / METRICS} has neither {TRAIN} nor {TEST}: give a run folder of "
                "tools/train_classifier.py"
            )
    save_png(_draw(runs, series, labels, together), output_png)


class Line(NamedTuple):
    """One run in a panel."""

    metrics: Metrics
    label: str
    color: str


def _draw(
    runs: Sequence[Run], series: Sequence[Metrics], labels: Sequence[str], together: bool
) -> Figure:
    families = [family for family in PANELS if family in {run.network.family for run in runs}]
    split = len(families) == 2 and len({r.network.family for r in runs}) == 2 and not together
    # side by side, networks of one depth have one colour, as in the paper
    keys = [run.network.depth for run in runs] if split else labels
    order = sorted(range(len(runs)), key=lambda i: runs[i].network.depth)
    colors = assign_colors(keys[i] for i in order)
    longest = max(int(m["iteration"][0][-1]) for m in series)
    unit = X_UNIT if longest >= X_UNIT else 1
    figure = Figure(figsize=(10, 4.2) if split else (6.5, 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 2 if split else 1, sharey=True))
    for panel, axes in enumerate(panels):
        chosen = [i for i in order if not split or runs[i].network.family == families[panel]]
        lines = [Line(series[i], labels[i], colors[keys[i]]) for i in chosen]
        _draw_panel(axes, lines, unit)
        if split:
            axes.set_title(PANELS[families[panel]])
    panels[0].set_ylabel("error (%)")
    panels[0].set_ylim(*error_range([value for m in series for value in final_errors(m)]))
    return figure


def final_errors(metrics: Metrics) -> list[float]:
    """Last test error, and mean training error of the last twentieth of the rows."""
    finals = [float(metrics[TEST][1][-1])] if TEST in metrics else []
    if TRAIN in metrics:
        errors = metrics[TRAIN][1]
        finals.append(float(np.mean(errors[-max(1, len(errors) // 20) :])))
    return finals


def _draw_panel(axes: Axes, lines: Sequence[Line], unit: int) -> None:
    for label in dict.fromkeys(line.label for line in lines):
        mine = [line for line in lines if line.label == label]
        name = _legend_text(label, [line.metrics for line in mine])
        for line in mine:
            width = 1.8 if len(mine) == 1 else 1.1
            _draw_run(axes, line, unit, width, name if line is mine[0] else None)
    for drop in sorted({drop for line in lines for drop in lr_drops(line.metrics)}):
        axes.axvline(drop / unit, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axes.plot([], [], color="0.3", linewidth=1, linestyle="--", label="training")
    axes.set_xlabel("iterations (1e4)" if unit == X_UNIT else "iterations")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", loc="upper right")


def _legend_text(label: str, series: Sequence[Metrics]) -> str:
    finals = [metrics[TEST][1][-1] for metrics in series if TEST in metrics]
    if not finals:
        return label
    runs = f", {len(series)} runs" if len(series) > 1 else ""
    return f"{label} ({np.mean(finals):.2f} %{runs})"


def _draw_run(axes: Axes, line: Line, unit: int, width: float, label: str | None) -> None:
    nothing = (np.empty(0), np.empty(0))
    x, errors = line.metrics.get(TRAIN, nothing)
    smoothed = smooth_between(x, errors, lr_drops(line.metrics), max(1, round(len(x) / 100)))
    style = dict(color=line.color, marker="o" if len(x) < FEW else None, markersize=3)
    axes.plot(x / unit, smoothed, linewidth=0.9, linestyle="--", **style)
    x, errors = line.metrics.get(TEST, nothing)
    style["marker"] = "o" if len(x) < FEW else None
    axes.plot(x / unit, errors, linewidth=width, label=label, **style)
