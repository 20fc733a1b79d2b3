"""Pictures of detection results: what they draw."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.report import detection_plots
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
    plot_learning,
    plot_losses,
    plot_mean_curves,
    plot_training,
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


def test_learning_curves(groups):
    assert plot_learning(groups, detector_colors(groups)) is None  # no evaluation on the way
    for group in groups:
        for run in group.runs:
            lines = [{"iteration": i, "bbox/AP50": i + run.seed} for i in (4, 9)]
            with open(run.folder / "metrics.json", "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    (axes,) = plot_learning(groups, detector_colors(groups)).axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[4, 9]] * 4
    assert [line.get_ydata().tolist() for line in axes.lines] == [[5, 10], [6, 11]] * 2
    assert [line.get_color() for line in axes.lines] == [REFERENCE] * 2 + [OURS] * 2
    assert [t.get_text() for t in axes.get_legend().texts] == ["VGG-16-FPN", "R-50-FPN"]


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


def losses(count=100):
    return [{"iteration": i, "total_loss": 3 - 0.02 * i, "lr": 0.01} for i in range(count)]


def test_plot_shows_every_run(metrics_file, tmp_path, monkeypatch):
    drawn, draw = [], detection_plots.draw_training
    monkeypatch.setattr(
        detection_plots, "draw_training", lambda *args: drawn.append(draw(*args)) or drawn[0]
    )
    first = metrics_file(*losses(), {"iteration": 99, "bbox/AP50": 40.0}, name="first")
    second = metrics_file(*losses(50), name="second")
    output = tmp_path / "new" / "curves.png"
    plot_training([first, second], output, ["with", "without"])
    loss_axes, ap_axes = drawn[0].axes
    labels = [[text.get_text() for text in axes.get_legend().texts] for axes in drawn[0].axes]
    assert labels == [["with", "without"], ["with"]]
    assert [len(line.get_xdata()) for line in loss_axes.lines] == [100, 100, 50, 50]
    assert ap_axes.lines[0].get_ydata().tolist() == [40.0]
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    assert list(output.parent.iterdir()) == [output]


def test_default_labels_are_folder_names(metrics_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(detection_plots, "draw_training", lambda runs, labels: seen.extend(labels))
    monkeypatch.setattr(detection_plots, "save_png", lambda figure, path: None)
    plot_training(
        [metrics_file(*losses(), name="one"), metrics_file(*losses(), name="two")],
        tmp_path / "c.png",
    )
    assert seen == ["one", "two"]


def test_wrong_runs(metrics_file, tmp_path):
    output, good = tmp_path / "c.png", metrics_file(*losses())
    with pytest.raises(ValueError, match="no runs"):
        plot_training([], output)
    with pytest.raises(ValueError, match="1 runs but 2 labels"):
        plot_training([good], output, ["a", "b"])
    with pytest.raises(ValueError, match="has no metrics"):
        plot_training([metrics_file(name="empty")], output)
    with pytest.raises(FileNotFoundError):
        plot_training([tmp_path / "none.json"], output)
    assert not output.exists()


def test_curves_command_line(tool, metrics_file, tmp_path, capsys):
    path, output = metrics_file(*losses(), name="a=b"), tmp_path / "c.png"
    assert tool.parse_run(str(path.parent)) == (str(path), "a=b")
    assert tool.parse_run(f"{path.parent}=my label") == (str(path), "my label")
    assert tool.parse_run(f"{path}=x") == (str(path), "x")
    assert tool.main(["curves", "--run", f"{path.parent}=x", "--output", str(output)]) == 0
    assert output.is_file()
    assert (
        tool.main(["curves", "--run", str(metrics_file(name="empty")), "--output", str(output)])
        == 2
    )
    assert "has no metrics" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["curves", "--output", "x.png"]])
def test_command_line_needs_its_arguments(tool, arguments):
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments)


def test_command_line_names_the_missing_file(tool, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["curves", "--run", str(tmp_path / "no"), "--output", "x.png"])
    assert "has neither metrics.json nor metrics.jsonl" in capsys.readouterr().err


def test_curves_do_not_need_detectron2(metrics_file, tmp_path):
    code = "import sys; sys.modules['detectron2'] = None; from resnet_backbone.cli import report; "
    code += "sys.exit(report.main(sys.argv[1:]))"
    words = ["curves", "--run", str(metrics_file(*losses())), "--output", str(tmp_path / "c.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
