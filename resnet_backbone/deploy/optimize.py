"""One call that makes a network, or a detector around it, fast for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from resnet_backbone.models.layers import (
    ConvNorm,
    ConvNormAct,
    FrozenBatchNorm2d,
    scale_and_shift,
)
from resnet_backbone.models.network import StagedNetwork
from resnet_backbone.models.resnet import ResidualBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, compile: bool = False
) -> nn.Module:
    """A fast copy of a model for inference; the model itself stays as it is.

    Batch norms within our networks are folded into their convolutions, on CPUs these also do the
    residual sum and the ReLU, kernels are stored channels_last, and nothing records gradients.
    At float32, outputs stay within 1e-4.

    Args:
        model: one of our classifiers or backbones, or any model that contains some, such as a
            detector of Detectron2 or torchvision.
        dtype: torch.float32, or torch.bfloat16 or torch.float16. In a model with a child
            ``backbone`` (a detector) only that child, with its feature pyramid, and the ``res5``
            of a C4 head take it; proposals, boxes and the other heads stay in float32.
        compile: also ``torch.compile`` these parts, with their weights as constants
            (Inductor's freezing, which is on only while they run). The first call of each
            image size compiles, for a minute or so; from the second size on, sizes are dynamic.

    Returns:
        A model called as the original is. At float32 without ``compile`` it has the same class;
        otherwise the parts named above are :class:`InferenceNetwork`, whose attributes are those
        of the network. Later changes of the original's weights do not reach it.

    Raises:
        ValueError: another dtype, a model without any of our networks, or one that was optimized
            before.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if any(isinstance(module, InferenceNetwork) for module in model.modules()):
        raise ValueError("this model was optimized before: optimize the original")
    if not any(isinstance(module, ConvNorm) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} contains none of our networks")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model = fuse_activations(fold_bn(model)).to(memory_format=torch.channels_last)
    if dtype == torch.float32 and not compile:
        return model
    places = list(network_places(model))
    if all(name != "backbone" for _, name in places):
        return InferenceNetwork(model, dtype, compile)
    for parent, name in places:
        setattr(parent, name, InferenceNetwork(getattr(parent, name), dtype, compile))
    return model


def fold_bn(model: nn.Module) -> nn.Module:
    """Puts the batch norms of our networks into their convolutions, in place; for evaluation.

    ``BN``, ``SyncBN`` and ``FrozenBN`` with running statistics disappear, the convolutions get a
    bias; other norms, and other libraries' layers, stay. Computed in double precision.
    """
    for conv in model.modules():
        if isinstance(conv, ConvNorm) and _is_foldable(conv.norm):
            like = conv.weight
            scale, shift = scale_and_shift(copy.deepcopy(conv.norm).double())
            weight = like.double() * scale[:, None, None, None]
            conv.weight = nn.Parameter(weight.detach().to(like.dtype), like.requires_grad)
            conv.bias = nn.Parameter(shift.detach().to(like.dtype), like.requires_grad)
            conv.norm = None
    return model


def fuse_activations(model: nn.Module) -> nn.Module:
    """Lets folded convolutions of our networks do the residual sum and the ReLU, in place.

    It holds for eager inference on CPUs (:func:`resnet_backbone.models.layers.can_fuse`). What is
    not a convolution, a sum and a ReLU stays as it is.
    """
    for module in model.modules():
        if isinstance(module, ConvNormAct):
            module.fused = module.norm is None and isinstance(module.activation, nn.ReLU)
        elif isinstance(module, ResidualBlock) and module.shortcut is not None:
            is_sum = module.gate is None and module.last.norm is None
            module.fused = is_sum and isinstance(module.activation, nn.ReLU)
    return model


def _is_foldable(norm: nn.Module | None) -> bool:
    return (
        isinstance(norm, (_BatchNorm, FrozenBatchNorm2d))
        and getattr(norm, "running_var", None) is not None
    )


def network_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name of the child) of the largest parts of a model that are networks of ours.

    These are :class:`StagedNetwork`s, a child ``backbone`` around one, and single stages.
    """
    for name, child in model.named_children():
        if _is_network(child, name):
            yield model, name
        else:
            yield from network_places(child)


def _is_network(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.Sequential) and len(module):
        return all(isinstance(block, ResidualBlock) for block in module)
    inside = any(isinstance(child, StagedNetwork) for child in module.modules())
    return inside and (name == "backbone" or isinstance(module, StagedNetwork))


class InferenceNetwork(nn.Module):
    """A network that runs in another precision, compiled or not, without gradients.

    The first argument is images in any precision and memory format, and the outputs have that
    precision again. Attributes that it does not have are the network's.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, compile: bool):
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype
        self.compiled = compile
        self._set_run()

    def _set_run(self) -> None:
        call = self.network.__call__
        self._run = torch.compile(call) if self.compiled else call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._set_run()

    @torch.no_grad()
    def forward(self, x: Tensor, *args, **kwargs) -> Any:
        with _freezing() if self.compiled else nullcontext():
            output = self._run(x.to(self.dtype), *args, **kwargs)
        return tree_map(lambda value: _cast(value, x.dtype), output)


def _freezing() -> AbstractContextManager:
    """Lets Inductor fold and pre-pack weights, if it compiles within this context.

    The flag is read at the first call of each shape, not by ``torch.compile``.
    """
    import torch._inductor.config as inductor

    return inductor.patch(freezing=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value
