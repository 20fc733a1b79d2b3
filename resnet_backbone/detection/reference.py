"""Detectron2's own models and evaluator, and the parts of a step, for comparisons with ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

__all__ = ["GivenProposals", "PascalVOCDetectionEvaluator"]

THEIRS = {
    "build_paper_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_paper_resnet_backbone": "build_resnet_backbone",
    "PaperRes5ROIHeads": "Res5ROIHeads",
}
"""Our registered name -> Detectron2's own of the same keys."""


def build_reference(cfg: CfgNode) -> nn.Module:
    """The detector of a config as Detectron2 builds it, with its own ResNet and its own heads."""
    cfg = cfg.clone()
    for node in (cfg.MODEL.BACKBONE, cfg.MODEL.ROI_HEADS):
        node.NAME = THEIRS.get(node.NAME, node.NAME)
    return build_model(cfg)


class GivenProposals(nn.Module):
    """A proposal network that does all of its work and then returns given boxes.

    Those of random weights are alike and few, and ours would differ from the reference's in their
    last bits and so in their order.

    Args:
        network: the proposal network.
        boxes: (R, 4), the same for each image.
    """

    def __init__(self, network: nn.Module, boxes: Tensor):
        super().__init__()
        self.network = network
        self.boxes = boxes

    def forward(self, images, features, targets=None):
        _, losses = self.network(images, features, targets)
        scores = torch.linspace(5, -5, len(self.boxes))
        fields = dict(proposal_boxes=Boxes(self.boxes), objectness_logits=scores)
        return [Instances(size, **fields) for size in images.image_sizes], losses


def objects(size: tuple[int, int], boxes: Tensor, classes: Tensor) -> Instances:
    """Ground truth of an image of (height, width): boxes (N, 4) and their classes (N,)."""
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


def detections(size: tuple[int, int], boxes: Tensor, scores: Tensor, classes: Tensor) -> Instances:
    """What a detector returns for an image: boxes (N, 4), their scores (N,) and classes (N,)."""
    return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


def losses_of(model: nn.Module, inputs: list[dict]) -> dict[str, Tensor]:
    """One forward pass in training, outside a trainer."""
    with EventStorage():
        return model(inputs)


@contextmanager
def voc_metadata(folder: str, split: str, class_names: Sequence[str]):
    """Yields the name under which a folder in VOC layout is registered meanwhile."""
    name = f"reference_{folder}"
    facts = dict(dirname=folder, split=split, year=2012, thing_classes=list(class_names))
    MetadataCatalog.get(name).set(evaluator_type="voc", **facts)
    try:
        yield name
    finally:
        MetadataCatalog.pop(name)
