"""Scores and boxes under bf16 autocast."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.modeling.build import FullConv2d, FullLinear, with_exact_scores

FPN = "voc/faster_rcnn_R_18_FPN.yaml"


def test_our_trainers_detectors_have_it(make_cfg, small):
    model = Trainer.build_model(make_cfg(FPN, **small))
    keys = list(build_model(make_cfg(FPN, **small)).state_dict())
    assert list(model.state_dict()) == keys
    kinds = {name: type(module) for name, module in model.named_modules()}
    exact = {name for name, kind in kinds.items() if kind in (FullConv2d, FullLinear)}
    assert exact == {
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }


def test_scores_are_in_single_precision_under_autocast(make_cfg, small):
    """Two regions whose scores differ by less than bf16 can tell keep their order."""
    model = with_exact_scores(build_model(make_cfg(FPN, **small)))
    features = torch.zeros(2, 16)
    features[:, 0], features[1, 1] = 1.0, 1.0
    predictor, head = model.roi_heads.box_predictor, model.proposal_generator.rpn_head
    with torch.no_grad():
        predictor.cls_score.weight[0, :2] = torch.tensor([3.0, 0.001])
        hidden = torch.rand(1, 16, 8, 8)
        expected = head.objectness_logits(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, deltas = predictor(features.bfloat16())
            logits = head.objectness_logits(hidden)
    assert scores.dtype == deltas.dtype == logits.dtype == torch.float32
    assert float(scores[1, 0] - scores[0, 0]) == pytest.approx(0.001, rel=0.01)
    assert torch.equal(logits, expected)


def test_trains_and_detects_under_autocast(make_cfg, small, images):
    model = with_exact_scores(build_model(make_cfg(FPN, **small)))
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert model.roi_heads.box_predictor.cls_score.weight.grad.any()
    assert model.backbone.fpn_output2.weight.grad.any()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        instances = model.eval()(images)[0]["instances"]
    assert len(instances) and instances.scores.dtype == torch.float32
    assert instances.pred_boxes.tensor.dtype == torch.float32
