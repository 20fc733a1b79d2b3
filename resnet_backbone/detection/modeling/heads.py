"""Region heads: res5 per region (C4) for every depth, VGG-16's fc6 and fc7, fast poolers."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.detection.config import backbone_node
from resnet_backbone.detection.modeling.backbones import in_memory_format, resnet_options
from resnet_backbone.fast.folding import is_watched
from resnet_backbone.fast.regions import for_regions, projections_on_map
from resnet_backbone.fast.roi_align import RegionAlign, StridedPool
from resnet_backbone.models.layers import init_he
from resnet_backbone.models.resnet import (
    DEPTHS,
    BottleneckBlock,
    init_residual_network,
    resnet_stage,
)


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


@ROI_HEADS_REGISTRY.register()
class PaperRes5ROIHeads(Res5ROIHeads):
    """RoI pooling on res4, then all layers of res5 per region (paper, appendix A).

    Detectron2's own class builds three bottlenecks whatever ``MODEL.RESNETS.DEPTH`` says, which
    is wrong at 18 and 34; this one builds the depth's own res5. Keys are the same,
    ``roi_heads.res5.*``.

    Where only 1x1 convolutions carry res5's stride (the paper's bottlenecks), they read every
    second pooled bin in each direction: the other three quarters are not pooled, and res5 has
    stride 1. Outputs and gradients are the same.
    """

    REGIONS_AT_ONCE = 128  # in inference: more would take memory, fewer would take time

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        options = super().from_config(cfg, input_shape)
        with_stride(options["pooler"], cls._strides(cfg)[0])
        return options

    @classmethod
    def _strides(cls, cfg: CfgNode) -> tuple[int, int]:
        """Stride of the pooling and of res5."""
        resnets = cfg.MODEL.RESNETS
        if resnets.RES5_DILATION > 1:
            return 1, 1
        is_bottleneck = DEPTHS[resnets.DEPTH][0] is BottleneckBlock
        return (2, 1) if is_bottleneck and resnets.STRIDE_IN_1X1 else (1, 2)

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        node, dilation = backbone_node(cfg), cfg.MODEL.RESNETS.RES5_DILATION
        options = resnet_options(cfg)
        stage, channels = resnet_stage(
            cfg.MODEL.RESNETS.DEPTH,
            5,
            stride=cls._strides(cfg)[1],
            dilation=dilation,
            multi_grid=node.MULTI_GRID,
            **options,
        )
        init_residual_network(stage, node.ACTIVATION, node.ZERO_INIT_RESIDUAL)
        return in_memory_format(cfg, for_regions(stage)), channels

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Maps (N, C, H, W) and the boxes of N images -> res5 of R regions, (R, C', h, w)."""
        if type(self.pooler) is not ROIPooler or is_watched(self.pooler):
            return self.res5(self.pooler(features, boxes))
        pool, res5 = self.pooler.level_poolers[0], self.res5
        maps, regions = features[0], convert_boxes_to_pooler_format(boxes)
        if isinstance(pool, RegionAlign) and pool.sums_rows(maps) and not is_watched(pool):
            projections = projections_on_map(res5, maps, regions.shape[0] * pool.bins)
            if projections is not None:
                maps, res5 = projections.of_map(maps), projections.stage_of
        is_graph = torch.jit.is_tracing() or torch.compiler.is_compiling()  # of any number
        if torch.is_grad_enabled() or is_graph or len(regions) <= self.REGIONS_AT_ONCE:
            return res5(pool(maps, regions))
        return torch.cat([res5(pool(maps, part)) for part in regions.split(self.REGIONS_AT_ONCE)])


@ROI_BOX_HEAD_REGISTRY.register()
class VGGBoxHead(nn.Module):
    """fc6 and fc7 with ReLU and dropout (arXiv 1409.1556; Fast R-CNN, arXiv 1504.08083).

    (N, C, P, P) regions -> (N, fc_dim). Keys ``fc6``, ``fc7``: VGG-16's classifier loads here.
    ``fc_dim`` is ``MODEL.ROI_BOX_HEAD.FC_DIM``: 4096 in the original.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, fc_dim: int = 4096, dropout: float = 0.5):
        super().__init__()
        size = input_shape.channels * input_shape.height * input_shape.width
        self.fc6 = nn.Linear(size, fc_dim)
        self.fc7 = nn.Linear(fc_dim, fc_dim)
        self.dropout = nn.Dropout(dropout)
        init_he(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {"input_shape": input_shape, "fc_dim": cfg.MODEL.ROI_BOX_HEAD.FC_DIM}

    @property
    def output_shape(self) -> ShapeSpec:
        return ShapeSpec(channels=self.fc7.out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc6(torch.flatten(x, 1))))
        return self.dropout(F.relu(self.fc7(x)))
