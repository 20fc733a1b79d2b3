"""The paper's networks in plain PyTorch: the table of their names, and their cost."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_backbone.models.baselines import PRELU_NETS, BNInception, PReLUNet
from resnet_backbone.models.layers import Feature, FrozenBatchNorm2d, StagedNetwork
from resnet_backbone.models.resnet import BasicBlock, BottleneckBlock, CifarResNet, ResNet
from resnet_backbone.models.vgg import VGG

__all__ = [
    "BNInception",
    "BasicBlock",
    "BottleneckBlock",
    "CifarResNet",
    "Feature",
    "FrozenBatchNorm2d",
    "PReLUNet",
    "ResNet",
    "Stage",
    "StagedNetwork",
    "VGG",
    "analyze",
    "build_model",
    "count_parameters",
    "list_models",
]

MODELS: dict[str, Callable[..., StagedNetwork]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101, 152)},
    **{f"plain{depth}": partial(ResNet, depth, shortcut="none") for depth in (18, 34)},
    **{f"cifar_resnet{n}": partial(CifarResNet, n) for n in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{n}": partial(CifarResNet, n, shortcut="none") for n in (20, 32, 44, 56, 110)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (11, 13, 16, 19)},
    **{f"vgg{depth}_bn": partial(VGG, depth, norm="BN") for depth in (11, 13, 16, 19)},
    **{f"prelu_net_{model.lower()}": partial(PReLUNet, model) for model in PRELU_NETS},
    "bn_inception": BNInception,
}


def list_models() -> list[str]:
    """Returns the names :func:`build_model` knows; CIFAR networks also take any other 6n+2."""
    return list(MODELS)


def find_constructor(name: str) -> Callable[..., StagedNetwork]:
    """Returns the class of a network with the arguments implied by its name bound.

    Raises:
        ValueError: the name is unknown; the message suggests the closest one.
    """
    if name in MODELS:
        return MODELS[name]
    cifar = re.fullmatch(r"cifar_(resnet|plain)(\d+)", name)
    if cifar:
        shortcut = {"shortcut": "none"} if cifar[1] == "plain" else {}
        return partial(CifarResNet, int(cifar[2]), **shortcut)
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "list_models() gives the names"
    raise ValueError(f"unknown model {name!r}: {hint}")


def build_model(name: str, num_classes: int | None = None, **options) -> StagedNetwork:
    """Builds a network by name, with freshly initialized weights.

    Args:
        name: one of :func:`list_models`, or ``cifar_resnet<6n+2>`` / ``cifar_plain<6n+2>``.
        num_classes: number of logits; 1000 by default, 10 for the CIFAR networks.
        **options: arguments of the network's class, for example ``out_features=("res3", "res4",
            "res5")``, ``stride_in_1x1=False``, ``shortcut="A"``; see ``ResNet``,
            ``CifarResNet``, ``VGG``, ``PReLUNet`` and ``BNInception``.

    Raises:
        ValueError: the name is unknown; the message suggests the closest one.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    return find_constructor(name)(**options)


class Stage(NamedTuple):
    """One row of :func:`analyze`: a direct child of the network and its cost for one image."""

    name: str
    output_shape: tuple[int, ...]  # (channels, height, width), or (channels,) for a head
    parameters: int
    convolutions: int  # multiply-adds of the convolutions
    linear: int  # multiply-adds of the linear layers

    @property
    def multiply_adds(self) -> int:
        return self.convolutions + self.linear


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters, including frozen ones.

    The scale and shift of a frozen batch norm are buffers and do not count.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def analyze(model: nn.Module, input_size: int | Sequence[int] = 224) -> list[Stage]:
    """Returns one row per direct child that runs, in order of registration.

    The multiply-adds are the paper's "FLOPs" (Table 1): one per weight and output position of
    the convolutions and linear layers. Biases, norms, activations, pooling, additions and gating
    do not count. A copy of the model runs on the meta device in evaluation mode, so large
    networks and images cost nothing.

    Args:
        model: any network that takes one batch of images. It is not modified and may be on meta.
        input_size: height and width of the image, or one number for both.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    model = copy.deepcopy(model).to("meta").eval()
    stages = {
        name: Stage(name, (), count_parameters(x), 0, 0) for name, x in model.named_children()
    }

    def add(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        kind = "linear" if isinstance(module, nn.Linear) else "convolutions"
        count = output.numel() * module.weight[0].numel()  # one row of weights per output
        stages[name] = stages[name]._replace(**{kind: getattr(stages[name], kind) + count})

    def note_shape(name: str, module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            stages[name] = stages[name]._replace(output_shape=tuple(output.shape[1:]))

    for name, child in model.named_children():
        child.register_forward_hook(partial(note_shape, name))
        for module in child.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(partial(add, name))
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        model(first.weight.new_empty(1, first.in_channels, height, width))
    return [stage for stage in stages.values() if stage.output_shape]
