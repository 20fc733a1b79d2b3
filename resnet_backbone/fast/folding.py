"""Batch norms as part of their convolutions: at each call while weights change, or for good."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from resnet_backbone import models
from resnet_backbone.models.layers import (
    ConvNorm,
    ConvNormAct,
    FrozenBatchNorm2d,
    StagedNetwork,
    scale_and_shift,
)

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class FoldingConvNorm(ConvNorm):
    """:class:`ConvNorm` that computes ``conv(x, w * scale, shift)`` where its norm is constant.

    The function and gradients are the same, with one pass less over the feature map. A frozen batch
    norm is always folded, in training too. A batch norm in evaluation mode is folded when no
    gradients are recorded and the kernel is smaller than the map. Nothing is kept between calls,
    so that changed weights always count. A norm with hooks is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._folding_pays(x):
            return self._conv_forward(x, *self.folded())
        return super().forward(x)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of convolution and norm in one, where :meth:`can_fold`."""
        if self.norm is None:
            return self.weight, self.bias
        scale, shift = scale_and_shift(self.norm)
        weight = self.weight * scale[:, None, None, None]
        return weight.to(self.weight.dtype), shift.to(self.weight.dtype)

    def can_fold(self) -> bool:
        """Whether the norm, if any, is constant for this call: frozen, or without gradients."""
        norm = self.norm
        if norm is None:
            return True
        if is_watched(norm):
            return False
        if type(norm) is FrozenBatchNorm2d:
            return True
        if type(norm) not in BATCH_NORMS or norm.running_var is None:
            return False
        return not (norm.training or torch.is_grad_enabled())

    def _folding_pays(self, x: Tensor) -> bool:
        """Whether the norm is frozen, or constant here and the kernel smaller than the output."""
        if self.norm is None or not self.can_fold():
            return False
        if type(self.norm) is FrozenBatchNorm2d:
            return True
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, Proxy):
            return False  # graphs have optimizers of their own
        pixels = x[:, 0].numel() // (self.stride[0] * self.stride[1])
        return pixels >= self.weight[0].numel()


class FoldingConvNormAct(ConvNormAct, FoldingConvNorm):
    """:class:`ConvNormAct` in the same way."""


def build_model(name: str, num_classes: int | None = None, **options: Any) -> StagedNetwork:
    """:func:`resnet_backbone.models.build_model`, then :func:`fold_each_call`."""
    return fold_each_call(models.build_model(name, num_classes, **options))


def fold_each_call(model: nn.Module) -> nn.Module:
    """Lets the convolutions of our networks fold constant batch norms, in place.

    Parameters, state dict and function stay, see :class:`FoldingConvNorm`. It is for networks whose
    weights change; :func:`fold_bn` folds once and for all.
    """
    return change_classes(model, {ConvNorm: FoldingConvNorm, ConvNormAct: FoldingConvNormAct})


def fold_bn(model: nn.Module) -> nn.Module:
    """Puts the batch norms of our networks into their convolutions, in place; for evaluation.

    ``BN``, ``SyncBN`` and ``FrozenBN`` with running statistics disappear, also in the classes of
    Detectron2 and torchvision, and the convolutions get a bias. Other norms, norms with hooks, and
    other libraries' convolutions stay. Computed in double precision.
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


def _is_foldable(norm: nn.Module | None) -> bool:
    """Whether it is a batch norm with running statistics; other classes are tried out."""
    if norm is None or is_watched(norm) or getattr(norm, "running_var", None) is None:
        return False
    if type(norm) in BATCH_NORMS:
        return True
    if not all(hasattr(norm, name) for name in ("running_mean", "weight", "bias", "eps")):
        return False
    norm = copy.deepcopy(norm).double().eval()
    scale, shift = (value[:, None, None] for value in scale_and_shift(norm))
    size = (2, len(norm.running_var), 2, 2)
    x = torch.linspace(-100, 100, math.prod(size)).to(norm.running_var).view(size)
    found, expected = norm(x), x * scale + shift
    return found.shape == size and torch.allclose(found.to(x), expected, 1e-5, 1e-5)


def is_watched(module: nn.Module) -> bool:
    """Whether some hook wants to see the module called."""
    own = any(getattr(module, f"_{name}") for name in HOOKS)
    return own or any(getattr(nn.modules.module, f"_global_{name}", None) for name in HOOKS)


def change_classes(model: nn.Module, kinds: Mapping[type, type]) -> nn.Module:
    """Replaces modules of some classes by ones of a subclass with the same content, in place.

    `kinds` are class, exactly -> subclass without attributes of its own. It returns the model;
    another module if it is of such a class itself.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in kinds:
                setattr(parent, name, _of_class(kinds[type(child)], child))
    return _of_class(kinds[type(model)], model) if type(model) in kinds else model


def _of_class(kind: type, module: nn.Module) -> nn.Module:
    same = kind.__new__(kind)
    same.__dict__.update(module.__dict__)
    return same
