"""Maps other libraries' key names to ours and back: one module for a library and its relatives.

Only key names change here, and a few values that the other side does not have. What tensors do not
show, such as the stride position of bottlenecks, is part of ``Preprocessing``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from torch import Tensor

from resnet_backbone.weights.architecture import FIRST_KEYS, infer_models
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.keymaps.detectron2 import CAFFE2, CONVERTED_HEAD, DETECTRON2
from resnet_backbone.weights.keymaps.huggingface import HUGGINGFACE
from resnet_backbone.weights.keymaps.table import Layout, Tensors, check_support
from resnet_backbone.weights.keymaps.torchvision import TIMM, TORCHVISION, from_torchvision

__all__ = ["LAYOUTS", "Layout", "check_support", "find_network", "from_torchvision", "recognize"]

logger = logging.getLogger(__name__)
# Suffixes of networks' first keys; what precedes them is the network's prefix in the file.
ANCHORS = ("conv1.weight", "features.0.weight", *FIRST_KEYS)
# Prefixes of the several networks of self-supervised trainers, in order of preference.
PREFERRED = ("encoder_q", "base_encoder", "teacher", "online", "student", "encoder", "backbone")
# Other content that trainers write under a network's prefix.
BESIDE = re.compile(
    r"(queue(_ptr|\d*)|(projection|prediction)(_head)?|projector|predictor|prototypes|heads?|fc|"
    r"bn_proj|lambd)(\.|$)"
)
HEADS = re.compile(r"(fc|head)\.(weight|bias)$")  # a classifier, which is part of the network


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
    """Returns the name of the first of ``LAYOUTS`` that matches the keys.

    Some layouts have the same keys: timm's ResNets are "torchvision", and Detectron2's standalone
    backbones are "resnet_backbone". Raises ValueError: no layout matches; names the first keys.
    """
    for name, layout in LAYOUTS.items():
        if layout.matches(tensors):
            return name
    first = ", ".join(islice(tensors, 3)) or "none"
    raise ValueError(
        f"the keys belong to no ResNet or VGG of {', '.join(LAYOUTS)}; the first are {first}"
    )


def find_network(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """Returns the layout of one network, and its tensors under our names.

    A common prefix and other content are dropped: trainers write ``backbone.body.layer1...`` or,
    beside queues and projectors, ``module.encoder_q.layer1...``. If a file has several networks,
    the choice is logged. Raises ValueError: there is none.
    """
    try:
        return _to_ours(tensors)
    except (KeyError, ValueError, TypeError):
        networks = _inner_networks(tensors)
        if not networks:
            raise

    def rank(prefix: str) -> tuple[int, str]:
        places = [k for k, word in enumerate(PREFERRED) if word in prefix.split(".")]
        return min(places, default=len(PREFERRED)), prefix

    best, *others = sorted(networks, key=rank)
    if others:
        logger.warning("%s: the network %r is read; the file also has %s", source, best, others)
    return networks[best]


def _inner_networks(tensors: Tensors) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Returns prefix -> network with this prefix; networks are not nested."""
    prefixes = {key.removesuffix(end) for key in tensors for end in ANCHORS if key.endswith(end)}
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for prefix in sorted(prefixes, key=len):
        if any(prefix.startswith(outer) for outer in found if outer):
            continue
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        inside = {k: v for k, v in inside.items() if HEADS.match(k) or not BESIDE.match(k)}
        with suppress(KeyError, ValueError, TypeError):
            layout, ours = _to_ours(inside)
            if infer_models(ours):
                found[prefix] = layout, ours
    return found


def _to_ours(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    layout = recognize(tensors)
    return layout, LAYOUTS[layout].to_ours(tensors)
