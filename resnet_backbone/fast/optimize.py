"""Folding of batch norms into convolutions, and models optimized for inference."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from resnet_backbone import models
from resnet_backbone.fast.engines import InferenceNetwork, check_engine
from resnet_backbone.models.layers import (
    BATCH_NORMS,
    ConvNorm,
    ConvNormAct,
    FrozenBatchNorm2d,
    StagedNetwork,
    scale_and_shift,
)
from resnet_backbone.models.resnet import ResidualBlock

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
HEADS = ("box_head", "cls_subnet", "bbox_subnet")  # Faster R-CNN's and RetinaNet's
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class FoldedConv(torch.autograd.Function):
    """A convolution with the kernel ``weight * scale``, which the backward pass recomputes.

    Autograd alone would keep a second kernel of each convolution for the backward pass. Maps
    (N, I, H, W) to (N, O, H', W'), given weight (O, I, h, w), the constants scale (O,) and shift
    (O,), and `setting`: stride, padding, dilation, groups.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, setting: tuple
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.setting = setting
        kernel = (weight * scale[:, None, None, None]).to(x.dtype)
        return F.conv2d(x, kernel, shift.to(x.dtype), *setting)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        scale, (stride, padding, dilation, groups) = scale[:, None, None, None], ctx.setting
        kernel, wanted = (weight * scale).to(x.dtype), [*ctx.needs_input_grad[:2], False]
        setting = None, stride, padding, dilation, False, (0, 0), groups, wanted
        of_x, of_kernel, _ = torch.ops.aten.convolution_backward(grad, x, kernel, *setting)
        of_weight = of_kernel if of_kernel is None else (of_kernel * scale).to(weight.dtype)
        return of_x, of_weight, None, None, None


def conv_dtype(x: Tensor) -> torch.dtype:
    """Returns the precision of x in a convolution: autocast's, if it applies."""
    kind = x.device.type
    can_change = x.is_floating_point() and x.dtype != torch.float64
    if not can_change or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def in_graph(x: Tensor) -> bool:
    """Whether PyTorch transforms operations on x (graphs, ``torch.func``): these stay plain."""
    jit = torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling()
    return jit or isinstance(x, Proxy) or torch._C._are_functorch_transforms_active()


class FoldingConvNorm(ConvNorm):
    """:class:`ConvNorm` that computes ``conv(x, w * scale, shift)`` while its norm is constant.

    Outputs and gradients are the same, with one fewer pass over the feature map. A frozen batch
    norm is always folded, even in training. One in evaluation mode is folded when no gradients are
    recorded and the kernel is smaller than the output. A norm with hooks is never folded. Nothing
    is cached between calls.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._folding_pays(x):
            return super().forward(x)
        if not self._keeps_kernel(x):
            return self._conv_forward(x, *self.folded())
        setting = self.stride, self.padding, self.dilation, self.groups
        x = x.to(conv_dtype(x))
        return FoldedConv.apply(x, self.weight, *scale_and_shift(self.norm), setting)

    def _keeps_kernel(self, x: Tensor) -> bool:
        """Whether autograd would keep the folded kernel, and :class:`FoldedConv` fits."""
        if self.padding_mode != "zeros" or in_graph(x):
            return False
        is_recorded = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return is_recorded and conv_dtype(x) == conv_dtype(self.weight)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns the kernel and bias with the norm folded in; needs :meth:`can_fold`."""
        if self.norm is None:
            return self.weight, self.bias
        scale, shift = scale_and_shift(self.norm)
        weight = self.weight * scale[:, None, None, None]
        return weight.to(self.weight.dtype), shift.to(self.weight.dtype)

    def can_fold(self) -> bool:
        """Whether the norm, if any, is constant now: frozen, or evaluated without gradients."""
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
        """Whether the norm is frozen, or constant now and the kernel smaller than the output."""
        if self.norm is None or not self.can_fold():
            return False
        if type(self.norm) is FrozenBatchNorm2d:
            return True
        if in_graph(x):
            return False  # graph compilers fold by themselves
        pixels = x[:, 0].numel() // (self.stride[0] * self.stride[1])
        return pixels >= self.weight[0].numel()


class FoldingConvNormAct(ConvNormAct, FoldingConvNorm):
    """:class:`ConvNormAct` with the folding of :class:`FoldingConvNorm`."""


def build_model(name: str, num_classes: int | None = None, **options: Any) -> StagedNetwork:
    """:func:`resnet_backbone.models.build_model` followed by :func:`fold_each_call`."""
    return fold_each_call(models.build_model(name, num_classes, **options))


def fold_each_call(model: nn.Module) -> nn.Module:
    """Turns the convolutions of our networks into :class:`FoldingConvNorm`, in place.

    State dicts do not change. Meant for weights that change; :func:`fold_bn` folds for good.
    """
    return change_classes(model, {ConvNorm: FoldingConvNorm, ConvNormAct: FoldingConvNormAct})


def fold_bn(model: nn.Module) -> nn.Module:
    """Folds the batch norms of our networks into their convolutions, in place, for evaluation.

    ``BN``, ``SyncBN`` and ``FrozenBN`` with running statistics are removed, Detectron2's and
    torchvision's classes included, and the convolutions get a bias. Other norms, norms with hooks
    and other libraries' convolutions are kept. Weights are computed in double precision.
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
    """Whether a norm is a batch norm with running statistics; unknown classes are tried out."""
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
    """Whether any hook runs when the module is called."""
    own = any(getattr(module, f"_{name}") for name in HOOKS)
    return own or any(getattr(nn.modules.module, f"_global_{name}", None) for name in HOOKS)


def change_classes(model: nn.Module, kinds: Mapping[type, type]) -> nn.Module:
    """Replaces modules by instances of another class with the same content, in place.

    `kinds` maps exact classes to subclasses or base classes with the same attributes. Use the
    returned model: it is a new module where the model itself is of such a class.
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
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    engine: str = "auto",
    calibration: Iterable[Any] = (),
) -> nn.Module:
    """Returns a fast copy of a model for inference; the original is not modified.

    Batch norms of our networks are folded into their convolutions, kernels are converted to
    channels_last, and gradients are off. An engine runs the whole network. In a detector it runs
    ``backbone`` with the feature pyramid, and the ``res5`` of a C4 head. The convolution of the
    proposal network and ``box_head`` have the same dtype, and run in PyTorch except in int8. The
    last layers and all later steps stay in PyTorch and float32. Images may have any size.

    Args:
        model: a classifier or backbone, or a model that contains one, such as a detector or
            segmentation network of this package, Detectron2 or torchvision.
        dtype: precision of these parts: torch.float32, torch.bfloat16, torch.float16, or
            torch.int8 (post-training quantization with OpenVINO).
        engine: "eager"; "compile" (``torch.compile`` with the weights as constants); "openvino" or
            "onnxruntime", on CPUs; or "auto", which tries all installed engines on the first input
            of each part and keeps the fastest. See :class:`InferenceNetwork`.
        calibration: for int8, about 100 inputs of the model, with images like those it will see.
            They determine the ranges of all activations.

    Returns:
        A model called like the original. The parts above are :class:`InferenceNetwork`, except
        with "eager" at float32, where the model keeps its class.

    Raises:
        ValueError: the dtype or engine is unknown, the engine is not installed or lacks the dtype,
            no part can be made faster, or the model is already optimized.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    check_engine(engine, dtype)
    if any(isinstance(module, InferenceNetwork) for module in model.modules()):
        raise ValueError("this model was optimized before: optimize the original")
    ours = any(isinstance(module, ConvNorm) for module in model.modules())
    plain = engine == "eager" and dtype == torch.float32
    if plain and not ours:
        raise ValueError(
            f"{type(model).__name__} contains none of our networks, so nothing in it becomes "
            "faster with engine eager at float32: use another one"
        )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model = fold_bn(model).to(memory_format=torch.channels_last)
    if plain:
        return model
    model = place_engines(model, dtype, engine)
    if dtype == torch.int8:
        with torch.no_grad():
            for inputs in calibration:
                model(inputs)
        for module in list(model.modules()):
            if isinstance(module, InferenceNetwork):
                module.quantize()
    return model


def place_engines(model: nn.Module, dtype: torch.dtype, engine: str) -> nn.Module:
    """Returns the model with engines around its parts, or one engine around all of it.

    PyTorch runs the heads, except in int8: engines were slower where one or two layers were
    measured.
    """
    network = partial(InferenceNetwork, dtype=dtype, engine=engine)
    head = network if dtype == torch.int8 else partial(InferenceNetwork, dtype=dtype)
    places, is_backbone = list(network_places(model)), hasattr(model, "output_shape")
    if is_backbone or all(_is_stage(getattr(parent, name)) for parent, name in places):
        return network(model)  # Detectron2's backbones, our stages alone, or no places at all
    for parent, name in places:
        setattr(parent, name, network(getattr(parent, name)))
    for parent, name in list(head_places(model)):
        setattr(parent, name, head(getattr(parent, name)))
    return model


def network_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields (parent, child name) of the outermost networks within a model."""
    for name, child in model.named_children():
        if _is_network(child, name):
            yield model, name
        else:
            yield from network_places(child)


def head_places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields (parent, child name) of the layers before the last ones of a detector's heads."""
    for parent in model.modules():
        proposes = any(hasattr(parent, name) for name in ("objectness_logits", "cls_logits"))
        for name, child in parent.named_children():
            if not (name in HEADS or (name == "conv" and proposes)):
                continue
            stages = isinstance(child, nn.ModuleList)  # Cascade R-CNN
            found = child.named_children() if stages else [(name, child)]
            for name, head in found:
                if any(True for _ in head.parameters()):
                    yield child if stages else parent, name


def _is_network(module: nn.Module, name: str) -> bool:
    """Whether a module is one of our networks or stages, or a detector's backbone or ``res5``."""
    if isinstance(module, StagedNetwork) or _is_stage(module):
        return True
    return name in ("backbone", "res5") and any(isinstance(m, nn.Conv2d) for m in module.modules())


def _is_stage(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential) or not len(module):
        return False
    return all(isinstance(block, ResidualBlock) for block in module)
