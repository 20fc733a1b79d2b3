"""Average precision against Detectron2's voc_eval and by hand; errors, confusion, F1."""

import contextlib
import functools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from detectron2.evaluation import pascal_voc_evaluation as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.detection.evaluation import evaluate_voc, operating, voc_ap
from resnet_backbone.detection.evaluation.operating import THRESHOLDS, count_confusion, f1_curves
from resnet_backbone.detection.evaluation.voc_ap import KINDS, read_boxes, score_boxes

CLASSES = ["cat", "dog"]

# Detectron2 sorts by an unstable sort; with a stable one, ties can be compared as well.
stable_sort = functools.partial(np.argsort, kind="stable")


@contextlib.contextmanager
def stable_reference():
    with mock.patch.object(np, "argsort", stable_sort), np.errstate(all="ignore"):
        yield


def reference_results(detections, ground_truth, threshold, use_07_metric):
    """(recall, precision, AP) per class of Detectron2's voc_eval."""
    objects = {}
    for image in ground_truth:
        columns = zip(image["classes"], image["boxes"], image["difficult"], strict=True)
        objects[image["image_id"]] = [
            {"name": CLASSES[c], "bbox": box, "difficult": hard} for c, box, hard in columns
        ]
    lines = {name: [] for name in CLASSES}
    for image in detections:
        for row in zip(image["classes"], image["scores"], image["boxes"], strict=True):
            numbers = [repr(float(v)) for v in (row[1], *row[2])]
            lines[CLASSES[row[0]]].append(" ".join([image["image_id"], *numbers]))
    with (
        tempfile.TemporaryDirectory() as folder,
        stable_reference(),
        mock.patch.object(reference, "parse_rec", objects.get),
    ):
        split = Path(folder, "split")
        split.write_text("\n".join(objects))
        for name in CLASSES:
            Path(folder, name).write_text("\n".join(lines[name]))
        arguments = f"{folder}/{{}}", "{}", str(split)
        return [reference.voc_eval(*arguments, n, threshold, use_07_metric) for n in CLASSES]


def assert_equal_to_reference(detections, ground_truth, thresholds):
    ours = evaluate_voc(detections, ground_truth, CLASSES, thresholds)
    for column, threshold in enumerate(thresholds):
        for key, use_07_metric in (("ap_area", False), ("ap_11point", True)):
            theirs = reference_results(detections, ground_truth, threshold, use_07_metric)
            for class_id, (recall, precision, ap) in enumerate(theirs):
                if not ours["num_ground_truth"][class_id]:
                    assert np.isnan(ours[key][class_id, column])
                    continue
                assert ours[key][class_id, column] == pytest.approx(ap, abs=1e-6)
                if threshold == 0.5:
                    np.testing.assert_array_equal(ours["recall"][class_id], recall)
                    np.testing.assert_array_equal(ours["precision"][class_id], precision)


@st.composite
def small_sets(draw):
    """Few boxes on a coarse grid: equal IoUs, IoUs at a threshold, equal scores, duplicates."""
    corner, side = st.integers(1, 5), st.integers(0, 4)
    # a detector may give boxes that are inside out; the devkit takes them as they are
    box = st.tuples(corner, corner, side, side).map(lambda b: (*b[:2], b[0] + b[2], b[1] + b[3]))
    any_box = st.one_of(box, st.tuples(corner, corner, corner, corner))
    class_id, score = st.integers(0, 1), st.sampled_from([0.1, 0.5, 0.9])
    ground_truth, detections = [], []
    for number in range(draw(st.integers(1, 3))):
        objects = draw(st.lists(st.tuples(box, class_id, st.booleans()), max_size=4))
        found = draw(st.lists(st.tuples(any_box, class_id, score), max_size=8))
        ground_truth.append(table(number, objects, "difficult"))
        detections.append(table(number, found, "scores"))
    return detections, ground_truth


def table(image_id, rows, third):
    boxes, classes, values = zip(*rows, strict=True) if rows else ((), (), ())
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return {"image_id": str(image_id), "boxes": boxes, "classes": classes, third: values}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(small_sets())
def test_adversarial_sets_equal_detectron2(sets):
    assert_equal_to_reference(*sets, [0.5, 0.3, 0.75])


def test_recall_that_is_a_step_of_the_11_points():
    """3 of 10 found is below the devkit's fourth recall step, which is 0.30000000000000004."""
    boxes = [(1 + 20 * i, 1, 10 + 20 * i, 10) for i in range(10)]
    truth = ground_truth_of(*[(box, 0, 0) for box in boxes])
    found = detections_of(*[(box, 0, 0.9) for box in boxes[:3]])
    assert_equal_to_reference(found, truth, [0.5])


def ground_truth_of(*rows):
    return [table("a", rows, "difficult")]


def detections_of(*rows):
    return [table("a", rows, "scores")]


def test_by_hand():
    """Three objects; found: one, it again, a wrong one, a second one."""
    boxes = [(1, 1, 10, 10), (21, 1, 30, 10), (41, 1, 50, 10)]
    truth = ground_truth_of(*[(b, 0, 0) for b in boxes])
    wrong = (61, 1, 70, 10), 0, 0.7
    found = detections_of((boxes[0], 0, 0.9), (boxes[0], 0, 0.8), wrong, (boxes[1], 0, 0.6))
    result = evaluate_voc(found, truth, CLASSES, [0.5])
    np.testing.assert_allclose(result["precision"][0], [1, 1 / 2, 1 / 3, 2 / 4])
    np.testing.assert_allclose(result["recall"][0], [1 / 3, 1 / 3, 1 / 3, 2 / 3])
    np.testing.assert_allclose(result["ap_area"][0], 1 / 3 * 1 + 1 / 3 * 1 / 2)
    # recall 0, .1, .2, .3 have precision 1; .4, .5, .6 have 1/2
    np.testing.assert_allclose(result["ap_11point"][0], (4 * 1 + 3 * 1 / 2) / 11)
    assert np.isnan(result["ap_area"][1]).all()
    counts = [result[f"num_{k}"].tolist() for k in ("ground_truth", "difficult", "detections")]
    assert counts == [[3, 0], [0, 0], [4, 0]]


def test_iou_must_exceed_the_threshold_and_counts_whole_pixels():
    truth = ground_truth_of(((1, 1, 10, 10), 0, 0))
    half = detections_of(((1, 1, 10, 5), 0, 0.9))  # 50 of 100 pixels: exactly .5
    assert evaluate_voc(half, truth, CLASSES, [0.5, 0.49])["ap_area"][0].tolist() == [0, 1]


def test_difficult_objects_count_neither_way():
    truth = ground_truth_of(((1, 1, 10, 10), 0, 0), ((21, 1, 30, 10), 0, 1))
    hard = ((21, 1, 30, 10), 0, 0.9)
    found = detections_of(hard, hard, ((1, 1, 10, 10), 0, 0.5))
    assert evaluate_voc(found, truth, CLASSES, [0.5])["ap_area"][0] == 1


def test_no_detections_is_zero_and_no_images_is_nan():
    truth = ground_truth_of(((1, 1, 10, 10), 0, 0))
    for nothing in ([], detections_of()):
        result = evaluate_voc(nothing, truth, CLASSES)
        assert (result["ap_area"][0] == 0).all() and (result["ap_11point"][0] == 0).all()
    assert np.isnan(evaluate_voc([], [], CLASSES)["ap_area"]).all()


@pytest.mark.parametrize(
    "found, images, message",
    [
        ([table("b", [], "scores")], 1, "'b'"),
        (detections_of(((1, 1, 2, 2), 2, 0.5)), 1, r"not in 0\.\.1"),
        ([], 2, "twice"),
        ([{**table("a", [((1, 1, 2, 2), 0, 1)], "scores"), "scores": []}], 1, "0 s"),
    ],
)
def test_wrong_input(found, images, message):
    with pytest.raises(ValueError, match=message):
        evaluate_voc(found, ground_truth_of() * images, CLASSES)


def test_errors_by_hand():
    boxes = [(1 + 20 * i, 1, 10 + 20 * i, 10) for i in range(5)]
    rows = [(box, 0, False) for box in boxes]
    truth = ground_truth_of(*rows, ((1, 41, 10, 50), 0, True), ((1, 21, 10, 30), 1, False))
    truth.append(table("b", [], "difficult"))
    found = detections_of(
        (boxes[0], 0, 0.9),  # correct
        ((1, 1, 10, 9), 0, 0.8),  # duplicate
        ((21, 1, 40, 12), 0, 0.7),  # IoU 100 / 240: localization
        ((1, 21, 10, 30), 0, 0.6),  # a dog: confusion
        ((1, 41, 10, 50), 0, 0.55),  # difficult: neither way
        (boxes[2], 0, 0.4),  # correct, but the sixth that counts
    )
    background = [((1, 1, 5, 5), 0, 0.5), ((1, 1, 5, 5), 1, 0.1)]
    found.append(table("b", background, "scores"))
    cat, dog = voc_ap.count_errors(*read_boxes(found, truth, CLASSES), CLASSES)
    assert cat == {"class": "cat", "objects": 5, **dict.fromkeys(KINDS, 1), "missed": 3}
    none = dict.fromkeys(KINDS, 0)
    assert dog == {"class": "dog", "objects": 1, **none, "background": 1, "missed": 1}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_sets())
def test_counts_agree_with_the_curves(sets):
    """What is found at all is the curve's last recall; the kinds never exceed the objects."""
    numbers = evaluate_voc(*sets, CLASSES)
    for class_id, row in enumerate(voc_ap.count_errors(*read_boxes(*sets, CLASSES), CLASSES)):
        objects = numbers["num_ground_truth"][class_id]
        assert row["objects"] == objects
        assert sum(row[kind] for kind in KINDS) <= objects
        recall = numbers["recall"][class_id]
        if objects:
            last = recall[-1] if len(recall) else 0.0
            assert row["missed"] == pytest.approx(objects * (1 - last))
        assert row["correct"] <= objects - row["missed"]


def test_operating_points_by_hand():
    boxes = [(1 + 20 * i, 1, 10 + 20 * i, 10) for i in range(5)]
    rows = [(boxes[0], 0, False), (boxes[1], 0, False), (boxes[2], 1, False), (boxes[3], 1, True)]
    truth = ground_truth_of(*rows, (boxes[4], 0, False))
    found = detections_of(
        (boxes[0], 0, 0.9),  # correct
        (boxes[0], 0, 0.85),  # again: background
        (boxes[0], 1, 0.8),  # a dog where a cat has been found: background
        (boxes[1], 1, 0.7),  # a cat taken for a dog
        (boxes[2], 1, 0.65),  # correct
        (boxes[3], 1, 0.6),  # difficult: neither way
        (boxes[4], 0, 0.3),  # correct, with a low score
        (boxes[1], 0, 0.1),
    )
    tables = read_boxes(found, truth, CLASSES)
    assert count_confusion(*tables, 2, 0.3).tolist() == [[2, 1, 0], [0, 1, 0], [1, 1, 0]]
    assert count_confusion(*tables, 2, 0.31).tolist() == [[1, 1, 1], [0, 1, 0], [1, 1, 0]]
    # the low score makes it a cat again, since correct detections come first
    assert count_confusion(*tables, 2, 0).tolist() == [[3, 0, 0], [0, 1, 0], [1, 2, 0]]
    curves = f1_curves(score_boxes(*tables, CLASSES), tables[1])
    at = {score: curves[:, np.searchsorted(THRESHOLDS, score - 1e-9)] for score in (0.05, 0.3, 0.5)}
    np.testing.assert_allclose(at[0.05], [2 * 3 / (4 + 3), 2 * 1 / (3 + 1)])
    np.testing.assert_allclose(at[0.3], [2 * 2 / (3 + 3), 2 * 1 / (3 + 1)])
    np.testing.assert_allclose(at[0.5], [2 * 1 / (2 + 3), 2 * 1 / (3 + 1)])
    points = operating.operating_points(*tables, CLASSES)
    assert points["F1"] == pytest.approx((6 / 7 + 1 / 2) / 2) and 0 <= points["threshold"] <= 0.1
    assert points["confusion"] == count_confusion(*tables, 2, 0).tolist()
    cat, dog = points["classes"]
    assert cat["class"] == "cat" and cat["F1"] == pytest.approx(6 / 7)
    assert (cat["precision"], cat["recall"]) == (3 / 4, 1)
    assert len(cat["curve"]) == 21 and cat["curve"][1] == 0.8571 and cat["curve"][10] == 0.4
    assert dog["threshold"] == pytest.approx(0.325, abs=0.002) and dog["precision"] == 1 / 3


def test_confused_objects_are_paired_by_overlap():
    """A cat where a cow and, nearer, a dog are; one on a difficult cat leaves the dog there."""
    truth = ground_truth_of(((1, 1, 10, 8), 2, False), ((1, 1, 10, 9), 1, False))
    truth.append(table("b", [((1, 1, 10, 10), 0, True), ((1, 1, 10, 9), 1, False)], "difficult"))
    found = detections_of(((1, 1, 10, 10), 0, 0.9))
    found.append(table("b", [((1, 1, 10, 10), 0, 0.9)], "scores"))
    matrix = count_confusion(*read_boxes(found, truth, ["cat", "dog", "cow"]), 3, 0.5)
    assert matrix.tolist() == [[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def plain_confusion(found, truth, score):
    """The same without tables, image by image."""
    matrix = np.zeros((3, 3), int)
    for detections, objects in zip(found, truth, strict=True):
        boxes, kinds, hard = (list(objects[key]) for key in ("boxes", "classes", "difficult"))
        order = np.argsort(-np.array(detections["scores"], float), kind="stable")
        others, taken = [], set()
        for place in order:
            if detections["scores"][place] < score:
                continue
            box, kind = detections["boxes"][place], detections["classes"][place]
            ious = [voc_ap.paired_iou(box[None], one[None])[0] for one in boxes]
            mine = [number for number, one in enumerate(kinds) if one == kind]
            best = max(mine, key=lambda n: ious[n], default=None)
            if best is None or not ious[best] > 0.5 or (best in taken and not hard[best]):
                others.append((kind, ious))
            elif not hard[best]:
                taken.add(best)
                matrix[kind, kind] += 1
        pairs = [
            (-iou, place, number)
            for place, (kind, ious) in enumerate(others)
            for number, iou in enumerate(ious)
            if iou > 0.5 and kinds[number] != kind and not hard[number]
        ]
        paired = {}
        for _, place, number in sorted(pairs):
            if place not in paired and number not in taken:
                paired[place] = kinds[number]
                taken.add(number)
        for place, (kind, _) in enumerate(others):
            matrix[paired.get(place, 2), kind] += 1
        for number, kind in enumerate(kinds):
            matrix[kind, 2] += number not in taken and not hard[number]
    return matrix


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_sets(), st.sampled_from([0.0, 0.5]))
def test_confusion_agrees_with_a_plain_one_and_with_the_curves(sets, score):
    tables = read_boxes(*sets, CLASSES)
    numbers, matrix = score_boxes(*tables, CLASSES), count_confusion(*tables, 2, score)
    np.testing.assert_array_equal(matrix, plain_confusion(*sets, score))
    assert matrix[:2].sum(axis=1).tolist() == numbers["num_ground_truth"].tolist()
    curves = f1_curves(numbers, tables[1])
    for number in range(2):
        correct, found = matrix[number, number], matrix[:, number].sum()
        f1 = 2 * correct / max(1, found + matrix[number].sum())
        if numbers["num_ground_truth"][number]:
            assert curves[number, np.searchsorted(THRESHOLDS, score)] == pytest.approx(f1)
