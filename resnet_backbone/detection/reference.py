"""Detectron2's own ResNet-FPN beside ours, to compare and to measure."""

from __future__ import annotations

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from resnet_backbone.detection.config import add_resnet_backbone_config


def build_fpn(ours: bool, depth: int = 50) -> nn.Module:
    """A registered ResNet-FPN as it comes: ours, or Detectron2's own.

    Both map (N, 3, H, W) to a dict of p2 ... p6 and have the same keys. Batch norms are frozen,
    and so are stem and res2: Detectron2's defaults.
    """
    cfg = add_resnet_backbone_config(get_cfg())
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    name = "build_paper_resnet_fpn_backbone" if ours else "build_resnet_fpn_backbone"
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))
