"""Builds a detector from a config."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.detection.config import backbone_node, building
from resnet_backbone.detection.modeling.heads import (
    ImagewisePooler,
    with_global_context,
    with_stride,
)
from resnet_backbone.fast.optimize import change_classes, in_graph, is_watched
from resnet_backbone.fast.sparse import ProposalHead, can_be_sparse, inputs_of

logger = logging.getLogger(__name__)
LAST_LAYERS = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")


def build_detector(cfg: CfgNode) -> nn.Module:
    """Builds a detector with Detectron2's ``build_model`` and this package's additions.

    These are a proposal network and RoIAlign that are fast on CPUs, scores and boxes in single
    precision, region heads with global context if ``RESNET_BACKBONE.GLOBAL_CONTEXT`` is set, and
    channels_last convolutions if ``RESNET_BACKBONE.CHANNELS_LAST`` is set.

    The model is on ``MODEL.DEVICE`` and in training mode, with Detectron2's parameter names.
    ``MODEL.WEIGHTS`` is not loaded. UsageError: Detectron2 cannot build a model of this config, or
    the heads do not support ``GLOBAL_CONTEXT``.
    """
    with building("model"):
        model = with_exact_scores(build_model(with_global_context(cfg)))
    kinds = {StandardRPNHead: JointRPNHead, RPN: TopRPN, ROIPooler: ImagewisePooler}
    model = change_classes(model, kinds)
    for module in model.modules():
        if isinstance(module, ROIPooler):
            with_stride(module)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    logger.info("%s with %.1f M parameters", cfg.MODEL.BACKBONE.NAME, millions)
    if backbone_node(cfg).CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
        heads = getattr(model, "roi_heads", None)
        if getattr(heads, "keypoint_on", False):
            last = heads.keypoint_head.score_lowres
            kinds = {nn.ConvTranspose2d: ContiguousDeconv}
            heads.keypoint_head.score_lowres = change_classes(last, kinds)
    return model


class ContiguousDeconv(nn.ConvTranspose2d):
    """A transposed convolution with a contiguous output, which Detectron2's keypoint loss needs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class _Full:
    """A layer that ignores autocast and computes in the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class FullLinear(_Full, nn.Linear):
    """``nn.Linear`` that ignores autocast."""


class FullConv2d(_Full, nn.Conv2d):
    """``nn.Conv2d`` that ignores autocast."""


class JointRPNHead(StandardRPNHead):
    """``StandardRPNHead`` that is fast on CPUs.

    The two 1x1 convolutions, which ignore autocast, read the same large map and have few outputs,
    so they are computed as one. The backward pass computes only cells with a sampled anchor. Maps
    L levels (N, C, H, W) to lists of logits (N, A, H, W) and deltas (N, 4 A, H, W).
    """

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        layers, conv = (self.objectness_logits, self.anchor_deltas), self.conv
        exact = all(type(layer) is FullConv2d for layer in layers)
        if not exact or any(map(is_watched, (*conv.modules(), *layers))):  # skipped below
            return super().forward(features)
        last = [
            torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias")
        ]
        has_relu = type(conv) is Conv2d and type(conv.activation) is nn.ReLU
        found = []
        for x in features:
            if has_relu and can_be_sparse(conv, x):
                outputs = ProposalHead.apply(*inputs_of(conv, x), *last)
            else:
                x = conv(x).to(last[0].dtype)
                with torch.autocast(x.device.type, enabled=False):
                    outputs = F.conv2d(x, *last)
            found.append(outputs.split([layer.out_channels for layer in layers], 1))
        scores, deltas = zip(*found, strict=True)
        return list(scores), list(deltas)


class TopRPN(RPN):
    """``RPN`` that decodes only the anchors with the best scores, which can become proposals.

    Detectron2 decodes all of them (243,000 in an 800x1216 image with FPN) and then picks the best
    ``PRE_NMS_TOPK`` of each level. The proposals are equal, except that those of equal scores may
    have another order.
    """

    def predict_proposals(self, anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes):
        levels = anchors, pred_objectness_logits, pred_anchor_deltas
        if in_graph(pred_objectness_logits[0]):
            return super().predict_proposals(*levels, image_sizes)
        before, after = self.pre_nms_topk[self.training], self.post_nms_topk[self.training]
        scores, boxes = [], []
        with torch.no_grad():
            for places, logits, deltas in zip(*levels, strict=True):
                logits, best = logits.topk(min(before, logits.shape[1]), dim=1)  # (N, K)
                deltas = deltas.gather(1, best[..., None].expand(-1, -1, deltas.shape[2]))
                pairs = deltas.flatten(0, 1), places.tensor[best].flatten(0, 1)
                boxes.append(self.box2box_transform.apply_deltas(*pairs).view_as(deltas))
                scores.append(logits)
            limits = self.nms_thresh, before, after, self.min_box_size
            return find_top_rpn_proposals(boxes, scores, image_sizes, *limits, self.training)


def with_exact_scores(model: nn.Module) -> nn.Module:
    """Excludes the last layers for proposals and boxes from mixed precision, in place.

    A bf16 score has 8 bits. Thousands of 200,000 anchors tie, and all detections above 0.5 share
    128 scores, which makes the ranking of proposals and detections random. These layers (linear or
    1x1 convolutions) are a thousandth of the work. The losses, decoding and NMS after them run in
    single precision. Without mixed precision nothing changes.
    """
    kinds = {nn.Linear: FullLinear, nn.Conv2d: FullConv2d}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if name in LAST_LAYERS and getattr(layer, "kernel_size", (1, 1)) == (1, 1):
                setattr(parent, name, change_classes(layer, kinds))
    return model
