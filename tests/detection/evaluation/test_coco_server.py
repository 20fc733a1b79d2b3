"""COCO's sets without annotations: evaluated, not trained on, written for the server."""

import json

import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO, _get_builtin_metadata

from resnet_backbone.detection.data import scan_coco
from resnet_backbone.detection.evaluation.coco import RESULT_FILE

CONFIG = "quickstart/faster_rcnn_R_18_FPN.yaml"
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


def test_an_empty_list_of_annotations_is_annotated(files, tmp_path):
    content = json.loads((tmp_path / "info.json").read_text()) | {"annotations": []}
    (tmp_path / "info.json").write_text(json.dumps(content))
    assert scan_coco(files[1], files[2])[1].annotated


def test_training_evaluates_on_it_and_writes_the_servers_file(
    files, train_net, tiny_training, tmp_path
):
    train, info, images = files
    run = tmp_path / "run"
    data = ["--coco-json", train, info, "--image-root", images, "--output-dir", run]
    keys = ["--weights", "", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"]
    keys += [*tiny_training, "SOLVER.MAX_ITER", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    code, lines = train_net(CONFIG, *data, *keys)
    assert code == 0, lines
    (found,) = run.rglob(RESULT_FILE)
    rows = json.loads(found.read_text())
    assert {row["image_id"] for row in rows} == {106, 107}
    assert {row["category_id"] for row in rows} <= {7, 90}
    assert all(len(row["bbox"]) == 4 and 0 <= row["score"] <= 1 for row in rows)
    assert not list(run.rglob("*.tmp"))


def test_it_is_refused_as_training_data(files, train_net, tiny_training, tmp_path):
    train, info, images = files
    data = ["--coco-json", info, train, "--image-root", images, "--output-dir", tmp_path / "run"]
    keys = ["--weights", "", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"]
    code, lines = train_net(CONFIG, *data, *keys, *tiny_training)
    assert code == 2 and "data set train:coco has no boxes to learn from" in lines[-1]


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


def test_the_papers_trainval_protocol(registered, train_net, small, tmp_path):
    """Trains on the union of train and val, and writes test-dev's detections."""
    small = {key.replace("__", "."): value for key, value in small.items()}
    keys = """MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 1 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 5
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 4 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0"""
    pairs = ["MODEL.WEIGHTS", "", *keys.split(), *(word for pair in small.items() for word in pair)]
    code, lines = train_net("paper/coco_trainval_R_50.yaml", "--output-dir", "run", *pairs)
    assert code == 0, lines
    images = [image["file_name"] for name in DATASETS[:2] for image in DatasetCatalog.get(name)]
    assert len(images) == 6
    rows = json.loads((tmp_path / f"run/inference/{DATASETS[2]}/{RESULT_FILE}").read_text())
    assert {row["image_id"] for row in rows} == {106, 107}
