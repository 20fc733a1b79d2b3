"""The gain over VGG: numbers against a by-hand computation, words for every sign."""

import math

import numpy as np
import pytest

from resnet_backbone.report.detector_runs import load_detector_runs
from resnet_backbone.report.gain import describe_gain, difference, find_gains, gain_text, group_runs


def test_difference_by_hand():
    ours, reference = [10.0, 12.0, 17.0], [7.0, 9.0]
    found = difference(ours, reference)
    error = math.sqrt(np.var(ours, ddof=1) / 3 + np.var(reference, ddof=1) / 2)
    pairs = [a - b for a in ours for b in reference]
    assert found.mean == 5.0 and found.error == pytest.approx(error)
    assert (found.low, found.high, found.pairs) == (min(pairs), max(pairs), 6) == (1.0, 10.0, 6)


def test_one_value_has_no_error():
    assert difference([10.0, 12.0], [7.0]).error is None
    assert difference([], [7.0]) is None


@pytest.fixture
def gain_of(make_detector):

    def make(ours, reference, **options):
        folders = [make_detector(f"r{i}", i, {"cat": v}, **options) for i, v in enumerate(ours)]
        folders += [
            make_detector(f"v{i}", i, {"cat": v}, vgg=True) for i, v in enumerate(reference)
        ]
        (gain,) = find_gains(group_runs(load_detector_runs(folders)))
        return gain

    return make


ABOVE, BELOW = "**10.00 points of AP50 above**", "**10.00 points of AP50 below**"
MIXED = [30.0, 21.0, 30.0, 30.0], [22.0, 21.5, 22.0, 22.0]
ORDER = ["5.88 points of AP50 above", "either order", "−1.00 to +8.50 over the 16 pairs"]


@pytest.mark.parametrize(
    "ours, reference, words, not_words",
    [
        ([30.0, 31.0], [20.0, 21.0], [ABOVE, "Every run of R-50"], "below"),
        ([20.0, 21.0], [30.0, 31.0], [BELOW, "is below every"], "above"),
        ([20.0, 30.0], [21.0, 27.0], ["**1.00 points of AP50 above**", "do not tell"], "Every"),
        ([20.0], [30.0], [BELOW, "chance in training", "one run each"], "error "),
        ([20.0, 21.0], [30.0], ["2 and 1 runs", "spread over seeds is not measured"], "Every"),
        ([20.0, 22.0], [20.0, 22.0], ["have the same AP50", "do not tell"], "above"),
        (*MIXED, ORDER, "Every"),
    ],
)
def test_words(gain_of, ours, reference, words, not_words):
    text = describe_gain(gain_of(ours, reference))
    for word in words:
        assert word in text
    assert not_words not in text
    assert text.startswith("R-50-FPN ") and text.endswith(".")


def test_missing_numbers(gain_of):
    assert describe_gain(gain_of([1.0], [2.0]), "AP90").endswith("AP90 is not measured.")


def test_classes(gain_of):
    gain = gain_of([30.0, 31.0], [20.0, 24.0])
    assert gain.of_class("cat").mean == 8.5 and gain.of_class("cow") is None
    assert sorted(gain.class_pairs("cat")) == [6.0, 7.0, 10.0, 11.0]


def test_the_nearest_vgg_of_the_same_schedule(make_detector):
    folders = [
        make_detector("r", 1, {"cat": 3.0}),
        make_detector("far", 1, {"cat": 2.0}, vgg=True, config={"SOLVER.BASE_LR": 0.1}),
        make_detector("long", 1, {"cat": 9.0}, vgg=True, results={"iterations": 900}),
        make_detector("c4", 1, {"cat": 9.0}, config={"MODEL.BACKBONE.NAME": "build_vgg_backbone"}),
    ]
    (gain,) = find_gains(group_runs(load_detector_runs(folders)))
    assert gain.of("AP50").mean == 1.0
    assert gain.differences == ("SOLVER.BASE_LR 0.005 / 0.1",)
    near = make_detector("near", 1, {"cat": 5.0}, vgg=True)
    (gain,) = find_gains(group_runs(load_detector_runs([*folders, near])))
    assert gain.of("AP50").mean == -2.0 and gain.differences == ()


@pytest.mark.parametrize(
    "config", [{"INPUT.MIN_SIZE_TEST": 600}, {"DATASETS.TRAIN": ["a"]}, {"MODEL.WEIGHTS": ""}]
)
def test_a_pair_of_one_recipe_goes_before_others(make_detector, config):
    folders = [make_detector("r", 1, {"cat": 3.0}, config=config)]
    folders.append(make_detector("v", 1, {"cat": 2.0}, vgg=True))
    (gain,) = find_gains(group_runs(load_detector_runs(folders)))  # nothing else to compare
    assert [text.partition(" ")[0] for text in gain.differences] == list(config)
    deep = make_detector("r101", 1, {"cat": 5.0}, config={"MODEL.RESNETS.DEPTH": 101})
    (gain,) = find_gains(group_runs(load_detector_runs([*folders, deep])))
    assert gain.label == "R-101-FPN minus VGG-16-FPN" and gain.differences == ()


def test_any_detector_can_be_the_reference(make_detector, tmp_path):
    deep = {"MODEL.RESNETS.DEPTH": 101, "SOLVER.MAX_ITER": 900}
    folders = [make_detector("r50", 1, {"cat": 3.0}, config={"SOLVER.MAX_ITER": 600})]
    folders.append(make_detector("r101", 1, {"cat": 5.0}, config=deep))
    groups = group_runs(load_detector_runs(folders))
    for reference, label in ((None, "R-101-FPN minus R-50"), (folders[1], "R-50-FPN minus R-101")):
        (gain,) = find_gains(groups, reference)
        assert gain.label == f"{label}-FPN"
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    moved = [folders[0], folders[1].rename(seeds / "seed_1")]
    (gain,) = find_gains(group_runs(load_detector_runs(moved)), seeds)
    assert gain.reference.first.depth == 101
    assert gain.differences == ("SOLVER.MAX_ITER 600 / 900",)
    with pytest.raises(ValueError, match="is not one of the run folders"):
        find_gains(groups, tmp_path)


def test_intervals_are_of_paired_draws(gain_of):
    gain = gain_of([30.0], [20.0])
    assert gain.interval("AP50") is None and "interval" not in describe_gain(gain)
    draws = np.arange(1000.0)
    gain.ours.draws, gain.reference.draws = {"AP50": draws + 10}, {"AP50": draws}
    assert gain.ours.interval("AP50") == pytest.approx((34.975, 984.025))
    assert gain.interval("AP50") == pytest.approx((10.0, 10.0))
    text = describe_gain(gain)
    assert "one run each; 95 % interval over test images +10.00 to +10.00" in text
    assert "choice of test images does not explain it" in text
    assert gain_text(gain, "AP50") == "+10.00 [+10.00, +10.00]"
    gain.reference.draws = {"AP50": draws[::-1]}
    assert "Other test images may reverse it." in describe_gain(gain)
