"""Hugging Face transformers' key names of its ResNets.

``ResNetForImageClassification`` has its network under ``resnet.``; ``ResNetModel`` and
``ResNetBackbone`` have not. Tensors with a head are written for the first, those without for the
others.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from resnet_backbone.weights.checkpoint import ModelSpec
from resnet_backbone.weights.keymaps.support import check_support
from resnet_backbone.weights.keymaps.table import (
    OURS,
    Layout,
    Tensors,
    check_statistics,
    inverse,
    linear_keys,
    rename,
    resnet_modules,
    torch_keys,
    with_counters,
    without_counters,
)

_PREFIX = "resnet."
_FIRST_KEY = "embedder.embedder.convolution.weight"


def _block_layer(stage: int, block: int, layer: str) -> tuple[str, str]:
    prefix = f"encoder.stages.{stage - 2}.layers.{block}."
    name = "shortcut" if layer == "shortcut" else f"layer.{int(layer[-1]) - 1}"
    return f"{prefix}{name}.convolution", f"{prefix}{name}.normalization"


_STEM = ("embedder.embedder.convolution", "embedder.embedder.normalization")
_BACKBONE = dict(torch_keys(resnet_modules(_STEM, _block_layer)))
_CLASSIFIER = {
    **{_PREFIX + theirs: ours for theirs, ours in _BACKBONE.items()},
    **dict(linear_keys("classifier.1")),
}


def _matches(keys: Collection[str]) -> bool:
    return bool({_FIRST_KEY, _PREFIX + _FIRST_KEY} & set(keys))


def _to_ours(tensors: Tensors) -> dict[str, Tensor]:
    table = _BACKBONE if _FIRST_KEY in tensors else _CLASSIFIER
    ours = without_counters(rename(tensors, table, "a transformers ResNet"))
    check_statistics(ours, "transformers' ResNets")
    return ours


def _from_ours(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    check_support("huggingface", model)
    table = _CLASSIFIER if "linear.weight" in tensors else _BACKBONE
    return with_counters(rename(tensors, inverse(table), OURS))


HUGGINGFACE = Layout("huggingface", _matches, _to_ours, _from_ours)
