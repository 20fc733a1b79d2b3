"""Global context (paper, appendix B): the whole image's feature beside each region's.

The image is one more region: pooled and passed through the per-region layers like the others. Its
feature, concatenated with a region's, goes to the classifier and the regressor, whose input is
twice as wide; all of it is trained end to end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, shapes_to_tensor
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor

from resnet_backbone.detection.config import CONTEXT_HEADS, UsageError, backbone_node
from resnet_backbone.detection.modeling.heads import PaperRes5ROIHeads


def with_global_context(cfg: CfgNode) -> CfgNode:
    """The config with the region heads that ``RESNET_BACKBONE.GLOBAL_CONTEXT`` asks for.

    Returns:
        `cfg` itself where the switch is off or the heads are named already, else a copy.

    Raises:
        UsageError: there is no such form of the config's region heads.
    """
    name = cfg.MODEL.ROI_HEADS.NAME
    if not backbone_node(cfg).GLOBAL_CONTEXT or name in CONTEXT_HEADS.values():
        return cfg
    if name not in CONTEXT_HEADS or cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UsageError(
            f"RESNET_BACKBONE.GLOBAL_CONTEXT is for GeneralizedRCNN with "
            f"{' or '.join(CONTEXT_HEADS)}, not for {cfg.MODEL.META_ARCHITECTURE} with "
            f"MODEL.ROI_HEADS.NAME {name}"
        )
    named = cfg.clone()
    named.defrost()
    named.MODEL.ROI_HEADS.NAME = CONTEXT_HEADS[name]
    return named


def region_features(heads: ROIHeads, maps: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
    """Features after the per-region layers, before the classifier and the regressor.

    Args:
        heads: C4's (``Res5ROIHeads``) or ``StandardROIHeads``, and their subclasses.
        maps: feature maps of N images.
        boxes: regions of each image, R in all, in pixels of the network's input.

    Returns:
        (R, D) in the order of the boxes.
    """
    features = [maps[name] for name in heads.in_features]
    if isinstance(heads, Res5ROIHeads):
        return heads._shared_roi_transform(features, boxes).mean(dim=[2, 3])
    return heads.box_head(heads.box_pooler(features, boxes)).flatten(1)


def add_whole_image(boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The regions (Ri, 4) of each image, and behind them the image itself, without padding.

    Args:
        sizes: (height, width) of each image; scalar tensors in a trace, which records them.
    """
    found = []
    for regions, (height, width) in zip(boxes, sizes, strict=True):
        corner = shapes_to_tensor([width, height], device=regions.device).to(regions.dtype)
        image = torch.cat([torch.zeros_like(corner), corner])
        found.append(torch.cat([regions, image[None]]))
    return found


def join_context(features: Tensor, counts: Sequence[int]) -> Tensor:
    """Puts the feature of the whole image beside those of its regions.

    Args:
        features: (R + N, D), of the regions of :func:`add_whole_image`.
        counts: number of regions of each of the N images, without the image itself.

    Returns:
        (R, 2 D): the region's feature, then its image's.
    """
    joined = []
    for of_image in features.split([count + 1 for count in counts]):
        regions, image = of_image[:-1], of_image[-1:]
        joined.append(torch.cat([regions, image.expand_as(regions)], dim=1))
    return torch.cat(joined)


class GlobalContext:
    """What both kinds of region heads share; beside :class:`ROIHeads` in a class's bases."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not backbone_node(cfg).GLOBAL_CONTEXT:
            raise UsageError(
                f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME} needs "
                "RESNET_BACKBONE.GLOBAL_CONTEXT True"
            )
        if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise UsageError(
                "RESNET_BACKBONE.GLOBAL_CONTEXT is for boxes: set MODEL.MASK_ON and "
                "MODEL.KEYPOINT_ON False"
            )
        options = super().from_config(cfg, input_shape)
        channels = options["box_predictor"].cls_score.in_features
        options["box_predictor"] = FastRCNNOutputLayers(cfg, ShapeSpec(channels=2 * channels))
        return options

    def predict_with_context(
        self, maps: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Scores (R, K + 1) before the softmax and box deltas (R, 4 K) of all proposals."""
        boxes = [image.proposal_boxes.tensor for image in proposals]
        regions = add_whole_image(boxes, [image.image_size for image in proposals])
        features = region_features(self, maps, [Boxes(region) for region in regions])
        return self.box_predictor(join_context(features, [box.shape[0] for box in boxes]))

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]):
        """Losses in training, else a list of detections; as ``StandardROIHeads._forward_box``."""
        predictions = self.predict_with_context(features, proposals)
        if self.training:
            return self.box_predictor.losses(predictions, proposals)
        return self.box_predictor.inference(predictions, proposals)[0]


@ROI_HEADS_REGISTRY.register()
class ContextROIHeads(GlobalContext, StandardROIHeads):
    """``StandardROIHeads`` (VGG-16, DC5, FPN) with global context."""


@ROI_HEADS_REGISTRY.register()
class ContextRes5ROIHeads(GlobalContext, PaperRes5ROIHeads):
    """The C4 heads with global context: a region's feature is res5's, averaged over its cells."""

    def forward(self, images, features, proposals, targets=None):
        """As ``Res5ROIHeads.forward``: detections and losses."""
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
            return [], self._forward_box(features, proposals)
        return self._forward_box(features, proposals), {}
