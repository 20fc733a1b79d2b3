"""Torchvision's key names of ResNets and VGGs, and the conventions of its weights.

Torchvision's VGGs with batch norm have convolution biases, which the norm cancels; ours have
none. ``running_mean - bias`` takes their place, and zeros are written for them: the same function,
not the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.keymaps.table import (
    OURS,
    Layout,
    Module,
    Tensors,
    cancel_biases,
    check_statistics,
    check_support,
    inverse,
    library_name,
    linear_keys,
    rename,
    resnet_modules,
    spell_transform,
    torch_keys,
    with_counters,
    with_zero_biases,
    without_counters,
)
from resnet_backbone.weights.preprocessing import Preprocessing, known_filter

RESNET = "a torchvision ResNet"
VGG = "a torchvision VGG"
VGG_HEAD = [*linear_keys("classifier.0", "fc6"), *linear_keys("classifier.3", "fc7")]
VGG_HEAD += linear_keys("classifier.6")


def _block_layer(stage: int, block: int, layer: str) -> tuple[str, str]:
    prefix = f"layer{stage - 1}.{block}."
    if layer == "shortcut":
        return prefix + "downsample.0", prefix + "downsample.1"
    return prefix + layer, prefix + layer.replace("conv", "bn")


_RESNET_TABLE = {
    **dict(torch_keys(resnet_modules(("conv1", "bn1"), _block_layer))),
    **dict(linear_keys("fc")),
}


def from_torchvision(state_dict: Tensors) -> dict[str, Tensor]:
    """A torchvision ResNet's or VGG's state dict, or gradients, under our keys.

    Which of the two it is, and for a VGG its depth and whether it has batch norm, is read from
    the keys. Heads may be missing: a VGG's convolutions alone are enough. Tensors are not copied,
    ``num_batches_tracked`` is kept. Torchvision's ResNets need ``stride_in_1x1=False``, which no
    key shows.

    Raises:
        ValueError: for a key, or a set of VGG layers, that torchvision's networks do not have.
    """
    if not any(key.startswith(("features.", "classifier.")) for key in state_dict):
        return rename(state_dict, _RESNET_TABLE, RESNET)
    table = {**vgg_features(find_vgg(state_dict)), **dict(VGG_HEAD)}
    return cancel_biases(rename(state_dict, table, VGG))


def resnet_to_torchvision(tensors: Tensors) -> dict[str, Tensor]:
    """A ResNet's tensors from our keys to torchvision's."""
    return with_counters(rename(tensors, inverse(_RESNET_TABLE), OURS))


def find_vgg(state_dict: Tensors) -> list[Module]:
    """The VGG whose convolutions have these indices in torchvision's ``features``."""
    convs = {
        key.split(".")[1]
        for key, value in state_dict.items()
        if key.startswith("features.") and key.endswith(".weight") and value.dim() == 4
    }
    for num_convs in VGG_DEPTHS.values():
        for batch_norm in (False, True):
            modules = vgg_modules(num_convs, batch_norm)
            if convs == {module.conv.split(".")[1] for module in modules}:
                return modules
    found = ", ".join(sorted(convs, key=lambda name: (len(name), name))) or "none"
    raise ValueError(f"no VGG has its convolutions at these indices of features: {found}")


def vgg_modules(num_convs: Iterable[int], batch_norm: bool) -> list[Module]:
    """Convolutions of a VGG of torchvision."""
    modules, index = [], 0
    for stage, count in enumerate(num_convs, start=1):
        for conv in range(count):
            norm = f"features.{index + 1}" if batch_norm else ""
            modules.append(Module(f"conv{stage}.{conv}", f"features.{index}", norm))
            index += 3 if batch_norm else 2  # convolution, batch norm, ReLU
        index += 1  # max pooling
    return modules


def vgg_features(modules: list[Module]) -> dict[str, str]:
    """Torchvision's key -> ours for a VGG's convolutions."""
    return dict(torch_keys(modules, bias=True))


def modules_of(model: ModelSpec, tensors: Tensors) -> list[Module]:
    """Convolutions of a VGG of this package."""
    depth = int(model.name.removeprefix("vgg").removesuffix("_bn"))
    return vgg_modules(VGG_DEPTHS[depth], any(".norm." in key for key in tensors))


def vgg_to_torchvision(
    tensors: Tensors, model: ModelSpec, head: list[tuple[str, str]]
) -> dict[str, Tensor]:
    """A VGG's tensors from our keys to torchvision's, the head's to those given."""
    table = {**vgg_features(modules_of(model, tensors)), **dict(head)}
    renamed = rename(with_zero_biases(tensors), inverse(table), OURS)
    return with_counters(renamed)


def _matches(keys: Collection[str]) -> bool:
    known = set(keys)
    timm_vgg = "pre_logits.fc1.weight" in known
    firsts = {"conv1.weight", "layer1.0.conv1.weight", "features.0.weight"}
    return bool(known & firsts) and not timm_vgg


def _to_ours(tensors: Tensors) -> dict[str, Tensor]:
    ours = without_counters(from_torchvision(tensors))
    check_statistics(ours, "torchvision's networks")
    return ours


def _from_ours(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    check_support("torchvision", model)
    if model.name.startswith("vgg"):
        return vgg_to_torchvision(tensors, model, VGG_HEAD)
    return resnet_to_torchvision(tensors)


def _usage(checkpoint: Checkpoint, path: Path) -> list[str]:
    load = f'safetensors.torch.load_file("{path}")'
    if path.suffix == ".pth":
        load = f'torch.load("{path}", weights_only=True)'
    classes = checkpoint.model.num_classes
    arguments = "" if classes in (None, 1000) else f"num_classes={classes}"
    strict = "" if classes else ", strict=False"
    return [
        f"network = torchvision.models.{library_name(checkpoint)}({arguments})",
        f"network.load_state_dict({load}{strict})",
        spell_transform(checkpoint.preprocessing),
    ]


def torchvision_preprocessing(weights: Any) -> Preprocessing:
    """The convention of an entry such as ``ResNet50_Weights.IMAGENET1K_V2``, as it says itself."""
    transform = weights.transforms()
    return Preprocessing(
        "RGB",
        1.0,
        tuple(transform.mean),
        tuple(transform.std),
        stride_in_1x1=False,
        source=f"torchvision.models.{weights}.transforms()",
        resize_size=transform.resize_size[0],
        crop_size=transform.crop_size[0],
        interpolation=known_filter(transform.interpolation.value),
    )


def torchvision_entry(wanted: Callable[[Any], bool]) -> Any | None:
    """Torchvision's ResNet or VGG entry that fits; None if none does, or without torchvision."""
    try:
        from torchvision import models
    except ImportError:
        return None
    for name in models.list_models(module=models):
        if name.startswith(("resnet", "vgg")):
            for weights in models.get_model_weights(name):
                if wanted(weights):
                    return weights
    return None


def published_hash(weights: Any) -> str:
    """Digits with which the sha256 of an entry's file begins; "" where none are published."""
    match = re.search(r"-([0-9a-f]{8,})\.", weights.url)
    return match[1] if match else ""


TORCHVISION = Layout("torchvision", _matches, _to_ours, _from_ours, _usage)
