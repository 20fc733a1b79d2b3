"""Detectron2's key names: ours, and in a whole detector ours behind a prefix.

Of a detector the backbone is taken: also the res5 of a C4 detector, and of a VGG detector fc6 and
fc7, which run per region. Its other parts are left out, and what our networks say there of their
input, so a detector is not got back; ``from_ours`` writes a backbone without prefix, which
Detectron2's checkpointer puts in its place. VGGs are those of this package's detectors.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from resnet_backbone.models.resnet import STAGE_NAMES as RESNET_STAGES
from resnet_backbone.models.vgg import STAGE_NAMES as VGG_STAGES
from resnet_backbone.weights.architecture import FIRST_KEYS, HEAD_NAMES
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.keymaps.table import (
    Layout,
    Tensors,
    check_support,
    spell_numbers,
    without_counters,
)
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS

CONVERTED_HEAD = "stem.fc."  # the head in files of tools/convert-torchvision-to-d2.py
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.")

# Layers of the ImageNet networks that a detector runs per region.
HEAD_LAYERS = {
    "roi_heads.res5.": "res5.",
    "roi_heads.box_head.fc6.": "fc6.",
    "roi_heads.box_head.fc7.": "fc7.",
}

# What Detectron2's meta-architectures have beside the backbone.
OTHER_PARTS = (
    "backbone.fpn_lateral",
    "backbone.fpn_output",
    "backbone.top_block.",
    "proposal_generator.",
    "roi_heads.",
    "sem_seg_head.",
    "head.",
    "anchor_generator.",
    "pixel_mean",
    "pixel_std",
)
_OUR_PARTS = {*RESNET_STAGES, *VGG_STAGES, *HEAD_NAMES}


def _prefix(keys: Collection[str]) -> str | None:
    known = set(keys)
    for prefix in (*BACKBONE_PREFIXES, ""):
        if known & {prefix + first for first in FIRST_KEYS}:
            return prefix
    return None


def _matches(keys: Collection[str]) -> bool:
    return _prefix(keys) is not None


def _to_ours(tensors: Tensors) -> dict[str, Tensor]:
    prefix = _prefix(tensors)
    if prefix is None:
        raise ValueError(f"no backbone: none of {', '.join(FIRST_KEYS)} behind backbone.")
    is_vgg = prefix + "conv1.0.weight" in tensors
    ours: dict[str, Tensor] = {}
    for key, value in tensors.items():
        own = _own_key(key, prefix, is_vgg)
        if own is not None and own.startswith(CONVERTED_HEAD):
            own = own.replace(CONVERTED_HEAD, "linear.")
        if own in ours:
            raise ValueError(f"key {key!r} names {own}, which the backbone has too")
        if own is not None:
            ours[own] = value
    return without_counters(ours)


def _own_key(key: str, prefix: str, is_vgg: bool) -> str | None:
    """Our name of a key, None for one of a detector's other parts."""
    if key.startswith(prefix) and key.removeprefix(prefix).partition(".")[0] in _OUR_PARTS:
        return key.removeprefix(prefix)
    if prefix:
        if key == prefix + INPUT_SETTINGS:
            return None
        for place, own in HEAD_LAYERS.items():
            if key.startswith(place) and (is_vgg or own == "res5."):
                return own + key.removeprefix(place)
        if key.startswith(OTHER_PARTS):
            return None
    raise ValueError(f"key {key!r} is not one of a Detectron2 ResNet or of a detector around it")


def _from_ours(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    check_support("detectron2", model)
    return without_counters(tensors)


def config_lines(checkpoint: Checkpoint, path: Path) -> list[str]:
    """Keys of Detectron2's config with which a file is used."""
    preprocessing, model = checkpoint.preprocessing, checkpoint.model
    lines = [
        f'MODEL.WEIGHTS "{path}"',
        f"INPUT.FORMAT {preprocessing.channel_order}",
        f"MODEL.PIXEL_MEAN {spell_numbers(preprocessing.pixel_mean_255())}",
        f"MODEL.PIXEL_STD {spell_numbers(preprocessing.pixel_std_255())}",
    ]
    if model.name.startswith("resnet"):
        lines.append(f"MODEL.RESNETS.DEPTH {model.name.removeprefix('resnet')}")
        if model.options.get("norm") == "GN":
            lines.append("MODEL.RESNETS.NORM GN")
    if checkpoint.has_bottlenecks:
        lines.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {preprocessing.stride_in_1x1}")
    elif model.name.startswith("resnet"):
        lines.append("MODEL.RESNETS.RES2_OUT_CHANNELS 64")
    return lines


DETECTRON2 = Layout("detectron2", _matches, _to_ours, _from_ours, config_lines)
