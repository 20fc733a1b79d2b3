"""Under mixed precision a detector's scores and boxes are computed in single precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAST_LAYERS = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")


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

    A bf16 score has 8 bits: of 200,000 anchors thousands are equal, and detections above 0.5 have
    128 scores to share, so that their order, by which proposals and AP are ranked, is chance. These
    layers (linear, or 1x1 convolutions) are a thousandth of the work. Losses, decoding and NMS
    follow them in single precision. Without mixed precision nothing changes.
    """
    kinds = {nn.Linear: FullLinear, nn.Conv2d: FullConv2d}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LAST_LAYERS and type(module) in kinds:
            if getattr(module, "kernel_size", (1, 1)) == (1, 1):
                module.__class__ = kinds[type(module)]
    return model
