"""Convolution + norm, activations, freezing and initialisation: what every network shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

Norm = str | Callable[[int], nn.Module] | None
NORMS = ("BN", "FrozenBN", "SyncBN", "GN")
ACTIVATIONS = ("relu", "prelu")
PRELU_SLOPE = 0.25  # initial slope, arXiv 1502.01852 section 2.1


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constants.

    The paper fixes BN during detection (appendix A): it is then a linear map per channel.
    State-dict keys are those of ``nn.BatchNorm2d``, as in Detectron2's layer of the same name;
    ``num_batches_tracked`` is accepted and not needed.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = scale_and_shift(self)
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def from_batch_norm(cls, bn: nn.modules.batchnorm._BatchNorm) -> FrozenBatchNorm2d:
        """A frozen copy of a ``BatchNorm2d`` or ``SyncBatchNorm``."""
        frozen = cls(bn.num_features, bn.eps).to(bn.running_mean.device, bn.running_mean.dtype)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(bn, name)
            if value is not None:
                getattr(frozen, name).copy_(value.detach())
        return frozen

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def scale_and_shift(norm: nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d) -> tuple:
    """The map ``x * scale + shift`` of a batch norm with fixed statistics, of any class.

    Both have shape (C,) and at least single precision.
    """
    variance = norm.running_var
    variance = variance.to(torch.promote_types(variance.dtype, torch.float32))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias + shift


def build_norm(norm: Norm, channels: int) -> nn.Module | None:
    """A normalisation layer from its name ("BN", "FrozenBN", "SyncBN", "GN") or from a callable.

    ``None`` and ``""`` mean no normalisation. Names follow Detectron2's ``get_norm``; GN has 32
    groups (arXiv 1803.08494).
    """
    if norm is None or norm == "":
        return None
    if callable(norm):
        return norm(channels)
    if norm == "GN":
        if channels % 32:
            raise ValueError(f"norm 'GN' needs a multiple of 32 channels, not {channels}")
        return nn.GroupNorm(32, channels)
    layers = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "SyncBN": nn.SyncBatchNorm}
    if norm not in layers:
        raise ValueError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)} or a callable")
    return layers[norm](channels)


def build_activation(name: str, channels: int) -> nn.Module:
    """``relu`` (the paper) or ``prelu``, one slope per channel (arXiv 1502.01852)."""
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "prelu":
        return nn.PReLU(channels, init=PRELU_SLOPE)
    raise ValueError(f"unknown activation {name!r}: use one of {', '.join(ACTIVATIONS)}")


def is_watched(module: nn.Module) -> bool:
    """Whether some hook wants to see the module called."""
    own = module._forward_hooks or module._forward_pre_hooks
    own = own or module._backward_hooks or module._backward_pre_hooks
    everywhere = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    everywhere = everywhere or hooks._global_backward_hooks or hooks._global_backward_pre_hooks
    return bool(own or everywhere)


class ConvNorm(nn.Conv2d):
    """A convolution followed by its norm, which is the child ``norm`` (Detectron2's key layout).

    The padding keeps the size at stride 1. There is a bias only where there is no norm.
    A frozen batch norm is folded into the kernel at each call, ``conv(x, w * scale, shift)``:
    the same function and gradients with one pass less over the feature map. So is a batch norm
    in evaluation mode when no gradients are recorded, where the kernel is smaller than the map.
    Nothing is kept between calls, so that changed weights always count;
    :func:`resnet_backbone.optimize_for_inference` folds once and for all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm: Norm = "BN",
    ):
        norm_layer = build_norm(norm, out_channels)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            bias=norm_layer is None,
        )
        self.norm = norm_layer

    def forward(self, x: Tensor) -> Tensor:
        if self._folding_pays(x):
            return self._conv_forward(x, *self.folded())
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)

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
        if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm.running_var is None:
            return False
        return not (norm.training or torch.is_grad_enabled())

    def _folding_pays(self, x: Tensor) -> bool:
        """Whether the norm is frozen, or constant here and the kernel smaller than the output.

        Exported, traced and compiled graphs keep a norm that is not frozen, their optimizers fold
        it. A norm with hooks is called.
        """
        if self.norm is None or not self.can_fold():
            return False
        if type(self.norm) is FrozenBatchNorm2d:
            return True
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, Proxy):
            return False
        pixels = x[:, 0].numel() // (self.stride[0] * self.stride[1])
        return pixels >= self.weight[0].numel()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.norm is None and any(key.startswith(prefix + "norm.") for key in state_dict):
            raise RuntimeError(
                f"the weights have {prefix}norm, which this network has not. Where it was folded "
                "(optimize_for_inference): load into the original and optimize that; otherwise "
                "build the network with their norm"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ConvNormAct(ConvNorm):
    """:class:`ConvNorm` followed by its activation, the child ``activation``.

    Attributes:
        fused: one pass for both where :func:`can_fuse` allows it; set by
            :func:`resnet_backbone.optimize_for_inference`.
    """

    fused = False

    def __init__(self, *args, activation: str = "relu", **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = build_activation(activation, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and can_fuse(self, self.activation, x):
            return fused_convolution(self, x)
        return self.activation(super().forward(x))


def can_fuse(
    conv: nn.Module, activation: nn.Module, x: Tensor, added: Tensor | None = None
) -> bool:
    """Whether :func:`fused_convolution` may replace ``activation(conv(x) + added)``.

    That is for a :class:`ConvNorm` without norm and a ReLU, in eager mode on a CPU, without
    derivatives, on plain tensors. Graphs that are exported, traced or compiled keep the single
    operators, which their optimizers fuse; so do modes that count operators. A module with hooks
    is called; ``conv`` is called anyway where nothing is added.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, Proxy):
        return False
    if type(conv) not in (ConvNorm, ConvNormAct) or type(activation) is not nn.ReLU:
        return False
    if conv.norm is not None or is_watched(activation) or (added is not None and is_watched(conv)):
        return False
    recording = torch.is_grad_enabled()
    for value in (x, conv.weight, conv.bias, added):
        if value is None:
            continue
        if type(value) not in (Tensor, nn.Parameter) or (recording and value.requires_grad):
            return False
        if not value.is_cpu or value.dtype != x.dtype:
            return False
    if forward_ad._current_level >= 0 or _get_current_dispatch_mode() is not None:
        return False
    onednn = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled) or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32


def fused_convolution(conv: nn.Conv2d, x: Tensor, added: Tensor | None = None) -> Tensor:
    """relu(conv(x)) or relu(conv(x) + added), without a pass of its own for sum and ReLU.

    The operators are those that Inductor emits (PyTorch has no public name for them). Their ReLU
    makes zero of NaN.
    """
    kernel = conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    operator = torch.ops.mkldnn._convolution_pointwise
    if added is None:
        return operator(x, *kernel, "relu", [], "")
    return operator.binary(x, added, *kernel, "add", 1.0, "relu", [], "")


def freeze(module: nn.Module) -> None:
    """Stops a module's training in place: no gradients, and batch norms become constants."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    _freeze_batch_norms(module)


def _freeze_batch_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            setattr(module, name, FrozenBatchNorm2d.from_batch_norm(child))
        else:
            _freeze_batch_norms(child)


def init_he(module: nn.Module, activation: str = "relu") -> None:
    """He initialisation of all convolutions, N(0, 2 / ((1 + a^2) fan_out)) (arXiv 1502.01852).

    ``a`` is the activation's negative slope. Linear layers are drawn from N(0, 0.01^2)
    (arXiv 1706.02677, section 5.1), biases are zero, norms keep the identity.
    """
    slope = PRELU_SLOPE if activation == "prelu" else 0.0
    for child in module.modules():
        if getattr(child, "weight", None) is None or child.weight.is_meta:
            continue  # the meta device has no values, and drawing none is slow
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, slope, "fan_out", "leaky_relu")
        elif isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.01)
        else:
            continue
        if child.bias is not None:
            nn.init.zeros_(child.bias)


def global_average_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)
