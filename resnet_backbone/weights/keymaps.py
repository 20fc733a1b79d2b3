"""Maps from other projects' state-dict keys to ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS

_NORM = r"weight|bias|running_mean|running_var|num_batches_tracked"

# torchvision's (and timm's) ResNet key -> ours; the first pattern that matches the whole key wins.
_TORCHVISION_RESNET = (
    (r"conv1\.weight", r"stem.conv1.weight"),
    (rf"bn1\.({_NORM})", r"stem.conv1.norm.\1"),
    (r"layer([1-4])\.(\d+)\.conv([123])\.weight", r"res{stage}.\2.conv\3.weight"),
    (rf"layer([1-4])\.(\d+)\.bn([123])\.({_NORM})", r"res{stage}.\2.conv\3.norm.\4"),
    (r"layer([1-4])\.(\d+)\.downsample\.0\.weight", r"res{stage}.\2.shortcut.weight"),
    (rf"layer([1-4])\.(\d+)\.downsample\.1\.({_NORM})", r"res{stage}.\2.shortcut.norm.\3"),
    (r"fc\.(weight|bias)", r"linear.\1"),
)
_VGG_CLASSIFIER = {"0": "fc6", "3": "fc7", "6": "linear"}


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision ResNet's or VGG's state dict under our keys.

    Which of the two it is, and for a VGG its depth and whether it has batch norm, is read from
    the keys. Heads may be missing: a VGG's convolutions alone are enough. Tensors are not copied.
    Torchvision's ResNets need ``stride_in_1x1=False``, which no key shows.

    Torchvision's VGGs with batch norm have convolution biases, which the norm cancels; ours have
    none. ``running_mean - bias`` takes their place: the same function in training and evaluation.

    Raises:
        ValueError: for a key, or a set of VGG layers, that torchvision's networks do not have.
    """
    if not any(key.startswith(("features.", "classifier.")) for key in state_dict):
        return {_resnet_key(key): value for key, value in state_dict.items()}
    layers = _vgg_layers(state_dict)
    mapped = {_vgg_key(key, layers): value for key, value in state_dict.items()}
    for name in layers.values():
        if name.endswith(".norm"):
            _cancel_bias(mapped, name)
    return mapped


def _cancel_bias(state_dict: dict[str, Tensor], norm: str) -> None:
    """Moves a convolution's bias into the running mean of the batch norm behind it."""
    bias_key, mean_key = norm.removesuffix("norm") + "bias", norm + ".running_mean"
    if bias_key not in state_dict:
        return
    if mean_key not in state_dict:
        raise ValueError(f"{bias_key} comes before a batch norm, but there is no {mean_key}")
    state_dict[mean_key] = state_dict[mean_key] - state_dict.pop(bias_key)


def _resnet_key(key: str) -> str:
    for pattern, ours in _TORCHVISION_RESNET:
        match = re.fullmatch(pattern, key)
        if match:
            stage = int(match[1]) + 1 if key.startswith("layer") else ""
            return match.expand(ours.replace("{stage}", str(stage)))
    raise ValueError(f"key {key!r} is not one of a torchvision ResNet")


def _vgg_key(key: str, layers: Mapping[str, str]) -> str:
    match = re.fullmatch(rf"(features|classifier)\.(\d+)\.({_NORM})", key)
    names = layers if match and match[1] == "features" else _VGG_CLASSIFIER
    if not match or match[2] not in names:
        raise ValueError(f"key {key!r} is not one of a torchvision VGG")
    return f"{names[match[2]]}.{match[3]}"


def _vgg_layers(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Index in torchvision's ``features`` -> our module, for the VGG with these convolutions."""
    convs = {
        key.split(".")[1]
        for key, value in state_dict.items()
        if re.fullmatch(r"features\.\d+\.weight", key) and value.dim() == 4
    }
    for num_convs in VGG_DEPTHS.values():
        for batch_norm in (False, True):
            layers = _vgg_layer_names(num_convs, batch_norm)
            if convs == {index for index, name in layers.items() if not name.endswith(".norm")}:
                return layers
    found = ", ".join(sorted(convs, key=int)) or "none"
    raise ValueError(f"no VGG has its convolutions at these indices of features: {found}")


def _vgg_layer_names(num_convs: Iterable[int], batch_norm: bool) -> dict[str, str]:
    layers, index = {}, 0
    for stage, count in enumerate(num_convs, start=1):
        for conv in range(count):
            layers[str(index)] = f"conv{stage}.{conv}"
            if batch_norm:
                layers[str(index + 1)] = f"conv{stage}.{conv}.norm"
            index += 3 if batch_norm else 2  # convolution, batch norm, ReLU
        index += 1  # max pooling
    return layers
