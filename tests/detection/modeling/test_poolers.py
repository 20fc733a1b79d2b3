"""Detectron2's poolers with fast levels: the same bins, all or every second one."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torchvision.ops import roi_pool

from resnet_backbone.detection.modeling.heads import with_fast_poolers, with_stride
from resnet_backbone.fast.roi_align import RegionAlign

SCALE = 1 / 16


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign", "ROIPool"])
def test_pooler_of_every_second_bin(kind):
    features = [torch.randn(1, 4, 12, 16)]
    boxes = [Boxes(torch.tensor([[3.0, 4, 60, 70], [100, 20, 250, 180]]))]
    expected = ROIPooler(14, (SCALE,), 0, kind)(features, boxes)[:, :, ::2, ::2]
    found = with_stride(ROIPooler(14, (SCALE,), 0, kind), 2)(features, boxes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_detectors_poolers_become_fast(make_cfg, small):
    """Those of a pyramid, with the same results; twice is once."""
    model = build_model(make_cfg("voc/faster_rcnn_R_18_FPN.yaml", **small))
    pooler = model.roi_heads.box_pooler
    features = [torch.randn(1, 16, 64 // 2**i, 96 // 2**i) for i in range(4)]
    boxes = [Boxes(torch.tensor([[3.0, 4, 60, 70], [10, 20, 350, 240], [0, 0, 200, 150]]))]
    expected = pooler(features, boxes)
    keys = list(model.state_dict())
    assert with_fast_poolers(model) is model and list(model.state_dict()) == keys
    assert [type(level) for level in pooler.level_poolers] == [RegionAlign] * 4
    torch.testing.assert_close(pooler(features, boxes), expected, rtol=1e-5, atol=1e-5)
    assert with_fast_poolers(model).roi_heads.box_pooler.level_poolers == pooler.level_poolers


def test_double_precision_maps_are_pooled_by_roi_pool():
    features = torch.randn(1, 4, 12, 16, dtype=torch.float64)
    corners = torch.tensor([[3.0, 4, 60, 70], [100, 20, 250, 180]])
    expected = roi_pool(features, [corners.double()], 7, SCALE)
    found = with_stride(ROIPooler(7, (SCALE,), 0, "ROIPool"))([features], [Boxes(corners)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_half_precision_maps_are_pooled_by_roi_pool():
    pooler = ROIPooler(7, (SCALE,), 0, "ROIPool")
    features = torch.randn(1, 4, 12, 16).bfloat16()
    boxes = [Boxes(torch.tensor([[3.0, 4, 60, 70], [100, 20, 250, 180]]))]
    expected = pooler([features.float()], boxes)
    found = with_stride(pooler)([features], boxes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)  # maxima of its values
