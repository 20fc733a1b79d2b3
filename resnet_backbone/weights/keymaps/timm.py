"""timm: its key names, the ``config.json`` beside its weights, and its conventions.

ResNets have torchvision's names, VGGs a classifier of convolutions.
What torchvision's layout says of biases before batch norms holds here. timm's ``resnet50_gn`` is
not read: its tensors are those of a ResNet with batch norm that has lost its statistics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.keymaps.table import (
    LIBRARY_NETWORKS,
    Layout,
    OtherNetwork,
    Tensors,
    cancel_biases,
    check_support,
    in_channels,
    library_name,
    linear_keys,
    rename,
    shorten,
    spell_transform,
    without_counters,
)
from resnet_backbone.weights.keymaps.torchvision import (
    TORCHVISION,
    find_vgg,
    resnet_to_torchvision,
    vgg_features,
    vgg_to_torchvision,
)
from resnet_backbone.weights.preprocessing import Preprocessing, known_filter

_VGG_HEAD = [*linear_keys("pre_logits.fc1", "fc6"), *linear_keys("pre_logits.fc2", "fc7")]
_VGG_HEAD += linear_keys("head.fc")
# timm's retired names of weights for these networks, "tv_resnet50" and "gluon_resnet50_v1b".
_RETIRED = re.compile(r"^(?:tv|ssl|swsl)_(?=resnet)|^gluon_(resnet\d+)_v1b$")
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


def check_timm_network(config: Mapping[str, Any], where: str) -> None:
    """Refuses timm's relatives of our networks that no tensor shows, such as resnetblur50.

    Args:
        config: ``architecture`` and, where they are written, ``model_args``, ``global_pool``.
        where: the config, for the message.

    Raises:
        OtherNetwork: another architecture, or arguments that make it another function.
    """
    architecture = shorten(str(config["architecture"]).partition(".")[0])
    if _RETIRED.sub(r"\1", architecture) not in LIBRARY_NETWORKS:
        raise OtherNetwork(
            f"{where}: timm's {architecture} is not among this package's networks, which are "
            f"{', '.join(LIBRARY_NETWORKS)}: use it in timm itself"
        )
    arguments = dict(config.get("model_args") or {})
    pools = {config.get("global_pool", "avg"), arguments.pop("global_pool", "avg")}
    changed = sorted(arguments.keys() - {"num_classes", "in_chans"})
    if changed or not pools <= {"avg", "fastavg", "", None}:
        what = shorten(", ".join(changed)) or "global_pool"
        raise OtherNetwork(
            f"{where}: timm builds this {architecture} with {what} of its own, which can make it "
            "another function: use it in timm itself"
        )


def timm_preprocessing(config: Mapping[str, Any], source: str) -> Preprocessing:
    """The convention of a timm ``pretrained_cfg``; its test is at the size of training."""
    size = config["input_size"][-1]
    centered = config.get("crop_mode", "center") == "center" and config.get("crop_pct")
    return Preprocessing(
        "RGB",
        1.0,
        tuple(config["mean"]),
        tuple(config["std"]),
        stride_in_1x1=False,
        source=source,
        resize_size=int(size / config["crop_pct"]) if centered else None,
        crop_size=size if centered else None,
        interpolation=known_filter(config.get("interpolation", "")),
    )


def timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json`` of timm: which network, and its ``pretrained_cfg``."""
    preprocessing, model = checkpoint.preprocessing, checkpoint.model
    is_vgg = model.name.startswith("vgg")
    resize, crop = preprocessing.center_crop()
    num_classes = model.num_classes or 0
    return {
        "architecture": library_name(checkpoint),
        "num_classes": num_classes,
        "pretrained_cfg": {
            "input_size": [in_channels(checkpoint), crop, crop],
            "crop_pct": _crop_share(resize, crop),
            "crop_mode": "center",
            "interpolation": preprocessing.interpolation or "bilinear",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": num_classes,
            "first_conv": "features.0" if is_vgg else "conv1",
            "classifier": "head.fc" if is_vgg else "fc",
        },
    }


def _crop_share(resize: int, crop: int) -> float:
    """The share from which timm gets this shorter side back: int(crop / share)."""
    share = crop / resize
    return share if int(crop / share) == resize else math.nextafter(share, 0)


def _usage(checkpoint: Checkpoint, path: Path) -> list[str]:
    return [
        f'network = timm.create_model("local-dir:{path}", pretrained=True)',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))",
        "# which is " + spell_transform(checkpoint.preprocessing).removeprefix("transform = "),
    ]


TIMM = Layout("timm", _matches, _to_ours, _from_ours, _usage)
