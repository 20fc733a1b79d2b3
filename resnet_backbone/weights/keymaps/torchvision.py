"""Torchvision's and timm's key names of ResNets and VGGs, and the conventions of their weights.

Their VGGs with batch norm have convolution biases, which the norm cancels; ours have none. Biases
are read as ``running_mean - bias`` and written as zeros: the same function, not the same tensors.
timm's ResNets have torchvision's names, and its VGGs have a convolutional classifier. Its
``resnet50_gn`` is refused, because it looks like a ResNet with batch norm that lost its statistics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.keymaps import table
from resnet_backbone.weights.keymaps.table import Layout, Module, Tensors
from resnet_backbone.weights.preprocessing import Preprocessing, known_filter, one_line

VGG_HEAD = table.linear_keys(
    {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "linear"}
)
TIMM_HEAD = table.linear_keys(
    {"pre_logits.fc1": "fc6", "pre_logits.fc2": "fc7", "head.fc": "linear"}
)
TIMM_VGG = "pre_logits.fc1.weight"
TIMM_KERNELS = {TIMM_VGG: 7, "pre_logits.fc2.weight": 1}
# timm's retired names of these networks, such as "tv_resnet50" and "gluon_resnet50_v1b".
_RETIRED = re.compile(r"^(?:tv|ssl|swsl)_(?=resnet)|^gluon_(resnet\d+)_v1b$")


def _block_layer(stage: int, block: int, layer: str) -> tuple[str, str]:
    prefix = f"layer{stage - 1}.{block}."
    if layer == "shortcut":
        return prefix + "downsample.0", prefix + "downsample.1"
    return prefix + layer, prefix + layer.replace("conv", "bn")


_RESNET_TABLE = {
    **table.torch_keys(table.resnet_modules(("conv1", "bn1"), _block_layer)),
    **table.linear_keys({"fc": "linear"}),
}


def from_torchvision(state_dict: Tensors) -> dict[str, Tensor]:
    """Renames a torchvision ResNet's or VGG's state dict, or gradients, to our keys.

    The network is inferred from the keys. The head may be missing, also fc6 and fc7 of a VGG.
    Counters are kept and tensors not copied. ResNets need ``stride_in_1x1=False``.

    Raises:
        ValueError: a key, or a set of VGG layers, that torchvision's networks do not have.
    """
    if not any(key.startswith(("features.", "classifier.")) for key in state_dict):
        return table.rename(state_dict, _RESNET_TABLE, "a torchvision ResNet")
    return _vgg_from(state_dict, VGG_HEAD, "a torchvision VGG")


def _vgg_from(tensors: Tensors, head: Mapping[str, str], network: str) -> dict[str, Tensor]:
    names = {**table.torch_keys(_find_vgg(tensors), bias=True), **head}
    return table.cancel_biases(table.rename(tensors, names, network))


def _find_vgg(state_dict: Tensors) -> list[Module]:
    """Returns the VGG whose convolutions have these indices in torchvision's ``features``."""
    convs = {
        key.split(".")[1]
        for key, value in state_dict.items()
        if key.startswith("features.") and key.endswith(".weight") and value.dim() == 4
    }
    for num_convs in VGG_DEPTHS.values():
        for batch_norm in (False, True):
            modules = _vgg_modules(num_convs, batch_norm)
            if convs == {module.conv.split(".")[1] for module in modules}:
                return modules
    found = ", ".join(sorted(convs, key=lambda name: (len(name), name))) or "none"
    raise ValueError(f"no VGG has its convolutions at these indices of features: {found}")


def _vgg_modules(num_convs: Iterable[int], batch_norm: bool) -> list[Module]:
    modules, index = [], 0
    for stage, count in enumerate(num_convs, start=1):
        for conv in range(count):
            norm = f"features.{index + 1}" if batch_norm else ""
            modules.append(Module(f"conv{stage}.{conv}", f"features.{index}", norm))
            index += 3 if batch_norm else 2  # convolution, batch norm, ReLU
        index += 1  # max pooling
    return modules


def _matches(keys: Collection[str]) -> bool:
    firsts = {"conv1.weight", "layer1.0.conv1.weight", "features.0.weight"}
    return bool(firsts & set(keys)) and TIMM_VGG not in keys


def _read(tensors: Tensors) -> dict[str, Tensor]:
    ours = from_torchvision(tensors)
    table.check_statistics(ours, "torchvision's networks")
    return ours


def _write(
    tensors: Tensors, model: ModelSpec, head: Mapping[str, str] = VGG_HEAD
) -> dict[str, Tensor]:
    if not model.name.startswith("vgg"):
        return table.with_counters(table.rename_back(tensors, _RESNET_TABLE))
    depth, normed = int(re.sub(r"\D", "", model.name)), table.norm_layers(tensors)
    names = {**table.torch_keys(_vgg_modules(VGG_DEPTHS[depth], bool(normed)), bias=True), **head}
    biases = {f"{layer}.bias": torch.zeros_like(tensors[f"{layer}.norm.bias"]) for layer in normed}
    return table.with_counters(table.rename_back({**tensors, **biases}, names))


def _read_timm(tensors: Tensors) -> dict[str, Tensor]:
    if not any(key.startswith("features.") for key in tensors):
        return _read(tensors)
    kernels = {k: tensors[k] for k in TIMM_KERNELS if k in tensors and tensors[k].dim() == 4}
    flat = {**tensors, **{key: kernel.flatten(1) for key, kernel in kernels.items()}}
    return _vgg_from(flat, TIMM_HEAD, "a timm VGG")


def _write_timm(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    renamed = _write(tensors, model, TIMM_HEAD)
    for key, size in TIMM_KERNELS.items():
        if key in renamed:
            renamed[key] = renamed[key].unflatten(1, (-1, size, size))
    return renamed


def _library_name(checkpoint: Checkpoint) -> str:
    """Returns the library's name, in which "_bn" marks a VGG with batch norm."""
    name = checkpoint.model.name.removesuffix("_bn")
    normed = name.startswith("vgg") and table.norm_layers(checkpoint.tensors)
    return f"{name}_bn" if normed else name


def _usage(checkpoint: Checkpoint, path: Path) -> list[str]:
    load = f'safetensors.torch.load_file("{path}")'
    if path.suffix == ".pth":
        load = f'torch.load("{path}", weights_only=True)'
    classes = checkpoint.model.num_classes
    arguments = "" if classes in (None, 1000) else f"num_classes={classes}"
    strict = "" if classes else ", strict=False"
    return [
        f"network = torchvision.models.{_library_name(checkpoint)}({arguments})",
        f"network.load_state_dict({load}{strict})",
        f"transform = {table.spell_transform(checkpoint.preprocessing)}",
    ]


def _usage_timm(checkpoint: Checkpoint, path: Path) -> list[str]:
    return [
        f'network = timm.create_model("local-dir:{path}", pretrained=True)',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))",
        f"# which is {table.spell_transform(checkpoint.preprocessing)}",
    ]


TORCHVISION = Layout("torchvision", _matches, _read, _write, _usage)
TIMM = Layout(
    "timm",
    lambda keys: TIMM_VGG in keys or _matches(keys),
    _read_timm,
    _write_timm,
    _usage_timm,
)

# The libraries' own descriptions of their weights


def torchvision_preprocessing(weights: Any) -> Preprocessing:
    """Returns the convention of an entry such as ``ResNet50_Weights.IMAGENET1K_V2``."""
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
    """Returns torchvision's first matching ResNet or VGG entry; None without one or torchvision."""
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
    """Returns the first digits of the sha256 of an entry's file; "" if none are published."""
    match = re.search(r"-([0-9a-f]{8,})\.", weights.url)
    return match[1] if match else ""


def check_timm_network(config: Mapping[str, Any], where: str) -> None:
    """Refuses timm's relatives of our networks with the same tensors, such as resnetblur50.

    Raises OtherNetwork: another architecture, or arguments that may change the function.
    """
    architecture = one_line(str(config["architecture"]).partition(".")[0], 80)
    if _RETIRED.sub(r"\1", architecture) not in table.LIBRARY_NETWORKS:
        raise table.OtherNetwork(
            f"{where}: timm's {architecture} is not among this package's networks, which are "
            f"{', '.join(table.LIBRARY_NETWORKS)}: use it in timm itself"
        )
    arguments = dict(config.get("model_args") or {})
    pools = {config.get("global_pool", "avg"), arguments.pop("global_pool", "avg")}
    changed = sorted(arguments.keys() - {"num_classes", "in_chans"})
    if changed or not pools <= {"avg", "fastavg", "", None}:
        what = one_line(", ".join(changed) or "global_pool", 80)
        raise table.OtherNetwork(
            f"{where}: timm builds this {architecture} with {what} of its own, which can make it "
            "another function: use it in timm itself"
        )


def timm_preprocessing(config: Mapping[str, Any], source: str) -> Preprocessing:
    """Returns the convention of a timm ``pretrained_cfg``, with its test at ``input_size``."""
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
    """Returns timm's ``config.json``: the network and its ``pretrained_cfg``."""
    preprocessing, model = checkpoint.preprocessing, checkpoint.model
    is_vgg = model.name.startswith("vgg")
    resize, crop = preprocessing.center_crop()
    num_classes = model.num_classes or 0
    return {
        "architecture": _library_name(checkpoint),
        "num_classes": num_classes,
        "pretrained_cfg": {
            "input_size": [table.in_channels(checkpoint), crop, crop],
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
    """Returns ``crop_pct``, from which timm recovers the shorter side: int(crop / crop_pct)."""
    share = crop / resize
    return share if int(crop / share) == resize else math.nextafter(share, 0)
