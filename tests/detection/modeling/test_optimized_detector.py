"""optimize_for_inference on whole detectors: which parts take bf16, and the detections."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from torch import nn

from resnet_backbone import optimize_for_inference
from resnet_backbone.fast import InferenceNetwork

FILES = {name: f"voc/faster_rcnn_{name}.yaml" for name in ("R_18_FPN", "R_18_C4", "VGG_16")}
CHEAP = dict(MODEL__RPN__POST_NMS_TOPK_TEST=20, MODEL__ROI_BOX_HEAD__FC_DIM=16)


@pytest.fixture
def detector(make_cfg):
    """Function (config's name) -> a small detector in evaluation mode that is sure of itself."""

    def build(name):
        torch.manual_seed(0)
        keys = dict(RESNET_BACKBONE__VGG__DEPTH=11) if "VGG" in name else {}
        model = build_model(make_cfg(FILES[name], **CHEAP, **keys)).eval()
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
        return model

    return build


@pytest.mark.parametrize(
    "name, half",
    [
        ("R_18_FPN", {"backbone", "proposal_generator.rpn_head.conv", "roi_heads.box_head"}),
        ("R_18_C4", {"backbone", "proposal_generator.rpn_head.conv", "roi_heads.res5"}),
        ("VGG_16", {"backbone", "proposal_generator.rpn_head.conv", "roi_heads.box_head"}),
    ],
)
def test_layers_that_give_scores_and_boxes_stay_in_float32(detector, images, name, half):
    model = detector(name)
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    modules = dict(fast.named_modules())
    assert {key for key, value in modules.items() if isinstance(value, InferenceNetwork)} == half
    for key, parameter in fast.named_parameters():
        inside = any(key.startswith(part + ".") for part in half)
        assert parameter.dtype == (torch.bfloat16 if inside else torch.float32), key
    with torch.no_grad():
        for output in fast(images):
            instances = output["instances"]
            assert instances.scores.dtype == instances.pred_boxes.tensor.dtype == torch.float32
    assert model.proposal_generator.rpn_head.conv.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_scores_of_given_regions(detector, images, dtype, bound):
    """Of the proposals of the original, since those of rounded scores come in another order."""
    model = detector("R_18_FPN")
    fast = optimize_for_inference(model, dtype=dtype)
    with torch.no_grad():
        prepared = model.preprocess_image(images)
        proposals, _ = model.proposal_generator(prepared, model.backbone(prepared.tensor))
        scores = []
        for detector_ in (model, fast):
            maps = detector_.backbone(prepared.tensor)
            heads = detector_.roi_heads
            regions = heads.box_pooler(
                [maps[name] for name in heads.in_features], [p.proposal_boxes for p in proposals]
            )
            scores.append(heads.box_predictor(heads.box_head(regions))[0])
            objectness, _ = detector_.proposal_generator.rpn_head([maps["p4"]])
            scores.append(objectness[0])
    for expected, found in ((scores[0], scores[2]), (scores[1], scores[3])):
        assert (found - expected).abs().max() < bound * expected.abs().max()
