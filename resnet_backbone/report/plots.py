"""Plots of classification runs (the paper's Fig. 4, 6 and 7), and shared parts of plots."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from resnet_backbone.models.layers import ConvNorm, ConvNormAct
from resnet_backbone.report.published import Network
from resnet_backbone.report.runs import Metrics, Run, smooth
from resnet_backbone.runtime.evaluation import evaluation_mode
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.runtime.records import METRICS

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
TRAIN, TEST, RATE = "train_error", "val_top1_error", "lr"
X_UNIT = 10_000  # iterations; the paper's axes are in 1e4
FEW = 4  # a line with fewer points gets markers
LEAST_DROP = 1.9  # smallest factor of a learning rate drop
PANELS = {"plain": "plain networks", "ResNet": "residual networks"}
FEW_CLASSES = 12  # classes up to which a confusion matrix has larger digits, and shows 1 %
MOST_NUMBERS = 25  # ... it has numbers in its cells
MOST_NAMES = 60  # ... it has names on its axes
STYLE = {"figure.constrained_layout.use": True, "grid.alpha": 0.3}
STYLE |= {"axes.grid": True, "axes.axisbelow": True}


def assign_colors(keys: Iterable[Hashable]) -> dict[Hashable, str]:
    """Returns a color for each distinct key, in order of appearance; they repeat after seven."""
    return {key: COLORS[i % len(COLORS)] for i, key in enumerate(dict.fromkeys(keys))}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """Returns a figure, with its size in inches, in our style, and its panel or panels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(rows, columns, **options)


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure atomically, with 120 dpi, and creates its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def lr_drops(metrics: Metrics) -> list[int]:
    """Returns the last logged iteration before each drop of the learning rate."""
    if RATE not in metrics:
        return []
    iterations, rate = metrics[RATE]
    with np.errstate(divide="ignore", invalid="ignore"):
        falls = rate[:-1] / rate[1:] >= LEAST_DROP
    return [int(iteration) for iteration in iterations[:-1][falls]]


def smooth_between(
    iterations: np.ndarray, values: np.ndarray, cuts: Sequence[int], window: int
) -> np.ndarray:
    """Returns a running mean that does not cross the cuts, so that a drop stays a step."""
    places = np.searchsorted(iterations, list(cuts), side="right")
    return np.concatenate([smooth(part, window) for part in np.split(values, places)])


def whole_range(metrics: Iterable[Metrics]) -> tuple[float, float]:
    """Returns limits of the error axis in percent that include all values."""
    series = np.concatenate([one[key][1] for one in metrics for key in (TEST, TRAIN) if key in one])
    highest = series[np.isfinite(series)].max(initial=0)
    return 0.0, min(100.0, 5.0 * math.ceil(1.02 * highest / 5)) or 100.0


def error_range(finals: Sequence[float]) -> tuple[float, float]:
    """Returns limits as in the paper's figures, which cut off the start; (0, 20) as in Fig. 6.

    Args:
        finals: final errors of the runs, in percent.
    """
    good = [value for value in finals if math.isfinite(value)]
    if not good:
        return 0.0, 100.0
    top = min(100.0, max(20.0, 5.0 * math.ceil(1.4 * max(good) / 5)))
    bottom = 0.0 if min(good) < 15 else 10.0 * math.floor(0.85 * min(good) / 10)
    return bottom, top


class Line(NamedTuple):
    metrics: Metrics
    label: str
    color: str


def plot_errors(runs: Sequence[Run], labels: Sequence[str], together: bool = False) -> Figure:
    """Plots error against iterations: training thin and dashed, test bold, a color per network.

    The training error is smoothed between drops of the learning rate (dotted lines). If there are
    both plain and residual networks, they get separate panels, as in the paper. Runs with the same
    label share a color and a legend entry with their mean final test error.

    Short runs are shown whole. For runs as long as the paper's, the error axis cuts off the start.

    Args:
        labels: one per run; "" for the network's name.
        together: use one panel for all.
    """
    labels = [label or run.network.title for run, label in zip(runs, labels, strict=True)]
    series = [run.metrics() for run in runs]
    for run, metrics in zip(runs, series, strict=True):
        if TEST not in metrics and TRAIN not in metrics:
            raise ValueError(
                f"{run.folder / METRICS} has neither {TRAIN} nor {TEST}: give a run folder of "
                "train-classifier"
            )
    families = {run.network.family for run in runs}
    split = families == PANELS.keys() and not together
    # in separate panels, networks of the same depth have the same color, as in the paper
    keys = [run.network.depth for run in runs] if split else labels
    order = sorted(range(len(runs)), key=lambda i: runs[i].network.depth)
    colors = assign_colors(keys[i] for i in order)
    longest = max(int(m["iteration"][0][-1]) for m in series)
    unit = X_UNIT if longest >= X_UNIT else 1
    size = (10, 4.2, 1, 2) if split else (6.5, 4.5)
    figure, panels = new_figure(*size, sharey=True, squeeze=False)
    for axes, family in zip(panels[0], PANELS if split else [""], strict=True):
        chosen = [i for i in order if not split or runs[i].network.family == family]
        _draw_panel(axes, [Line(series[i], labels[i], colors[keys[i]]) for i in chosen], unit)
        axes.set_title(PANELS.get(family, ""))
    finals = [value for m in series for value in final_errors(m)]
    limits = whole_range(series) if unit == 1 else error_range(finals)
    panels[0, 0].set(ylabel="error (%)", ylim=limits)
    return figure


def final_errors(metrics: Metrics) -> list[float]:
    """Returns the last test error, and the mean training error of the last 5 % of the rows."""
    finals = [float(metrics[TEST][1][-1])] if TEST in metrics else []
    if TRAIN in metrics:
        errors = metrics[TRAIN][1]
        finals.append(float(np.mean(errors[-max(1, len(errors) // 20) :])))
    return finals


def _draw_panel(axes: Axes, lines: Sequence[Line], unit: int) -> None:
    for label in dict.fromkeys(line.label for line in lines):
        mine, name = [line for line in lines if line.label == label], label
        finals = [line.metrics[TEST][1][-1] for line in mine if TEST in line.metrics]
        if finals:
            runs = f", {len(mine)} runs" if len(mine) > 1 else ""
            name += f" ({np.mean(finals):.2f} %{runs})"
        for line in mine:
            width = 1.8 if len(mine) == 1 else 1.1
            _draw_run(axes, line, unit, width, name if line is mine[0] else None)
    for drop in sorted({drop for line in lines for drop in lr_drops(line.metrics)}):
        axes.axvline(drop / unit, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axes.plot([], [], color="0.3", linewidth=1, linestyle="--", label="training")
    axes.set_xlabel("iterations (1e4)" if unit == X_UNIT else "iterations")
    axes.set_xlim(left=0)
    axes.legend(fontsize="small", loc="upper right")


def _draw_run(axes: Axes, line: Line, unit: int, width: float, label: str | None) -> None:
    nothing = (np.empty(0), np.empty(0))
    x, errors = line.metrics.get(TRAIN, nothing)
    smoothed = smooth_between(x, errors, lr_drops(line.metrics), max(1, round(len(x) / 100)))
    style = dict(color=line.color, marker="o" if len(x) < FEW else None, markersize=3)
    axes.plot(x / unit, smoothed, linewidth=0.9, linestyle="--", **style)
    x, errors = line.metrics.get(TEST, nothing)
    style["marker"] = "o" if len(x) < FEW else None
    axes.plot(x / unit, errors, linewidth=width, label=label, **style)


def layer_responses(
    model: nn.Module, images: Tensor, batch_size: int = 100
) -> list[tuple[str, float]]:
    """Computes the standard deviation of each 3x3 layer's response (paper, Fig. 7, section 4.2).

    A layer's response is the output of its BN, before the nonlinearity and the addition of the
    shortcut. The standard deviation is taken over images, channels and positions. All 3x3
    convolutions count, also the first one of CIFAR networks: 6n+1 of the 6n+2 layers.

    Args:
        model: a network of this package; it runs in evaluation mode, then its mode is restored.
        images: normalized, (N, 3, H, W), on the model's device.

    Returns:
        (layer name, such as "res2.0.conv1"; standard deviation), in forward order.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, ConvNorm) and layer.kernel_size == (3, 3)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no 3x3 layers of this package's networks: responses are "
            "computed for them (resnet_backbone.list_models()), not for other libraries'"
        )
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in layers}  # count, sum, of squares
    with torch.no_grad(), evaluation_mode(model), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(_watch(layer, sums[name]).remove)
        for batch in images.split(batch_size):
            model(batch)
    moments = ((name, total / n, squares / n) for name, (n, total, squares) in sums.items())
    return [(name, math.sqrt(max(0.0, square - mean**2))) for name, mean, square in moments]


def _watch(layer: ConvNorm, sums: Tensor):
    """Accumulates the sums of a layer's output before its nonlinearity."""

    def add(values: Tensor) -> None:
        values = values.double()
        parts = (values.numel(), values.sum(), values.square().sum())
        sums.add_(torch.tensor(parts, dtype=torch.float64))

    if isinstance(layer, ConvNormAct):
        return layer.activation.register_forward_pre_hook(lambda _, inputs: add(inputs[0]))
    return layer.register_forward_hook(lambda _, inputs, output: add(output))


class Responses(NamedTuple):
    label: str
    network: Network
    stds: Sequence[float]  # in the order of the layers


def plot_responses(curves: Sequence[Responses]) -> Figure:
    """Plots the two panels of Fig. 7: layers in forward order, and sorted by magnitude.

    Networks of the same depth share a color; plain ones are dashed.
    """
    keys = [curve.network.depth or curve.label for curve in curves]
    twins = {(key, curve.network.family) for key, curve in zip(keys, curves, strict=True)}
    if len(twins) < len(curves):  # several seeds or shortcuts of one depth
        keys = list(range(len(curves)))
    colors = assign_colors(keys)
    figure, (ordered, ranked) = new_figure(7, 6.5, rows=2, sharey=True)
    for key, curve in zip(keys, curves, strict=True):
        dashes = "--" if curve.network.family == "plain" else "-"
        style = dict(color=colors[key], linestyle=dashes, linewidth=1.2, label=curve.label)
        index = range(1, len(curve.stds) + 1)
        ordered.plot(index, curve.stds, **style)
        ranked.plot(index, sorted(curve.stds, reverse=True), **style)
    for axes, order in ((ordered, "original"), (ranked, "sorted by magnitude")):
        axes.set(xlabel=f"layer index ({order})", ylabel="std", xlim=(0, None), ylim=(0, None))
    ordered.legend(fontsize="small")
    return figure


def responses_table(responses: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    lines = [f"{'network':20s} {'3x3 layers':>10s} {'mean std':>9s} {'largest':>8s}"]
    for label, rows in responses.items():
        stds = [std for _, std in rows]
        lines.append(f"{label:20s} {len(stds):10d} {sum(stds) / len(stds):9.3f} {max(stds):8.3f}")
    return "\n".join(lines)


def plot_confusion(
    confusion: np.ndarray, class_names: Sequence[str], detected: bool = False
) -> Figure:
    """Plots the confusion matrix of the classes with images, in percent of each row's sum.

    Predictions of classes without images are in the last column, "others". For a detector
    (`detected`), rows are objects. Its matrix has an additional row for detections on no object,
    and an additional column for missed objects.
    """
    counts, rows = np.array(confusion, float), [*class_names, *(["background"] if detected else ())]
    present = counts.any(1)
    present[-1] |= detected
    columns = [name for name, used in zip(rows, present, strict=True) if used]
    totals = counts[present].sum(1, keepdims=True)
    rows = [f"{name} ({total:,.0f})" for name, total in zip(columns, totals[:, 0], strict=True)]
    counts = counts[np.ix_(present, present)]
    others = totals - counts.sum(1, keepdims=True)
    if detected:
        columns[-1] = "missed"
    if (others > 1e-6).any():  # counts may be means over runs
        columns.append("others")
        counts = np.hstack([counts, others])
    share = 100.0 * counts / np.maximum(totals, 1e-9)
    side = min(12.0, 4 + 0.3 * len(rows))
    figure, axes = new_figure(side + 1, side)
    axes.grid(False)
    axes.set(xlabel="predicted", ylabel="label")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    what = "row" if detected else "label's images"
    figure.colorbar(image, ax=axes, label=f"% of the {what}", shrink=0.8)
    if detected:
        axes.set(xlabel="detected as", ylabel="object")
        for draw in (axes.axhline, axes.axvline):
            draw(len(rows) - 1.5, color="0.5", linewidth=0.8)
    if len(rows) <= MOST_NAMES:
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
    if len(rows) <= MOST_NUMBERS:
        size, least = (7, 1.5) if len(rows) > FEW_CLASSES else (9, 0.5)  # rounds to 2 or 1
        for (row, column), value in np.ndenumerate(share):
            if value >= least:
                style = dict(color="white" if value > 50 else "black", fontsize=size)
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", **style)
    return figure
