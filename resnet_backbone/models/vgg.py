"""VGG-11/13/16/19 (arXiv 1409.1556, Table 1: A, B, D, E), the paper's detection baseline."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.models.layers import SMALL_STD, ConvNormAct, Norm, StagedNetwork, init_he

# Number of 3x3 convolutions in conv1..conv5.
DEPTHS: dict[int, tuple[int, int, int, int, int]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
STAGE_WIDTHS = (64, 128, 256, 512, 512)
STAGE_NAMES = ("conv1", "conv2", "conv3", "conv4", "conv5", "pool5")


class VGG(StagedNetwork):
    """3x3 convolutions in five stages with 2x2 max pooling between them.

    Stages conv1..conv5 end before their pooling, at strides 1, 2, 4, 8, 16. VGG-16's ``conv5`` is
    conv5_3 in the detection literature. ``pool5`` is conv5 pooled, at stride 32. The classifier
    has fc6 and fc7 of 4096 with dropout, and ``linear`` (fc8). At inputs other than 224x224,
    pool5 is averaged to 7x7.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes, in_channels, activation, out_features, freeze_at: as in
            :class:`~resnet_backbone.models.resnet.ResNet`; ``freeze_at=2`` fine-tunes conv3_1 and
            up, as in Fast R-CNN.
        norm: as in ResNet; "" is the original, "BN" the later variant.
        dropout: drop probability after fc6 and fc7.
    """

    head_names = ("fc6", "fc7", "linear")

    def __init__(
        self,
        depth: int = 16,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: Norm = "",
        activation: str = "relu",
        dropout: float = 0.5,
        out_features: Iterable[str] | None = None,
        freeze_at: int = 0,
    ):
        if depth not in DEPTHS:
            raise ValueError(f"unknown depth {depth}: use one of {', '.join(map(str, DEPTHS))}")
        super().__init__(STAGE_NAMES, out_features)
        self.depth = depth
        channels, stride = in_channels, 1
        for name, num_convs, width in zip(
            self.stage_names, DEPTHS[depth], STAGE_WIDTHS, strict=False
        ):
            stage = nn.Sequential()
            if name != "conv1":
                stage.add_module("pool", nn.MaxPool2d(2))
                stride *= 2
            for index in range(num_convs):
                layer = ConvNormAct(channels, width, 3, norm=norm, activation=activation)
                stage.add_module(str(index), layer)
                channels = width
            self.add_stage(name, stage, channels, stride)
        if "pool5" in self.stage_names:
            self.add_stage("pool5", nn.MaxPool2d(2), channels, 2 * stride)
        if self.is_classifier:
            self.fc6 = nn.Linear(channels * 7 * 7, 4096)
            self.fc7 = nn.Linear(4096, 4096)
            self.linear = nn.Linear(4096, num_classes)
            self.dropout = nn.Dropout(dropout)
        init_he(self, activation)
        if self.is_classifier:  # else pixels of 0 to 255 give a first loss above 20, and diverge
            nn.init.normal_(self.linear.weight, std=SMALL_STD)
        self.freeze(freeze_at)
        self.to(memory_format=torch.channels_last)

    def forward_head(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.linear(x)
