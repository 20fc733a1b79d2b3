"""The networks as registered Detectron2 backbones, with and without a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.files import origin_input
from resnet_backbone.detection.checkpoint.input_check import StatesInput, config_input
from resnet_backbone.detection.config import (
    CONTEXT_HEADS,
    DEEPLAB_BACKBONE,
    DEEPLAB_HEADS,
    DEFAULTS,
    UsageError,
    backbone_node,
)
from resnet_backbone.fast import fold_each_call
from resnet_backbone.fast.optimize import change_classes
from resnet_backbone.fast.sparse import Conv3x3, can_be_sparse, inputs_of
from resnet_backbone.models import VGG, ResNet
from resnet_backbone.models.layers import NORMS, Norm
from resnet_backbone.models.resnet import DEPTHS, STAGE_WIDTHS


class PaperBackbone(StatesInput):
    """Mixin that turns a :class:`~resnet_backbone.models.StagedNetwork` into a Detectron2 backbone.

    Any input size works, so ``size_divisibility`` is 0 and there are no ``padding_constraints``
    (Detectron2's defaults). Constant batch norms are folded at each call.
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


class OutputConv(Conv2d):
    """A pyramid's 3x3 convolution whose backward pass is sparse on CPUs.

    The regions of a training step cover a small part of the finest maps.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None or not can_be_sparse(self, x):
            return super().forward(x)
        return Conv3x3.apply(*inputs_of(self, x))

    def __prepare_scriptable__(self) -> Conv2d:
        return change_classes(self, {OutputConv: Conv2d})


class PaperFPN(FPN):
    """Detectron2's FPN that refuses weights trained on other input before it loads anything.

    Without norms, whose gradients are dense, its last layers are :class:`OutputConv`.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for conv in self.output_convs:
            if type(conv) is Conv2d and conv.norm is None:
                conv.__class__ = OutputConv  # in place: a pyramid lists its layers twice

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if isinstance(self.bottom_up, StatesInput):
            self.bottom_up.check_settings(state_dict, prefix + "bottom_up.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def resolve_norm(name: str) -> Norm:
    """Returns one of our names as it is, else Detectron2's layer (LN, nnSyncBN, naiveSyncBN)."""
    if name in ("", *NORMS):
        return name
    try:
        get_norm(name, 1)
    except KeyError:
        known = ", ".join((*NORMS, "LN", "nnSyncBN", "naiveSyncBN"))
        raise ValueError(f"unknown NORM {name!r}: use one of {known}, or '' for none") from None
    return partial(get_norm, name)


def resnet_options(cfg: CfgNode) -> dict:
    """Returns the block options shared by the backbone and a C4 head."""
    resnets, node = cfg.MODEL.RESNETS, backbone_node(cfg)
    _refuse_other_variants(cfg)
    return dict(
        shortcut=node.SHORTCUT,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        norm=resolve_norm(resnets.NORM),
        activation=node.ACTIVATION,
        multi_grid=node.MULTI_GRID,
    )


def _refuse_other_variants(cfg: CfgNode) -> None:
    """Refuses settings of Detectron2's ResNet that these networks do not support."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in DEPTHS:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"MODEL.RESNETS.DEPTH {resnets.DEPTH} is not one of {known}")
    fixed = {
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        "STEM_OUT_CHANNELS": 64,
        "DEFORM_ON_PER_STAGE": [False] * 4,
    }
    if resnets.RES2_OUT_CHANNELS != 256:  # the default, at any depth
        fixed["RES2_OUT_CHANNELS"] = STAGE_WIDTHS[0] * DEPTHS[resnets.DEPTH][0].expansion
    for key, only in fixed.items():
        if resnets[key] != only:
            raise ValueError(
                f"MODEL.RESNETS.{key} {resnets[key]} is not a network of the paper: use "
                f"{only}, or Detectron2's build_resnet_backbone"
            )


@BACKBONE_REGISTRY.register()
def build_paper_resnet_backbone(
    cfg: CfgNode, input_shape: ShapeSpec, network_class: type[PaperResNet] = PaperResNet
) -> PaperResNet:
    """Builds a ResNet or plain network that returns ``MODEL.RESNETS.OUT_FEATURES``."""
    resnets, node = cfg.MODEL.RESNETS, backbone_node(cfg)
    network = network_class(
        resnets.DEPTH,
        in_channels=input_shape.channels,
        dilations=(1, 1, node.RES4_DILATION, resnets.RES5_DILATION),
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        zero_init_residual=node.ZERO_INIT_RESIDUAL,
        caffe_pool=node.CAFFE_POOL,
        **resnet_options(cfg),
    )
    return _with_input(cfg, network)


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaperVGG:
    """Builds VGG's convolutions, returning ``RESNET_BACKBONE.VGG.OUT_FEATURES``."""
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
    weights, node, heads = cfg.MODEL.WEIGHTS, backbone_node(cfg), cfg.MODEL.ROI_HEADS.NAME
    if node.GLOBAL_CONTEXT and heads not in CONTEXT_HEADS.values():
        raise UsageError(
            f"RESNET_BACKBONE.GLOBAL_CONTEXT: MODEL.ROI_HEADS.NAME {heads} has none; build the "
            "model from with_global_context(cfg) of resnet_backbone.detection, as the commands do"
        )
    if weights and node.WEIGHTS_INPUT == "set":
        raise UsageError(
            f"RESNET_BACKBONE.WEIGHTS_INPUT is set, but {weights} has not been read: call "
            "resnet_backbone.detection.use_weights_input(cfg, cfg.MODEL.WEIGHTS) before the model "
            "is built"
        )
    network.input_settings = config_input(cfg)
    network.weights_preprocessing = node.WEIGHTS_PREPROCESSING
    known = origin_input(weights)
    network.set_grad_checkpointing(node.GRADIENT_CHECKPOINTING)
    network.origin = None if known is None else (weights, known)
    return in_memory_format(cfg, network)


def in_memory_format(cfg: CfgNode, module: nn.Module) -> nn.Module:
    """Converts kernels to the memory format of ``RESNET_BACKBONE.CHANNELS_LAST``, in place."""
    last = backbone_node(cfg).CHANNELS_LAST
    return module.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block) -> FPN:
    """Builds an FPN; strides of ``MODEL.FPN.IN_FEATURES`` must double (arXiv 1612.03144)."""
    fpn = cfg.MODEL.FPN
    strides = _strides(bottom_up, "MODEL.FPN.IN_FEATURES", fpn.IN_FEATURES)
    if any(b != 2 * a for a, b in pairwise(strides.values())):
        raise ValueError(
            f"FPN needs strides that double, got {strides}: "
            "remove the dilation (RES4_DILATION, RES5_DILATION) or choose other IN_FEATURES"
        )
    options = dict(norm=fpn.NORM, top_block=top_block, fuse_type=fpn.FUSE_TYPE)
    pyramid = PaperFPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, **options)
    return in_memory_format(cfg, pyramid)


def _strides(backbone: Backbone, key: str, names: Sequence[str]) -> dict[str, int]:
    """Returns the strides of the maps named by a config key."""
    shapes = backbone.output_shape()
    absent = [name for name in names if name not in shapes]
    if absent:
        raise UsageError(
            f"{key} names {absent}, but the backbone returns {list(shapes)}: set its OUT_FEATURES "
            "to match"
        )
    return {name: shapes[name].stride for name in names}


@BACKBONE_REGISTRY.register()
def build_paper_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a ResNet with p2..p6 of ``MODEL.FPN.OUT_CHANNELS``; p6 is p5 subsampled."""
    return _build_fpn(cfg, build_paper_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_paper_resnet_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a ResNet with p3..p7 for RetinaNet (arXiv 1708.02002); p6, p7 come from res5."""
    bottom_up = build_paper_resnet_backbone(cfg, input_shape)
    if "res5" not in bottom_up.output_shape():
        raise ValueError("p6 and p7 are made from res5: add it to MODEL.RESNETS.OUT_FEATURES")
    channels = bottom_up.output_shape()["res5"].channels
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


@BACKBONE_REGISTRY.register()
def build_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a VGG with p2..p6; IN_FEATURES conv3, conv4, conv5, pool5 give a ResNet's strides."""
    return _build_fpn(cfg, build_vgg_backbone(cfg, input_shape), LastLevelMaxPool())


class DeepLabResNet(PaperResNet):
    """A ResNet whose input is padded to a multiple of its largest stride.

    DeepLab's heads upsample by a fixed factor, which must reproduce the size of the labels.
    """

    @property
    def size_divisibility(self) -> int:
        return max(shape.stride for shape in self.output_shape().values())


@BACKBONE_REGISTRY.register()
def build_paper_resnet_deeplab_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DeepLabResNet:
    """Builds the paper's networks like ``build_resnet_deeplab_backbone`` of Detectron2's DeepLab.

    Reads ``RES4_DILATION``, ``RES5_DILATION`` and ``RES5_MULTI_GRID`` of ``MODEL.RESNETS``, whose
    ``STEM_TYPE`` must be "basic". Dilations 1, 2 give output stride 16; 2, 4 give 8.
    """
    resnets, node = cfg.MODEL.RESNETS, backbone_node(cfg)
    if "RES5_MULTI_GRID" not in resnets:
        raise UsageError(
            f"{DEEPLAB_BACKBONE} reads the keys of Detectron2's DeepLab: call "
            "detectron2.projects.deeplab.add_deeplab_config(cfg) before the config file is merged"
        )
    if resnets.STEM_TYPE != "basic":
        raise UsageError(
            f"MODEL.RESNETS.STEM_TYPE {resnets.STEM_TYPE} is not a network of the paper: use "
            "basic, or Detectron2's build_resnet_deeplab_backbone"
        )
    ours = {"RES4_DILATION": resnets.RES4_DILATION, "MULTI_GRID": list(resnets.RES5_MULTI_GRID)}
    for key, value in ours.items():
        if node[key] not in (DEFAULTS[key], value):
            raise UsageError(
                f"RESNET_BACKBONE.{key} {node[key]} contradicts MODEL.RESNETS ({value}), "
                f"which {DEEPLAB_BACKBONE} reads: leave RESNET_BACKBONE.{key} out"
            )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.RESNET_BACKBONE = node.clone()
    cfg.RESNET_BACKBONE.update(ours)
    backbone = build_paper_resnet_backbone(cfg, input_shape, DeepLabResNet)
    if cfg.MODEL.SEM_SEG_HEAD.NAME in DEEPLAB_HEADS:
        _check_head(cfg, backbone)
    return backbone


def _check_head(cfg: CfgNode, backbone: DeepLabResNet) -> None:
    """Checks a DeepLab head: it upsamples its finest map by ``COMMON_STRIDE`` and pools crops."""
    head, crop = cfg.MODEL.SEM_SEG_HEAD, cfg.INPUT.CROP
    strides = _strides(backbone, "MODEL.SEM_SEG_HEAD.IN_FEATURES", head.IN_FEATURES)
    stride, finest = min((stride, name) for name, stride in strides.items())
    if head.COMMON_STRIDE != stride:
        raise UsageError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE {head.COMMON_STRIDE} is not the stride of {finest}, "
            f"{stride}: set it to {stride}, or change "
            "MODEL.RESNETS.RES4_DILATION and RES5_DILATION"
        )
    if crop.ENABLED and crop.TYPE != "absolute":
        raise UsageError(
            f"INPUT.CROP.TYPE {crop.TYPE}: {head.NAME} learns from crops of one size; set "
            "INPUT.CROP.TYPE absolute INPUT.CROP.SIZE '[512, 512]'"
        )
