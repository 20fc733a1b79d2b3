"""Region heads: res5 per region (C4) for every depth, and VGG-16's fc6 and fc7."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.detection.backbones import in_memory_format, resnet_options
from resnet_backbone.detection.config import backbone_node
from resnet_backbone.models.layers import init_he
from resnet_backbone.models.resnet import init_residual_network, resnet_stage


@ROI_HEADS_REGISTRY.register()
class PaperRes5ROIHeads(Res5ROIHeads):
    """RoI pooling on res4, then all layers of res5 per region (paper, appendix A).

    Detectron2's own class builds three bottlenecks whatever ``MODEL.RESNETS.DEPTH`` says, which
    is wrong at 18 and 34; this one builds the depth's own res5. Keys are the same,
    ``roi_heads.res5.*``.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        node, dilation = backbone_node(cfg), cfg.MODEL.RESNETS.RES5_DILATION
        stage, channels = resnet_stage(
            cfg.MODEL.RESNETS.DEPTH,
            5,
            stride=1 if dilation > 1 else 2,
            dilation=dilation,
            multi_grid=node.MULTI_GRID,
            **resnet_options(cfg),
        )
        init_residual_network(stage, node.ACTIVATION, node.ZERO_INIT_RESIDUAL)
        return in_memory_format(cfg, stage), channels


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
