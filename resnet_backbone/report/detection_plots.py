"""Plots of detection runs: training and learning curves, gain per class, errors, time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from resnet_backbone.report.gain import DetectorGroup, Gain
from resnet_backbone.report.plots import COLORS, assign_colors, save_png
from resnet_backbone.report.runs import Metrics, load_metrics, smooth

LOSS, AP50 = "total_loss", "bbox/AP50"  # of Detectron2's metrics.json
OURS, REFERENCE = COLORS[0], COLORS[1]  # the first ResNet and the first VGG, in every picture


def detector_colors(groups: Sequence[DetectorGroup]) -> dict[str, str]:
    """A color for each detector's label, the same in every picture."""
    others = [color for color in COLORS if color not in (OURS, REFERENCE)]
    colors = {}
    for group in groups:
        first = REFERENCE if group.first.family == "VGG" else OURS
        free = [color for color in (first, *others) if color not in colors.values()]
        colors[group.label] = free[0] if free else first
    return colors


def plot_training(
    metrics_paths: Sequence[str | os.PathLike],
    output_png: str | os.PathLike,
    labels: Sequence[str] | None = None,
) -> None:
    """Draw total loss (smoothed over a twentieth of the run, the raw one pale) and AP50 of runs.

    Args:
        metrics_paths: `metrics.json` files of Detectron2, one per run.
        output_png: the picture, written in one go; its folder is made.
        labels: one per run; by default the name of the folder that holds the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no runs, another number of labels than of runs, or a file without metrics.
    """
    paths = [os.path.abspath(path) for path in metrics_paths]
    if not paths:
        raise ValueError("no runs to draw; give at least one metrics.json")
    if labels is None:
        labels = [os.path.basename(os.path.dirname(path)) for path in paths]
    if len(labels) != len(paths):
        raise ValueError(f"{len(paths)} runs but {len(labels)} labels; give one label per run")
    save_png(draw_training([load_metrics(path) for path in paths], labels), output_png)


def draw_training(runs: Sequence[Metrics], labels: Sequence[str]) -> Figure:
    """The figure of :func:`plot_training`."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    loss_axes, ap_axes = figure.subplots(2, 1, sharex=True)
    colors = assign_colors(range(len(runs)))
    for index, (metrics, label) in enumerate(zip(runs, labels, strict=True)):
        if LOSS in metrics:
            loss_axes.plot(*metrics[LOSS], color=colors[index], alpha=0.25, linewidth=0.8)
            _draw_losses(loss_axes, [metrics[LOSS]], colors[index], label)
        _draw_learning(ap_axes, [metrics], colors[index], label)
    loss_axes.set_ylabel("total loss")
    _finish_training(loss_axes)
    _finish_training(ap_axes)
    ap_axes.set(xlabel="iteration", ylabel="AP50 (%)")
    return figure


def plot_learning(groups: Sequence[DetectorGroup], colors: Mapping[str, str]) -> Figure | None:
    """AP50 against the iteration, a line for each run; None where none evaluated on its way."""
    runs = {group.label: [run.metrics() for run in group.runs] for group in groups}
    if not any(len(one[AP50][0]) > 1 for found in runs.values() for one in found if AP50 in one):
        return None
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, found in runs.items():
        _draw_learning(axes, found, colors[label], label)
    _finish_training(axes)
    axes.set(xlabel="iteration", ylabel="AP50 (%)")
    return figure


def _draw_learning(axes: Axes, runs: Sequence[Metrics], color: str, label: str) -> None:
    for number, metrics in enumerate(one for one in runs if AP50 in one):
        style = dict(color=color, marker="o", markersize=4, label=None if number else label)
        axes.plot(*metrics[AP50], **style)


def _finish_training(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "not in these runs", ha="center", transform=axes.transAxes)


def _grid(count: int, columns: int, width: float, height: float, **options) -> tuple:
    """A figure and its `count` panels of so many inches, at most so many columns wide."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False, **options))
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _shared_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    where = dict(loc="outside upper center", ncols=len(labels), fontsize="small")
    figure.legend(handles, labels, **where)


def plot_losses(groups: Sequence[DetectorGroup], colors: Mapping[str, str]) -> Figure | None:
    """Training losses, smoothed over a twentieth of the run; None where no run has any."""
    metrics = {group.label: [run.metrics() for run in group.runs] for group in groups}
    names = {name for runs in metrics.values() for one in runs for name in one}
    parts = sorted(name for name in names if name.startswith("loss_"))
    shown = [LOSS, *parts] if LOSS in names else parts
    if not shown:
        return None
    figure, panels = _grid(len(shown), columns=3, width=3.3, height=2.5)
    for axes, name in zip(panels, shown, strict=True):
        for label, runs in metrics.items():
            _draw_losses(axes, [one[name] for one in runs if name in one], colors[label], label)
        axes.set_title(name.replace("_", " "), fontsize="small")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="small")
    figure.supxlabel("iteration", fontsize="small")
    _shared_legend(figure, panels[0])
    return figure


def _draw_losses(axes: Axes, runs, color: str, label: str) -> None:
    for number, (iterations, values) in enumerate(runs):
        smoothed = smooth(values, max(1, len(values) // 20))
        width = 1.6 if len(runs) == 1 else 1.0
        name = label if number == 0 else None
        axes.plot(iterations, smoothed, color=color, linewidth=width, alpha=0.85, label=name)


class Curves(NamedTuple):
    """Interpolated precision of one detector's runs, 0..1.

    Attributes:
        label, color: of the detector.
        precision: (runs, classes, R) at R levels of recall from 0 to 1; nan for classes without
            ground truth.
    """

    label: str
    color: str
    precision: np.ndarray


def plot_class_gains(gains: Sequence[Gain]) -> Figure:
    """A bar for the gain of each class, largest first, a dot for each pair of runs."""
    height = 1.2 + 0.27 * len(gains[0].ours.first.classes)
    figure = Figure(figsize=(2.5 + 5.5 * len(gains), height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(gains)))
    for axes, gain in zip(panels, gains, strict=True):
        _draw_class_gains(axes, gain)
    return figure


def _draw_class_gains(axes: Axes, gain: Gain) -> None:
    found = {name: gain.of_class(name) for name in gain.ours.first.classes}
    shown = sorted((-d.mean, name) for name, d in found.items() if d is not None)
    names = [name for _, name in shown]
    means = [-mean for mean, _ in shown]
    axes.barh(names, means, color=[OURS if m >= 0 else REFERENCE for m in means], alpha=0.6)
    pairs = [gain.class_pairs(name) for name in names]
    if max(map(len, pairs), default=0) > 1:
        for row, values in enumerate(pairs):
            axes.plot(values, [row] * len(values), "o", color="black", markersize=2.5, alpha=0.6)
    overall = gain.of(gain.ours.first.class_metric)
    if overall is not None:
        text = f"mean {overall.mean:+.2f}"
        axes.axvline(overall.mean, color="black", linewidth=1, linestyle="--", label=text)
        axes.legend(fontsize="small", loc="lower right")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize="small", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{gain.ours.first.class_metric}, points")
    axes.set_title(gain.label, fontsize="medium")


def plot_mean_curves(curves: Sequence[Curves]) -> Figure:
    """Mean over the classes of the interpolated precision, thin for each run, bold their mean."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for one in curves:
        _draw_curves(axes, np.nanmean(one.precision, axis=1), one.color, one.label)
    _finish_curves(axes, 0.2)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision, interpolated, mean over classes")
    axes.legend(fontsize="small")
    return figure


def plot_class_curves(curves: Sequence[Curves], class_names: Sequence[str]) -> Figure:
    """The interpolated precision of every class in a panel of its own."""
    known = ~np.isnan(curves[0].precision).all(axis=(0, 2))
    shown = [i for i in range(len(class_names)) if known[i]]
    figure, panels = _grid(len(shown), columns=5, width=2.1, height=1.8, sharex=True, sharey=True)
    for axes, index in zip(panels, shown, strict=True):
        for one in curves:
            _draw_curves(axes, one.precision[:, index], one.color, one.label)
        _finish_curves(axes, 0.5)
        axes.set_title(class_names[index], fontsize="small", pad=3)
        axes.tick_params(labelsize="x-small")
    figure.supxlabel("recall", fontsize="small")
    figure.supylabel("precision, interpolated", fontsize="small")
    _shared_legend(figure, panels[0])
    return figure


def _draw_curves(axes: Axes, runs: np.ndarray, color: str, label: str) -> None:
    recall = np.linspace(0, 1, runs.shape[-1])
    if len(runs) > 1:
        axes.plot(recall, runs.T, color=color, linewidth=0.6, alpha=0.5)
    axes.plot(recall, runs.mean(axis=0), color=color, linewidth=1.8, label=label)


def _finish_curves(axes: Axes, step: float) -> None:
    ticks = np.arange(0, 1.01, step)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=ticks, yticks=ticks)
    axes.grid(alpha=0.3)


def error_shares(errors: Sequence[Mapping]) -> dict[str, float]:
    """Errors of one run by kind, summed over the classes, in percent of the objects.

    Args:
        errors: a row for each class: class, objects, and a count for each kind.
    """
    objects = sum(row["objects"] for row in errors)
    kinds = [key for key in (errors[0] if errors else ()) if key not in ("class", "objects")]
    return {kind: 100 * sum(row[kind] for row in errors) / max(1, objects) for kind in kinds}


def plot_errors_by_kind(
    shares: Mapping[str, Sequence[Mapping[str, float]]], colors: Mapping[str, str]
) -> Figure:
    """Kinds of errors beside each other: bars are means over the runs, dots single runs.

    Args:
        shares: detector -> for each run the result of :func:`error_shares`.
        colors: of :func:`detector_colors`.
    """
    kinds = list(next(iter(shares.values()))[0])
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(shares)
    for number, (label, runs) in enumerate(shares.items()):
        places = np.arange(len(kinds)) - 0.4 + width * (number + 0.5)
        values = np.array([[run[kind] for kind in kinds] for run in runs])
        means = values.mean(axis=0)
        axes.bar(places, means, 0.94 * width, color=colors[label], alpha=0.65, label=label)
        for place, mean, top in zip(places, means, values.max(axis=0), strict=True):
            where = dict(xytext=(0, 4), textcoords="offset points", ha="center")
            axes.annotate(f"{mean:.1f}", (place, top), fontsize="x-small", **where)
        if len(runs) > 1:
            for row in values:
                axes.plot(places, row, "o", color="black", markersize=2.5, alpha=0.6)
    axes.set_xticks(range(len(kinds)), [_kind_text(kind) for kind in kinds])
    axes.set_ylabel("% of the objects")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small")
    return figure


def _kind_text(kind: str) -> str:
    return "missed\n(any score)" if kind == "missed" else kind


class Point(NamedTuple):
    """A detector in the picture of accuracy and time."""

    label: str
    seconds: float  # per image
    ap50: float  # percent
    spread: float | None = None
    color: str = "0.35"


def plot_accuracy_and_time(points: Sequence[Point]) -> Figure:
    """AP50 against seconds per image; logarithmic where times differ much."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for point, marker in zip(points, cycle("osD^vP*X"), strict=False):
        error = None if point.spread is None else [point.spread]
        place = ([point.seconds], [point.ap50], error)
        axes.errorbar(*place, fmt=marker, color=point.color, capsize=3, label=point.label)
    figure.legend(loc="outside right upper", fontsize="small")
    times = [point.seconds for point in points]
    if max(times) > 5 * min(times):
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 1.5, 2.5 * max(times))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.25 * max(times))
    axes.margins(y=0.2)
    axes.set_xlabel("seconds per image")
    axes.set_ylabel("AP50 (%)")
    axes.grid(alpha=0.3)
    return figure
