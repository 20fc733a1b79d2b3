"""The paper's residual networks for ImageNet and CIFAR-10, and their plain twins (1512.03385)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.models.layers import (
    ConvNorm,
    ConvNormAct,
    Norm,
    StagedNetwork,
    build_activation,
    init_he,
)

SHORTCUTS = ("A", "B", "C", "highway", "none")
HIGHWAY_GATE_BIAS = -3.0  # gates start nearly closed: arXiv 1505.00387 section 2.3


class ZeroPadShortcut(nn.Module):
    """Option A (section 3.3): identity, subsampled by the stride, padded with zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride, self.extra_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1, self.stride)  # torch.export takes a slice for some sizes only
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


def build_shortcut(
    option: str, in_channels: int, out_channels: int, stride: int, norm: Norm
) -> nn.Module | None:
    """Builds a block's shortcut (section 3.3; Table 3, A, B, C); ``None`` for a plain network."""
    if option not in SHORTCUTS:
        raise ValueError(f"unknown shortcut {option!r}: use one of {', '.join(SHORTCUTS)}")
    if option == "none":
        return None
    same_shape = stride == 1 and in_channels == out_channels
    if same_shape and option != "C":
        return nn.Identity()
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return ConvNorm(in_channels, out_channels, 1, stride=stride, norm=norm)


class ResidualBlock(nn.Module):
    """activation(F(x) + shortcut(x)), equations 1 and 2; subclasses build and run F.

    ``shortcut="highway"`` gates the sum, T * F(x) + (1 - T) * shortcut(x), with T = sigmoid(1x1
    convolution of x): Highway Networks (arXiv 1505.00387) in the form of 1603.05027, section 3.1.
    """

    expansion: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        shortcut: str = "B",
        norm: Norm = "BN",
        activation: str = "relu",
        stride_in_1x1: bool = True,
    ):
        super().__init__()
        self.shortcut = build_shortcut(shortcut, in_channels, out_channels, stride, norm)
        self.gate = None
        if shortcut == "highway":
            self.gate = nn.Conv2d(in_channels, out_channels, 1, stride=stride)
        self.activation = build_activation(activation, out_channels)
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        options = dict(norm=norm, activation=activation)
        self.build_residual(in_channels, out_channels, strides, dilation, options)

    def build_residual(
        self, in_channels: int, out_channels: int, strides: tuple, dilation: int, options: dict
    ) -> None:
        """Adds the layers of F; ``strides`` are for the first 1x1 and the 3x3 convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(x))
            y = gate * y + (1 - gate) * self.shortcut(x)
        elif self.shortcut is not None:
            y += self.shortcut(x)
        return self.activation(y)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (Fig. 5 left): the first has the stride, both have the dilation."""

    expansion = 1

    def build_residual(
        self, in_channels: int, out_channels: int, strides: tuple, dilation: int, options: dict
    ) -> None:
        stride, norm = max(strides), options["norm"]
        self.conv1 = ConvNormAct(
            in_channels, out_channels, 3, stride=stride, dilation=dilation, **options
        )
        self.conv2 = ConvNorm(out_channels, out_channels, 3, dilation=dilation, norm=norm)

    def residual(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions (Fig. 5 right), 4 times narrower inside.

    ``stride_in_1x1``: the paper and its released weights put the stride on the first 1x1;
    torchvision, timm and fb.resnet.torch put it on the 3x3. Shapes match, outputs do not.
    """

    expansion = 4

    def build_residual(
        self, in_channels: int, out_channels: int, strides: tuple, dilation: int, options: dict
    ) -> None:
        width = out_channels // self.expansion
        self.conv1 = ConvNormAct(in_channels, width, 1, stride=strides[0], **options)
        self.conv2 = ConvNormAct(width, width, 3, stride=strides[1], dilation=dilation, **options)
        self.conv3 = ConvNorm(width, out_channels, 1, norm=options["norm"])

    def residual(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


# Table 1: block type, and number of blocks in res2..res5 (conv2_x..conv5_x).
DEPTHS: dict[int, tuple[type[ResidualBlock], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}
STAGE_WIDTHS = (64, 128, 256, 512)  # channels of the 3x3 convolutions in res2..res5
STAGE_NAMES = ("stem", "res2", "res3", "res4", "res5")
CIFAR_STAGE_NAMES = STAGE_NAMES[:4]
# Dilations of res2..res5 by output stride (arXiv 1606.00915, 1706.05587).
DILATIONS = {32: (1, 1, 1, 1), 16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


class Stem(nn.Module):
    """7x7 convolution with stride 2, then 3x3 max pooling with stride 2 (Table 1).

    ``caffe_pool``: the released Caffe networks pool without padding and round the size up; later
    implementations pad by one pixel. The windows shift by a pixel. An odd input n of the pooling
    (images of 4k + 1 or 4k + 2 pixels) gives (n - 1) / 2 instead of (n + 1) / 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, activation: str, caffe_pool: bool
    ):
        super().__init__()
        self.conv1 = ConvNormAct(
            in_channels, out_channels, 7, stride=2, norm=norm, activation=activation
        )
        self.pool = nn.MaxPool2d(3, 2, padding=0 if caffe_pool else 1, ceil_mode=caffe_pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv1(x))


def make_stage(
    block: type[ResidualBlock],
    num_blocks: int,
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    multi_grid: Sequence[int] = (),
    **block_options,
) -> nn.Sequential:
    """Builds a stage: the first block has the stride, block i dilation * multi_grid[i]."""
    grid = tuple(multi_grid) or (1,) * num_blocks
    if len(grid) != num_blocks or min(grid) < 1:
        raise ValueError(f"multi_grid {grid} needs {num_blocks} positive rates, one per block")
    stage = nn.Sequential()
    for rate in grid:
        options = dict(stride=stride, dilation=dilation * rate, **block_options)
        stage.append(block(in_channels, out_channels, **options))
        in_channels, stride = out_channels, 1
    return stage


def init_residual_network(network: nn.Module, activation: str, zero_init_residual: bool) -> None:
    """He initialization, nearly closed Highway gates and, optionally, zero last gammas."""
    init_he(network, activation)
    for block in network.modules():
        if not isinstance(block, ResidualBlock):
            continue
        if block.gate is not None:
            nn.init.constant_(block.gate.bias, HIGHWAY_GATE_BIAS)
        if zero_init_residual:
            if block.shortcut is None:
                raise ValueError("zero_init_residual needs shortcuts, or all signals are zero")
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            if getattr(last.norm, "weight", None) is None:
                raise ValueError("zero_init_residual needs a norm with a weight (gamma)")
            nn.init.zeros_(last.norm.weight)


def resnet_stage(depth: int, stage: int, *, in_channels: int | None = None, **options):
    """Returns stage ``res{stage}`` (2..5) of a ResNet as a module, and its output channels.

    ``resnet_stage(depth, 5, stride=2)`` is what a C4 detection head runs per region.
    ``options`` are passed to :func:`make_stage`.
    """
    block, num_blocks = DEPTHS[depth]
    if in_channels is None:
        in_channels = 64 if stage == 2 else STAGE_WIDTHS[stage - 3] * block.expansion
    channels = STAGE_WIDTHS[stage - 2] * block.expansion
    return make_stage(block, num_blocks[stage - 2], in_channels, channels, **options), channels


class ResidualNetwork(StagedNetwork):
    """Base class of the ImageNet and CIFAR-10 networks."""

    def checkpointed_parts(self, stage: nn.Module) -> Iterable[nn.Module]:
        return stage if isinstance(stage, nn.Sequential) else (stage,)  # blocks, or the stem

    def finish(self, num_classes: int, activation: str, freeze_at: int, zero_init: bool) -> None:
        """Adds the head, initializes and freezes, once all stages are added."""
        if self.is_classifier:
            self.linear = nn.Linear(self.features[self.stage_names[-1]].channels, num_classes)
        init_residual_network(self, activation, zero_init)
        self.freeze(freeze_at)
        self.to(memory_format=torch.channels_last)


class ResNet(ResidualNetwork):
    """A residual network, or its plain counterpart with ``shortcut="none"``.

    A classifier maps (N, in_channels, H, W) to logits (N, num_classes). With ``out_features`` the
    network has no head, stops after the deepest requested stage, and returns a dict of feature
    maps at strides 4 (stem, res2), 8, 16, 32. Module and key names are Detectron2's.

    Args:
        depth: 18, 34, 50, 101 or 152 (Table 1).
        num_classes: number of logits.
        in_channels: channels of the input image.
        shortcut: "A", "B" or "C" (Table 3; the paper uses B for 50 layers and more), "highway"
            (gated, arXiv 1505.00387) or "none" (plain, section 3.3).
        stride_in_1x1: put a bottleneck's stride on its first 1x1, as in the paper, or its 3x3.
        norm: "BN" (the paper), "FrozenBN", "SyncBN", "GN" or a callable channels -> module;
            "" for none, which gives the convolutions a bias.
        activation: "relu" (the paper) or "prelu" (arXiv 1502.01852).
        dilations: one for each of res2..res5, for all 3x3 convolutions of the stage, as in R-FCN.
            A stage with a dilation above 1 has stride 1: (1, 1, 1, 2) is DC5 at output stride 16,
            and (1, 1, 2, 4) is output stride 8 (arXiv 1606.00915).
        multi_grid: one rate per block of res5, times its dilation (arXiv 1706.05587).
        out_features: any of stem, res2, res3, res4, res5; ``None`` for a classifier.
        freeze_at: number of frozen stages, counted from the stem.
        zero_init_residual: start the last gamma of each block at zero (arXiv 1706.02677, 5.1).
        caffe_pool: pool1 as in the released Caffe networks, see :class:`Stem`.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        shortcut: str = "B",
        stride_in_1x1: bool = True,
        norm: Norm = "BN",
        activation: str = "relu",
        dilations: Sequence[int] = (1, 1, 1, 1),
        multi_grid: Sequence[int] = (),
        out_features: Iterable[str] | None = None,
        freeze_at: int = 0,
        zero_init_residual: bool = False,
        caffe_pool: bool = False,
    ):
        if depth not in DEPTHS:
            raise ValueError(f"unknown depth {depth}: use one of {', '.join(map(str, DEPTHS))}")
        if len(dilations) != 4 or min(dilations) < 1:
            raise ValueError(f"dilations {tuple(dilations)}: give four positive ones, res2..res5")
        super().__init__(STAGE_NAMES, out_features)
        self.depth, self.stride_in_1x1 = depth, stride_in_1x1
        self.dilations, self.multi_grid = tuple(dilations), tuple(multi_grid)
        self.add_stage("stem", Stem(in_channels, 64, norm, activation, caffe_pool), 64, 4)
        options = dict(shortcut=shortcut, stride_in_1x1=stride_in_1x1, norm=norm)
        options["activation"] = activation
        stride = 4
        for number, name in enumerate(self.stage_names[1:], start=2):
            dilation, grid = dilations[number - 2], multi_grid if number == 5 else ()
            step = 1 if number == 2 or dilation > 1 else 2
            rates = dict(stride=step, dilation=dilation, multi_grid=grid)
            stage, channels = resnet_stage(depth, number, **rates, **options)
            stride *= step
            self.add_stage(name, stage, channels, stride)
        self.finish(num_classes, activation, freeze_at, zero_init_residual)


class CifarResNet(ResidualNetwork):
    """A CIFAR-10 network: 3x3 convolution, then three stages of n blocks (section 4.2).

    Maps (N, in_channels, 32, 32) to logits (N, num_classes); other sizes work too. Stages stem,
    res2, res3, res4 have 16, 16, 32, 64 channels and strides 1, 1, 2, 4. With option A and 10
    classes there are 97,216 n - 21,926 parameters.

    Args:
        depth: 6n + 2; 20, 32, 44, 56, 110 or 1202 in the paper (Table 6).
        shortcut: "A" is the paper's choice here; "none" is the plain counterpart.
        norm, activation, out_features, freeze_at, zero_init_residual: as in :class:`ResNet`.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str = "A",
        norm: Norm = "BN",
        activation: str = "relu",
        out_features: Iterable[str] | None = None,
        freeze_at: int = 0,
        zero_init_residual: bool = False,
    ):
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n+2 with n >= 1: use 8, 14, 20, 32, 44 ...")
        super().__init__(CIFAR_STAGE_NAMES, out_features)
        self.depth = depth
        options = dict(norm=norm, activation=activation)
        self.add_stage("stem", ConvNormAct(in_channels, 16, 3, **options), 16, 1)
        options["shortcut"] = shortcut
        width, stride = 16, 1
        for name in self.stage_names[1:]:
            step = 1 if name == "res2" else 2
            channels, width, stride = width, width * step, stride * step
            stage = make_stage(BasicBlock, blocks, channels, width, stride=step, **options)
            self.add_stage(name, stage, width, stride)
        self.finish(num_classes, activation, freeze_at, zero_init_residual)
