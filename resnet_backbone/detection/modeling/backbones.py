"""The networks as registered Detectron2 backbones, with and without a feature pyramid."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from resnet_backbone.detection.checkpoint.files import origin_input
from resnet_backbone.detection.checkpoint.input_check import StatesInput, config_input
from resnet_backbone.detection.config import UsageError, backbone_node, refuse_ignored_context
from resnet_backbone.fast import fold_each_call
from resnet_backbone.models import VGG, ResNet
from resnet_backbone.models.layers import NORMS, Norm
from resnet_backbone.models.resnet import DEPTHS, STAGE_WIDTHS


class PaperBackbone(StatesInput):
    """What makes a :class:`~resnet_backbone.models.StagedNetwork` a Detectron2 backbone.

    ``output_shape`` is the network's feature table. The networks work at any input size, so
    ``size_divisibility`` is 0 and there are no ``padding_constraints`` (Detectron2's defaults); FPN
    states its own. Constant batch norms fold at each call.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        fold_each_call(self)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(**self.features[name]._asdict()) for name in self.out_features}


class PaperResNet(PaperBackbone, ResNet, Backbone):
    """:class:`resnet_backbone.models.ResNet` as a Detectron2 backbone; same arguments and keys."""


class PaperVGG(PaperBackbone, VGG, Backbone):
    """:class:`resnet_backbone.models.VGG` as a Detectron2 backbone; same arguments and keys."""


class PaperFPN(FPN):
    """Detectron2's FPN that refuses weights of other input before it takes any of its own."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if isinstance(self.bottom_up, StatesInput):
            self.bottom_up.check_settings(state_dict, prefix + "bottom_up.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def resolve_norm(name: str) -> Norm:
    """Our layer for a name that we know, otherwise Detectron2's (LN, nnSyncBN, naiveSyncBN)."""
    return name if name in ("", *NORMS) else partial(_detectron2_norm, name)


def _detectron2_norm(name: str, channels: int) -> nn.Module:
    try:
        return get_norm(name, channels)
    except KeyError:
        known = ", ".join((*NORMS, "LN", "nnSyncBN", "naiveSyncBN"))
        raise ValueError(f"unknown NORM {name!r}: use one of {known}, or '' for none") from None


def resnet_options(cfg: CfgNode) -> dict:
    """Block options that the backbone and a C4 head share, from ``MODEL.RESNETS`` and our node."""
    resnets, node = cfg.MODEL.RESNETS, backbone_node(cfg)
    _refuse_other_variants(cfg)
    return dict(
        shortcut=node.SHORTCUT,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        norm=resolve_norm(resnets.NORM),
        activation=node.ACTIVATION,
    )


def _refuse_other_variants(cfg: CfgNode) -> None:
    """Settings of Detectron2's ResNet that these networks do not have must not pass unseen."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in DEPTHS:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"MODEL.RESNETS.DEPTH {resnets.DEPTH} is not one of {known}")
    res2_channels = STAGE_WIDTHS[0] * DEPTHS[resnets.DEPTH][0].expansion
    fixed = {
        "NUM_GROUPS": (1,),
        "WIDTH_PER_GROUP": (64,),
        "STEM_OUT_CHANNELS": (64,),
        "RES2_OUT_CHANNELS": (256, res2_channels),  # 256 is the default, at any depth
    }
    for key, allowed in fixed.items():
        if resnets[key] not in allowed:
            raise ValueError(
                f"MODEL.RESNETS.{key} {resnets[key]} is not a network of the paper: use "
                f"{allowed[-1]}, or Detectron2's build_resnet_backbone"
            )
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE is not supported: use Detectron2's "
            "build_resnet_backbone for deformable convolutions"
        )


@BACKBONE_REGISTRY.register()
def build_paper_resnet_backbone(
    cfg: CfgNode, input_shape: ShapeSpec, network_class: type[PaperResNet] = PaperResNet
) -> PaperResNet:
    """ResNet-18/34/50/101/152 or a plain twin, returning ``MODEL.RESNETS.OUT_FEATURES``."""
    resnets, node = cfg.MODEL.RESNETS, backbone_node(cfg)
    network = network_class(
        resnets.DEPTH,
        in_channels=input_shape.channels,
        dilations=(1, 1, node.RES4_DILATION, resnets.RES5_DILATION),
        multi_grid=node.MULTI_GRID,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        zero_init_residual=node.ZERO_INIT_RESIDUAL,
        caffe_pool=node.CAFFE_POOL,
        **resnet_options(cfg),
    )
    return _with_input(cfg, network)


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaperVGG:
    """VGG-11/13/16/19 convolutions, returning ``RESNET_BACKBONE.VGG.OUT_FEATURES``."""
    vgg = backbone_node(cfg).VGG
    network = PaperVGG(
        vgg.DEPTH,
        in_channels=input_shape.channels,
        norm=resolve_norm(vgg.NORM),
        activation=backbone_node(cfg).ACTIVATION,
        out_features=vgg.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return _with_input(cfg, network)


def _with_input(cfg: CfgNode, network: StatesInput) -> StatesInput:
    refuse_ignored_context(cfg)
    weights = cfg.MODEL.WEIGHTS
    if weights and backbone_node(cfg).WEIGHTS_INPUT == "set":
        raise UsageError(
            f"RESNET_BACKBONE.WEIGHTS_INPUT is set, but {weights} has not been read: call "
            "resnet_backbone.detection.use_weights_input(cfg, cfg.MODEL.WEIGHTS) before the model "
            "is built"
        )
    network.input_settings = config_input(cfg)
    network.weights_preprocessing = backbone_node(cfg).WEIGHTS_PREPROCESSING
    known = origin_input(weights)
    network.origin = None if known is None else (weights, known)
    return in_memory_format(cfg, network)


def in_memory_format(cfg: CfgNode, module: nn.Module) -> nn.Module:
    """Stores kernels as ``RESNET_BACKBONE.CHANNELS_LAST`` says; values and keys stay."""
    last = backbone_node(cfg).CHANNELS_LAST
    return module.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block) -> FPN:
    """``MODEL.FPN.IN_FEATURES`` must have strides that double (arXiv 1612.03144)."""
    shapes = bottom_up.output_shape()
    absent = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in shapes]
    if absent:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES names {absent}, the backbone returns {list(shapes)}: "
            "set its OUT_FEATURES to match"
        )
    strides = {name: shapes[name].stride for name in cfg.MODEL.FPN.IN_FEATURES}
    if any(b != 2 * a for a, b in pairwise(strides.values())):
        raise ValueError(
            f"FPN needs strides that double, got {strides}: "
            "remove the dilation (RES4_DILATION, RES5_DILATION) or choose other IN_FEATURES"
        )
    pyramid = PaperFPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    return in_memory_format(cfg, pyramid)


@BACKBONE_REGISTRY.register()
def build_paper_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet with p2..p6 of ``MODEL.FPN.OUT_CHANNELS``; p6 is p5 subsampled."""
    return _build_fpn(cfg, build_paper_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_paper_resnet_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet with p3..p7 for RetinaNet (arXiv 1708.02002); p6, p7 come from res5."""
    bottom_up = build_paper_resnet_backbone(cfg, input_shape)
    if "res5" not in bottom_up.output_shape():
        raise ValueError("p6 and p7 are made from res5: add it to MODEL.RESNETS.OUT_FEATURES")
    channels = bottom_up.output_shape()["res5"].channels
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


@BACKBONE_REGISTRY.register()
def build_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A VGG with p2..p6; with IN_FEATURES conv3, conv4, conv5, pool5 at the ResNet's strides."""
    return _build_fpn(cfg, build_vgg_backbone(cfg, input_shape), LastLevelMaxPool())
