"""A detector as evaluations and predictions run it."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from resnet_backbone.detection.inference import improve


class AutocastModel(nn.Module):
    """Runs a detector under bf16 autocast on the CPU."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(inputs)


def for_testing(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model as evaluations run it: improved as ``RESNET_BACKBONE.TEST`` says, in its precision.

    Raises:
        UsageError, WeightsError: see :func:`improve`.
    """
    bare = model.model if isinstance(model, AutocastModel) else model
    tested = improve(cfg, bare)
    on_cpu = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"
    return AutocastModel(tested) if on_cpu else tested
