"""Training curves."""

import json

import numpy as np
import pytest
from PIL import Image
from resnet_backbone.report.curves import load_metrics, plot_training, smooth

from resnet_backbone.report import curves


@pytest.fixture
def run(tmp_path):
    """Function that writes lines to NAME/metrics.json and returns its path."""

    def write(*entries, name="run", tail=""):
        path = tmp_path / name / "metrics.json"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(e) + "\n" for e in entries) + tail)
        return path

    return write


def losses(count=100, start=0):
    return [
        {"iteration": i, "total_loss": 3 - 0.02 * i, "lr": 0.01}
        for i in range(start, start + count)
    ]


def test_load(run):
    path = run(*losses(3), {"iteration": 2, "bbox/AP50": 41.5, "note": "text"})
    metrics = load_metrics(path)
    assert set(metrics) == {"iteration", "total_loss", "lr", "bbox/AP50"}
    assert [a.tolist() for a in metrics["total_loss"]] == [[0, 1, 2], [3, 2.98, 2.96]]
    assert [a.tolist() for a in metrics["bbox/AP50"]] == [[2], [41.5]]


def test_resumed_run_keeps_the_last_value(run):
    again = [{"iteration": i, "total_loss": 9.0} for i in (1, 2, 3)]
    metrics = load_metrics(run(*losses(3), *again))
    assert [a.tolist() for a in metrics["total_loss"]] == [[0, 1, 2, 3], [3, 9, 9, 9]]


@pytest.mark.parametrize("tail", ['{"iteration": 3, "total_l', "17\n", '{"total_loss": 1}\n', "\n"])
def test_incomplete_lines_are_passed_over(run, tail, caplog):
    metrics = load_metrics(run(*losses(3), tail=tail))
    assert metrics["total_loss"][0].tolist() == [0, 1, 2]
    assert ("line 4 is incomplete" in caplog.text) == bool(tail.strip())


def test_smooth():
    values = np.array([0.0, 3.0, 6.0, np.nan, 12.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3, 4.5, 9, 12])
    np.testing.assert_array_equal(smooth(values, 1), values)
    with pytest.raises(ValueError, match="window is 0"):
        smooth(values, 0)


def test_plot_shows_every_run(run, tmp_path, monkeypatch):
    drawn = []
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[0])
    first = run(*losses(), {"iteration": 99, "bbox/AP50": 40.0}, name="first")
    second = run(*losses(50), name="second")
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


def test_default_labels_are_folder_names(run, tmp_path, monkeypatch):
    seen = []
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda r, labels: seen.extend(labels) or draw(r, labels))
    plot_training([run(*losses(), name="one"), run(*losses(), name="two")], tmp_path / "c.png")
    assert seen == ["one", "two"]


def test_wrong_arguments(run, tmp_path):
    output, good = tmp_path / "c.png", run(*losses())
    with pytest.raises(ValueError, match="no runs"):
        plot_training([], output)
    with pytest.raises(ValueError, match="1 runs but 2 labels"):
        plot_training([good], output, ["a", "b"])
    with pytest.raises(ValueError, match="has no metrics"):
        plot_training([run(name="empty")], output)
    with pytest.raises(FileNotFoundError):
        plot_training([tmp_path / "none.json"], output)
    assert not output.exists()


def test_command_line(tool, run, tmp_path, capsys):
    path, output = run(*losses(), name="a=b"), tmp_path / "c.png"
    assert tool.parse_run(str(path.parent)) == (str(path), "a=b")
    assert tool.parse_run(f"{path.parent}=my label") == (str(path), "my label")
    assert tool.parse_run(f"{path}=x") == (str(path), "x")
    assert tool.main(["curves", "--run", f"{path.parent}=x", "--output", str(output)]) == 0
    assert output.is_file()
    assert tool.main(["curves", "--run", str(run(name="empty")), "--output", str(output)]) == 1
    assert "has no metrics" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["curves", "--output", "x.png"]])
def test_command_line_needs_its_arguments(tool, arguments):
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments)


def test_command_line_names_the_missing_file(tool, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["curves", "--run", str(tmp_path / "no"), "--output", "x.png"])
    assert "has neither metrics.json nor metrics.jsonl" in capsys.readouterr().err
