"""Groups of detection runs, and the gain of one group over another in numbers and words."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_backbone.report.detector_runs import DetectorRun
from resnet_backbone.report.runs import Group, group_by

# Keys that define the network, or which of its stages are used.
NETWORK = re.compile(
    r"MODEL\.(RESNETS\.|BACKBONE\.NAME$|PIXEL_|FPN\.IN_FEATURES$|RPN\.IN_FEATURES$"
    r"|ROI_HEADS\.IN_FEATURES$)|INPUT\.FORMAT$"
    r"|RESNET_BACKBONE\.(VGG\.|SHORTCUT|ACTIVATION|CAFFE_POOL|WEIGHTS_PREPROCESSING$)"
)
SAME = ("DATASETS.TRAIN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST")
CLEAR = 2.0  # standard errors above which the text calls a difference clear
COVERAGE = 95  # percent, of the intervals
NONE = "-"


class DetectorGroup(Group[DetectorRun]):
    """Runs of one detector and recipe."""

    def __init__(self, runs: Sequence[DetectorRun]):
        super().__init__(runs)
        self.label = self.first.title  # with a letter if other groups have the same title
        self.particulars: tuple[str, ...] = ()  # differences from these groups, "KEY value"
        # Metric -> (R,), its mean over the runs in percent on R resampled test sets, which are the
        # same for all groups; empty if the boxes were not read.
        self.draws: dict[str, np.ndarray] = {}

    def class_values(self, name: str) -> list[float]:
        found = [run.classes.get(name) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def interval(self, key: str) -> tuple[float, float] | None:
        """Returns the 95 % interval of a metric over the resampled test sets."""
        return _interval(self.draws[key]) if key in self.draws else None


def group_runs(runs: Sequence[DetectorRun]) -> list[DetectorGroup]:
    """Groups runs that differ only in their seeds: VGG first, then by depth and head."""
    _check_same_test(runs)

    def identity(run: DetectorRun) -> list:
        return [run.recipe, run.weights, run.planned_iterations, run.images_per_batch]

    groups = [DetectorGroup(members) for members in group_by(runs, identity)]
    groups.sort(key=lambda g: (g.first.family != "VGG", g.first.depth, g.first.head))
    for group in groups:
        _name_apart(group, [g for g in groups if g.first.title == group.first.title])
    return groups


def _check_same_test(runs: Sequence[DetectorRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        sets = f"{first.folder} and {run.folder} were evaluated on different test sets"
        if run.test != first.test:
            raise ValueError(f"{sets}: {first.test} and {run.test}; give runs on the same test set")
        if sorted(run.classes) != sorted(first.classes):
            raise ValueError(f"{sets} (classes); give runs on the same test set")
        if run.objects and first.objects and run.objects != first.objects:
            raise ValueError(f"{sets} (objects); give runs on the same test set")


def _name_apart(group: DetectorGroup, same: Sequence[DetectorGroup]) -> None:
    """Adds a letter to the label of groups with the same title, and notes their differences."""
    if len(same) == 1:
        return
    group.label = f"{group.first.title} {chr(ord('a') + same.index(group))}"
    notes: dict[str, str] = {}
    for other in same:
        if other.first.weights != group.first.weights:
            notes["weights"] = group.first.weights or "no weights"
        planned = group.first.planned_iterations
        if other.first.planned_iterations != planned:
            notes["length"] = f"{planned} iterations"
        for key, (value, _) in group.differing_keys(other).items():
            if key not in ("SOLVER.MAX_ITER", "SOLVER.STEPS"):
                notes[key] = f"{key} {value!r}"
    group.particulars = tuple(notes[key] for key in sorted(notes))


class Difference(NamedTuple):
    mean: float
    error: float | None  # its standard error (Welch); None with a single value on either side
    low: float  # the smallest difference of two values, one from each set
    high: float  # the largest
    pairs: int  # how many such pairs there are


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference | None:
    """Returns the difference of `values` from `reference`; None if one of them is empty."""
    if not values or not reference:
        return None
    error, mean = None, statistics.fmean(values) - statistics.fmean(reference)
    if len(values) > 1 and len(reference) > 1:
        error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (values, reference)))
    low, high = min(values) - max(reference), max(values) - min(reference)
    return Difference(mean, error, low, high, len(values) * len(reference))


@dataclass(frozen=True)
class Gain:
    ours: DetectorGroup
    reference: DetectorGroup

    @property
    def label(self) -> str:
        return f"{self.ours.label} minus {self.reference.label}"

    @property
    def differences(self) -> tuple[str, ...]:
        """Config differences apart from the network, "KEY here / there"; empty for a fair pair."""
        a, b = self.ours.first, self.reference.first
        sides = {
            key: values
            for key, values in self.ours.differing_keys(self.reference).items()
            if not NETWORK.match(key)
        }
        if a.planned_iterations != b.planned_iterations:
            sides["SOLVER.MAX_ITER"] = a.planned_iterations, b.planned_iterations
        if bool(a.weights) != bool(b.weights) or (a.title == b.title and a.weights != b.weights):
            sides["MODEL.WEIGHTS"] = a.weights or "none", b.weights or "none"
        return tuple(f"{key} {here} / {there}" for key, (here, there) in sides.items())

    def of(self, key: str) -> Difference | None:
        return difference(self.ours.values(key), self.reference.values(key))

    def of_class(self, name: str) -> Difference | None:
        return difference(self.ours.class_values(name), self.reference.class_values(name))

    def class_pairs(self, name: str) -> list[float]:
        reference = self.reference.class_values(name)
        return [a - b for a in self.ours.class_values(name) for b in reference]

    def interval(self, key: str) -> tuple[float, float] | None:
        """Returns the 95 % interval of the gain, with both on the same resampled test sets."""
        ours, reference = self.ours.draws.get(key), self.reference.draws.get(key)
        return None if ours is None or reference is None else _interval(ours - reference)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [(100 - COVERAGE) / 2, (100 + COVERAGE) / 2])
    return float(low), float(high)


def find_gains(groups: Sequence[DetectorGroup], reference: Path | None = None) -> list[Gain]:
    """Returns the pairs of groups to compare.

    Args:
        reference: folder of a run, or of its seeds, whose group all others are compared with. By
            default each ResNet is compared with the VGG of the same head, data, sizes and schedule,
            whose config differs least. Without any such pair, all groups are compared with the
            first one.
    """
    if reference is not None:
        path = reference.resolve()

        def is_meant(run: DetectorRun) -> bool:
            is_seed = run.home.name.startswith("seed_") and path == run.home.parent
            return is_seed or path in (run.folder, run.home)

        chosen = next((g for g in groups if any(map(is_meant, g.runs))), None)
        if chosen is None:
            raise ValueError(f"{reference} is not one of the run folders: add it with --run")
        return [Gain(group, chosen) for group in groups if group is not chosen]
    gains = []
    for group in groups:
        rivals = [g for g in groups if g.first.family == "VGG" != group.first.family]
        pairs = [Gain(group, rival) for rival in rivals if _matches(group.first, rival.first)]
        if pairs:
            gains.append(min(pairs, key=lambda gain: len(gain.differences)))
    return gains or [Gain(group, groups[0]) for group in groups[1:]]


def _matches(a: DetectorRun, b: DetectorRun) -> bool:
    one, other = (
        [run.head, run.planned_iterations, run.images_per_batch, bool(run.weights)]
        + [run.config.get(key) for key in SAME]
        for run in (a, b)
    )
    return one == other


def signed(value: float) -> str:
    """Formats as "+3.21", with a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def gain_text(gain: Gain, key: str) -> str:
    """Formats as "+3.21 ± 0.45 (+2.50 to +4.01) [+1.90, +4.50]", as far as it was measured.

    These are mean, standard error, range over pairs of runs, 95 % interval over test images.
    """
    found, interval = gain.of(key), gain.interval(key)
    if found is None:
        return NONE
    text = signed(found.mean)
    if found.error is not None:
        text += f" ± {found.error:.2f} ({signed(found.low)} to {signed(found.high)})"
    return text + (f" [{signed(interval[0])}, {signed(interval[1])}]" if interval else "")


def describe_gain(gain: Gain, key: str = "AP50") -> str:
    found = gain.of(key)
    if found is None:
        return f"{gain.label}: {key} is not measured."
    ours, reference = gain.ours.label, gain.reference.label
    if found.mean == 0:
        text = f"{ours} and {reference} have the same {key}"
    else:
        side = "above" if found.mean > 0 else "below"
        text = f"{ours} is **{abs(found.mean):.2f} points of {key} {side}** {reference}"
    mine, theirs = len(gain.ours.runs), len(gain.reference.runs)
    notes = [f"{mine} and {theirs} runs"]
    if mine == theirs:
        notes = ["one run each" if mine == 1 else f"{mine} runs each"]
    if found.error is not None:
        ends = f"from {signed(found.low)} to {signed(found.high)}"
        notes.append(f"standard error of the difference {found.error:.2f}")
        notes.append(f"{ends} over the {found.pairs} pairs of runs")
    verdict, interval = _verdict(found, ours, reference), gain.interval(key)
    if interval:
        low, high = map(signed, interval)
        notes.append(f"{COVERAGE} % interval over test images {low} to {high}")
        if interval[0] <= 0 <= interval[1]:
            verdict += " Other test images may reverse it."
        else:
            verdict += " The choice of test images does not explain it."
    return f"{text} ({'; '.join(notes)}). {verdict}"


def _verdict(found: Difference, ours: str, reference: str) -> str:
    if found.error is None:
        return "The spread over seeds is not measured, so chance in training may reverse it."
    if abs(found.mean) < CLEAR * found.error or found.mean == 0:
        return f"That is less than {CLEAR:g} standard errors: these runs do not tell the two apart."
    if found.low > 0 or found.high < 0:
        side = "above" if found.mean > 0 else "below"
        return f"Every run of {ours} is {side} every run of {reference}."
    return "Single runs come out in either order."
