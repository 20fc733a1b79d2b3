"""Which of this package's networks each library has: what can be written for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resnet_backbone.weights.architecture import constructor_options
from resnet_backbone.weights.checkpoint import ModelSpec

_SAME_TENSORS = {"FrozenBN": "BN", "SyncBN": "BN", None: ""}


@dataclass(frozen=True)
class Support:
    """Networks that a library builds with the same function.

    Attributes:
        networks: (family, norm) pairs, norm being "BN", "GN" or "" for none.
        stride_in_1x1: bottlenecks may have their stride in the first 1x1 convolution.
        in_channels: images may have other than three channels.
        dilations: stages are dilated as this package's are.
    """

    networks: frozenset[tuple[str, str]]
    stride_in_1x1: bool = True
    in_channels: bool = True
    dilations: bool = False


_BN_NETWORKS = frozenset({("ResNet", "BN"), ("VGG", ""), ("VGG", "BN")})
SUPPORT = {
    "torchvision": Support(_BN_NETWORKS, stride_in_1x1=False, in_channels=False),
    "timm": Support(_BN_NETWORKS, stride_in_1x1=False),
    "huggingface": Support(frozenset({("ResNet", "BN")})),
    "detectron2": Support(_BN_NETWORKS | {("ResNet", "GN")}, dilations=True),
    "caffe2": Support(frozenset({("ResNet", "BN"), ("ResNet", "GN"), ("VGG", "")}), dilations=True),
}


def check_support(library: str, model: ModelSpec) -> None:
    """Refuses a network that a library does not have.

    ``stride_in_1x1`` is looked at only where the specification has it.

    Raises:
        ValueError: saying why, and which layouts take the network.
    """
    problem = _problem(SUPPORT[library], model)
    if problem:
        others = [name for name, support in SUPPORT.items() if not _problem(support, model)]
        able = " and ".join([*others, "resnet_backbone"])
        raise ValueError(f"{library} has no such network: {problem}; layouts that do: {able}")


def _problem(support: Support, model: ModelSpec) -> str:
    options = {**constructor_options(model.name), **model.options}
    family, norm = _family(model.name), _SAME_TENSORS.get(options["norm"], options["norm"])
    if family == "CIFAR":
        return f"{model.name} is one of the paper's CIFAR networks"
    for key, usual in (("shortcut", "B"), ("activation", "relu"), ("caffe_pool", False)):
        if options.get(key, usual) != usual:
            return f"{model.name} has {key}={options[key]!r}"
    if (family, norm) not in support.networks:
        return f"{model.name} has norm={options['norm']!r}"
    return _limits(support, model, options)


def _limits(support: Support, model: ModelSpec, options: dict[str, Any]) -> str:
    bottleneck = model.name in ("resnet50", "resnet101", "resnet152")
    if model.options.get("stride_in_1x1") and bottleneck and not support.stride_in_1x1:
        return "its bottlenecks have their stride in the 3x3 convolution (stride_in_1x1=False)"
    if options["in_channels"] != 3 and not support.in_channels:
        return f"its networks take 3 channels, not {options['in_channels']}"
    dilated = max(options.get("dilations", (1,))) > 1 or options.get("multi_grid")
    if dilated and not support.dilations:
        return "it dilates the first block of a stage by the rate of the stage before"
    return ""


def _family(name: str) -> str:
    if name.startswith("cifar"):
        return "CIFAR"
    return "VGG" if name.startswith("vgg") else "ResNet"
