"""Pictures of detection results: what they draw."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.cli.report import parse_run
from resnet_backbone.report import detection_plots as plots
from resnet_backbone.report.detector_runs import load_detector_runs
from resnet_backbone.report.gain import find_gains, group_runs
from resnet_backbone.report.plots import COLORS

LOSSES = [{"iteration": i, "total_loss": 3 - 0.02 * i, "lr": 0.01} for i in range(100)]


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
    assert plots.detector_colors(groups) == {"VGG-16-FPN": plots.REFERENCE, "R-50-FPN": plots.OURS}
    assert plots.OURS != plots.REFERENCE and {plots.OURS, plots.REFERENCE} <= set(COLORS)


def test_class_gains(groups):
    (axes,) = plots.plot_class_gains(find_gains(groups)).axes
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
    curves = [plots.Curves("a", plots.OURS, precision)]
    curves.append(plots.Curves("b", plots.REFERENCE, precision[:1]))
    (axes,) = plots.plot_mean_curves(curves, "recall", "precision").axes
    thin = [line.get_ydata()[0] for line in axes.lines]
    assert thin == [0.5, 0.25, 0.375, 0.5]  # two runs, their mean; a single run
    (axes,) = plots.plot_mean_curves(curves, "score", "F1", lambda mean: (0.3, mean.max())).axes
    texts = [text.get_text() for text in axes.get_legend().texts]
    assert texts == ["a: 0.38 at 0.30", "b: 0.50 at 0.30"]
    figure = plots.plot_class_curves(curves, ["x", "y", "z"], "recall", "precision")
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["x", "y"]


def test_errors():
    errors = [
        {"class": "cat", "objects": 30, "correct": 15, "confusion": 5, "missed": 10},
        {"class": "dog", "objects": 10, "correct": 1, "confusion": 5, "missed": 2},
    ]
    share = plots.error_shares(errors)
    assert share == {"correct": 40.0, "confusion": 25.0, "missed": 30.0}
    assert plots.error_shares([]) == {}
    other = dict(share, correct=20.0)
    shares, colors = {"a": [share, other], "b": [share]}, {"a": plots.OURS, "b": "red"}
    (axes,) = plots.plot_errors_by_kind(shares, colors).axes
    assert [bar.get_height() for bar in axes.patches] == [30.0, 25.0, 30.0, 40.0, 25.0, 30.0]
    assert [text.get_text() for text in axes.texts][:3] == ["30.0", "25.0", "30.0"]


def test_training(groups):
    series = {group.label: [run.metrics() for run in group.runs] for group in groups}
    figure = plots.plot_training(series, plots.detector_colors(groups))
    assert [axes.get_title() for axes in figure.axes] == ["total loss", "loss cls"]
    assert len(figure.axes[0].lines) == 4
    for group in groups:
        for run in group.runs:
            lines = [{"iteration": i, "bbox/AP50": i + run.seed} for i in (4, 9)]
            with open(run.folder / "metrics.json", "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    series = {group.label: [run.metrics() for run in group.runs] for group in groups}
    figure = plots.plot_training(series, plots.detector_colors(groups))
    axes = figure.axes[-1]
    assert axes.get_title() == "AP50 (%)"
    assert [line.get_xdata().tolist() for line in axes.lines] == [[4, 9]] * 4
    assert [line.get_ydata().tolist() for line in axes.lines] == [[5, 10], [6, 11]] * 2
    assert [line.get_color() for line in axes.lines] == [plots.REFERENCE] * 2 + [plots.OURS] * 2
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["VGG-16-FPN", "R-50-FPN"]
    assert plots.plot_training({"bare": [{}]}, {"bare": plots.OURS}) is None


def test_a_single_point_shows():
    one = {name: (np.array([5]), np.array([2.0])) for name in ("total_loss", "bbox/AP50")}
    figure = plots.plot_training({"a": [one]}, {"a": plots.OURS})
    assert all(axes.lines[0].get_marker() == "o" for axes in figure.axes)
    assert all(axes.get_xlim()[0] == 0 for axes in figure.axes)


def test_detectors_that_find_nothing(make_detector):
    runs = [make_detector("r", 1, {"cat": 0.0}), make_detector("v", 1, {"cat": 0.0}, vgg=True)]
    (axes,) = plots.plot_class_gains(find_gains(group_runs(load_detector_runs(runs)))).axes
    assert axes.lines[0].get_xdata().tolist() == [0] and axes.get_xlim() == (-1, 1)
    points = [plots.Point("a", 0.5, 0.0), plots.Point("b", 0.6, 0.0)]
    assert plots.plot_accuracy_and_time(points).axes[0].get_ylim() == (0, 1)


def test_accuracy_and_time():
    """Times that differ much are on a logarithmic axis."""
    points = [plots.Point("a", 0.5, 40.0, 1.0), plots.Point("b", 2.0, 45.0)]
    figure = plots.plot_accuracy_and_time(points)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert figure.axes[0].get_xscale() == "linear" and figure.axes[0].get_xlim()[1] > 2.0
    points = [plots.Point("slow", 9.6, 20.0), plots.Point("fast", 0.45, 18.0)]
    figure = plots.plot_accuracy_and_time(points)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and low < 0.45 and high > 9.6
    texts = [text.get_text() for text in axes.get_xticklabels()]
    assert {"0.5", "1", "2", "5", "10"} <= set(texts)


def test_curves_command_line(tool, refused, metrics_file, tmp_path):
    path, output = metrics_file(*LOSSES, name="a=b"), tmp_path / "new" / "c.png"
    assert parse_run(str(path.parent)) == (path, "a=b")
    assert parse_run(f"{path.parent}=my label") == (path, "my label")
    assert parse_run(f"{path}=x") == (path, "x")
    assert tool("curves", "--run", f"{path.parent}=x", "--output", output)[0] == 0
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    assert list(output.parent.iterdir()) == [output]
    rates = metrics_file({"iteration": 1, "lr": 0.1}, name="rates")
    for run, message in (
        (rates, "neither losses nor AP50"),
        (metrics_file(name="empty"), "has no metrics"),
        (tmp_path / "no", "has neither metrics.json nor metrics.jsonl"),
    ):
        assert message in refused("curves", "--run", run, "--output", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    assert tool()[0] == tool("curves", "--output", "x.png")[0] == 2


def test_curves_do_not_need_detectron2(metrics_file, tmp_path):
    code = "import sys; sys.modules['detectron2'] = None; from resnet_backbone.cli import report; "
    code += "report.main(sys.argv[1:])"
    words = ["curves", "--run", str(metrics_file(*LOSSES)), "--output", str(tmp_path / "c.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
