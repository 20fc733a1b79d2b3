"""Building blocks of every network: convolution + norm, freezing, initialization, stages."""

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
TRAINABLE_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization whose statistics and affine parameters are constants.

    The paper fixes BN for detection (appendix A), which makes it an affine map per channel.
    State-dict keys are those of ``nn.BatchNorm2d``, as in Detectron2's layer of the same name;
    ``num_batches_tracked`` is accepted and ignored.
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
        """Returns a frozen copy of a ``BatchNorm2d`` or ``SyncBatchNorm``."""
        frozen = cls(bn.num_features, bn.eps).to(bn.running_mean.device, bn.running_mean.dtype)
        frozen.load_state_dict(bn.state_dict(), strict=False)  # weight and bias may be absent
        return frozen

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


BATCH_NORMS = (*TRAINABLE_BATCH_NORMS, FrozenBatchNorm2d)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns a batch norm with fixed statistics as ``x * scale + shift``; any class works.

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
    """Builds a norm layer from its name ("BN", "FrozenBN", "SyncBN", "GN") or from a callable.

    ``None`` and ``""`` mean no norm. Names follow Detectron2's ``get_norm``; GN has 32 groups
    (arXiv 1803.08494).
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
    """Builds "relu" (the paper) or "prelu" with one slope per channel (arXiv 1502.01852)."""
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "prelu":
        return nn.PReLU(channels, init=PRELU_SLOPE)
    raise ValueError(f"unknown activation {name!r}: use one of {', '.join(ACTIVATIONS)}")


def prelu_slopes(model: nn.Module) -> set[int]:
    """Returns the ``id`` of each PReLU slope, to be excluded from weight decay.

    Decay pushes the slopes to zero, that is, to ReLU (arXiv 1502.01852, section 2.1).
    """
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.PReLU)}


class ConvNorm(nn.Conv2d):
    """A convolution followed by its norm, the child ``norm`` (Detectron2's key layout).

    Padding preserves the size at stride 1. The convolution has a bias only without a norm.
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
    """Freezes a module in place: no gradients, and batch norms become constants."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TRAINABLE_BATCH_NORMS):
                setattr(parent, name, FrozenBatchNorm2d.from_batch_norm(child))


SMALL_STD = 0.001  # of the last of several linear layers (arXiv 1502.01852, section 2.2)


def init_he(module: nn.Module, activation: str = "relu") -> None:
    """He initialization of all convolutions, N(0, 2 / ((1 + a^2) fan_out)) (arXiv 1502.01852).

    ``a`` is the activation's negative slope. Linear layers are drawn from N(0, 0.01^2)
    (arXiv 1706.02677, section 5.1), biases are zero, and norms stay at the identity.
    """
    slope = PRELU_SLOPE if activation == "prelu" else 0.0
    for child in module.modules():
        if getattr(child, "weight", None) is None or child.weight.is_meta:
            continue  # meta tensors have no values, and initializing them is slow
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, slope, "fan_out", "leaky_relu")
        elif isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.01)
        else:
            continue
        if child.bias is not None:
            nn.init.zeros_(child.bias)


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """Runs ``module(x)`` and recomputes its inner maps in the backward pass (arXiv 1604.06174).

    Recomputation leaves running statistics alone, so each batch counts once.
    """
    if torch.compiler.is_compiling():  # which takes no contexts, and updates statistics once
        return checkpoint(module, x, use_reentrant=False)

    @contextmanager
    def again() -> Iterator[None]:
        norms = [norm for norm in module.modules() if isinstance(norm, TRAINABLE_BATCH_NORMS)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm, (_, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = 0.0, copy.deepcopy(count)
        try:
            yield  # torch exits with an exception once all maps are recomputed
        finally:
            for norm, values in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = values

    def contexts() -> tuple:
        return nullcontext(), again()

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


class Feature(NamedTuple):
    """Channels and stride of a stage's feature map."""

    channels: int
    stride: int  # input pixels per output pixel


class StagedNetwork(nn.Module):
    """A classifier, or a backbone that returns the feature maps of named stages.

    Subclasses add their stages with :meth:`add_stage` in execution order, then the layers of the
    head, by default one linear layer. At the end of the constructor they convert their kernels to
    ``torch.channels_last``, which leaves values and keys alone. The maps inherit this format, in
    which convolutions on CPUs are faster (GPUs: not measured). Networks can be traced
    (``torch.jit``, ``torch.fx``), exported, compiled and scripted.

    Attributes:
        grad_checkpointing: see :meth:`set_grad_checkpointing`.
        features: name -> :class:`Feature`, one entry per stage, in order.
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
        """Returns feature maps by stage name.

        Args:
            x: images, (N, in_channels, H, W), normalized as the weights expect.
            names: stages to return; ``None`` returns all of them.

        Returns:
            name -> (N, channels, H / stride, W / stride). ResNets round sizes up, VGGs down.
            PReLU-nets round up in conv1 and down in pooling. BN-Inception rounds up, but down in
            the poolings of its stem.
        """
        names = [names] if isinstance(names, str) else names
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
        """Returns the modules of a stage, in order, whose inputs are kept for backward."""
        return (stage,)

    def set_grad_checkpointing(self, enable: bool = True) -> StagedNetwork:
        """Turns gradient checkpointing in training on or off, in place.

        Only the input of each residual block (in other networks, of each stage) is kept for the
        backward pass, which recomputes the maps inside. Outputs, gradients and running statistics
        do not change. ``torch.fx`` traces networks without it.
        """
        self.grad_checkpointing = enable
        return self

    def forward_head(self, x: Tensor) -> Tensor:
        """Maps the last stage's output to logits, (N, num_classes)."""
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Returns logits (N, num_classes) of a classifier, or the dict of ``out_features``."""
        if isinstance(x, Tensor) and x.dim() != 4:  # torch.fx traces with a Proxy
            raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(x.shape)}")
        if self.is_classifier:
            last = self.stage_names[-1]
            return self.forward_head(self.forward_features(x, [last])[last])
        return self.forward_features(x, self.out_features)

    def __prepare_scriptable__(self) -> torch.fx.GraphModule:
        """Returns the traced graph, since ``torch.jit.script`` cannot compile the modules."""
        traced = torch.fx.symbolic_trace(copy.deepcopy(self))
        for node in traced.graph.nodes:
            node.type = None  # drops forward's annotation, a union of two output types
        traced.recompile()
        return traced

    def freeze(self, freeze_at: int) -> StagedNetwork:
        """Freezes the first ``freeze_at`` stages in place (1 = the stem, or VGG's conv1).

        Frozen layers get no gradients, and their batch norms become constants. Stages are counted
        as in Detectron2: 2 also freezes res2, and 5 all stages, but not a classifier's head.
        """
        if freeze_at not in range(6):
            raise ValueError(f"freeze_at must be a number of stages from 0 to 5, not {freeze_at!r}")
        for name in self.stage_names[:freeze_at]:
            freeze(getattr(self, name))
        return self
