"""Blob names of Caffe2: MSRA's and FAIR's ImageNet files, Detectron1 and its detectors.

Norms appear under two spellings, ``_bn_s/_b/_rm/_riv`` (``riv`` is a variance) and
``_bn_gamma/_beta/_running_mean/_running_var``, and in Detectron1's files as a scale and a shift
alone: the statistics are folded in. Such a norm gets those of an identity, mean 0 and variance
1 - 1e-5: with the epsilon 1e-5 of this package's batch norms the same function in evaluation.

``from_ours`` writes the first spelling with all statistics, and the head as ``pred``, the name that
Detectron2 loads. It is the inverse but for the other spelling, folded statistics and the bias of
MSRA's conv1, which ``to_ours`` moves into the running mean, all of which it does not write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from resnet_backbone.models import FrozenBatchNorm2d
from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.weights.checkpoint import ModelSpec
from resnet_backbone.weights.keymaps.detectron2 import config_lines
from resnet_backbone.weights.keymaps.table import (
    OURS,
    Layout,
    Module,
    Tensors,
    cancel_biases,
    check_support,
    inverse,
    rename,
    resnet_modules,
    without_counters,
)

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
_BRANCHES = {
    "conv1": "branch2a",
    "conv2": "branch2b",
    "conv3": "branch2c",
    "shortcut": "branch1",
}
_RESNET_HEADS = {"pred": "linear", "fc1000": "linear"}
_VGG_HEADS = {"fc6": "fc6", "fc7": "fc7", "fc8": "linear"}

# Blobs of Detectron1's detectors beside the backbone, and what a solver keeps.
OTHER_PARTS = (
    "fpn_",
    "conv_rpn",
    "rpn_",
    "retnet_",
    "cls_score",
    "bbox_pred",
    "head_conv",
    "_[mask]_",
    "mask_fcn",
    "conv5_mask",
    "conv_fcn",
    "kps_",
    "__preserve__/",
)
_BOX_HEAD = ("fc6_", "fc7_")  # of a ResNet detector; VGG's own have these names
_MOMENTUM = "_momentum"


def _block_layer(stage: int, block: int, layer: str) -> tuple[str, str]:
    name = f"res{stage}_{block}_{_BRANCHES[layer]}"
    return name, name


def _keys(modules: Iterable[Module], group_norm: bool) -> Iterator[tuple[str, str]]:
    """(blob, our key); in the stem a batch norm is res_conv1_bn or conv1_bn, a GN conv1_gn."""
    blobs = _GROUP_NORM_BLOBS if group_norm else _NORM_BLOBS
    for module in modules:
        yield f"{module.conv}_w", f"{module.ours}.weight"
        yield f"{module.conv}_b", f"{module.ours}.bias"
        for blob, tensor in blobs.items():
            if module.norm:
                yield f"{module.norm}_{blob}", f"{module.ours}.norm.{tensor}"


def _head_keys(heads: dict[str, str]) -> Iterator[tuple[str, str]]:
    for blob, ours in heads.items():
        yield from ((f"{blob}_w", f"{ours}.weight"), (f"{blob}_b", f"{ours}.bias"))


def _resnet_table(group_norm: bool) -> dict[str, str]:
    table = {}
    for stem_norm in ("conv1",) if group_norm else ("res_conv1", "conv1"):
        modules = resnet_modules(("conv1", stem_norm), _block_layer)
        table.update(_keys(modules, group_norm))
    return {**table, **dict(_head_keys(_RESNET_HEADS))}


def _vgg_table() -> dict[str, str]:
    deepest = map(max, zip(*VGG_DEPTHS.values(), strict=True))
    modules = [
        Module(f"conv{stage}.{conv}", f"conv{stage}_{conv + 1}", "")
        for stage, count in enumerate(deepest, start=1)
        for conv in range(count)
    ]
    return dict([*_keys(modules, group_norm=False), *_head_keys(_VGG_HEADS)])


_BATCH_NORM, _GROUP_NORM, _VGG = _resnet_table(False), _resnet_table(True), _vgg_table()


def _matches(keys: Collection[str]) -> bool:
    return bool({"conv1_w", "conv1_1_w"} & set(keys))


def _to_ours(tensors: Tensors) -> dict[str, Tensor]:
    if "conv1_1_w" in tensors:
        return rename(_backbone(tensors, OTHER_PARTS), _VGG, "a Caffe2 VGG")
    blobs = _backbone(tensors, (*OTHER_PARTS, *_BOX_HEAD))
    if any("_gn_" in key for key in blobs):
        return rename(blobs, _GROUP_NORM, "a Caffe2 ResNet with group norm")
    return cancel_biases(_with_statistics(rename(blobs, _BATCH_NORM, "a Caffe2 ResNet")))


def _backbone(tensors: Tensors, other_parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in tensors.items()
        if not key.startswith(other_parts) and not key.endswith(_MOMENTUM)
    }


def _with_statistics(tensors: Tensors) -> dict[str, Tensor]:
    """Gives every norm those of an identity if none has any: one alone lacking them is damage."""
    completed = dict(tensors)
    if any(".running_" in key for key in tensors):
        return completed
    for key, value in tensors.items():
        norm = key.removesuffix("norm.weight")
        if norm != key:
            identity = FrozenBatchNorm2d(len(value)).to(value.device)
            completed[norm + "norm.running_mean"] = identity.running_mean
            completed[norm + "norm.running_var"] = identity.running_var
    return completed


def _from_ours(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    check_support("caffe2", model)
    table = _BATCH_NORM
    if model.name.startswith("vgg"):
        table = _VGG
    elif not any(".running_" in key for key in tensors):
        table = _GROUP_NORM
    return rename(without_counters(tensors), inverse(table), OURS)


CAFFE2 = Layout("caffe2", _matches, _to_ours, _from_ours, config_lines)
