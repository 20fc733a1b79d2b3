"""The backbone inside Detectron2's own detectors, and inside ours."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_model as build_detector  # noqa: E402

from resnet_backbone.detection import add_resnet_backbone_config  # noqa: E402
from resnet_backbone.models import build_model  # noqa: E402
from resnet_backbone.weights.architecture import infer_models  # noqa: E402
from resnet_backbone.weights.checkpoint import ModelSpec  # noqa: E402
from resnet_backbone.weights.keymaps import LAYOUTS, recognize  # noqa: E402
from resnet_backbone.weights.keymaps.table import without_counters  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection" / "voc"
DETECTRON2 = LAYOUTS["detectron2"]
FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.NORM": "BN",
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.KEYPOINT_ON": True,
}
DETECTORS = {
    "C4": {"MODEL.MASK_ON": True},
    "FPN": FPN,
    "FPN of BN": {**FPN, "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0},
    "Panoptic": {
        **FPN,
        "MODEL.META_ARCHITECTURE": "PanopticFPN",
        "MODEL.KEYPOINT_ON": False,
    },
    "RetinaNet": {
        **FPN,
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    },
    "Semantic": {**FPN, "MODEL.META_ARCHITECTURE": "SemanticSegmentor"},
    "DC5": {
        "MODEL.RESNETS.OUT_FEATURES": ["res5"],
        "MODEL.RESNETS.RES5_DILATION": 2,
        "MODEL.RPN.IN_FEATURES": ["res5"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    },
}


def detector_state(options, file=None):
    """A detector's tensors without values."""
    cfg = add_resnet_backbone_config(get_cfg())
    cfg.MODEL.DEVICE = "meta"
    if file:
        cfg.merge_from_file(str(CONFIGS / file))
    for key, value in options.items():
        cfg.merge_from_list([key, value])
    with torch.device("meta"):
        return build_detector(cfg).state_dict()


@pytest.mark.parametrize("name", DETECTORS)
def test_detectron2s_detectors(name):
    state = detector_state(DETECTORS[name])
    assert recognize(state) == "detectron2"
    tensors = DETECTRON2.to_ours(state)
    assert infer_models(tensors) == [ModelSpec("resnet50")]
    with torch.device("meta"):
        ours = without_counters(build_model("resnet50", out_features=["res5"]).state_dict())
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in ours.items()}
    place = "backbone." if name in ("C4", "DC5") else "backbone.bottom_up."
    assert tensors["res4.5.conv3.weight"] is state[place + "res4.5.conv3.weight"]
    if name == "C4":
        assert tensors["res5.2.conv3.weight"] is state["roi_heads.res5.2.conv3.weight"]


@pytest.mark.parametrize(
    "file, found, size",
    [
        ("faster_rcnn_R_18_FPN.yaml", ModelSpec("resnet18"), 100),
        ("faster_rcnn_R_101_C4.yaml", ModelSpec("resnet101"), 520),
        ("faster_rcnn_VGG_16.yaml", ModelSpec("vgg16"), 30),  # with fc6 and fc7
        ("faster_rcnn_VGG_16_FPN.yaml", ModelSpec("vgg16"), 26),
    ],
)
def test_our_detectors(file, found, size):
    state = detector_state({}, file)
    assert recognize(state) == "detectron2"
    tensors = DETECTRON2.to_ours(state)
    assert infer_models(tensors) == [found]
    assert len(tensors) == size
    assert ("fc6.weight" in tensors) == (size == 30)


@pytest.mark.parametrize(
    "key",
    [
        "backbone.bottom_up.neck.weight",
        "backbone.bottom_up.res2x.weight",
        "backbone.res2.0.conv1.weight",
        "teacher.backbone.stem.conv1.weight",
        "linear.weight",
    ],
)
def test_unknown_parts_of_a_detector(key):
    with torch.device("meta"):
        state = build_model("resnet18", out_features=["res5"]).state_dict(
            prefix="backbone.bottom_up."
        )
    state["pixel_mean"] = torch.ones(3)
    assert infer_models(DETECTRON2.to_ours(state)) == [ModelSpec("resnet18")]
    with pytest.raises(ValueError, match=f"key '{key}' is not one of a Detectron2 ResNet"):
        DETECTRON2.to_ours({**state, key: torch.ones(1)})


def test_two_stages_of_one_name():
    with torch.device("meta"):
        state = build_model("resnet18", out_features=["res5"]).state_dict(prefix="backbone.")
    twice = {**state, "roi_heads.res5.0.conv1.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="names res5.0.conv1.weight, which the backbone has too"):
        DETECTRON2.to_ours(twice)


def test_another_box_head_of_a_resnet_detector_is_left_out():
    with torch.device("meta"):
        state = build_model("resnet18", out_features=["res5"]).state_dict(prefix="backbone.")
    state["roi_heads.box_head.fc6.weight"] = torch.ones(1)
    assert infer_models(DETECTRON2.to_ours(state)) == [ModelSpec("resnet18")]


def test_no_backbone():
    with pytest.raises(ValueError, match="no backbone: none of stem.conv1.weight"):
        DETECTRON2.to_ours({"roi_heads.box_head.fc1.weight": torch.ones(1)})
