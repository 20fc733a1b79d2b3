"""Objects that one detector finds and another misses, chosen by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU
from resnet_backbone.report.evidence import Evidence

SCORE = 0.5

RULE = """\
A run finds an object if a detection of its class, with a score of at least {score:g}, overlaps it \
by an IoU above {iou:g}, and no other object of that class more. Looked at are the objects, \
difficult ones left out, that {finder} finds in more than half of its runs and {other} in none. \
Shown is for each class the object with the largest gap: mean score of {finder}'s best detection \
on it less the largest score of {other}'s. The largest gaps come first, an image only once."""


class Miss(NamedTuple):
    """An object that one detector finds and the other misses.

    Attributes:
        row: of the object in the table of the ground truth.
        gap: of the scores, 0..1.
        run: the finder's first run that finds it.
    """

    row: int
    gap: float
    run: int


def object_scores(evidence: Evidence) -> np.ndarray:
    """For each object of the ground truth the score of the best detection on it, 0 without one.

    A detection is on the object of its class with the highest IoU, if that is above .5.

    Returns:
        (objects,), 0..1.
    """
    found = evidence.found
    scores = np.zeros(len(evidence.truth["classes"]))
    over = found["iou"] > CURVE_IOU
    np.maximum.at(scores, found["match"][over], found["scores"][over])
    return scores


def find_misses(
    finder: Sequence[Evidence], other: Sequence[Evidence], score: float = SCORE
) -> np.ndarray:
    """Objects found by most runs of one detector and by none of the other, see :data:`RULE`.

    Returns:
        (objects,) the gap of the scores; nan where the object is none of them.
    """
    mine, theirs = (np.array([object_scores(e) for e in runs]) for runs in (finder, other))
    most = 2 * (mine >= score).sum(axis=0) > len(mine)
    chosen = most & (theirs < score).all(axis=0) & ~finder[0].truth["difficult"]
    return np.where(chosen, mine.mean(axis=0) - theirs.max(axis=0), np.nan)


def select_misses(
    finder: Sequence[Evidence], other: Sequence[Evidence], count: int, score: float = SCORE
) -> list[Miss]:
    """At most `count` objects by :data:`RULE`: one of a class and of an image, largest gap first.

    Args:
        finder, other: runs of the two detectors, of the same ground truth.
        count: most objects.
        score: from which on an object counts as found, 0..1.
    """
    truth, gaps = finder[0].truth, find_misses(finder, other, score)
    rows = np.flatnonzero(~np.isnan(gaps))
    rows = rows[np.argsort(-gaps[rows], kind="stable")]
    selected: list[Miss] = []
    classes, images = set(), set()
    for row in rows.tolist():
        class_id, image = int(truth["classes"][row]), int(truth["image"][row])
        if class_id in classes or image in images or len(selected) == count:
            continue
        classes.add(class_id)
        images.add(image)
        first = next(i for i, run in enumerate(finder) if object_scores(run)[row] >= score)
        selected.append(Miss(row, float(gaps[row]), first))
    return selected
