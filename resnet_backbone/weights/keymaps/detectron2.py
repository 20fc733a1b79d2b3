"""Detectron2's key names, which are ours with a prefix, and Caffe2's blob names.

From a detector, only the backbone is read, with the layers that run per region: res5 of a C4
detector, fc6 and fc7 of a VGG detector. ``from_ours`` writes a backbone alone.

Caffe2's names are in MSRA's and FAIR's ImageNet files and in Detectron1's files. Norms have two
spellings. Detectron1's have only a scale and a shift, and get the statistics of an identity.
``from_ours`` writes the first spelling with all statistics, no bias of conv1 (MSRA's moves into
the running mean), and the head as ``pred``, the name that Detectron2 loads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from resnet_backbone.models import FrozenBatchNorm2d
from resnet_backbone.models.resnet import STAGE_NAMES as RESNET_STAGES
from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.models.vgg import STAGE_NAMES as VGG_STAGES
from resnet_backbone.weights.architecture import FIRST_KEYS, HEAD_NAMES
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.keymaps import table
from resnet_backbone.weights.keymaps.table import Layout, Module, Tensors
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS

CONVERTED_HEAD = "stem.fc."  # the head in files of tools/convert-torchvision-to-d2.py
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.")

# Layers of the ImageNet network that a detector runs per region.
HEAD_LAYERS = {
    "roi_heads.res5.": "res5.",
    "roi_heads.box_head.fc6.": "fc6.",
    "roi_heads.box_head.fc7.": "fc7.",
}

# Parts of Detectron2's meta-architectures other than the backbone.
OTHER_PARTS = tuple(
    "backbone.fpn_lateral backbone.fpn_output backbone.top_block. proposal_generator. roi_heads. "
    "sem_seg_head. head. anchor_generator. pixel_mean pixel_std".split()
)
_OUR_PARTS = {*RESNET_STAGES, *VGG_STAGES, *HEAD_NAMES}


def _prefix(keys: Collection[str]) -> str | None:
    known = set(keys)
    for prefix in (*BACKBONE_PREFIXES, ""):
        if known & {prefix + first for first in FIRST_KEYS}:
            return prefix
    return None


def _read(tensors: Tensors) -> dict[str, Tensor]:
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
    return ours


def _own_key(key: str, prefix: str, is_vgg: bool) -> str | None:
    """Returns our name for a key; None for a detector's other parts."""
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


def config_lines(checkpoint: Checkpoint, path: Path) -> list[str]:
    """Returns the keys of Detectron2's config that a file needs."""
    preprocessing, model = checkpoint.preprocessing, checkpoint.model
    lines = [
        f'MODEL.WEIGHTS "{path}"',
        f"INPUT.FORMAT {preprocessing.channel_order}",
        f"MODEL.PIXEL_MEAN {table.spell_numbers(preprocessing.pixel_mean_255())}",
        f"MODEL.PIXEL_STD {table.spell_numbers(preprocessing.pixel_std_255())}",
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


DETECTRON2 = Layout(
    "detectron2",
    lambda keys: _prefix(keys) is not None,
    _read,
    lambda tensors, model: table.without_counters(tensors),
    config_lines,
)

# Caffe2

_NORM_BLOBS = {
    "bn_s": "weight",
    "bn_b": "bias",
    "bn_rm": "running_mean",
    "bn_riv": "running_var",
    "bn_gamma": "weight",
    "bn_beta": "bias",
    "bn_running_mean": "running_mean",
    "bn_running_var": "running_var",
}
_GROUP_NORM_BLOBS = {"gn_s": "weight", "gn_b": "bias"}
_BRANCHES = dict(conv1="branch2a", conv2="branch2b", conv3="branch2c", shortcut="branch1")
_RESNET_HEADS = {"pred": "linear", "fc1000": "linear"}
_VGG_HEADS = {"fc6": "fc6", "fc7": "fc7", "fc8": "linear"}

# Blobs of Detectron1's detectors other than the backbone, and of the solver.
OTHER_BLOBS = tuple(
    "fpn_ conv_rpn rpn_ retnet_ cls_score bbox_pred head_conv _[mask]_ mask_fcn conv5_mask "
    "conv_fcn kps_ __preserve__/".split()
)
_BOX_HEAD = ("fc6_", "fc7_")  # of a ResNet detector; a VGG's own layers have the same names
_MOMENTUM = "_momentum"


def _block_layer(stage: int, block: int, layer: str) -> tuple[str, str]:
    name = f"res{stage}_{block}_{_BRANCHES[layer]}"
    return name, name


def _blobs(
    modules: Iterable[Module], norm_blobs: Mapping[str, str], heads: Mapping[str, str]
) -> dict[str, str]:
    """Returns blob -> our key; the stem's norm is res_conv1_bn, conv1_bn or conv1_gn."""
    names = {}
    for module in (*modules, *(Module(ours, blob) for blob, ours in heads.items())):
        names[f"{module.conv}_w"] = f"{module.ours}.weight"
        names[f"{module.conv}_b"] = f"{module.ours}.bias"
        for blob, tensor in norm_blobs.items() if module.norm else ():
            names[f"{module.norm}_{blob}"] = f"{module.ours}.norm.{tensor}"
    return names


def _resnet_table(norm_blobs: Mapping[str, str], *stem_norms: str) -> dict[str, str]:
    names = {}
    for stem_norm in stem_norms:
        modules = table.resnet_modules(("conv1", stem_norm), _block_layer)
        names |= _blobs(modules, norm_blobs, _RESNET_HEADS)
    return names


def _vgg_table() -> dict[str, str]:
    deepest = map(max, zip(*VGG_DEPTHS.values(), strict=True))
    modules = [
        Module(f"conv{stage}.{conv}", f"conv{stage}_{conv + 1}")
        for stage, count in enumerate(deepest, start=1)
        for conv in range(count)
    ]
    return _blobs(modules, {}, _VGG_HEADS)


_BATCH_NORM = _resnet_table(_NORM_BLOBS, "res_conv1", "conv1")
_GROUP_NORM = _resnet_table(_GROUP_NORM_BLOBS, "conv1")
_VGG = _vgg_table()


def _read_blobs(tensors: Tensors) -> dict[str, Tensor]:
    if "conv1_1_w" in tensors:
        return table.rename(_backbone(tensors, OTHER_BLOBS), _VGG, "a Caffe2 VGG")
    blobs = _backbone(tensors, (*OTHER_BLOBS, *_BOX_HEAD))
    if any("_gn_" in key for key in blobs):
        return table.rename(blobs, _GROUP_NORM, "a Caffe2 ResNet with group norm")
    return table.cancel_biases(
        _with_statistics(table.rename(blobs, _BATCH_NORM, "a Caffe2 ResNet"))
    )


def _backbone(tensors: Tensors, others: tuple[str, ...]) -> dict[str, Tensor]:
    own = (k for k in tensors if not k.startswith(others) and not k.endswith(_MOMENTUM))
    return {key: tensors[key] for key in own}


def _with_statistics(tensors: Tensors) -> dict[str, Tensor]:
    """Adds the statistics of an identity if no norm has any; a single gap would be damage."""
    completed = dict(tensors)
    for layer in table.norm_layers(tensors) if _is_folded(tensors) else ():
        scale = tensors[f"{layer}.norm.weight"]
        identity = FrozenBatchNorm2d(len(scale)).to(scale.device)
        completed[f"{layer}.norm.running_mean"] = identity.running_mean
        completed[f"{layer}.norm.running_var"] = identity.running_var
    return completed


def _is_folded(tensors: Tensors) -> bool:
    return not any(".running_" in key for key in tensors)


def _write_blobs(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    names = _GROUP_NORM if _is_folded(tensors) else _BATCH_NORM
    if model.name.startswith("vgg"):
        names = _VGG
    return table.rename_back(table.without_counters(tensors), names)


CAFFE2 = Layout(
    "caffe2",
    lambda keys: bool({"conv1_w", "conv1_1_w"} & set(keys)),
    _read_blobs,
    _write_blobs,
    config_lines,
)
