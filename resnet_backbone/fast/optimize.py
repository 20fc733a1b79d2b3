"""Networks made fast: batch norms as part of their convolutions, and one call for inference."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._pytree import tree_map_only

from resnet_backbone import models
from resnet_backbone.models.layers import (
    ConvNorm,
    ConvNormAct,
    FrozenBatchNorm2d,
    StagedNetwork,
    scale_and_shift,
)
from resnet_backbone.models.resnet import ResidualBlock

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FoldingConvNorm(ConvNorm):
    """:class:`ConvNorm` that computes ``conv(x, w * scale, shift)`` where its norm is constant.

    The function and gradients are the same, with one pass less over the feature map. A frozen batch
    norm is always folded, in training too; one in evaluation mode when no gradients are recorded
    and the kernel is smaller than the map. Nothing is kept between calls. A norm with hooks is
    called.
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
    """Makes the convolutions of our networks :class:`FoldingConvNorm`, in place, same state dict.

    It is for networks whose weights change; :func:`fold_bn` folds once and for all.
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

    `kinds` are class, exactly -> subclass without attributes of its own. Use what is returned: the
    model, or another module if it is of such a class itself.
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


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, compile: bool = False
) -> nn.Module:
    """A fast copy of a model for inference; the model itself stays as it is.

    Batch norms within our networks are folded into their convolutions, kernels are stored
    channels_last, and nothing records gradients. At float32, outputs stay within 1e-4.

    Args:
        model: one of our classifiers or backbones, or any model that contains some, such as a
            detector of Detectron2 or torchvision.
        dtype: torch.float32, torch.bfloat16 or torch.float16. A network and a backbone take it as a
            whole; in a model around our networks only these do, and of a detector ``backbone``
            with its feature pyramid, the ``res5`` of a C4 head, the convolution of the proposal
            network and ``box_head``; the last layers and all that follows stay in float32.
        compile: also ``torch.compile`` these parts, with their weights as constants (Inductor's
            freezing): ``load_state_dict`` is refused. The first two image sizes compile, for a
            minute or so each; then sizes are dynamic.

    Returns:
        A model called as the original is. At float32 without ``compile`` it has the same class;
        otherwise the parts named above are :class:`InferenceNetwork`.

    Raises:
        ValueError: another dtype, no network of ours in it, or one that was optimized before.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if any(isinstance(module, InferenceNetwork) for module in model.modules()):
        raise ValueError("this model was optimized before: optimize the original")
    if not any(isinstance(module, ConvNorm) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} contains none of our networks")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model = fold_bn(model).to(memory_format=torch.channels_last)
    if dtype == torch.float32 and not compile:
        return model
    places = list(network_places(model))
    is_backbone = hasattr(model, "output_shape")  # Detectron2's contract: a feature pyramid
    if is_backbone or all(_is_stage(getattr(parent, name)) for parent, name in places):
        return InferenceNetwork(model, dtype, compile)
    for parent, name in places:
        setattr(parent, name, InferenceNetwork(getattr(parent, name), dtype, compile))
    if dtype != torch.float32:
        for parent, name in list(head_places(model)):
            setattr(parent, name, InferenceNetwork(getattr(parent, name), dtype, False))
    return model


def network_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name of the child) of the largest parts of a model that are networks of ours."""
    for name, child in model.named_children():
        if _is_network(child, name):
            yield model, name
        else:
            yield from network_places(child)


def head_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of the convolution before a detector's proposals, and of ``box_head``."""
    for parent in model.modules():
        proposes = any(hasattr(parent, name) for name in ("objectness_logits", "cls_logits"))
        for name, child in parent.named_children():
            if name == "box_head" or (name == "conv" and proposes):
                if any(True for _ in child.parameters()):
                    yield parent, name


def _is_network(module: nn.Module, name: str) -> bool:
    """Whether it is a network, a single stage, or a ``backbone`` around some."""
    if isinstance(module, StagedNetwork) or _is_stage(module):
        return True
    return name == "backbone" and any(isinstance(child, ConvNorm) for child in module.modules())


def _is_stage(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential) or not len(module):
        return False
    return all(isinstance(block, ResidualBlock) for block in module)


class InferenceNetwork(nn.Module):
    """A network that runs in another precision, compiled or not, without gradients.

    Images, the first argument, have any precision, and so have the outputs; images of integers go
    to the network as they are, for outputs in float32. Attributes are also the network's.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, compile: bool):
        super().__init__()
        self.network = network.to(dtype)
        self.compiled = compile
        self._set_run()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

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

    def _apply(self, fn, recurse: bool = True) -> InferenceNetwork:
        super()._apply(fn, recurse)
        if self.compiled:  # its code is that of the parameters by identity, which _apply keeps
            self.network = copy.deepcopy(self.network)
            self._set_run()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.compiled:
            raise RuntimeError(
                "the weights of a compiled model are constants of its code: load into the "
                "original and optimize that"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def forward(self, x: Tensor, *args, **kwargs) -> Any:
        if not isinstance(x, Tensor):
            raise TypeError(f"the first argument is a tensor of images, not a {type(x).__name__}")
        result = x.dtype if x.is_floating_point() else torch.float32
        context = nullcontext()
        if self.compiled:  # Inductor reads the flag at the first call of each shape
            context = importlib.import_module("torch._inductor.config").patch(freezing=True)
        with context:
            output = self._run(_cast(x, self.dtype), *args, **kwargs)
        return _cast(output, result)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """All floating-point tensors within dicts, lists and tuples in another precision."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)
