"""Detectron2's own ResNet-FPN and Faster R-CNN beside ours, to compare and to measure."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from torch import nn

from resnet_backbone.detection.config import add_resnet_backbone_config
from resnet_backbone.detection.engine.trainer import Trainer

STAGES = ["res2", "res3", "res4", "res5"]
LEVELS = ["p2", "p3", "p4", "p5", "p6"]


def _config(depth: int) -> CfgNode:
    cfg = add_resnet_backbone_config(get_cfg())
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    return cfg


def build_fpn(ours: bool, depth: int = 50) -> nn.Module:
    """A registered ResNet-FPN as it comes: ours, or Detectron2's own.

    Both map (N, 3, H, W) to a dict of p2 ... p6 and have the same keys. Batch norms are frozen,
    and so are stem and res2: Detectron2's defaults.
    """
    cfg = _config(depth)
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = STAGES
    name = "build_paper_resnet_fpn_backbone" if ours else "build_resnet_fpn_backbone"
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))


def detector_config(arch: str, ours: bool, regions: int = 512) -> CfgNode:
    """Faster R-CNN R-50 with 80 classes, Detectron2's defaults and those of its model zoo.

    Args:
        arch: "fpn" or "c4".
        ours: with our backbone and C4 head instead of Detectron2's.
        regions: per image in training.
    """
    cfg = _config(50)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = regions
    names = cfg.MODEL
    if arch == "c4":
        names.BACKBONE.NAME = "build_paper_resnet_backbone" if ours else "build_resnet_backbone"
        names.ROI_HEADS.NAME = "PaperRes5ROIHeads" if ours else "Res5ROIHeads"
        names.RPN.PRE_NMS_TOPK_TEST = 6000
        return cfg
    backbone = "build_paper_resnet_fpn_backbone" if ours else "build_resnet_fpn_backbone"
    names.BACKBONE.NAME, names.ROI_HEADS.NAME = backbone, "StandardROIHeads"
    names.RESNETS.OUT_FEATURES = names.FPN.IN_FEATURES = STAGES
    names.RPN.IN_FEATURES, names.ROI_HEADS.IN_FEATURES = LEVELS, LEVELS[:4]
    names.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    names.RPN.PRE_NMS_TOPK_TRAIN, names.RPN.PRE_NMS_TOPK_TEST = 2000, 1000
    names.RPN.POST_NMS_TOPK_TRAIN = 1000
    head = names.ROI_BOX_HEAD
    head.NAME, head.NUM_FC, head.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 7
    return cfg


def build_detector(arch: str, ours: bool, regions: int = 512) -> nn.Module:
    """The detector of that config, as Detectron2 builds it or as our trainer does; same keys."""
    cfg = detector_config(arch, ours, regions)
    torch.manual_seed(0)
    return Trainer.build_model(cfg) if ours else build_model(cfg)
