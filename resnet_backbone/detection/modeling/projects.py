"""Detectron2's projects DeepLab and PointRend: their config keys, and our backbone in DeepLab."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from resnet_backbone.detection.config import DEFAULTS, UsageError, backbone_node
from resnet_backbone.detection.modeling.backbones import PaperResNet, build_paper_resnet_backbone

DEEPLAB_BACKBONE = "build_paper_resnet_deeplab_backbone"
DEEPLAB_HEADS = ("DeepLabV3Head", "DeepLabV3PlusHead")
PROJECTS = {
    "add_deeplab_config": (
        "deeplab",
        (*DEEPLAB_HEADS, DEEPLAB_BACKBONE, "WarmupPolyLR"),
    ),
    "add_pointrend_config": (
        "point_rend",
        ("PointRendROIHeads", "PointRendMaskHead", "PointRendSemSegHead"),
    ),
}
"""Function that adds keys -> its module in ``detectron2.projects``, names that ask for it."""


def add_project_keys(cfg: CfgNode, config_file: str, overrides: Sequence[str] = ()) -> None:
    """Registers the projects that a config file or overrides name, and adds their keys, in place.

    Detectron2 asks for ``add_deeplab_config`` and ``add_pointrend_config`` before such a file is
    read; the tools do it by themselves.

    Raises:
        UsageError: this Detectron2 was installed without the project.
    """
    named = set(overrides)
    if config_file and os.path.isfile(config_file):
        named |= set(_strings(CfgNode.load_yaml_with_base(config_file)))
    for add_keys, (project, names) in PROJECTS.items():
        if named.intersection(names):
            getattr(import_project(project), add_keys)(cfg)


def import_project(name: str) -> Any:
    """``detectron2.projects.<name>``; importing registers its heads.

    Raises:
        UsageError: this Detectron2 was installed without it.
    """
    try:
        return importlib.import_module(f"detectron2.projects.{name}")
    except ImportError as error:
        raise UsageError(
            f"this needs detectron2.projects.{name}, which this Detectron2 lacks ({error}): pip "
            "install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"
        ) from error


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, str):
        yield node


class DeepLabResNet(PaperResNet):
    """A ResNet whose input is padded so that every map, enlarged by its stride, fits the labels.

    DeepLab's heads enlarge by a fixed factor and so work only at sizes that the stride divides.
    """

    @property
    def size_divisibility(self) -> int:
        return max(shape.stride for shape in self.output_shape().values())


@BACKBONE_REGISTRY.register()
def build_paper_resnet_deeplab_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DeepLabResNet:
    """As ``build_resnet_deeplab_backbone`` of Detectron2's DeepLab, with the paper's networks.

    Reads the project's keys ``MODEL.RESNETS.RES4_DILATION``, ``RES5_DILATION`` and
    ``RES5_MULTI_GRID``; dilations 1, 2 are output stride 16, 2, 4 are 8. ``STEM_TYPE`` is "basic".

    Raises:
        UsageError: the config lacks these keys, wants the project's own stem, says something else
            under ``RESNET_BACKBONE``, or has a DeepLab head that does not suit the maps.
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
                f"RESNET_BACKBONE.{key} {node[key]} contradicts MODEL.RESNETS, which says {value} "
                f"and counts for {DEEPLAB_BACKBONE}: leave RESNET_BACKBONE.{key} out"
            )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.RESNET_BACKBONE = node.clone()
    cfg.RESNET_BACKBONE.merge_from_list([word for pair in ours.items() for word in pair])
    backbone = build_paper_resnet_backbone(cfg, input_shape, DeepLabResNet)
    if cfg.MODEL.SEM_SEG_HEAD.NAME in DEEPLAB_HEADS:
        _check_head(cfg, backbone)
    return backbone


def _check_head(cfg: CfgNode, backbone: DeepLabResNet) -> None:
    """DeepLab's heads enlarge their finest map by ``COMMON_STRIDE`` and pool over whole crops."""
    head, crop = cfg.MODEL.SEM_SEG_HEAD, cfg.INPUT.CROP
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    absent = [name for name in head.IN_FEATURES if name not in strides]
    if absent:
        raise UsageError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {absent}, the backbone returns {list(strides)}: "
            "set MODEL.RESNETS.OUT_FEATURES to match"
        )
    stride, finest = min((strides[name], name) for name in head.IN_FEATURES)
    if head.COMMON_STRIDE != stride:
        raise UsageError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE {head.COMMON_STRIDE} is not the stride of {finest}, "
            f"{stride}, by which {head.NAME} enlarges: set it to {stride}, or change "
            "MODEL.RESNETS.RES4_DILATION and RES5_DILATION"
        )
    if crop.ENABLED and crop.TYPE != "absolute":
        raise UsageError(
            f"INPUT.CROP.TYPE {crop.TYPE}: {head.NAME} learns from crops of one size; set "
            "INPUT.CROP.TYPE absolute INPUT.CROP.SIZE '[512, 512]'"
        )
