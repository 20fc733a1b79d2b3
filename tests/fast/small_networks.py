"""Small networks with norms that count, and their outputs by the paper's layers."""

import copy

import torch
from drawn_networks import randomise
from torch import nn

from resnet_backbone import build_model
from resnet_backbone.fast.optimize import FoldingConvNorm, FoldingConvNormAct, change_classes
from resnet_backbone.models import StagedNetwork
from resnet_backbone.models.layers import ConvNorm, ConvNormAct

PLAIN = {FoldingConvNorm: ConvNorm, FoldingConvNormAct: ConvNormAct}


def network(name="cifar_resnet8", seed=0, **options) -> StagedNetwork:
    torch.manual_seed(seed)
    if name.startswith("vgg"):  # its classifier is large and has no convolutions
        options = {"out_features": ("conv5",), **options}
        options.pop("num_classes", None)
    return randomise(build_model(name, **options))


@torch.no_grad()
def unfolded(model: nn.Module, images):
    """The outputs by the paper's layers: convolution, then norm."""
    return change_classes(copy.deepcopy(model), PLAIN)(images)
