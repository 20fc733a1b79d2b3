"""Networks with random values, by which a misplaced layer shows, or with none; their outputs."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from resnet_backbone import build_model
from resnet_backbone.fast.optimize import FoldingConvNorm, FoldingConvNormAct, change_classes
from resnet_backbone.models import StagedNetwork
from resnet_backbone.models.layers import ConvNorm, ConvNormAct
from resnet_backbone.weights import Checkpoint, ModelSpec, get_preprocessing
from resnet_backbone.weights.keymaps.table import without_counters

PLAIN = {FoldingConvNorm: ConvNorm, FoldingConvNormAct: ConvNormAct}


def on_meta(build: Callable[..., nn.Module], *args, **options) -> nn.Module:
    """A network that ``build`` makes of the arguments, on the meta device."""
    with torch.device("meta"):
        return build(*args, **options)


def meta_state(name: str, *args, **options) -> dict[str, Tensor]:
    """The tensors of a network of ours, without values and without counters."""
    return without_counters(on_meta(build_model, name, *args, **options).state_dict())


def randomize(network: nn.Module) -> nn.Module:
    """Fresh values that keep signals near 1; norms, frozen ones too, are not the identity."""
    for module in network.modules():
        has_statistics = getattr(module, "running_var", None) is not None
        if (has_statistics or isinstance(module, nn.GroupNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = (3 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
        if has_statistics:
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked.zero_()
    return network.eval()


def random_checkpoint(name, convention="torchvision", num_classes=10, **options) -> Checkpoint:
    """Random weights that state a convention as their input."""
    torch.manual_seed(0)
    preprocessing = get_preprocessing(convention)
    if name in ("resnet50", "resnet101", "resnet152"):
        options["stride_in_1x1"] = preprocessing.stride_in_1x1
    else:
        preprocessing = replace(preprocessing, stride_in_1x1=None)
    spec = ModelSpec(name, num_classes, options)
    state = without_counters(randomize(spec.build()).state_dict())
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    return Checkpoint(tensors, spec, preprocessing)


def network(name="cifar_resnet8", seed=0, **options) -> StagedNetwork:
    torch.manual_seed(seed)
    if name.startswith("vgg"):  # its classifier is large and has no convolutions
        options = {"out_features": ("conv5",), **options}
        options.pop("num_classes", None)
    return randomize(build_model(name, **options))


@torch.no_grad()
def unfolded(model: nn.Module, images):
    """The outputs by the paper's layers: convolution, then norm."""
    return change_classes(copy.deepcopy(model), PLAIN)(images)


def assert_close(found, expected, bound=1e-4):
    """Of tensors, or of dicts of them: differences relative to the largest expected value."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_close(found[name], expected[name], bound)
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max()
