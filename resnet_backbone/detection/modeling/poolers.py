"""Detectron2's poolers with levels that are fast on CPUs."""

from __future__ import annotations

from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from resnet_backbone.fast.roi_align import RegionAlign, StridedPool


def with_stride(pooler: ROIPooler, stride: int = 1) -> ROIPooler:
    """Gives the levels of a pooler their fast form, in place.

    RoIAlign becomes :class:`RegionAlign`; others are pooled in full, and every ``stride``-th bin is
    kept.
    """
    levels = pooler.level_poolers
    for index, level in enumerate(levels):
        if type(level) is ROIAlign:
            levels[index] = RegionAlign(
                level.output_size, level.spatial_scale, level.sampling_ratio, level.aligned, stride
            )
        elif not isinstance(level, (RegionAlign, StridedPool)):
            levels[index] = StridedPool(level, stride)
    return pooler


def with_fast_poolers(model: nn.Module) -> nn.Module:
    """:func:`with_stride` for all poolers of a detector, in place; results stay."""
    for module in model.modules():
        if isinstance(module, ROIPooler):
            with_stride(module)
    return model
