"""Small networks with norms that count, and comparisons of outputs."""

import copy

import torch
from torch import nn

from resnet_backbone import build_model
from resnet_backbone.fast.optimize import FoldingConvNorm, FoldingConvNormAct, change_classes
from resnet_backbone.models import StagedNetwork
from resnet_backbone.models.layers import ConvNorm, ConvNormAct

PLAIN = {FoldingConvNorm: ConvNorm, FoldingConvNormAct: ConvNormAct}


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Norms that are not the identity, so that a misplaced one shows."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                module.weight.uniform_(0.4, 0.8)
                module.bias.normal_(0, 0.2)
    return model


def network(name="cifar_resnet8", seed=0, **options) -> StagedNetwork:
    torch.manual_seed(seed)
    if name.startswith("vgg"):  # its classifier is large and has no convolutions
        options = {"out_features": ("conv5",), **options}
        options.pop("num_classes", None)
    return randomize(build_model(name, **options)).eval()


@torch.no_grad()
def unfolded(model: nn.Module, images):
    """The outputs by the paper's layers: convolution, then norm."""
    return change_classes(copy.deepcopy(model), PLAIN)(images)


def assert_close(found, expected, bound=1e-4):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_close(found[name], expected[name], bound)
        return
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= bound * expected.abs().max()
