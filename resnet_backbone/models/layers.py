"""What every network shares: convolution + norm, freezing, initialization, stages in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Norm = str | Callable[[int], nn.Module] | None
NORMS = ("BN", "FrozenBN", "SyncBN", "GN")
ACTIVATIONS = ("relu", "prelu")
PRELU_SLOPE = 0.25  # initial slope, arXiv 1502.01852 section 2.1


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization whose statistics and affine parameters are constants.

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
    def from_batch_norm(cls, bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """A frozen copy of a ``BatchNorm2d`` or ``SyncBatchNorm``."""
        frozen = cls(bn.num_features, bn.eps).to(bn.running_mean.device, bn.running_mean.dtype)
        frozen.load_state_dict(bn.state_dict(), strict=False)  # some have no weight and bias
        return frozen

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
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
    """A normalization layer from its name ("BN", "FrozenBN", "SyncBN", "GN") or from a callable.

    ``None`` and ``""`` mean no normalization. Names follow Detectron2's ``get_norm``; GN has 32
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


def prelu_slopes(model: nn.Module) -> set[int]:
    """``id`` of the slopes, which are never decayed: decay pushes them to zero, which is ReLU.

    Source: arXiv 1502.01852, section 2.1.
    """
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.PReLU)}


class ConvNorm(nn.Conv2d):
    """A convolution followed by its norm, which is the child ``norm`` (Detectron2's key layout).

    The padding keeps the size at stride 1. There is a bias only where there is no norm.
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
        padding, bias = dilation * (kernel_size - 1) // 2, norm_layer is None
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias
        )
        self.norm = norm_layer

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.norm is None and any(key.startswith(prefix + "norm.") for key in state_dict):
            raise RuntimeError(
                f"the weights have {prefix}norm, which this network does not have. Where it was "
                "folded (optimize_for_inference): load into the original and optimize that; "
                "otherwise build the network with their norm"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ConvNormAct(ConvNorm):
    """:class:`ConvNorm` followed by its activation, the child ``activation``."""

    def __init__(self, *args, activation: str = "relu", **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = build_activation(activation, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


def freeze(module: nn.Module) -> None:
    """Stops a module's training in place: no gradients, and batch norms become constants."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                setattr(parent, name, FrozenBatchNorm2d.from_batch_norm(child))


def init_he(module: nn.Module, activation: str = "relu") -> None:
    """He initialization of all convolutions, N(0, 2 / ((1 + a^2) fan_out)) (arXiv 1502.01852).

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


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` whose inner maps are computed again in the backward pass (arXiv 1604.06174).

    The second computation leaves running statistics alone, so that each batch counts once.
    """

    @contextmanager
    def again() -> Iterator[None]:
        norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm, (_, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = 0.0, copy.deepcopy(count)
        try:
            yield  # it is left by an exception as soon as all maps are there
        finally:
            for norm, values in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = values

    def contexts() -> tuple:
        return nullcontext(), again()

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


def global_average_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Feature(NamedTuple):
    """One row of a network's feature table."""

    channels: int
    stride: int  # input pixels per output pixel


class StagedNetwork(nn.Module):
    """A classifier, or a backbone that returns the feature maps of named stages.

    Subclasses add their stages with :meth:`add_stage` in the order in which they run, then the
    layers of the head, whose default is a linear one. At the end of the constructor they store
    their kernels as ``torch.channels_last``: the same values under the same keys, and every map
    then takes that form, in which convolutions on CPUs are faster (GPUs: not measured). Networks
    can be traced (``torch.jit``, ``torch.fx``), exported, compiled and scripted.

    Attributes:
        grad_checkpointing: see :meth:`set_grad_checkpointing`.
        features: name -> :class:`Feature`, one entry per stage that was built, in order.
        out_features: names of the maps that ``forward`` returns; empty for a classifier.
        left_out: names of the deeper stages and head layers that a backbone does not build.
    """

    head_names: tuple[str, ...] = ("linear",)
    grad_checkpointing = False

    def __init__(self, stage_names: Sequence[str], out_features: Iterable[str] | None):
        super().__init__()
        self.features: dict[str, Feature] = {}
        out_features = [out_features] if isinstance(out_features, str) else out_features
        self.out_features = tuple(out_features or ())
        unknown = [name for name in self.out_features if name not in stage_names]
        if unknown:
            raise ValueError(
                f"unknown out_features {unknown}: this network has {', '.join(stage_names)}"
            )
        deepest = max(map(stage_names.index, self.out_features), default=len(stage_names) - 1)
        self.stage_names = tuple(stage_names[: deepest + 1])
        head = self.head_names if self.out_features else ()
        self.left_out = (*stage_names[deepest + 1 :], *head)

    def add_stage(self, name: str, stage: nn.Module, channels: int, stride: int) -> None:
        self.add_module(name, stage)
        self.features[name] = Feature(channels, stride)

    @property
    def is_classifier(self) -> bool:
        return not self.out_features

    def forward_features(self, x: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Feature maps by stage name.

        Args:
            x: images, (N, in_channels, H, W), normalized as the weights ask.
            names: stages to return; ``None`` returns every one.

        Returns:
            name -> (N, channels, H / stride, W / stride); ResNets round sizes up, VGGs down,
            PReLU-nets and BN-Inception up in conv1 and down in pooling.
        """
        wanted = set(self.stage_names if names is None else names)
        if not wanted <= set(self.stage_names):
            missing = sorted(wanted - set(self.stage_names))
            raise ValueError(f"no stage {missing}: this network has {', '.join(self.stage_names)}")
        maps, saves = {}, self.grad_checkpointing and self.training and torch.is_grad_enabled()
        for name in self.stage_names:
            stage = getattr(self, name)
            for part in self.checkpointed_parts(stage) if saves else (stage,):
                x = checkpointed(part, x) if saves else part(x)
            if name in wanted:
                maps[name] = x
        return maps

    def checkpointed_parts(self, stage: nn.Module) -> Iterable[nn.Module]:
        """The modules of a stage, in order, whose inputs are kept for the backward pass."""
        return (stage,)

    def set_grad_checkpointing(self, enable: bool = True) -> StagedNetwork:
        """Turns gradient checkpointing in training on or off, in place.

        With it only the inputs of parts are kept for the backward pass, which computes the maps
        within a part again: those of a residual block, or of a stage of another network. Results,
        gradients and running statistics are the same. ``torch.fx`` traces networks without it.
        """
        self.grad_checkpointing = enable
        return self

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map -> logits, (N, num_classes)."""
        return self.linear(global_average_pool(x))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Logits (N, num_classes) of a classifier, or the dict of ``out_features``."""
        if isinstance(x, Tensor) and x.dim() != 4:  # torch.fx traces with a stand-in
            raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(x.shape)}")
        if self.is_classifier:
            last = self.stage_names[-1]
            return self.forward_head(self.forward_features(x, [last])[last])
        return self.forward_features(x, self.out_features)

    def __prepare_scriptable__(self) -> torch.fx.GraphModule:
        """``torch.jit.script`` compiles the traced graph; it cannot read the modules themselves."""
        traced = torch.fx.symbolic_trace(copy.deepcopy(self))
        for node in traced.graph.nodes:
            node.type = None  # of forward's annotations, which name two types of output
        traced.recompile()
        return traced

    def freeze(self, freeze_at: int) -> StagedNetwork:
        """Freezes the first ``freeze_at`` stages in place (1 = the stem, or VGG's conv1).

        Frozen layers get no gradients and their batch norms become constants. Counted as in
        Detectron2: 2 also freezes res2, 5 the whole network.
        """
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"freeze_at must be a number of stages from 0 to 5, not {freeze_at}")
        for name in self.stage_names[:freeze_at]:
            freeze(getattr(self, name))
        return self
