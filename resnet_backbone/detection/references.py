"""Detectron2's counterparts of what a config builds, for comparisons with them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

__all__ = [
    "THEIRS",
    "Boxes",
    "GivenProposals",
    "Instances",
    "PascalVOCDetectionEvaluator",
    "build_detection_train_loader",
    "build_reference",
    "losses_of",
    "register_coco_instances",
    "voc_metadata",
]
THEIRS = {
    "build_paper_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_paper_resnet_backbone": "build_resnet_backbone",
    "PaperRes5ROIHeads": "Res5ROIHeads",
}
"""Our registered name -> Detectron2's own with the same keys."""


def build_reference(cfg: CfgNode) -> nn.Module:
    """Builds a config's detector with Detectron2's own ResNet and heads."""
    cfg = cfg.clone()
    for node in (cfg.MODEL.BACKBONE, cfg.MODEL.ROI_HEADS):
        node.NAME = THEIRS.get(node.NAME, node.NAME)
    if cfg.MODEL.RESNETS.DEPTH in (18, 34):
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64  # required by Detectron2 at these depths
    return build_model(cfg)


class GivenProposals(nn.Module):
    """A proposal network that runs as usual and then returns the given boxes (R, 4).

    Random weights yield few proposals, and rounding would change their order.
    """

    def __init__(self, network: nn.Module, boxes: Tensor):
        super().__init__()
        self.network, self.boxes = network, boxes

    def forward(self, images, features, targets=None):
        _, losses = self.network(images, features, targets)
        scores = torch.linspace(5, -5, len(self.boxes))
        fields = dict(proposal_boxes=Boxes(self.boxes), objectness_logits=scores)
        return [Instances(size, **fields) for size in images.image_sizes], losses


def losses_of(model: nn.Module, inputs: list[dict]) -> dict[str, Tensor]:
    """Returns the losses of one training forward pass, without a trainer."""
    with EventStorage():
        return model(inputs)


@contextmanager
def voc_metadata(folder: str, split: str, class_names: Sequence[str]):
    """Registers a folder in VOC layout within the block, and yields the data set's name."""
    name = f"reference_{folder}"
    facts = dict(dirname=folder, split=split, year=2012, thing_classes=list(class_names))
    MetadataCatalog.get(name).set(evaluator_type="voc", **facts)
    try:
        yield name
    finally:
        MetadataCatalog.pop(name)
