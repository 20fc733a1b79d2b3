"""Key names of other libraries, to ours and back: one module for a library and its relatives.

Only names, and values that no library shares, change here. What tensors do not show, such as
where bottlenecks have their stride, is not looked at: that is ``Preprocessing``.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from pathlib import Path

from resnet_backbone.weights.architecture import FIRST_KEYS
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.keymaps.detectron2 import CAFFE2, CONVERTED_HEAD, DETECTRON2
from resnet_backbone.weights.keymaps.huggingface import HUGGINGFACE
from resnet_backbone.weights.keymaps.table import Layout, Tensors, check_support
from resnet_backbone.weights.keymaps.torchvision import TIMM, TORCHVISION, from_torchvision

__all__ = ["LAYOUTS", "Layout", "check_support", "from_torchvision", "recognize"]


def _is_ours(keys: Collection[str]) -> bool:
    # ResNet-C/D of torchvision's kind also have a conv1.0.weight, as our VGGs do
    others = ("layer1.0.conv1.weight", CONVERTED_HEAD + "weight")
    return any(key in keys for key in FIRST_KEYS) and not any(key in keys for key in others)


def _usage(checkpoint: Checkpoint, path: Path) -> list[str]:
    return [
        "from resnet_backbone.weights import InputNormalizer, build_network, read_checkpoint",
        f'checkpoint = read_checkpoint("{path}")',
        "network = build_network(checkpoint)",
        "normalize = InputNormalizer(checkpoint.preprocessing)  # of RGB bytes (N, 3, H, W)",
    ]


# In the order in which they are tried.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("resnet_backbone", _is_ours, dict, lambda tensors, model: dict(tensors), _usage),
        TORCHVISION,
        TIMM,
        HUGGINGFACE,
        DETECTRON2,
        CAFFE2,
    )
}


def recognize(tensors: Tensors) -> str:
    """The name of the layout that tensors have: the first of ``LAYOUTS`` that matches.

    Some share their keys: timm's ResNets are "torchvision", Detectron2's backbones by themselves
    are "resnet_backbone", and so are read alike.

    Raises:
        ValueError: naming the first keys, if no layout matches.
    """
    for name, layout in LAYOUTS.items():
        if layout.matches(tensors):
            return name
    first = ", ".join(islice(tensors, 3)) or "none"
    raise ValueError(
        f"the keys are of no ResNet or VGG of {', '.join(LAYOUTS)}; the first are {first}"
    )
