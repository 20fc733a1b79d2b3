"""Every detection config starts; those that differ in data or length alone are one run here."""

import json
import math
import re
from pathlib import Path

import detectron2
import pytest

from resnet_backbone.detection.checkpoint.files import refuse_other_input
from resnet_backbone.detection.checkpoint.input_check import config_input
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.engine.schedule import check_training
from resnet_backbone.detection.evaluation import voc
from resnet_backbone.weights import sources

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
FILES = sorted(path for path in CONFIGS.glob("*/*.yaml") if not path.name.startswith("Base-"))
NAMES = [str(path.relative_to(CONFIGS)) for path in FILES]
WITH_WEIGHTS = [one for one in NAMES if not re.search("^(quickstart|voc07)/|from_coco", one)]
MASKS = sorted(CONFIGS.glob("../segmentation/*/*.yaml"))
SEGMENTATION = [str(path.relative_to(CONFIGS)) for path in MASKS]
# Small, but the paper's anchors of 128 pixels lie inside the image.
SMALL = """INPUT.MIN_SIZE_TRAIN (160,) INPUT.MAX_SIZE_TRAIN 240 INPUT.MIN_SIZE_TEST 160
INPUT.MAX_SIZE_TEST 240 MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TEST 20
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 16
SOLVER.IMS_PER_BATCH 1 SOLVER.MAX_ITER 1 DATALOADER.NUM_WORKERS 0 TEST.PRECISE_BN.NUM_ITER 2
SOLVER.AMP.ENABLED False MODEL.BACKBONE.FREEZE_AT 0""".split()


RPN = {"loss_rpn_cls", "loss_rpn_loc"}
BOX = {"loss_cls", "loss_box_reg"}
# what a config learns, by the first word of its name; others are Faster R-CNN
LOSSES = {
    "retinanet": BOX,
    "keypoint": RPN | BOX | {"loss_keypoint"},
    "cascade": RPN | {f"{loss}_stage{stage}" for loss in BOX for stage in range(3)},
    "rpn": {"loss_loc_cls", "loss_loc_box"},
    "rcnn": {"loss_loc_cls", "loss_loc_box"},
}


def is_coco(name: str) -> bool:
    return name.startswith(("coco", "imagenet")) or "/coco" in name


@pytest.fixture
def data(tiny_voc, tiny_coco, tmp_path):
    """Function (name of a config) -> options for the tiny VOC data set."""

    def options(name: str) -> list:
        if not is_coco(name):
            return ["--voc-root", tiny_voc, "--train-set", "train", "--test-set", "test"]
        train, test = tmp_path / "train.json", tmp_path / "test.json"
        for path, numbers in ((train, range(6)), (test, range(6, 8))):
            tiny_coco(path, numbers, only=90 if "_loc/" in name else None)  # one class an image
            content = json.loads(path.read_text())
            if "keypoint" in name:  # people
                content["categories"] = [{"id": 90, "name": "person"}]
                for one in content["annotations"]:
                    x, y, width, height = one["bbox"]
                    one |= {"category_id": 90, "num_keypoints": 17}
                    one["keypoints"] = [x + width // 2, y + height // 2, 2] * 17
            path.write_text(json.dumps(content))
        return ["--coco-json", train, test, "--image-root", tiny_voc / "JPEGImages"]

    return options


@pytest.fixture(scope="module")
def results():
    """What runs that were done had, by the config that they amounted to."""
    return {}


def amounts_to(name, overrides) -> str:
    """The config without what this test replaces (the data) or one iteration does not reach."""
    cfg = load_config(str(CONFIGS / name), [str(word) for word in overrides])
    check_training(cfg)
    del cfg["DATASETS"]
    for key in ("STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD", "BASE_LR"):
        del cfg.SOLVER[key]
    del cfg.TEST["EVAL_PERIOD"], cfg.MODEL.ROI_HEADS["NUM_CLASSES"]
    return f"{is_coco(name)} {cfg.dump()}"


@pytest.mark.parametrize("name", [*WITH_WEIGHTS, *SEGMENTATION])
def test_weights_and_their_input(name, monkeypatch):
    monkeypatch.setattr(sources, "download", lambda url, target, *_: target)
    cfg = load_config(str(CONFIGS / name), [])
    assert "://" in cfg.MODEL.WEIGHTS
    refuse_other_input(config_input(cfg), sources.resolve(cfg.MODEL.WEIGHTS).preprocessing, name)
    depth = "VGG" in name and "vgg16" or cfg.MODEL.RESNETS.DEPTH
    assert str(depth) in cfg.MODEL.WEIGHTS or "self-supervised" in (CONFIGS / name).read_text()
    if name in SEGMENTATION:
        assert cfg.RESNET_BACKBONE.REFERENCE_BATCH == cfg.SOLVER.IMS_PER_BATCH == 16


KINDS = {"faster_rcnn_R_50_C4_1x": "", "faster_rcnn_R_50_DC5_1x": ""}
KINDS |= {"faster_rcnn_R_50_FPN_1x": "_fpn", "rpn_R_50_FPN_1x": "_fpn"}
KINDS |= {"retinanet_R_50_FPN_1x": "_p6p7"}


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", KINDS.items())
def test_files_of_detectron2s_zoo_start(train_net, data, tmp_path, name, kind):
    file = Path(detectron2.__file__).parent / "model_zoo/configs/COCO-Detection" / f"{name}.yaml"
    keys = [*SMALL, "MODEL.RESNETS.NORM", "BN", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    keys += ["MODEL.BACKBONE.NAME", f"build_paper_resnet{kind}_backbone"]
    train_net(file, "--output-dir", tmp_path, *data("coco"), *keys)
    assert (tmp_path / "model_final.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_starts(train_net, data, tmp_path, name, results, monkeypatch):
    monkeypatch.setattr(voc, "draw_voc", lambda *given: None)
    run = tmp_path / "run"
    keys = [*SMALL, "MODEL.RESNETS.NORM", "BN", "MODEL.WEIGHTS", ""]
    if name.startswith("imagenet_loc/rcnn"):
        proposer = tmp_path / "proposer"
        rpn = name.replace("rcnn", "rpn")
        train_net(rpn, "--output-dir", proposer, *data(rpn), *keys)
        keys += ["RESNET_BACKBONE.LOCALIZATION.PROPOSALS", str(proposer)]
    if name.startswith("voc07"):
        keys += ["MODEL.FPN.OUT_CHANNELS", "32"]  # the groups of its norm
    if name.startswith("quickstart"):
        keys += ["RESNET_BACKBONE.VGG.NORM", "BN"]
    known = amounts_to(name, keys)
    if known not in results:
        where = ["--output-dir", run, *data(name)]
        train_net(name, *where, *keys)
        rows = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
        losses = {key: value for row in rows for key, value in row.items() if "loss" in key}
        assert (run / "model_final.pth").is_file()
        results[known] = losses, json.loads((run / "results.json").read_text())
    losses, content = results[known]
    if name.startswith("imagenet_det/"):
        assert "AP75" not in content["results"]["bbox"], "it is not the metric of DET"
    wanted = LOSSES.get(Path(name).name.split("_")[0], RPN | BOX)
    assert wanted <= losses.keys()
    assert all(math.isfinite(value) for value in losses.values())
    assert all(losses[key] > 0 for key in wanted if "cls" in key)
    task, number = ("localization", "true_class_error") if "_loc/" in name else ("bbox", "AP50")
    assert content["iterations"] == 1 and 0 <= content["results"][task][number] <= 100
    assert content["test_precision"] == "float32"
