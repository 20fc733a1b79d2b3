"""Parameters and multiply-adds of any network, per stage, without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Stage(NamedTuple):
    """What :func:`analyze` tells about one direct child of a network, for one image."""

    name: str
    output_shape: tuple[int, ...]  # (channels, height, width) of a map, (channels,) of a head
    parameters: int
    convolutions: int  # multiply-adds of the convolutions
    linear: int  # multiply-adds of the linear layers

    @property
    def multiply_adds(self) -> int:
        return self.convolutions + self.linear


class MultiplyAdds(NamedTuple):
    """Multiply-adds for one image."""

    stages: dict[str, int]  # by direct child of the network, in order
    convolutions: int
    linear: int

    @property
    def total(self) -> int:
        return self.convolutions + self.linear


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included.

    The scale and shift of a frozen batch norm are constants and not parameters.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, input_size: int | Sequence[int] = 224) -> MultiplyAdds:
    """Multiply-adds for one image, the paper's "FLOPs" (Table 1), in total and per stage.

    Convolutions and linear layers count, with one multiply-add per weight and output position.
    Biases, norms, activations, pooling, additions and gating do not.

    Args:
        model: any network of one image batch; it stays as it is and may be on the meta device.
        input_size: height and width of the image, or one number for both.
    """
    stages = analyze(model, input_size)
    return MultiplyAdds(
        {stage.name: stage.multiply_adds for stage in stages},
        sum(stage.convolutions for stage in stages),
        sum(stage.linear for stage in stages),
    )


def analyze(model: nn.Module, input_size: int | Sequence[int] = 224) -> list[Stage]:
    """One row per direct child that runs, in the order of registration.

    A copy of the model runs on the meta device in evaluation mode, so that the size of network
    and image costs nothing. Arguments as of :func:`count_multiply_adds`.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    model = copy.deepcopy(model).to("meta").eval()
    counts: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, child in model.named_children():
        counts[name] = [0, 0]
        child.register_forward_hook(_shape_hook(shapes, name))
        for module in child.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(_count_hook(counts[name]))
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    image = first.weight.new_empty(1, first.in_channels, height, width)
    with torch.no_grad():
        model(image)
    return [
        Stage(name, shapes[name], count_parameters(child), *counts[name])
        for name, child in model.named_children()
        if name in shapes
    ]


def _shape_hook(shapes: dict[str, tuple[int, ...]], name: str):
    def hook(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape[1:])

    return hook


def _count_hook(count: list[int]):
    """Adds to ``count``, which is [convolutions, linear]. One weight row makes one output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        kind = 1 if isinstance(module, nn.Linear) else 0
        count[kind] += output.numel() * module.weight[0].numel()

    return hook
