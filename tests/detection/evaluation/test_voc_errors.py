"""Kinds of errors, by hand and in total."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("detectron2")

from resnet_backbone.detection.evaluation.voc_ap import evaluate_voc, read_boxes
from resnet_backbone.detection.evaluation.voc_errors import KINDS, count_errors

NAMES = ["cat", "dog"]


def image(name, rows, third):
    boxes, classes, values = zip(*rows, strict=True) if rows else ((), (), ())
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return {"image_id": name, "boxes": boxes, "classes": classes, third: values}


def test_by_hand():
    truth = [
        image(
            "a",
            [
                ((1, 1, 10, 10), 0, False),
                ((21, 1, 30, 10), 0, False),
                ((41, 1, 50, 10), 0, False),
                ((61, 1, 70, 10), 0, False),
                ((81, 1, 90, 10), 0, False),
                ((1, 41, 10, 50), 0, True),
                ((1, 21, 10, 30), 1, False),
            ],
            "difficult",
        ),
        image("b", [], "difficult"),
    ]
    found = [
        image(
            "a",
            [
                ((1, 1, 10, 10), 0, 0.9),  # correct
                ((1, 1, 10, 9), 0, 0.8),  # duplicate
                ((21, 1, 40, 12), 0, 0.7),  # IoU 100 / 240: localization
                ((1, 21, 10, 30), 0, 0.6),  # a dog: confusion
                ((1, 41, 10, 50), 0, 0.55),  # difficult: neither way
                ((41, 1, 50, 10), 0, 0.4),  # correct, but the sixth that counts
            ],
            "scores",
        ),
        image("b", [((1, 1, 5, 5), 0, 0.5), ((1, 1, 5, 5), 1, 0.1)], "scores"),  # background
    ]
    cat, dog = count_errors(*read_boxes(found, truth, NAMES), NAMES)
    assert cat == {
        "class": "cat",
        "objects": 5,
        **dict.fromkeys(KINDS, 1),
        "missed": 3,
    }
    assert dog == {
        "class": "dog",
        "objects": 1,
        **dict.fromkeys(KINDS, 0),
        "background": 1,
        "missed": 1,
    }


@st.composite
def small_sets(draw):
    corner, side = st.integers(1, 5), st.integers(0, 4)
    box = st.tuples(corner, corner, side, side).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    )
    truth, found = [], []
    for number in range(draw(st.integers(1, 3))):
        objects = st.tuples(box, st.integers(0, 1), st.booleans())
        scored = st.tuples(box, st.integers(0, 1), st.sampled_from([0.1, 0.5, 0.9]))
        truth.append(image(str(number), draw(st.lists(objects, max_size=4)), "difficult"))
        found.append(image(str(number), draw(st.lists(scored, max_size=8)), "scores"))
    return found, truth


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_sets())
def test_counts_agree_with_the_curves(sets):
    """What is found at all is the curve's last recall; the kinds never exceed the objects."""
    numbers = evaluate_voc(*sets, NAMES)
    for class_id, row in enumerate(count_errors(*read_boxes(*sets, NAMES), NAMES)):
        objects = numbers["num_ground_truth"][class_id]
        assert row["objects"] == objects
        assert sum(row[kind] for kind in KINDS) <= objects
        recall = numbers["recall"][class_id]
        if objects:
            last = recall[-1] if len(recall) else 0.0
            assert row["missed"] == pytest.approx(objects * (1 - last))
        assert row["correct"] <= objects - row["missed"]
