"""VOC and COCO evaluation against Detectron2's."""

import contextlib
import functools
import json
import math
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation import pascal_voc_evaluation as reference
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.detection.data import VOC_CLASSES, register_coco, register_voc
from resnet_backbone.detection.evaluation import (
    VOCEvaluator,
    build_evaluator,
    evaluate_voc,
    format_table,
)
from resnet_backbone.detection.evaluation import voc as voc_module
from resnet_backbone.detection.evaluation.voc_ap import COCO_IOU_THRESHOLDS
from resnet_backbone.runtime.errors import DataError

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
    box = st.tuples(corner, corner, side, side).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    )
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
@given(small_sets(), st.sampled_from([0.5, 0.3, 0.75]))
def test_adversarial_sets_equal_detectron2(sets, threshold):
    assert_equal_to_reference(*sets, [threshold])


@pytest.mark.parametrize("seed", range(3))
def test_random_sets_equal_detectron2(seed):
    rng = np.random.default_rng(seed)
    ground_truth, detections = [], []
    for image_id in range(20):
        boxes = rng.integers(1, 60, (8, 2))
        boxes = np.concatenate([boxes, boxes + rng.integers(10, 40, (8, 2))], axis=1)
        rows = list(zip(boxes, rng.integers(0, 2, 8), rng.random(8) < 0.2, strict=True))
        ground_truth.append(table(image_id, rows, "difficult"))
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 3, (24, 4)).round(1)
        classes = np.repeat([r[1] for r in rows], 3)
        scores = rng.random(24).round(2)
        detections.append(table(image_id, list(zip(near, classes, scores, strict=True)), "scores"))
    assert_equal_to_reference(detections, ground_truth, COCO_IOU_THRESHOLDS)


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
    found = detections_of(
        (boxes[0], 0, 0.9), (boxes[0], 0, 0.8), ((61, 1, 70, 10), 0, 0.7), (boxes[1], 0, 0.6)
    )
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
    "found, truth, message",
    [
        ([table("b", [], "scores")], ground_truth_of(), "'b'"),
        (detections_of(((1, 1, 2, 2), 2, 0.5)), ground_truth_of(), r"not in 0\.\.1"),
        ([], ground_truth_of() * 2, "twice"),
        (
            [{**table("a", [((1, 1, 2, 2), 0, 1)], "scores"), "scores": []}],
            ground_truth_of(),
            "0 s",
        ),
    ],
)
def test_wrong_input(found, truth, message):
    with pytest.raises(ValueError, match=message):
        evaluate_voc(found, truth, CLASSES)


# --- the evaluators ---------------------------------------------------------------------------


@pytest.fixture
def register(make_voc):
    """Function that registers a small VOC set; names are removed afterwards."""
    names = []

    def function(images, class_names, loader=register_voc):
        name = f"voc_evaluation_test_{len(names)}"
        loader(name, make_voc(images), "train", class_names)
        names.append(name)
        return name

    yield function
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def instances(boxes, scores, classes):
    result = Instances((500, 500))
    result.pred_boxes = Boxes(torch.as_tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.as_tensor(np.array(scores), dtype=torch.float32)
    result.pred_classes = torch.as_tensor(np.array(classes), dtype=torch.int64)
    return {"instances": result}


def noisy_detections(records, seed=0):
    """Outputs near the ground truth, as Detectron2's evaluator would round them."""
    rng = np.random.default_rng(seed)
    outputs = []
    for record in records:
        boxes = np.array([a["bbox"] for a in record["annotations"]]).repeat(4, axis=0)
        noise = rng.normal(0, 12, boxes.shape) * rng.random((len(boxes), 1)) ** 2
        boxes = np.round((boxes + noise) * 2) / 2  # halves are exact in float32 and in {:.1f}
        classes = np.repeat([a["category_id"] for a in record["annotations"]], 4)
        classes = np.where(rng.random(len(boxes)) < 0.2, rng.integers(0, 20, len(boxes)), classes)
        outputs.append(instances(boxes, rng.random(len(boxes)).round(3), classes))
    return outputs


@pytest.mark.data
@pytest.mark.parametrize("year", [2007, 2012])
def test_real_images_equal_detectron2(data_root, tmp_path, year):
    name, folder = f"voc_evaluation_test_real_{year}", data_root / "VOCdevkit" / "VOC2007"
    register_voc(name, folder, "mini_test", VOC_CLASSES)
    try:
        records = DatasetCatalog.get(name)
        outputs = noisy_detections(records)
        ours = VOCEvaluator(name, str(tmp_path))
        theirs = PascalVOCDetectionEvaluator(name)
        theirs._is_2007 = year == 2007
        for evaluator in (ours, theirs):
            evaluator.reset()
            evaluator.process(records, outputs)
        with stable_reference():
            expected = theirs.evaluate()["bbox"]
        got = ours.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    if year == 2007:
        assert got["AP50-11pt"] == pytest.approx(expected["AP50"], abs=1e-6)
    else:
        for key in ("AP", "AP50", "AP75"):
            assert 5 < got[key] < 95
            assert got[key] == pytest.approx(expected[key], abs=1e-6)
    per_class = [got[f"AP50-{c}"] for c in VOC_CLASSES]
    assert got["AP50"] == pytest.approx(np.mean(per_class))
    saved = json.loads((tmp_path / "voc_results.json").read_text())
    assert saved["summary"]["AP50"] == got["AP50"]
    assert [c["AP50"] for c in saved["classes"]] == per_class
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert len(detections) == sum(len(o["instances"]) for o in outputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "detections.json",
        "results",
        "voc_results.json",
        "voc_results.png",
    ]
    with Image.open(tmp_path / "voc_results.png") as picture:
        assert picture.width > 1000
    errors = saved["errors"]
    assert [row["class"] for row in errors] == list(VOC_CLASSES)
    assert sum(row["correct"] for row in errors) > 0
    counts = {row["class"]: row["ground_truth"] for row in saved["classes"]}
    assert {row["class"]: row["objects"] for row in errors} == counts


def perfect(name):
    """Inputs and outputs: every object found."""
    records = DatasetCatalog.get(name)
    outputs = [
        instances(
            [a["bbox"] for a in r["annotations"]],
            [0.9] * len(r["annotations"]),
            [a["category_id"] for a in r["annotations"]],
        )
        for r in records
    ]
    return records, outputs


IMAGES = {"a": [("cat", (1, 1, 4, 4)), ("dog", (5, 5, 9, 9))], "b": [("cat", (2, 2, 8, 8), 0)]}


def test_perfect_detections(register, tmp_path):
    name = register(IMAGES, ["cat", "dog", "emu"])
    evaluator = VOCEvaluator(name, str(tmp_path / "new"))
    evaluator.process(*perfect(name))
    results = evaluator.evaluate()["bbox"]
    assert math.isnan(results.pop("AP50-emu"))
    assert list(results) == ["AP", "AP50", "AP75", "AP50-11pt", "AP50-cat", "AP50-dog"]
    assert list(results.values()) == pytest.approx([100] * 6)
    text = (tmp_path / "new" / "voc_results.json").read_text()
    assert "NaN" not in text
    table = format_table(json.loads(text))
    assert "without ground truth: emu" in table and "100.00" in table
    boxes = {
        (d["image_id"], d["category"]): d["bbox"]
        for d in json.loads((tmp_path / "new" / "detections.json").read_text())
    }
    assert boxes == {
        ("a", "cat"): [0, 0, 4, 4],
        ("a", "dog"): [4, 4, 5, 5],
        ("b", "cat"): [1, 1, 7, 7],
    }


def test_the_devkits_files(register, tmp_path):
    """Read back, they hold the same detections, in VOC's pixels, and no two scores as one."""
    name = register(IMAGES, ["cat", "a/b"])
    inputs = DatasetCatalog.get(name)
    scores = [0.5, 0.50000006, 0.25]
    boxes = [[0, 0, 4, 4], [1.25, 0, 5, 4], [2, 2, 3, 3]]
    evaluator = VOCEvaluator(name, str(tmp_path / "out"))
    evaluator.process(inputs, [instances(boxes, scores, [0, 0, 1]), instances([], [], [])])
    evaluator.evaluate()
    folder = tmp_path / "out" / "results" / "VOC2007" / "Main"
    assert {path.name for path in folder.iterdir()} == {
        f"comp4_det_train_{label}.txt" for label in ("cat", "a_b")
    }
    rows = [line.split() for line in (folder / "comp4_det_train_cat.txt").read_text().splitlines()]
    found = {np.float32(row[1]): [float(value) for value in row[2:]] for row in rows}
    assert [row[0] for row in rows] == ["a", "a"]
    assert found == {
        np.float32(0.5): [1.0, 1.0, 4.0, 4.0],
        np.float32(0.50000006): [2.25, 1.0, 5.0, 4.0],
    }
    with open(folder / "comp4_det_train_cat.txt") as file:  # replaced as a whole, not written over
        evaluator.reset()
        evaluator.evaluate()
        assert len(file.readlines()) == 2
    assert not (folder / "comp4_det_train_cat.txt").read_text()


def test_a_split_without_annotations_is_written_and_not_scored(make_voc, tmp_path, caplog):
    """As VOC 2012's test set, beside annotated ones in the same folder."""
    root = make_voc(IMAGES)
    make_voc({"t1": [], "t2": []}, split="test")
    for image in ("t1", "t2"):
        (root / "Annotations" / f"{image}.xml").unlink()
    name = "voc_evaluation_test_server"
    register_voc(name, root, "test", CLASSES, on_bad="refuse")
    try:
        inputs = DatasetCatalog.get(name)
        assert [(one["image_id"], one["annotations"]) for one in inputs] == [("t1", []), ("t2", [])]
        evaluator = VOCEvaluator(name, str(tmp_path / "out"))
        evaluator.process(inputs, [instances([[0, 0, 4, 4]], [0.5], [1])] * 2)
        with caplog.at_level("WARNING"):
            assert evaluator.evaluate() == {}
        assert "no annotations to score with; its detections are written to" in caplog.text
        (file,) = (tmp_path / "out").rglob("comp4_det_test_dog.txt")
        assert file.read_text() == "t1 0.5 1.00 1.00 4.00 4.00\nt2 0.5 1.00 1.00 4.00 4.00\n"
        (root / "Annotations" / "t1.xml").write_text(
            (root / "Annotations" / "a.xml").read_text().replace("a.jpg", "t1.jpg")
        )
        DatasetCatalog.remove(name)
        register_voc(name + "2", root, "test", CLASSES, on_bad="refuse")
        with pytest.raises(DataError, match="missing-xml"):  # one is annotated: the other is a gap
            DatasetCatalog.get(name + "2")
    finally:
        for one in (name, name + "2"):
            if one in DatasetCatalog.list():
                DatasetCatalog.remove(one)
            MetadataCatalog.pop(one)


def test_nothing_detected(register, caplog):
    name = register(IMAGES, CLASSES)
    evaluator = VOCEvaluator(name)
    evaluator.process(DatasetCatalog.get(name), [instances([], [], [])] * 2)
    with caplog.at_level("WARNING"):
        results = evaluator.evaluate()["bbox"]
    assert "detected nothing at all" in caplog.text
    assert set(results.values()) == {0.0}


def test_images_that_were_not_run_on_count_as_missed(register, caplog):
    name = register(IMAGES, CLASSES)
    records, outputs = perfect(name)
    evaluator = VOCEvaluator(name)
    evaluator.process(records[:1], outputs[:1])
    with caplog.at_level("WARNING"):
        results = evaluator.evaluate()["bbox"]
    assert "not run on 1 of 2 images (such as b)" in caplog.text
    assert results["AP50-cat"] == pytest.approx(50) and results["AP50-dog"] == pytest.approx(100)


def test_bad_boxes_are_not_ground_truth(register, caplog):
    name = register({"a": [("cat", (1, 1, 4, 4)), ("cat", (5, 5, 5, 5))]}, CLASSES)
    evaluator = VOCEvaluator(name)
    evaluator.process(*perfect(name))
    with caplog.at_level("WARNING"):
        assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100)
    assert "without 1 bad boxes" in caplog.text


def test_reset_and_limit(register):
    name = register({"a": [("cat", (1, 1, 4, 4))]}, CLASSES)
    inputs = DatasetCatalog.get(name)
    outputs = [instances([[0, 0, 4, 4], [5, 5, 9, 9]], [0.5, 0.9], [0, 0])]
    for limit, ap50 in ((None, 50), (2, 50), (1, 0)):
        evaluator = VOCEvaluator(name, max_dets_per_image=limit)
        evaluator.process(inputs, [instances([[9, 9, 12, 12]] * 9, [1.0] * 9, [0] * 9)])
        evaluator.reset()
        evaluator.process(inputs, outputs)
        assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(ap50)


def test_predictions_of_all_processes_are_gathered(register, monkeypatch):
    name = register(IMAGES, CLASSES)
    records, outputs = perfect(name)
    first, second = VOCEvaluator(name), VOCEvaluator(name)
    first.process(records[:1], outputs[:1])
    second.process(records[1:], outputs[1:])
    both = [first._predictions, second._predictions]
    monkeypatch.setattr(voc_module.comm, "gather", lambda data, dst: both)
    assert first.evaluate()["bbox"]["AP50"] == pytest.approx(100)
    monkeypatch.setattr(voc_module.comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(voc_module.comm, "is_main_process", lambda: False)
    assert second.evaluate() is None


def test_detectron2s_own_registration_will_do(register):
    from detectron2.data.datasets import register_pascal_voc

    def loader(name, root, split, class_names):
        register_pascal_voc(name, str(root), split, 2007, class_names)
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"

    name = register(IMAGES, CLASSES, loader)
    evaluator = build_evaluator(name)
    assert isinstance(evaluator, VOCEvaluator)
    evaluator.process(*perfect(name))
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100)


def test_metadata_that_is_missing(register):
    name = register(IMAGES, CLASSES)
    assert isinstance(build_evaluator(name), VOCEvaluator)
    try:
        with pytest.raises(ValueError, match="register_voc or register_coco"):
            build_evaluator("voc_evaluation_test_unknown")
        with pytest.raises(ValueError, match="has no thing_classes, dirname, split"):
            VOCEvaluator("voc_evaluation_test_unknown")
    finally:
        MetadataCatalog.pop("voc_evaluation_test_unknown")


@pytest.mark.parametrize("complete", [True, False])
def test_coco(tmp_path, make_voc, complete):
    """A perfect detector scores 100, on JSON without area, iscrowd and info too."""
    images = make_voc({"a": [], "b": []}) / "JPEGImages"
    full = {"area": 16, "iscrowd": 0} if complete else {}
    content = {
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "width": 20, "height": 10}
            for i, n in enumerate("ab")
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 90, "bbox": [0, 0, 4, 4], **full},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [3, 3, 4, 4], **full},
        ],
    } | ({"info": {}} if complete else {})
    (tmp_path / "set.json").write_text(json.dumps(content))
    name = f"voc_evaluation_test_coco_{complete}"
    register_coco(name, str(tmp_path / "set.json"), str(images))
    try:
        evaluator = build_evaluator(name, str(tmp_path / "out"))
        evaluator.reset()
        inputs = DatasetCatalog.get(name)
        evaluator.process(
            inputs, [instances([[0, 0, 4, 4]], [0.9], [1]), instances([[3, 3, 7, 7]], [0.9], [0])]
        )
        results = evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    for key in ("AP", "AP50", "APs", "AP-cat", "AP-dog"):
        assert results[key] == pytest.approx(100)
