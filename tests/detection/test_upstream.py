"""Detectron2's own trainer, predictor and checkpointer, unchanged, with our backbones."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import PascalVOCDetectionEvaluator

from resnet_backbone.weights import WeightsError

NAMES = {"train": "upstream_train", "test": "upstream_test"}


@pytest.fixture
def cfg(make_cfg, small, tiny_voc, tmp_path):
    for split, name in NAMES.items():
        register_pascal_voc(name, str(tiny_voc), split, 2007, class_names=["bar", "box"])
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    cfg = make_cfg("quickstart/faster_rcnn_R_18_FPN.yaml", **small)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAMES["train"],), (NAMES["test"],)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH = 2, (), 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.AMP.ENABLED = False  # Detectron2's needs a GPU
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


class Trainer(DefaultTrainer):
    """Detectron2's trainer; the evaluator is what it asks users to give."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return PascalVOCDetectionEvaluator(dataset_name)


def test_default_trainer_trains_resumes_and_predicts(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "AP50" in trainer._last_eval_results["bbox"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    cfg.SOLVER.MAX_ITER = 3
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in again.model.state_dict().items())
    again.train()
    assert again.iter == 3

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    for key, value in (("INPUT.FORMAT", "RGB"), ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675])):
        other = cfg.clone()
        other.merge_from_list([key, value])
        for load in (DefaultPredictor, lambda cfg: Trainer(cfg).resume_or_load(resume=True)):
            with pytest.raises(WeightsError, match=f"on other input: {key} is .*; set {key}"):
                load(other)
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    found = DefaultPredictor(cfg)(image)["instances"]
    again.model.eval()
    again.model.roi_heads.box_predictor.test_score_thresh = 0.0
    tensor = torch.from_numpy(image.astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        expected = again.model([dict(image=tensor, height=64, width=96)])[0]["instances"]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["R_18_C4", "R_18_DC5", "VGG_16", "VGG_16_FPN"])
def test_default_trainer_with_other_detectors(make_cfg, cfg, file):
    other = make_cfg(f"voc/faster_rcnn_{file}.yaml", MODEL__ROI_BOX_HEAD__FC_DIM=16)
    for key in ("DATASETS", "INPUT", "SOLVER", "OUTPUT_DIR", "DATALOADER"):
        other[key] = cfg[key]
    other.MODEL.ROI_HEADS.NUM_CLASSES = 2
    other.SOLVER.BASE_LR = 1e-4
    trainer = Trainer(other)
    trainer.train()
    assert trainer.iter == 2


ENV_MODULE = """
from resnet_backbone import detection

def setup_environment():
    detection.was_set_up = True
"""
REGISTERED = """
import sys
import detectron2  # alone
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.env import setup_custom_environment

assert "build_paper_resnet_backbone" in BACKBONE_REGISTRY, "not registered"
setup_custom_environment(sys.argv[1])
assert sys.modules["resnet_backbone.detection"].was_set_up
"""


def test_env_module(tmp_path):
    """DETECTRON2_ENV_MODULE (detectron2/utils/env.py) brings our backbones to any script.

    It may name our module, or a file that imports it.
    """
    plugin = tmp_path / "plugin.py"
    plugin.write_text(ENV_MODULE)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REGISTERED, str(plugin)],
        env=os.environ | {"DETECTRON2_ENV_MODULE": "resnet_backbone.detection"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
