"""The evaluator of VOC data sets, against Detectron2's."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from test_voc_ap import CLASSES, stable_reference

from resnet_backbone.detection.data import VOC_CLASSES, register_voc
from resnet_backbone.detection.evaluation import build_evaluator
from resnet_backbone.detection.evaluation import voc as voc_module
from resnet_backbone.detection.evaluation.operating import OperatingPoints
from resnet_backbone.detection.evaluation.voc import VOCEvaluator, format_table
from resnet_backbone.runtime.errors import DataError, UsageError


@pytest.fixture
def register(make_voc):
    """Function that registers a small VOC set."""

    def function(images, class_names, loader=register_voc):
        loader("voc_test", make_voc(images), "train", class_names)
        return "voc_test"

    return function


def evaluate(evaluator, inputs, outputs):
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()["bbox"]


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
    name = "voc_real"
    register_voc(name, data_root / "VOCdevkit" / "VOC2007", "mini_test", VOC_CLASSES)
    records = DatasetCatalog.get(name)
    outputs = noisy_detections(records)
    theirs = PascalVOCDetectionEvaluator(name)
    theirs._is_2007 = year == 2007
    theirs.reset()
    with stable_reference():
        expected = evaluate(theirs, records, outputs)
    got = evaluate(VOCEvaluator(name, str(tmp_path)), records, outputs)
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
    names = {"detections.json", "results", "voc_results.json", "voc_results.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
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
    outputs = []
    for record in records:
        boxes = [one["bbox"] for one in record["annotations"]]
        classes = [one["category_id"] for one in record["annotations"]]
        outputs.append(instances(boxes, [0.9] * len(boxes), classes))
    return records, outputs


IMAGES = {"a": [("cat", (1, 1, 4, 4)), ("dog", (5, 5, 9, 9))], "b": [("cat", (2, 2, 8, 8), 0)]}


def test_perfect_detections(register, tmp_path):
    name = register(IMAGES, ["cat", "dog", "emu"])
    results = evaluate(VOCEvaluator(name, str(tmp_path / "new")), *perfect(name))
    assert math.isnan(results.pop("AP50-emu"))
    assert list(results) == ["AP", "AP50", "AP75", "AP50-11pt", "AP50-cat", "AP50-dog"]
    assert list(results.values()) == pytest.approx([100] * 6)
    text = (tmp_path / "new" / "voc_results.json").read_text()
    assert "NaN" not in text
    table = format_table(json.loads(text))
    assert "without ground truth: emu" in table and "100.00" in table
    found = json.loads((tmp_path / "new" / "detections.json").read_text())
    boxes = {(one["image_id"], one["category"]): one["bbox"] for one in found}
    wanted = {("a", "cat"): [0, 0, 4, 4], ("a", "dog"): [4, 4, 5, 5], ("b", "cat"): [1, 1, 7, 7]}
    assert boxes == wanted


def test_the_devkits_files(register, tmp_path):
    """Read back, they hold the same detections, in VOC's pixels, and no two scores as one."""
    name = register(IMAGES, ["cat", "a/b"])
    inputs = DatasetCatalog.get(name)
    scores = [0.5, 0.50000006, 0.25]
    boxes = [[0, 0, 4, 4], [1.25, 0, 5, 4], [2, 2, 3, 3]]
    outputs = [instances(boxes, scores, [0, 0, 1]), instances([], [], [])]
    evaluator = VOCEvaluator(name, str(tmp_path / "out"))
    evaluate(evaluator, inputs, outputs)
    folder = tmp_path / "out" / "results" / "VOC2007" / "Main"
    path = folder / "comp4_det_train_cat.txt"
    assert {file.name for file in folder.iterdir()} == {path.name, "comp4_det_train_a_b.txt"}
    rows = [line.split() for line in path.read_text().splitlines()]
    found = {np.float32(row[1]): [float(value) for value in row[2:]] for row in rows}
    assert [row[0] for row in rows] == ["a", "a"]
    wanted = [1.0, 1.0, 4.0, 4.0], [2.25, 1.0, 5.0, 4.0]
    assert found == dict(zip(np.float32(scores[:2]), wanted, strict=True))
    with open(path) as file:  # replaced as a whole, not written over
        evaluator.reset()
        evaluator.evaluate()
        assert len(file.readlines()) == 2
    assert not path.read_text()


def test_a_split_without_annotations_is_written_and_not_scored(make_voc, tmp_path, caplog):
    """As VOC 2012's test set, beside annotated ones in the same folder."""
    root = make_voc(IMAGES)
    make_voc({"t1": [], "t2": []}, split="test")
    for image in ("t1", "t2"):
        (root / "Annotations" / f"{image}.xml").unlink()
    register_voc("voc_server", root, "test", CLASSES, on_bad="refuse")
    inputs = DatasetCatalog.get("voc_server")
    assert [(one["image_id"], one["annotations"]) for one in inputs] == [("t1", []), ("t2", [])]
    evaluator = VOCEvaluator("voc_server", str(tmp_path / "out"))
    evaluator.process(inputs, [instances([[0, 0, 4, 4]], [0.5], [1])] * 2)
    with caplog.at_level("WARNING"):
        assert evaluator.evaluate() == {}
        points = OperatingPoints("voc_server", str(tmp_path / "out"))
        points.process(inputs, [instances([[0, 0, 4, 4]], [0.5], [1])] * 2)
        assert points.evaluate() == {} and "voc_server has no objects: no " in caplog.text
    assert "no annotations to score with; its detections are written to" in caplog.text
    assert not list((tmp_path / "out").glob("operating*"))
    (file,) = (tmp_path / "out").rglob("comp4_det_test_dog.txt")
    assert file.read_text() == "t1 0.5 1.00 1.00 4.00 4.00\nt2 0.5 1.00 1.00 4.00 4.00\n"
    text = (root / "Annotations" / "a.xml").read_text().replace("a.jpg", "t1.jpg")
    (root / "Annotations" / "t1.xml").write_text(text)
    register_voc("voc_gap", root, "test", CLASSES, on_bad="refuse")
    with pytest.raises(DataError, match="missing-xml"):  # one is annotated: the other is a gap
        DatasetCatalog.get("voc_gap")


def test_nothing_detected(register, caplog):
    name = register(IMAGES, CLASSES)
    with caplog.at_level("WARNING"):
        outputs = [instances([], [], [])] * 2
        results = evaluate(VOCEvaluator(name), DatasetCatalog.get(name), outputs)
    assert "detected nothing at all" in caplog.text
    assert set(results.values()) == {0.0}


def test_more_classes_than_the_data_have(register, tmp_path):
    name = register(IMAGES, CLASSES)
    outputs = [instances([[0, 0, 9, 9]], [0.5], [79])] * 2
    with pytest.raises(ValueError, match="is the model's number of classes that of the data set"):
        evaluate(VOCEvaluator(name, str(tmp_path / "out")), DatasetCatalog.get(name), outputs)


def test_images_that_were_not_run_on_count_as_missed(register, caplog):
    name = register(IMAGES, CLASSES)
    records, outputs = perfect(name)
    with caplog.at_level("WARNING"):
        results = evaluate(VOCEvaluator(name), records[:1], outputs[:1])
    assert "not run on 1 of 2 images (such as b)" in caplog.text
    assert results["AP50-cat"] == pytest.approx(50) and results["AP50-dog"] == pytest.approx(100)


def test_bad_boxes_are_not_ground_truth(register, caplog):
    name = register({"a": [("cat", (1, 1, 4, 4)), ("cat", (5, 5, 5, 5))]}, CLASSES)
    with caplog.at_level("WARNING"):
        assert evaluate(VOCEvaluator(name), *perfect(name))["AP50"] == pytest.approx(100)
    assert "without 1 bad boxes" in caplog.text


def test_predictions_of_all_processes_are_gathered(register, monkeypatch):
    name = register(IMAGES, CLASSES)
    records, outputs = perfect(name)
    first, second = VOCEvaluator(name), VOCEvaluator(name)
    first.process(records[:1], outputs[:1])
    second.process(records[1:], outputs[1:])
    both = [first.found, second.found]
    monkeypatch.setattr(voc_module.comm, "gather", lambda data, dst: both)
    assert first.evaluate()["bbox"]["AP50"] == pytest.approx(100)
    monkeypatch.setattr(voc_module.comm, "gather", lambda data, dst: [])
    monkeypatch.setattr(voc_module.comm, "is_main_process", lambda: False)
    assert second.evaluate() is None


def test_detectron2s_own_registration_will_do(register):
    def loader(name, root, split, class_names):
        register_pascal_voc(name, str(root), split, 2007, class_names)
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"

    name = register(IMAGES, CLASSES, loader)
    evaluator = build_evaluator(name)
    assert isinstance(evaluator, VOCEvaluator)
    assert evaluate(evaluator, *perfect(name))["AP50"] == pytest.approx(100)


def test_metadata_that_is_missing(register):
    assert isinstance(build_evaluator(register(IMAGES, CLASSES)), VOCEvaluator)
    with pytest.raises(ValueError, match="register_voc or register_coco"):
        build_evaluator("voc_unknown")
    with pytest.raises(ValueError, match="has no thing_classes, dirname, split"):
        VOCEvaluator("voc_unknown")
    with pytest.raises(UsageError, match="OPERATING_POINTS: voc_unknown has no boxes to count"):
        OperatingPoints("voc_unknown")
