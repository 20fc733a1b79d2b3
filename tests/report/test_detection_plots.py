"""Pictures of detection results: what they draw."""

import json

import numpy as np
import pytest

from resnet_backbone.report.detection_plots import (
    OURS,
    REFERENCE,
    Curves,
    Point,
    detector_colors,
    error_shares,
    plot_accuracy_and_time,
    plot_class_curves,
    plot_class_gains,
    plot_errors_by_kind,
    plot_losses,
    plot_mean_curves,
)
from resnet_backbone.report.gain import find_gains, group_runs
from resnet_backbone.report.plots import COLORS
from resnet_backbone.report.runs import load_detector_runs


@pytest.fixture
def groups(make_detector):
    values = {"r1": (30.0, 10.0), "r2": (34.0, 20.0), "v1": (20.0, 40.0), "v2": (20.0, 44.0)}
    folders = []
    for name, (cat, dog) in values.items():
        classes = {"cat": cat, "dog": dog}
        folders.append(make_detector(name, int(name[1]), classes, name[0] == "v"))
        lines = [{"iteration": i, "total_loss": 3 - i / 10, "loss_cls": 1.0} for i in range(20)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folders[-1] / "metrics.json").write_text(text)
    return group_runs(load_detector_runs(folders))


def test_colors_belong_to_networks(groups):
    assert detector_colors(groups) == {"VGG-16-FPN": REFERENCE, "R-50-FPN": OURS}
    assert OURS != REFERENCE and {OURS, REFERENCE} <= set(COLORS)


def test_class_gains(groups):
    (axes,) = plot_class_gains(find_gains(groups)).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = [(bar.get_width(), bar.get_facecolor()[:3]) for bar in axes.patches]
    assert names == ["cat", "dog"] and [width for width, _ in bars] == [12.0, -27.0]
    assert bars[0][1] != bars[1][1]  # a loss has another color
    dots = {tuple(sorted(line.get_xdata())) for line in axes.lines if line.get_marker() == "o"}
    assert dots == {(10.0, 10.0, 14.0, 14.0), (-34.0, -30.0, -24.0, -20.0)}
    assert axes.get_legend().texts[0].get_text() == "mean -7.50"


def test_curves():
    precision = np.zeros((2, 3, 5))
    precision[0, 0], precision[1, 0] = 1.0, 0.5
    precision[:, 2] = np.nan  # a class without ground truth
    curves = [Curves("a", OURS, precision), Curves("b", REFERENCE, precision[:1])]
    (axes,) = plot_mean_curves(curves).axes
    thin = [line.get_ydata()[0] for line in axes.lines]
    assert thin == [0.5, 0.25, 0.375, 0.5]  # two runs, their mean; a single run
    figure = plot_class_curves(curves, ["x", "y", "z"])
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["x", "y"]


def test_errors():
    errors = [
        {"class": "cat", "objects": 30, "correct": 15, "confusion": 5, "missed": 10},
        {"class": "dog", "objects": 10, "correct": 1, "confusion": 5, "missed": 2},
    ]
    share = error_shares(errors)
    assert share == {"correct": 40.0, "confusion": 25.0, "missed": 30.0}
    assert error_shares([]) == {}
    other = dict(share, correct=20.0)
    (axes,) = plot_errors_by_kind({"a": [share, other], "b": [share]}, {"a": OURS, "b": "red"}).axes
    assert [bar.get_height() for bar in axes.patches] == [30.0, 25.0, 30.0, 40.0, 25.0, 30.0]
    assert [text.get_text() for text in axes.texts][:3] == ["30.0", "25.0", "30.0"]


def test_losses(groups, make_detector):
    figure = plot_losses(groups, detector_colors(groups))
    assert [axes.get_title() for axes in figure.axes] == ["total loss", "loss cls"]
    assert len(figure.axes[0].lines) == 4
    bare = group_runs(load_detector_runs([make_detector("bare", 9, {"cat": 1.0})]))
    assert plot_losses(bare, detector_colors(bare)) is None


def test_accuracy_and_time():
    points = [Point("a", 0.5, 40.0, 1.0), Point("b", 2.0, 45.0)]
    figure = plot_accuracy_and_time(points)
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert axes.get_xlim()[1] > 2.0


def test_times_that_differ_much_are_on_a_logarithmic_axis():
    points = [Point("slow", 9.6, 20.0), Point("fast", 0.45, 18.0)]
    figure = plot_accuracy_and_time(points)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and low < 0.45 and high > 9.6
    texts = [text.get_text() for text in axes.get_xticklabels()]
    assert {"0.5", "1", "2", "5", "10"} <= set(texts)
