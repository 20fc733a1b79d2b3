"""Detectron2's own config files, with the name of the backbone replaced."""

import pytest

pytest.importorskip("detectron2")

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
