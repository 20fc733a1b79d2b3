"""Panoptic quality by hand, and against plain loops."""

import json
from collections import Counter

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.detection.evaluation import PanopticEvaluator
from resnet_backbone.detection.evaluation.coco import match_segments, panoptic_quality
from resnet_backbone.runtime.errors import DataError

TRUE = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 4, 4]])


def segment(number, category, crowd=0):
    return {"id": int(number), "category_id": int(category), "iscrowd": int(crowd)}


TRUTH = [segment(1, 7), segment(2, 7), segment(3, 9), segment(4, 7, crowd=1)]


def test_panoptic_quality_by_hand():
    """A match of IoU 4/6, one missed, one found too much; void and a crowd cost nothing."""
    found = np.array([[5, 5, 0, 6, 6, 6], [5, 5, 0, 0, 0, 6], [7, 7, 0, 0, 8, 8]])
    classes = {5: 7, 6: 7, 7: 9, 8: 7}
    counts = match_segments(TRUE, TRUTH, found, classes)
    # 6 covers 2 of segment 2's 4 pixels and 2 of void: IoU 2 / (4 + 4 - 2 - 2) is not over .5,
    # and half of it on void is not most of it; 8 lies on the crowd; 7 covers 2 of 4
    assert counts[7] == {"iou": pytest.approx(4 / 6), "tp": 1, "fn": 1, "fp": 1}
    assert counts[9] == {"fn": 1, "fp": 1}
    quality = panoptic_quality(counts.values())
    assert quality["PQ"] == pytest.approx((4 / 6 / 2 + 0) / 2)
    assert quality["SQ"] == pytest.approx((4 / 6 + 0) / 2)
    assert quality["RQ"] == pytest.approx((1 / 2 + 0) / 2)


def test_void_is_no_part_of_the_union():
    true, found = np.array([[1, 1, 0, 0]]), np.array([[5, 5, 5, 5]])
    assert match_segments(true, [segment(1, 7)], found, {5: 7})[7] == {"iou": 1.0, "tp": 1}


def test_the_truth_is_of_full_quality():
    counts = match_segments(TRUE, TRUTH, TRUE, {1: 7, 2: 7, 3: 9})
    assert panoptic_quality(counts.values()) == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0}
    assert np.isnan(panoptic_quality([])["PQ"])


def test_evaluating_an_image_without_panoptic_segments(tmp_path):
    """Of a data set that Detectron2 registered by itself."""
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps({"categories": [], "annotations": []}))
    ids = dict(thing_dataset_id_to_contiguous_id={}, stuff_dataset_id_to_contiguous_id={})
    MetadataCatalog.get("pan").set(panoptic_json=str(file), panoptic_root=str(tmp_path), **ids)
    with pytest.raises(DataError, match="image id 3 is not in annotations of .*panoptic.json"):
        PanopticEvaluator("pan").process([{"image_id": 3}], [{}])


@st.composite
def images(draw):
    """True and found ids (12 x 12) with classes; small blocks, so that many match."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    true = np.kron(rng.integers(0, 5, (3, 3)), np.ones((4, 4), int))
    found = np.where(rng.random((12, 12)) < draw(st.floats(0, 0.6)), rng.integers(0, 5), true)
    crowd = int(rng.integers(0, 5))
    truth = [segment(i, i % 2 + 1, i == crowd) for i in np.unique(true[true > 0])]
    classes = {
        int(i): int(rng.integers(1, 3)) if rng.random() < 0.2 else int(i) % 2 + 1
        for i in np.unique(found[found > 0])
    }
    return true, truth, found, classes


@given(images())
@settings(deadline=None, max_examples=60)
def test_panoptic_quality_equals_plain_loops(image):
    """By the rules of COCO's panopticapi, pair by pair; 0 is void."""
    true, truth, found, classes = image
    counts: Counter = match_segments(true, truth, found, classes)
    expected = {category: Counter() for category in (1, 2)}
    missed, wrong = {s["id"] for s in truth if not s["iscrowd"]}, set(classes)
    for segment in (s for s in truth if not s["iscrowd"]):
        for number, category in classes.items():
            one, other = true == segment["id"], found == number
            both, union = (one & other).sum(), (one | (other & (true != 0))).sum()
            if category == segment["category_id"] and both / union > 0.5:
                expected[category] += Counter(tp=1, iou=both / union)
                missed.remove(segment["id"])
                wrong.remove(number)
    for segment in truth:
        expected[segment["category_id"]]["fn"] += segment["id"] in missed
    for number in wrong:
        crowds = [s["id"] for s in truth if s["iscrowd"] and s["category_id"] == classes[number]]
        ignored = np.isin(true, [0, *crowds])[found == number].mean()
        expected[classes[number]]["fp"] += ignored <= 0.5
    for category, theirs in expected.items():
        ours = counts.get(category, Counter())
        assert [ours[key] for key in ("tp", "fp", "fn")] == [theirs[k] for k in ("tp", "fp", "fn")]
        assert ours["iou"] == pytest.approx(theirs["iou"])
