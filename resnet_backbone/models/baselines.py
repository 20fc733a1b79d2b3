"""PReLU-net and BN-Inception, the baselines of the paper's Tables 3, 4 and 5."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.models.layers import (
    SMALL_STD,
    ConvNormAct,
    Norm,
    StagedNetwork,
    build_activation,
    init_he,
)

# Number of 3x3 convolutions per stage, and the widths of conv1 and the three stages
# (arXiv 1502.01852, Table 3).
PRELU_NETS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "A": (5, (96, 256, 512, 512)),
    "B": (6, (96, 256, 512, 512)),
    "C": (6, (96, 384, 768, 896)),
}
BINS = (7, 3, 2, 1)


class PReLUNet(StagedNetwork):
    """The networks of "Delving Deep into Rectifiers" (arXiv 1502.01852, Table 3).

    A 7x7 convolution, three stages of 3x3 convolutions with 2x2 max pooling before each, spatial
    pyramid pooling to 7x7, 3x3, 2x2 and 1x1 bins, fc1 and fc2 of 4096 with dropout, ``linear``.
    Stages conv1..conv4 have strides 2, 4, 8, 16. Every layer but the last ends in a PReLU with one
    slope per channel. In fc1 and fc2 this is one slope per output, which the paper leaves open.

    Args:
        model: "A" (19 layers), "B" (22, the one in the ResNet paper) or "C" (22, wider).
        num_classes, in_channels, out_features, freeze_at: as in
            :class:`~resnet_backbone.models.resnet.ResNet`.
        norm: as in ResNet; "" is the original.
        activation: "prelu", or "relu" for the paper's baseline.
        dropout: drop probability after fc1 and fc2.
    """

    head_names = ("fc1", "fc2", "linear")

    def __init__(
        self,
        model: str = "B",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: Norm = "",
        activation: str = "prelu",
        dropout: float = 0.5,
        out_features: Iterable[str] | None = None,
        freeze_at: int = 0,
    ):
        if model not in PRELU_NETS:
            raise ValueError(f"unknown PReLU-net {model!r}: use one of {', '.join(PRELU_NETS)}")
        super().__init__(("conv1", "conv2", "conv3", "conv4"), out_features)
        depth, widths = PRELU_NETS[model]
        channels, options = in_channels, {"norm": norm, "activation": activation}
        for number, (name, width) in enumerate(zip(self.stage_names, widths, strict=False)):
            stage = nn.Sequential()
            if number:
                stage.add_module("pool", nn.MaxPool2d(2))
            for index in range(depth if number else 1):
                kernel, stride = (3, 1) if number else (7, 2)
                layer = ConvNormAct(channels, width, kernel, stride=stride, **options)
                stage.add_module(str(index), layer)
                channels = width
            self.add_stage(name, stage, channels, 2 ** (number + 1))
        if self.is_classifier:
            pooled = channels * sum(bins * bins for bins in BINS)
            self.fc1 = self._hidden(pooled, activation, dropout)
            self.fc2 = self._hidden(4096, activation, dropout)
            self.linear = nn.Linear(4096, num_classes)
        init_he(self, activation)
        if self.is_classifier:  # as in VGG
            nn.init.normal_(self.linear.weight, std=SMALL_STD)
        self.freeze(freeze_at)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _hidden(inputs: int, activation: str, dropout: float) -> nn.Sequential:
        act = build_activation(activation, 4096)
        return nn.Sequential(nn.Linear(inputs, 4096), act, nn.Dropout(dropout))

    def forward_head(self, x: Tensor) -> Tensor:
        pyramid = [F.adaptive_max_pool2d(x, bins).flatten(1) for bins in BINS]
        return self.linear(self.fc2(self.fc1(torch.cat(pyramid, dim=1))))


class InceptionBlock(nn.Module):
    """Four branches side by side: 1x1, 3x3, two 3x3, and pooling (arXiv 1502.03167, Figure 5).

    Args:
        one: channels of the 1x1 branch; 0 drops the branch and gives the block stride 2.
        three: (reduced, output) channels of the 3x3 branch.
        double: (reduced, output) channels of the branch with two 3x3 convolutions.
        pool: "avg" or "max".
        projection: channels of the 1x1 convolution after pooling; 0 drops that convolution.
        options: norm and activation of every convolution.
    """

    def __init__(
        self,
        channels: int,
        one: int,
        three: tuple[int, int],
        double: tuple[int, int],
        pool: str,
        projection: int,
        **options: Norm,
    ):
        super().__init__()
        conv, stride = partial(ConvNormAct, **options), 1 if one else 2
        self.branches = nn.ModuleDict()
        if one:
            self.branches["one"] = conv(channels, one, 1)
        self.branches["three"] = nn.Sequential(
            conv(channels, three[0], 1), conv(*three, 3, stride=stride)
        )
        self.branches["double_three"] = nn.Sequential(
            conv(channels, double[0], 1),
            conv(*double, 3),
            conv(double[1], double[1], 3, stride=stride),
        )
        pooling = nn.AvgPool2d if pool == "avg" else nn.MaxPool2d
        self.branches["pool"] = nn.Sequential(pooling(3, stride, padding=1))
        if projection:
            self.branches["pool"].append(conv(channels, projection, 1))
        self.out_channels = one + three[1] + double[1] + (projection or channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches.values()], dim=1)


Row = tuple[int, tuple[int, int], tuple[int, int], str, int]
# The rows of Figure 5 by stage; each stride-2 block starts a stage.
INCEPTION: dict[str, dict[str, Row]] = {
    "inception3": {
        "3a": (64, (64, 64), (64, 96), "avg", 32),
        "3b": (64, (64, 96), (64, 96), "avg", 64),
    },
    "inception4": {
        "3c": (0, (128, 160), (64, 96), "max", 0),
        "4a": (224, (64, 96), (96, 128), "avg", 128),
        "4b": (192, (96, 128), (96, 128), "avg", 128),
        "4c": (160, (128, 160), (128, 160), "avg", 128),
        "4d": (96, (128, 192), (160, 192), "avg", 128),
    },
    "inception5": {
        "4e": (0, (128, 192), (192, 256), "max", 0),
        "5a": (352, (192, 320), (160, 224), "avg", 128),
        "5b": (352, (192, 320), (192, 224), "max", 128),
    },
}


class BNInception(StagedNetwork):
    """Inception with batch normalization (arXiv 1502.03167, Figure 5).

    Stages conv1, conv2, inception3, inception4, inception5 have strides 2, 4, 8, 16, 32. Blocks 3c
    and 4e halve the map and start inception4 and inception5. conv1 is an ordinary convolution, as
    in released reimplementations; the paper's is separable with a depth multiplier of 8.

    Args:
        num_classes, in_channels, norm, activation, out_features, freeze_at: as in
            :class:`~resnet_backbone.models.resnet.ResNet`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: Norm = "BN",
        activation: str = "relu",
        out_features: Iterable[str] | None = None,
        freeze_at: int = 0,
    ):
        super().__init__(("conv1", "conv2", *INCEPTION), out_features)
        options = {"norm": norm, "activation": activation}
        conv = partial(ConvNormAct, **options)
        stems = {
            "conv1": {"0": conv(in_channels, 64, 7, stride=2)},
            "conv2": {"0": conv(64, 64, 1), "1": conv(64, 192, 3)},
        }
        channels = 192
        for number, name in enumerate(self.stage_names):
            stage = nn.Sequential()
            if name in ("conv2", "inception3"):
                stage.add_module("pool", nn.MaxPool2d(3, 2, ceil_mode=True))
            for key, layer in (stems.get(name) or INCEPTION[name]).items():
                block = layer if name in stems else InceptionBlock(channels, *layer, **options)
                stage.add_module(key, block)
                channels = block.out_channels
            self.add_stage(name, stage, channels, 2 ** (number + 1))
        if self.is_classifier:
            self.linear = nn.Linear(channels, num_classes)
        init_he(self, activation)
        self.freeze(freeze_at)
        self.to(memory_format=torch.channels_last)
