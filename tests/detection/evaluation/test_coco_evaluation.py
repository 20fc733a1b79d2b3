"""COCO's numbers against pycocotools' and Detectron2's; sets without annotations."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO, _get_builtin_metadata
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from drawn_images import coco_json
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from resnet_backbone.detection.data import scan_coco
from resnet_backbone.detection.evaluation import build_evaluator, coco

SUMMARY = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
NAMES = {90: "dog", 7: "cat", 11: "owl"}  # not in order, and with gaps
SIDE = 128
ENGINES = [coco.run_hotcoco, coco.run_pycocotools]


def box_mask(box):
    x, y, w, h = (int(value) for value in box)
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    found = rle.encode(mask)
    return {**found, "counts": found["counts"].decode()}


@st.composite
def small_sets(draw):
    """Coarse grids: equal IoUs and scores, crowds, duplicates, empty images and classes."""
    corner, side = st.integers(0, 3).map(lambda x: 8 * x), st.integers(1, 12).map(lambda x: 8 * x)
    box = st.tuples(corner, corner, side, side).map(lambda b: [float(value) for value in b])
    category, score = st.sampled_from(list(NAMES)), st.sampled_from([0.1, 0.5, 0.9])
    images = draw(st.integers(1, 3))
    image = st.integers(1, images)
    truth = draw(st.lists(st.tuples(image, category, box, st.booleans()), max_size=8))
    found = draw(st.lists(st.tuples(image, category, box, score), max_size=16))
    rows = [dict(image_id=i, category_id=c, bbox=b, score=s) for i, c, b, s in found]
    return dataset(images, truth), [one | {"segmentation": box_mask(one["bbox"])} for one in rows]


def dataset(images, truth):
    sizes = {number: (f"{number}.jpg", SIDE, SIDE) for number in range(1, images + 1)}
    boxes = []
    for image, kind, box, crowd in truth:
        more = {"area": box[2] * box[3], "iscrowd": int(crowd), "segmentation": box_mask(box)}
        boxes.append((image, kind, box, more))
    return coco_json(NAMES, sizes, boxes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small_sets(), st.sampled_from(["bbox", "segm"]))
def test_engines_agree_on_adversarial_sets(sets, task):
    first, second = (coco.score_coco(*sets, task, engine=engine) for engine in ENGINES)
    np.testing.assert_equal(first, second)
    curves = [engine(*sets, task) for engine in ENGINES]
    np.testing.assert_array_equal(*(precision for precision, _ in curves))
    assert list(first[0]) == SUMMARY and list(first[1]) == sorted(NAMES)


def random_set(seed, images=12):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 5)):
            corner, size = rng.integers(0, 60, 2), rng.integers(6, 64, 2)
            category = int(rng.choice(list(NAMES)))
            box = [*map(float, corner), *map(float, size)]
            truth.append((image, category, box, bool(rng.random() < 0.1)))
            for _ in range(3):
                near = [*(corner + rng.integers(0, 6, 2)), *(size + rng.integers(-4, 5, 2))]
                found.append((image, category, [float(v) for v in near], float(rng.random())))
    return dataset(images, truth), found


@pytest.fixture
def register(tmp_path):
    """Function (dataset) -> name of it, registered."""

    def run(content):
        name = f"coco_evaluation_test_{len(list(tmp_path.iterdir()))}"
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        classes = {one["id"]: one["name"] for one in content["categories"]}
        metadata = MetadataCatalog.get(name).set(json_file=str(path), evaluator_type="coco")
        metadata.thing_classes = [classes[key] for key in sorted(classes)]
        metadata.thing_dataset_id_to_contiguous_id = {k: i for i, k in enumerate(sorted(classes))}
        return name

    return run


def run(evaluator, name, content, found):
    """An evaluator's results for detections given as (image, category id, xywh, score)."""
    process(evaluator, name, content, found)
    return evaluator.evaluate()


def process(evaluator, name, content, found):
    contiguous = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    evaluator.reset()
    for image in content["images"]:
        mine = [row for row in found if row[0] == image["id"]]
        boxes = torch.tensor([row[2] for row in mine]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((SIDE, SIDE), pred_boxes=Boxes(boxes))
        instances.scores = torch.tensor([row[3] for row in mine], dtype=torch.float64)
        instances.pred_classes = torch.tensor([contiguous[row[1]] for row in mine]).long()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])


@pytest.mark.parametrize("seed", range(3))
def test_detectron2s_numbers(register, tmp_path, seed):
    content, found = random_set(seed)
    name = register(content)
    ours = run(build_evaluator(name, str(tmp_path / "ours")), name, content, found)["bbox"]
    theirs = run(COCOEvaluator(name, use_fast_impl=False), name, content, found)["bbox"]
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-6, nan_ok=True), key
    assert set(ours) - set(theirs) == set(SUMMARY[6:])
    assert 0 < ours["AP"] < 100
    written = json.loads((tmp_path / "ours" / "coco_instances_results.json").read_text())
    assert {row["category_id"] for row in written} <= set(NAMES)


def test_a_second_evaluation_of_some_images(register):
    content, found = random_set(0)
    for one in content["images"]:  # ids that are not their positions
        one["id"] = 100 - one["id"]
    for one in content["annotations"]:
        one["image_id"] = 100 - one["image_id"]
    name, found = register(content), [(100 - row[0], *row[1:]) for row in found]
    few = [one["id"] for one in content["images"]][:2]
    numbers = []
    for evaluator in (build_evaluator(name), COCOEvaluator(name, use_fast_impl=False)):
        process(evaluator, name, content, found)
        numbers.append(evaluator.evaluate(img_ids=few)["bbox"]["AP"])
    assert 0 < numbers[0] == pytest.approx(numbers[1], abs=1e-6)
    evaluator = build_evaluator(name)
    first = run(evaluator, name, content, found)["bbox"]
    assert evaluator.evaluate()["bbox"] == pytest.approx(first, nan_ok=True)


def test_keypoint_results_have_the_ids_of_the_data(register, tmp_path):
    content = dataset(2, [(2, 90, [0.0, 0.0, 9.0, 9.0], False)])
    content["images"][1]["id"] = content["annotations"][0]["image_id"] = 285
    content["annotations"][0] |= {"keypoints": [1, 1, 2], "num_keypoints": 1}
    name = register(content)
    MetadataCatalog.get(name).keypoint_names = ["nose"]
    evaluator = build_evaluator(name, str(tmp_path / "out"), sigmas=[0.1])
    evaluator.reset()
    instances = Instances((SIDE, SIDE), pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]])))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([2])
    instances.pred_keypoints = torch.tensor([[[1.5, 1.5, 1.0]]])
    evaluator.process([{"image_id": 285}], [{"instances": instances}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(100)
    (row,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert (row["image_id"], row["category_id"]) == (285, 90)


@pytest.mark.parametrize("complete", [True, False])
def test_perfect_detections(register, complete):
    """Also on JSON without area, iscrowd and info."""
    truth = [(1, 90, [0.0, 0.0, 4.0, 4.0], False), (2, 7, [3.0, 3.0, 4.0, 4.0], False)]
    content = dataset(2, truth) | ({"info": {}} if complete else {})
    for one in () if complete else content["annotations"]:
        del one["area"], one["iscrowd"]
    name, found = register(content), [(*one[:3], 0.9) for one in truth]
    results = run(build_evaluator(name), name, content, found)["bbox"]
    for key in ("AP", "AP50", "APs", "AP-cat", "AP-dog"):
        assert results[key] == pytest.approx(100)


def test_nothing_found_and_nothing_to_find(register, caplog):
    caplog.set_level(logging.WARNING)
    content, _ = random_set(0)
    name = register(content)
    found = run(build_evaluator(name), name, content, [])["bbox"]
    assert found["AP"] == found["AR100"] == 0 and "detected nothing at all" in caplog.text
    empty = {**content, "annotations": []}
    name = register(empty)
    found = run(build_evaluator(name), name, empty, [(1, 90, [0.0, 0.0, 9.0, 9.0], 0.5)])["bbox"]
    assert np.isnan([found["AP"], found["AP-dog"]]).all()
    assert "has no ground truth boxes: AP is nan" in caplog.text


def test_one_class_is_reported(register):
    content, found = random_set(1)
    content["categories"] = [one for one in content["categories"] if one["name"] == "dog"]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 90]
    name = register(content)
    dogs = [row for row in found if row[1] == 90]
    found = run(build_evaluator(name), name, content, dogs)["bbox"]
    assert found["AP"] == found["AP-dog"] > 0


def test_a_file_without_annotations_gets_a_result_file(register, tmp_path):
    """It is complete, or stays as it was."""
    content, found = random_set(2)
    content.pop("annotations")  # as in COCO's test-dev
    name, path = register(content), tmp_path / "out" / "coco_instances_results.json"
    evaluator = build_evaluator(name, str(path.parent))
    assert run(evaluator, name, content, found) == {}
    before = path.read_text()
    written = json.loads(before)
    assert len(written) == len(found) and {row["category_id"] for row in written} <= set(NAMES)
    rows = [dict(image_id=1, category_id=0, bbox=[0, 0, 9, 9], score=s) for s in (0.5, object())]
    with pytest.raises(TypeError):
        evaluator._eval_predictions([{"instances": rows}])
    assert path.read_text() == before
    assert not list(path.parent.glob("*.tmp"))


# Sets without annotations, whose detections a server scores

DATASETS = ("coco_2014_train", "coco_2014_val", "coco_2017_test-dev")


@pytest.fixture
def files(tiny_voc, tiny_coco, tmp_path):
    """(JSON with annotations, JSON of images alone, folder of the images)."""
    train = tiny_coco(tmp_path / "train.json", range(6))
    info = tiny_coco(tmp_path / "info.json", range(6, 8), annotated=False)
    return train, info, str(tiny_voc / "JPEGImages")


def test_a_list_of_images_passes_the_check(files):
    _, info, images = files
    records, report = scan_coco(info, images)
    assert not report.problems and not report.annotated and report.num_images == 2
    assert [record["annotations"] for record in records] == [[], []]
    assert scan_coco(files[0], images)[1].annotated
    content = json.loads(Path(info).read_text()) | {"annotations": []}
    Path(info).write_text(json.dumps(content))
    assert scan_coco(info, images)[1].annotated  # an empty list is one


@pytest.mark.parametrize("order", [1, -1])
def test_it_is_evaluated_on_and_not_trained_on(files, train_net, tiny_training, tmp_path, order):
    *jsons, images = files
    run = tmp_path / "run"
    keys = ["--image-root", images, "--output-dir", run, "--weights", "", *tiny_training]
    keys += ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN", "SOLVER.MAX_ITER", 1]
    keys += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    config = "quickstart/faster_rcnn_R_18_FPN.yaml"
    code = 0 if order == 1 else 2
    lines = train_net(config, "--coco-json", *jsons[::order], *keys, code=code)
    if code:
        assert "data set train:coco has no boxes to learn from" in lines[-1]
        return
    (found,) = run.rglob(coco.RESULT_FILE)
    rows = json.loads(found.read_text())
    assert {row["image_id"] for row in rows} == {106, 107}
    assert {row["category_id"] for row in rows} <= {7, 90}
    assert all(len(row["bbox"]) == 4 and 0 <= row["score"] <= 1 for row in rows)
    assert not list(run.rglob("*.tmp"))


@pytest.fixture
def registered(tiny_voc, tiny_coco, tmp_path, monkeypatch):
    """COCO 2014 and test-dev as Detectron2 registers them, below the current folder."""
    root = tmp_path / "datasets" / "coco"
    for name, numbers in zip(DATASETS, (range(3), range(3, 6), range(6, 8)), strict=True):
        folder, file = _PREDEFINED_SPLITS_COCO["coco"][name]
        tiny_coco(tmp_path / "datasets" / file, numbers, "dev" not in name)
        (tmp_path / "datasets" / folder).symlink_to(tiny_voc / "JPEGImages")
    monkeypatch.chdir(tmp_path)
    yield root
    for name in DATASETS:
        folder, file = (f"datasets/{part}" for part in _PREDEFINED_SPLITS_COCO["coco"][name])
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
        register_coco_instances(name, _get_builtin_metadata("coco"), file, folder)


def test_the_papers_trainval_protocol(registered, train_net, tiny_training, tmp_path):
    """Trains on the union of train and val, and writes test-dev's detections."""
    keys = """MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0
    SOLVER.MAX_ITER 1 MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50
    MODEL.RPN.POST_NMS_TOPK_TEST 5 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 4
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0""".split()
    words = ["--output-dir", "run", "MODEL.WEIGHTS", "", *tiny_training, *keys]
    train_net("paper/coco_trainval_R_50.yaml", *words)
    images = [image["file_name"] for name in DATASETS[:2] for image in DatasetCatalog.get(name)]
    assert len(images) == 6
    rows = json.loads((tmp_path / f"run/inference/{DATASETS[2]}/{coco.RESULT_FILE}").read_text())
    assert {row["image_id"] for row in rows} == {106, 107}
