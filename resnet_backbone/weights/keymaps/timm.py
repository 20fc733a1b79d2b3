"""timm's key names: ResNets as torchvision's, VGGs with a classifier of convolutions.

What torchvision's layout says of biases before batch norms holds here. timm's ``resnet50_gn`` is
not read: its tensors are those of a ResNet with batch norm that has lost its statistics.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from resnet_backbone.weights.checkpoint import ModelSpec
from resnet_backbone.weights.keymaps.support import check_support
from resnet_backbone.weights.keymaps.table import (
    Layout,
    Tensors,
    cancel_biases,
    linear_keys,
    rename,
    without_counters,
)
from resnet_backbone.weights.keymaps.torchvision import (
    TORCHVISION,
    find_vgg,
    resnet_to_torchvision,
    vgg_features,
    vgg_to_torchvision,
)

_VGG_HEAD = [*linear_keys("pre_logits.fc1", "fc6"), *linear_keys("pre_logits.fc2", "fc7")]
_VGG_HEAD += linear_keys("head.fc")
_KERNELS = {"pre_logits.fc1.weight": 7, "pre_logits.fc2.weight": 1}


def _matches(keys: Collection[str]) -> bool:
    return "pre_logits.fc1.weight" in keys or TORCHVISION.matches(keys)


def _to_ours(tensors: Tensors) -> dict[str, Tensor]:
    if not any(key.startswith("features.") for key in tensors):
        return TORCHVISION.to_ours(tensors)
    table = {**vgg_features(find_vgg(tensors)), **dict(_VGG_HEAD)}
    flat = {
        key: value.flatten(1) if key in _KERNELS and value.dim() == 4 else value
        for key, value in tensors.items()
    }
    return without_counters(cancel_biases(rename(flat, table, "a timm VGG")))


def _from_ours(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    check_support("timm", model)
    if not model.name.startswith("vgg"):
        return resnet_to_torchvision(tensors)
    renamed = vgg_to_torchvision(tensors, model, _VGG_HEAD)
    for key, size in _KERNELS.items():
        if key in renamed:
            renamed[key] = renamed[key].unflatten(1, (-1, size, size))
    return renamed


TIMM = Layout("timm", _matches, _to_ours, _from_ours)
