"""Plots of detection runs: training and learning curves, gain per class, errors, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from resnet_backbone.report.gain import DetectorGroup, Gain
from resnet_backbone.report.plots import COLORS, FEW, new_figure
from resnet_backbone.report.runs import Metrics, smooth

LOSS, AP50 = "total_loss", "bbox/AP50"  # in Detectron2's metrics.json
OURS, REFERENCE = COLORS[0], COLORS[1]  # for the first ResNet and the first VGG in every plot


def detector_colors(groups: Sequence[DetectorGroup]) -> dict[str, str]:
    """Returns a color for each detector's label, the same in every plot."""
    others, colors = [color for color in COLORS if color not in (OURS, REFERENCE)], {}
    for group in groups:
        first = REFERENCE if group.first.family == "VGG" else OURS
        free = [color for color in (first, *others) if color not in colors.values()]
        colors[group.label] = [*free, first][0]
    return colors


def plot_training(
    metrics: Mapping[str, Sequence[Metrics]], colors: Mapping[str, str]
) -> Figure | None:
    """Plots losses (smoothed over a twentieth of the run) and AP50 in training, a line per run.

    There is a panel for each number that any run has. Returns None if no run has any.
    """
    names = {name for runs in metrics.values() for one in runs for name in one}
    parts = sorted(name for name in names if name.startswith("loss_"))
    shown = [name for name in (LOSS, *parts, AP50) if name in names]
    if not shown:
        return None
    figure, panels = _grid(len(shown), columns=3, width=4.2, height=3.2)
    for axes, name in zip(panels, shown, strict=True):
        for label, runs in metrics.items():
            found = [one[name] for one in runs if name in one]
            _draw_runs(axes, found, name != AP50, color=colors[label], label=label)
        axes.set_title("AP50 (%)" if name == AP50 else name.replace("_", " "), fontsize="small")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xlim(left=0)
        axes.tick_params(labelsize="small")
    figure.supxlabel("iteration", fontsize="small")
    _shared_legend(figure, panels)
    return figure


def _draw_runs(axes: Axes, runs, smoothed: bool, label: str, color: str) -> None:
    style = dict(color=color, linewidth=1.6 if len(runs) == 1 else 1.0, alpha=0.85)
    for iterations, values in runs:
        if smoothed:
            values = smooth(values, max(1, len(values) // 20))
        marker = None if smoothed and len(values) >= FEW else "o"
        axes.plot(iterations, values, marker=marker, label=label, **style)


def _grid(count: int, columns: int, width: float, height: float, **options) -> tuple:
    """Returns a figure and its `count` panels; width and height are of one panel, in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, panels = new_figure(width * columns, height * rows + 0.5, rows, columns, **options)
    panels = np.ravel(panels)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    entries = {}
    for axes in panels:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    where = dict(loc="outside upper center", ncols=len(entries), fontsize="small")
    figure.legend(entries.values(), entries.keys(), **where)


class Curves(NamedTuple):
    """Curves of one detector's runs, 0..1; nan for classes without objects."""

    label: str
    color: str
    values: np.ndarray  # (runs, classes, R) at R levels of recall or score from 0 to 1


def plot_class_gains(gains: Sequence[Gain]) -> Figure:
    """Plots a bar for the gain of each class, largest first, and a dot for each pair of runs."""
    height = 1.2 + 0.27 * len(gains[0].ours.first.classes)
    figure, panels = new_figure(2.5 + 5.5 * len(gains), height, columns=len(gains))
    for axes, gain in zip(np.ravel(panels), gains, strict=True):
        _draw_class_gains(axes, gain)
    return figure


def _draw_class_gains(axes: Axes, gain: Gain) -> None:
    found = {name: gain.of_class(name) for name in gain.ours.first.classes}
    shown = sorted((-d.mean, name) for name, d in found.items() if d is not None)
    names = [name for _, name in shown]
    means = [-mean for mean, _ in shown]
    axes.barh(names, means, color=[OURS if m >= 0 else REFERENCE for m in means], alpha=0.6)
    for row, name in enumerate(names):
        values = gain.class_pairs(name)
        axes.plot(values, [row] * len(values), "o", color="black", markersize=2.5, alpha=0.6)
    if not any(means):
        axes.set_xlim(-1, 1)
    overall = gain.of(gain.ours.first.class_metric)
    if overall is not None:
        text = f"mean {overall.mean:+.2f}"
        axes.axvline(overall.mean, color="black", linewidth=1, linestyle="--", label=text)
        axes.legend(fontsize="small", loc="lower right")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize="small", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"{gain.ours.first.class_metric}, points")
    axes.set_title(gain.label, fontsize="medium")


Peak = Callable[[np.ndarray], tuple[float, float]]


def plot_mean_curves(curves: Sequence[Curves], x: str, y: str, peak: Peak | None = None) -> Figure:
    """Plots curves averaged over classes: thin lines for runs, a bold line for their mean.

    Args:
        x, y: names of the levels and the values.
        peak: returns level and value of the point on a bold line to mark with a dot.
    """
    figure, axes = new_figure(6, 4.5)
    for one in curves:
        _draw_curves(axes, np.nanmean(one.values, axis=1), one.color, one.label, peak, True)
    _finish_curves(axes, 0.2)
    axes.set(xlabel=x, ylabel=f"{y}, mean over classes")
    axes.legend(fontsize="small")
    return figure


def plot_class_curves(
    curves: Sequence[Curves], class_names: Sequence[str], x: str, y: str, peak: Peak | None = None
) -> Figure:
    """Like :func:`plot_mean_curves`, with a panel for each class."""
    known = ~np.isnan(curves[0].values).all(axis=(0, 2))
    shown = [i for i in range(len(class_names)) if known[i]]
    figure, panels = _grid(len(shown), columns=5, width=2.1, height=1.8, sharex=True, sharey=True)
    for axes, index in zip(panels, shown, strict=True):
        for one in curves:
            _draw_curves(axes, one.values[:, index], one.color, one.label, peak)
        _finish_curves(axes, 0.5)
        axes.set_title(class_names[index], fontsize="small", pad=3)
        axes.tick_params(labelsize="x-small")
    figure.supxlabel(x, fontsize="small")
    figure.supylabel(y, fontsize="small")
    _shared_legend(figure, panels)
    return figure


def _draw_curves(
    axes: Axes, runs: np.ndarray, color: str, label: str, peak: Peak | None, named: bool = False
) -> None:
    levels, mean = np.linspace(0, 1, runs.shape[-1]), runs.mean(axis=0)
    if len(runs) > 1:
        axes.plot(levels, runs.T, color=color, linewidth=0.6, alpha=0.5)
    if peak:
        place, best = peak(mean)
        axes.plot([place], [best], "o", color=color, markersize=5, clip_on=False)
        label += f": {best:.2f} at {place:.2f}" if named else ""
    axes.plot(levels, mean, color=color, linewidth=1.8, label=label)


def _finish_curves(axes: Axes, step: float) -> None:
    ticks = np.arange(0, 1.01, step)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=ticks, yticks=ticks)


def error_shares(errors: Sequence[Mapping]) -> dict[str, float]:
    """Returns a run's errors by kind, summed over classes, in percent of the objects."""
    objects = sum(row["objects"] for row in errors)
    kinds = [key for key in (errors[0] if errors else ()) if key not in ("class", "objects")]
    return {kind: 100 * sum(row[kind] for row in errors) / max(1, objects) for kind in kinds}


def plot_errors_by_kind(
    shares: Mapping[str, Sequence[Mapping[str, float]]], colors: Mapping[str, str]
) -> Figure:
    """Plots each detector's shares by kind: bars are means over runs, dots single runs."""
    kinds = list(next(iter(shares.values()))[0])
    figure, axes = new_figure(8, 3.8)
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
    shown = {"missed": "missed\n(any score)", "localisation": "localization"}
    texts = [shown.get(kind, kind) for kind in kinds]
    axes.set_xticks(range(len(kinds)), texts)
    axes.set_ylabel("% of the objects")
    axes.margins(y=0.12)
    axes.grid(False, axis="x")
    axes.legend(fontsize="small")
    return figure


class Point(NamedTuple):
    label: str
    seconds: float  # per image
    ap50: float  # percent
    spread: float | None = None
    color: str = "0.35"


def plot_accuracy_and_time(points: Sequence[Point]) -> Figure:
    """Plots AP50 against seconds per image, on a log scale if times differ by a factor above 5."""
    figure, axes = new_figure(6.5, 4.2)
    for point, marker in zip(points, cycle("osD^vP*X"), strict=False):
        error = None if point.spread is None else [point.spread]
        place = ([point.seconds], [point.ap50], error)
        style = dict(color=point.color, capsize=3, clip_on=False)
        axes.errorbar(*place, fmt=marker, label=point.label, **style)
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
    low, high = axes.get_ylim()
    axes.set(xlabel="seconds per image", ylabel="AP50 (%)", ylim=(max(low, 0), max(high, 1)))
    return figure
