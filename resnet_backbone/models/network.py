"""What all networks share: stages that run in order, a feature table, freezing, a head."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.fx
from torch import Tensor, nn

from resnet_backbone.models.layers import freeze


class Feature(NamedTuple):
    """One row of a network's feature table."""

    channels: int
    stride: int  # input pixels per output pixel


class StagedNetwork(nn.Module):
    """A classifier, or a backbone that returns the feature maps of named stages.

    Subclasses add their stages with :meth:`add_stage` in the order in which they run, then the
    layers of the head, and define :meth:`forward_head`. At the end of the constructor they store
    their kernels as ``torch.channels_last``: the same values under the same keys, and every map
    then takes that form, in which convolutions on CPUs are faster (GPUs: not measured). Networks
    can be traced (``torch.jit``, ``torch.fx``), exported, compiled and scripted.

    Attributes:
        features: name -> :class:`Feature`, one entry per stage that was built, in order.
        out_features: names of the maps that ``forward`` returns; empty for a classifier.
        left_out: names of the deeper stages and head layers that a backbone does not build.
    """

    head_names: tuple[str, ...] = ("linear",)

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
            name -> (N, channels, H / stride, W / stride); ResNets round sizes up, VGGs down.
        """
        wanted = set(self.stage_names if names is None else names)
        if not wanted <= set(self.stage_names):
            missing = sorted(wanted - set(self.stage_names))
            raise ValueError(f"no stage {missing}: this network has {', '.join(self.stage_names)}")
        maps = {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in wanted:
                maps[name] = x
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map -> logits, (N, num_classes)."""
        raise NotImplementedError

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
            raise ValueError(f"freeze_at is a number of stages from 0 to 5, not {freeze_at}")
        for name in self.stage_names[:freeze_at]:
            freeze(getattr(self, name))
        return self
