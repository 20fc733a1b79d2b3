"""Detectron2's own config files with our backbone, and its baselines that are LazyConfigs alone."""

from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import PolygonMasks
from detectron2.utils.events import EventStorage

from resnet_backbone.detection import build_detector
from resnet_backbone.detection.config import load_config
from resnet_backbone.runtime.errors import UsageError

# the form of Detectron2's Base-RetinaNet.yaml
RETINANET = """
MODEL:
  META_ARCHITECTURE: "RetinaNet"
  BACKBONE:
    NAME: "build_retinanet_resnet_fpn_backbone"
  RESNETS:
    OUT_FEATURES: ["res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res3", "res4", "res5"]
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["{formula}"]
"""
OURS = ["MODEL.BACKBONE.NAME", "build_paper_resnet_p6p7_backbone", "MODEL.WEIGHTS", ""]
FORMULA = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


def write(tmp_path, formula):
    path = tmp_path / "Base-RetinaNet.yaml"
    path.write_text(RETINANET.replace("{formula}", formula))
    return str(path)


def test_retinanet_of_the_zoo_with_our_backbone(tmp_path):
    cfg = load_config(write(tmp_path, FORMULA), [*OURS, "MODEL.DEVICE", "cpu"])
    assert eval(FORMULA) == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    model = build_detector(cfg)
    assert model.anchor_generator.num_anchors == [9] * 5
    assert type(model.backbone.bottom_up).__name__ == "PaperResNet"


@pytest.mark.parametrize(
    "formula",
    ["__import__('os').getcwd()", "9**9**9**9", "[x for x in 3]", "(1).real", "y", "1 +", "[1/0]"],
)
def test_formulas_are_not_executed(tmp_path, formula):
    with pytest.raises(UsageError, match="is no formula of numbers and lists"):
        load_config(write(tmp_path, formula), [])


FOLDER = Path(__file__).resolve().parents[2] / "configs"
SMALL = "depth=18 norm=BN".split()
LAZY = {
    "detection/coco/fcos_R_50_FPN_lazy.py": {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
    "segmentation/coco/mask_rcnn_R_50_FPN_LSJ_lazy.py": {
        *("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"),
    },
}


@pytest.mark.parametrize("name", LAZY)
def test_baselines_that_are_lazy_configs_start(name, images):
    config = LazyConfig.load(str(FOLDER / name))
    assert set(config) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    keys = [f"model.backbone.bottom_up.{word}" for word in SMALL]
    keys += ["model.backbone.norm=BN"] if "LSJ" in name else []
    model = instantiate(LazyConfig.apply_overrides(config, keys).model)
    for given in images:
        boxes = given["instances"].gt_boxes.tensor.tolist()
        outlines = [[[x, y, x1, y, x1, y1, x, y1]] for x, y, x1, y1 in boxes]
        given["instances"].gt_masks = PolygonMasks(outlines)
    with EventStorage():
        losses = model(images)
    assert set(losses) == LAZY[name] and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    schedule = instantiate(config.lr_multiplier)
    assert schedule(0.5) == pytest.approx(1) and schedule(0.999) == pytest.approx(0.01)
