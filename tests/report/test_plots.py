"""Error curves in the style of the paper's Fig. 4 and 6."""

import math

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.cli.report import parse_run
from resnet_backbone.report.plots import error_range, lr_drops, plot_errors, smooth_between
from resnet_backbone.report.runs import load_run


def rows(iterations=1000, drops=(), train=30.0, test=20.0, every=10):
    """Rows of metrics: errors fall to a half at each drop of the learning rate."""
    made = []
    for iteration in range(every, iterations + 1, every):
        passed = sum(iteration > drop for drop in drops)
        row = {"iteration": iteration, "lr": 0.1**passed, "train_error": train / 2**passed}
        made.append(row)
        if iteration % (5 * every) == 0:
            made.append({"iteration": iteration, "val_top1_error": test / 2**passed})
    return made


def curves_of(axes, style):
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xdata())]


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().texts]


def test_drops_are_found_and_a_warm_up_is_none():
    rate = np.array([0.01, 0.01, 0.1, 0.1, 0.01, 0.001])
    assert lr_drops({"lr": (np.arange(6) * 10, rate)}) == [30, 40]
    cosine = 0.05 * (1 + np.cos(np.linspace(0, math.pi, 50)[:-1]))
    assert len(lr_drops({"lr": (np.arange(20), cosine[:20])})) == 0
    assert lr_drops({}) == []


def test_smoothing_does_not_reach_over_a_drop():
    iterations, values = np.arange(1, 7) * 10, np.array([8.0, 8, 8, 2, 2, 2])
    np.testing.assert_array_equal(smooth_between(iterations, values, [30], 3), values)
    assert smooth_between(iterations, values, [], 3)[2] == 6


@pytest.mark.parametrize(
    "finals, limits",
    [
        ([8.4, 4, 13.2, 11], (0, 20)),  # the axis of Fig. 6
        ([25, 33], (20, 50)),  # ImageNet
        ([14, 64], (0, 90)),  # plain-110
        ([89, 90], (70, 100)),
        ([math.nan], (0, 100)),
    ],
)
def test_the_axis_holds_the_ends_of_all_curves(finals, limits):
    assert error_range(finals) == limits


@pytest.mark.parametrize(
    "test, top", [((66.67, 45.0), 70), ((66.67, math.nan), 70), ((math.nan,), 100), ((98.0,), 100)]
)
def test_short_runs_are_shown_whole(make_run, test, top):
    metrics = [{"iteration": 10 * n, "val_top1_error": e} for n, e in enumerate(test, start=1)]
    (axes,) = plot_errors([load_run(make_run("r", metrics=metrics))], [""]).axes
    assert axes.get_ylim() == (0, top)


def test_plain_and_residual_networks_have_panels_and_depths_have_colors(make_run):
    metrics = rows(20_000, [10_000], train=26.0, every=100)
    names = ("resnet56", "plain20", "plain56", "resnet20")
    runs = [load_run(make_run(name, f"cifar10/{name}", metrics=metrics)) for name in names]
    plain, residual = plot_errors(runs, [""] * 4).axes
    assert plain.get_title() == "plain networks" and residual.get_title() == "residual networks"
    assert legend_of(plain) == ["plain-20 (10.00 %)", "plain-56 (10.00 %)", "training"]
    assert legend_of(residual) == ["ResNet-20 (10.00 %)", "ResNet-56 (10.00 %)", "training"]
    for axes in (plain, residual):
        test, training = curves_of(axes, "-"), curves_of(axes, "--")
        assert [line.get_color() for line in test] == [line.get_color() for line in training]
        assert test[0].get_color() != test[1].get_color()
        assert min(t.get_linewidth() for t in test) > max(t.get_linewidth() for t in training)
        assert test[0].get_xdata()[-1] == 2  # in 1e4
        assert axes.get_xlabel() == "iterations (1e4)"
        (drop,) = curves_of(axes, ":")
        assert drop.get_xdata()[0] == 1
        assert axes.get_ylim() == (0, 20)
    colors = [[line.get_color() for line in curves_of(axes, "-")] for axes in (plain, residual)]
    assert colors[0] == colors[1]


def test_one_family_or_together_is_one_panel(make_run):
    names = ("plain20", "resnet20")
    runs = [load_run(make_run(name, f"cifar10/{name}", metrics=rows())) for name in names]
    assert len(plot_errors(runs[:1], [""]).axes) == 1
    (axes,) = plot_errors(runs, ["", ""], together=True).axes
    test = curves_of(axes, "-")
    assert test[0].get_color() != test[1].get_color()
    assert test[0].get_xdata()[-1] == 1000 and axes.get_xlabel() == "iterations"


def test_seeds_share_color_and_entry(make_run):
    runs = [load_run(make_run(f"s{seed}", metrics=rows(test=20.0 + seed))) for seed in (1, 2, 3)]
    (axes,) = plot_errors(runs, ["", "", ""]).axes
    assert legend_of(axes) == ["ResNet-20 (22.00 %, 3 runs)", "training"]
    assert len({line.get_color() for line in curves_of(axes, "-")}) == 1
    names = ["one (21.00 %)", "ResNet-20 (22.00 %)", "three (23.00 %)", "training"]
    assert legend_of(plot_errors(runs, ["one", "", "three"]).axes[0]) == names


def test_a_run_that_has_not_evaluated_yet_shows_its_training(make_run):
    metrics = [row for row in rows(20) if "train_error" in row]
    (axes,) = plot_errors([load_run(make_run("r", metrics=metrics))], [""]).axes
    (line,) = curves_of(axes, "--")
    assert line.get_ydata().tolist() == [30, 30] and line.get_marker() == "o"


def test_wrong_arguments(make_run, tmp_path):
    strange = make_run("strange", metrics=[{"iteration": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="neither train_error nor val_top1_error"):
        plot_errors([load_run(strange)], [""])
    with pytest.raises(FileNotFoundError):
        plot_errors([load_run(make_run("none", results={"val_top1_error": 9}))], [""])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(tmp_path / "nowhere")


def test_command_line(tool, refused, make_run, tmp_path):
    run, output = make_run("r", metrics=rows()), tmp_path / "a.png"
    assert parse_run(str(run)) == (run / "metrics.jsonl", "")
    assert parse_run(f"{run}=x") == (run / "metrics.jsonl", "x")
    assert tool("curves", "--run", f"{run}=x", "--output", output)[0] == 0
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    other = tmp_path / "detection"
    other.mkdir()
    (other / "metrics.json").write_text('{"iteration": 1, "total_loss": 1}\n')
    error = refused("curves", "--run", run, "--run", other, "--output", output)
    assert "draw them separately" in error
