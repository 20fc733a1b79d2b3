"""The gain of one detector over another: numbers, and the words for them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from resnet_backbone.report.detector_runs import DetectorGroup

# Keys that make the network what it is, or say where another one's stages are tapped.
NETWORK = re.compile(
    r"MODEL\.(RESNETS\.|BACKBONE\.NAME$|PIXEL_|FPN\.IN_FEATURES$|RPN\.IN_FEATURES$"
    r"|ROI_HEADS\.IN_FEATURES$)|INPUT\.FORMAT$"
    r"|RESNET_BACKBONE\.(VGG\.|SHORTCUT|ACTIVATION|CAFFE_POOL|WEIGHTS_PREPROCESSING$)"
)
SAME = ("DATASETS.TRAIN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST")
CLEAR = 2.0  # standard errors from which on the text calls two detectors told apart


class Difference(NamedTuple):
    """Mean of one set of values less that of another.

    Attributes:
        mean: the difference.
        error: its standard error, of two independent samples (Welch); None with a single value
            on either side.
        low, high: the smallest and the largest difference of two values, one from each set.
        pairs: how many such pairs there are.
    """

    mean: float
    error: float | None
    low: float
    high: float
    pairs: int


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference | None:
    """What `values` have over `reference`; None where one of them is empty."""
    if not values or not reference:
        return None
    error = None
    if len(values) > 1 and len(reference) > 1:
        parts = [statistics.variance(v) / len(v) for v in (values, reference)]
        error = math.sqrt(sum(parts))
    return Difference(
        statistics.fmean(values) - statistics.fmean(reference),
        error,
        min(values) - max(reference),
        max(values) - min(reference),
        len(values) * len(reference),
    )


@dataclass(frozen=True)
class Gain:
    """A ResNet's group and the VGG's that it is compared with.

    Attributes:
        ours, reference: the groups.
        differences: what else they do not share, "KEY here / there"; empty for a fair pair.
    """

    ours: DetectorGroup
    reference: DetectorGroup
    differences: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.ours.label} minus {self.reference.label}"

    def of(self, key: str) -> Difference | None:
        return difference(self.ours.values(key), self.reference.values(key))

    def of_class(self, name: str) -> Difference | None:
        return difference(self.ours.class_values(name), self.reference.class_values(name))

    def class_pairs(self, name: str) -> list[float]:
        """The difference of every pair of runs."""
        reference = self.reference.class_values(name)
        return [a - b for a in self.ours.class_values(name) for b in reference]


def find_gains(groups: Sequence[DetectorGroup]) -> list[Gain]:
    """For each ResNet the VGG of the same head, data, sizes and schedule, if there is one.

    Of several, the one whose config differs in the fewest further keys.
    """
    gains = []
    for group in groups:
        if group.first.family != "ResNet":
            continue
        rivals = [g for g in groups if g.first.family == "VGG" and _matches(group, g)]
        pairs = [Gain(group, rival, _differences(group, rival)) for rival in rivals]
        if pairs:
            gains.append(min(pairs, key=lambda gain: len(gain.differences)))
    return gains


def _matches(group: DetectorGroup, other: DetectorGroup) -> bool:
    a, b = group.first, other.first
    return (
        a.head == b.head
        and a.planned_iterations == b.planned_iterations
        and a.images_per_batch == b.images_per_batch
        and bool(a.weights) == bool(b.weights)
        and all(a.config.get(key) == b.config.get(key) for key in SAME)
    )


def _differences(group: DetectorGroup, other: DetectorGroup) -> tuple[str, ...]:
    return tuple(
        f"{key} {here} / {there}"
        for key, (here, there) in group.differing_keys(other).items()
        if not NETWORK.match(key)
    )


def signed(value: float) -> str:
    """ "+3.21"; a minus sign as long as the plus."""
    return f"{value:+.2f}".replace("-", "−")


def describe_gain(gain: Gain, key: str = "AP50") -> str:
    """What the numbers say, in words, whatever the sign."""
    found = gain.of(key)
    if found is None:
        return f"{gain.label}: {key} is not measured."
    ours, reference = gain.ours.label, gain.reference.label
    if found.mean == 0:
        text = f"{ours} and {reference} have the same {key}"
    else:
        side = "above" if found.mean > 0 else "below"
        text = f"{ours} is **{abs(found.mean):.2f} points of {key} {side}** {reference}"
    text += f" ({_seeds(gain)}{_error(found)})."
    return f"{text} {_verdict(found, ours, reference)}"


def _seeds(gain: Gain) -> str:
    counts = [len(group.runs) for group in (gain.ours, gain.reference)]
    if counts[0] != counts[1]:
        return f"{counts[0]} and {counts[1]} runs"
    return "one run each" if counts[0] == 1 else f"{counts[0]} runs each"


def _error(found: Difference) -> str:
    if found.error is None:
        return ""
    return (
        f"; standard error of the difference {found.error:.2f}; from {signed(found.low)} to "
        f"{signed(found.high)} over the {found.pairs} pairs of runs"
    )


def _verdict(found: Difference, ours: str, reference: str) -> str:
    if found.error is None:
        return (
            "The spread over seeds is not measured on both sides, so that this difference may be "
            "chance, sign included."
        )
    if abs(found.mean) < CLEAR * found.error or found.mean == 0:
        return f"That is less than {CLEAR:g} standard errors: these runs do not tell the two apart."
    if found.low > 0 or found.high < 0:
        side = "above" if found.mean > 0 else "below"
        return f"Every run of {ours} is {side} every run of {reference}."
    return "Single runs come out in either order."
