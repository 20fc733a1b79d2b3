"""A detector from its config, as training, evaluation and prediction use it."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from resnet_backbone.detection.config import backbone_node
from resnet_backbone.detection.modeling.context import with_global_context
from resnet_backbone.detection.modeling.heads import with_fast_poolers
from resnet_backbone.fast.folding import change_classes

logger = logging.getLogger(__name__)
LAST_LAYERS = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")


def build_detector(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``, with what this package adds to every detector.

    Region heads with global context where ``RESNET_BACKBONE.GLOBAL_CONTEXT`` is set, RoIAlign that
    is fast on CPUs, :func:`with_exact_scores`, and channels_last convolutions where
    ``RESNET_BACKBONE.CHANNELS_LAST`` is set.

    Args:
        cfg: of the detector; ``MODEL.WEIGHTS`` is not loaded.

    Returns:
        The model on ``MODEL.DEVICE``, in training mode, with Detectron2's parameter names.

    Raises:
        UsageError: ``GLOBAL_CONTEXT`` with region heads that do not have it.
    """
    model = with_exact_scores(with_fast_poolers(build_model(with_global_context(cfg))))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    logger.info("%s with %.1f M parameters", cfg.MODEL.BACKBONE.NAME, millions)
    if backbone_node(cfg).CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
    return model


class FullLinear(nn.Linear):
    """``nn.Linear`` that autocast leaves alone: it computes in its weights' precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class FullConv2d(nn.Conv2d):
    """``nn.Conv2d`` in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def with_exact_scores(model: nn.Module) -> nn.Module:
    """Takes the last layers of a detector's proposals and boxes out of mixed precision, in place.

    A bf16 score has 8 bits. Of 200,000 anchors thousands have equal scores, and all detections
    above 0.5 share 128 scores, so their order, by which proposals and AP are ranked, is random.
    These layers (linear, or 1x1 convolutions) are a thousandth of the work. Losses, decoding and
    NMS follow them in single precision. Without mixed precision nothing changes.
    """
    kinds = {nn.Linear: FullLinear, nn.Conv2d: FullConv2d}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if name in LAST_LAYERS and getattr(layer, "kernel_size", (1, 1)) == (1, 1):
                setattr(parent, name, change_classes(layer, kinds))
    return model
