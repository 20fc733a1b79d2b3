"""The CIFAR-10 networks of 6n+2 layers and their plain twins (arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resnet_backbone.models.layers import ConvNormAct, Norm, global_average_pool
from resnet_backbone.models.network import StagedNetwork
from resnet_backbone.models.resnet import BasicBlock, init_residual_network, make_stage

STAGE_WIDTHS = (16, 32, 64)
STAGE_NAMES = ("stem", "res2", "res3", "res4")


class CifarResNet(StagedNetwork):
    """3x3 convolution to 16 maps, then three stages of n blocks with 16, 32, 64 maps.

    Maps (N, in_channels, 32, 32) to logits (N, num_classes); other sizes work too. Stages are
    named stem, res2, res3, res4 with strides 1, 1, 2, 4. It has 97,216 n - 21,926 parameters
    with option A and 10 classes.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110, 1202 in the paper (Table 6).
        num_classes, in_channels, norm, activation: as in
            :class:`~resnet_backbone.models.resnet.ResNet`.
        out_features, freeze_at, zero_init_residual: as there.
        shortcut: "A" is the paper's choice here; "none" is the plain twin.
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
        super().__init__(STAGE_NAMES, out_features)
        self.depth = depth
        options = dict(norm=norm, activation=activation)
        self.add_stage("stem", ConvNormAct(in_channels, 16, 3, **options), 16, 1)
        channels, stride = 16, 1
        for name, width in zip(self.stage_names[1:], STAGE_WIDTHS, strict=False):
            step = 1 if width == 16 else 2
            stage = make_stage(
                BasicBlock, blocks, channels, width, stride=step, shortcut=shortcut, **options
            )
            channels, stride = width, stride * step
            self.add_stage(name, stage, channels, stride)
        if self.is_classifier:
            self.linear = nn.Linear(channels, num_classes)
        init_residual_network(self, activation, zero_init_residual)
        self.freeze(freeze_at)
        self.to(memory_format=torch.channels_last)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.linear(global_average_pool(x))
