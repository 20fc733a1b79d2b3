"""Region heads: res5 per region (C4) for every depth, VGG-16's fc6 and fc7, global context.

Global context (paper, appendix B) treats the whole image as one more region, which is pooled and
passed through the per-region layers. Its feature is concatenated with each region's, so the
classifier and the regressor have twice the input width. Everything is trained end to end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec, get_norm, shapes_to_tensor
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.detection.config import CONTEXT_HEADS, UsageError, backbone_node, with_keys
from resnet_backbone.detection.modeling.backbones import in_memory_format, resnet_options
from resnet_backbone.fast.optimize import fold_each_call, in_graph, is_watched
from resnet_backbone.fast.regions import RegionAlign, StridedPool, project_on_map
from resnet_backbone.models.layers import init_he
from resnet_backbone.models.resnet import (
    DEPTHS,
    BottleneckBlock,
    init_residual_network,
    resnet_stage,
)


def with_stride(pooler: ROIPooler, stride: int = 1) -> ROIPooler:
    """Makes a pooler fast on CPUs, in place; it keeps every ``stride``-th bin."""
    levels = pooler.level_poolers
    for index, level in enumerate(levels):
        if type(level) is ROIAlign:
            levels[index] = RegionAlign(
                level.output_size, level.spatial_scale, level.sampling_ratio, level.aligned, stride
            )
        elif not isinstance(level, (RegionAlign, StridedPool)):
            levels[index] = StridedPool(level, stride)
    return pooler


class ImagewisePooler(ROIPooler):
    """``ROIPooler`` that in inference pools the regions of one image after the other.

    Detectron2's pools all of a level, then copies them into the output. So for each image it needs
    twice the memory of the pooled regions.
    """

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        is_single = len(box_lists) < 2 or len(self.level_poolers) < 2
        if is_single or torch.is_grad_enabled() or in_graph(x[0]):
            return super().forward(x, box_lists)
        counts = [len(boxes) for boxes in box_lists]
        output = x[0].new_empty(sum(counts), x[0].shape[1], *self.output_size)
        for image, regions in enumerate(output.split(counts)):
            maps = [level[image : image + 1] for level in x]
            regions.copy_(super().forward(maps, [box_lists[image]]))
        return output


@ROI_HEADS_REGISTRY.register()
class PaperRes5ROIHeads(Res5ROIHeads):
    """RoI pooling on res4, then all layers of res5 per region (paper, appendix A).

    Detectron2's own class always builds three bottlenecks, which is wrong at
    ``MODEL.RESNETS.DEPTH`` 18 and 34. This one builds res5 of the given depth, with the same keys
    ``roi_heads.res5.*``.

    Where only 1x1 convolutions have res5's stride (the paper's bottlenecks), they read every second
    pooled bin in each direction. The other three quarters are not pooled, and res5 has stride 1.
    Outputs and gradients do not change.
    """

    REGIONS_AT_ONCE = 64  # in inference: a trade-off of memory and time

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        options = super().from_config(cfg, input_shape)
        with_stride(options["pooler"], cls._strides(cfg)[0])
        return options

    @classmethod
    def _strides(cls, cfg: CfgNode) -> tuple[int, int]:
        """Returns the strides of the pooling and of res5."""
        resnets = cfg.MODEL.RESNETS
        if resnets.RES5_DILATION > 1:
            return 1, 1
        is_bottleneck = DEPTHS[resnets.DEPTH][0] is BottleneckBlock
        return (2, 1) if is_bottleneck and resnets.STRIDE_IN_1X1 else (1, 2)

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        resnets, node = cfg.MODEL.RESNETS, backbone_node(cfg)
        options = dict(stride=cls._strides(cfg)[1], dilation=resnets.RES5_DILATION)
        stage, channels = resnet_stage(resnets.DEPTH, 5, **options, **resnet_options(cfg))
        init_residual_network(stage, node.ACTIVATION, node.ZERO_INIT_RESIDUAL)
        return in_memory_format(cfg, fold_each_call(stage)), channels

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Maps features (N, C, H, W) and the boxes of N images to res5 (R, C', h, w)."""
        is_known = type(self.pooler) in (ROIPooler, ImagewisePooler)
        if not is_known or is_watched(self.pooler):
            return self.res5(self.pooler(features, boxes))
        pool, res5 = self.pooler.level_poolers[0], self.res5
        maps, regions = features[0], convert_boxes_to_pooler_format(boxes)
        if isinstance(pool, RegionAlign) and pool.sums_rows(maps) and not is_watched(pool):
            projected = project_on_map(res5, maps, regions.shape[0] * pool.bins)
            if projected is not None:
                maps, res5 = projected.of_map(maps), projected
        at_once = torch.is_grad_enabled() or in_graph(maps)  # graphs are of any number of regions
        at_once |= getattr(res5, "samples", None) is not None  # calibration: one call an image
        if at_once or len(regions) <= self.REGIONS_AT_ONCE:
            return res5(pool(maps, regions))
        return torch.cat([res5(pool(maps, part)) for part in regions.split(self.REGIONS_AT_ONCE)])


@ROI_HEADS_REGISTRY.register()
class PaperRes5ROIHeadsExtraNorm(PaperRes5ROIHeads):
    """:class:`PaperRes5ROIHeads` with a newly initialized norm after res5, ``res5.norm``.

    Source: arXiv 1911.05722; facebookresearch/moco, detection/train_net.py.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        stage, channels = super()._build_res5_block(cfg)
        stage.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels) or nn.Identity())
        return stage, channels


@ROI_BOX_HEAD_REGISTRY.register()
class VGGBoxHead(nn.Module):
    """fc6 and fc7 with ReLU and dropout (arXiv 1409.1556; Fast R-CNN, arXiv 1504.08083).

    Maps regions (N, C, P, P) to (N, fc_dim). VGG-16's classifier loads into ``fc6`` and ``fc7``.
    ``fc_dim`` is ``MODEL.ROI_BOX_HEAD.FC_DIM``, 4096 in the original.
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


def with_global_context(cfg: CfgNode) -> CfgNode:
    """Returns the config with the region heads for ``RESNET_BACKBONE.GLOBAL_CONTEXT``.

    It is `cfg` itself if the switch is off or the heads already have global context, else a copy.
    UsageError: the config's region heads do not support global context.
    """
    name = cfg.MODEL.ROI_HEADS.NAME
    if not backbone_node(cfg).GLOBAL_CONTEXT or name in CONTEXT_HEADS.values():
        return cfg
    if name not in CONTEXT_HEADS or cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UsageError(
            f"RESNET_BACKBONE.GLOBAL_CONTEXT is for GeneralizedRCNN with "
            f"{' or '.join(CONTEXT_HEADS)}, not for {cfg.MODEL.META_ARCHITECTURE} with "
            f"MODEL.ROI_HEADS.NAME {name}"
        )
    return with_keys(cfg, "MODEL.ROI_HEADS.NAME", CONTEXT_HEADS[name])


def region_features(heads: ROIHeads, maps: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
    """Returns features (R, D) after the per-region layers, before classifier and regressor.

    Args:
        heads: ``Res5ROIHeads`` (C4), ``StandardROIHeads``, or a subclass.
        boxes: regions of each image, R in total, in pixels of the network's input.
    """
    features = [maps[name] for name in heads.in_features]
    if isinstance(heads, Res5ROIHeads):
        return heads._shared_roi_transform(features, boxes).mean(dim=[2, 3])
    return heads.box_head(heads.box_pooler(features, boxes)).flatten(1)


def add_whole_image(boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Appends the whole image to the regions (Ri, 4) of each image; sizes are (height, width).

    In a trace, sizes are scalar tensors, so the trace records them.
    """
    found = []
    for regions, (height, width) in zip(boxes, sizes, strict=True):
        corner = shapes_to_tensor([width, height], device=regions.device).to(regions.dtype)
        image = torch.cat([torch.zeros_like(corner), corner])
        found.append(torch.cat([regions, image[None]]))
    return found


def join_context(features: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenates each region's feature with its image's: (R + N, D) -> (R, 2 D).

    `counts` are the numbers of regions in each of the N images, without the image itself.
    """
    joined = []
    for of_image in features.split([count + 1 for count in counts]):
        regions, image = of_image[:-1], of_image[-1:]
        joined.append(torch.cat([regions, image.expand_as(regions)], dim=1))
    return torch.cat(joined)


class GlobalContext:
    """Mixin for both kinds of region heads, to be listed before the :class:`ROIHeads` base."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not backbone_node(cfg).GLOBAL_CONTEXT:
            raise UsageError(
                f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME} needs "
                "RESNET_BACKBONE.GLOBAL_CONTEXT True"
            )
        if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise UsageError(
                "RESNET_BACKBONE.GLOBAL_CONTEXT is for boxes: set MODEL.MASK_ON and "
                "MODEL.KEYPOINT_ON False"
            )
        options = super().from_config(cfg, input_shape)
        channels = options["box_predictor"].cls_score.in_features
        options["box_predictor"] = FastRCNNOutputLayers(cfg, ShapeSpec(channels=2 * channels))
        return options

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]):
        """Like ``StandardROIHeads._forward_box``: losses in training, else detections."""
        boxes = [image.proposal_boxes.tensor for image in proposals]
        regions = add_whole_image(boxes, [image.image_size for image in proposals])
        pooled = region_features(self, features, [Boxes(region) for region in regions])
        joined = join_context(pooled, [box.shape[0] for box in boxes])
        predictions = self.box_predictor(joined)
        if self.training:
            return self.box_predictor.losses(predictions, proposals)
        return self.box_predictor.inference(predictions, proposals)[0]


@ROI_HEADS_REGISTRY.register()
class ContextROIHeads(GlobalContext, StandardROIHeads):
    """``StandardROIHeads`` (VGG-16, DC5, FPN) with global context."""


@ROI_HEADS_REGISTRY.register()
class ContextRes5ROIHeads(GlobalContext, PaperRes5ROIHeads):
    """The C4 heads with global context; a region's feature is the mean of its res5 map."""

    def forward(self, images, features, proposals, targets=None):
        """Like ``Res5ROIHeads.forward``: returns detections and losses."""
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
            return [], self._forward_box(features, proposals)
        return self._forward_box(features, proposals), {}
