"""The explicit table of names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial

from resnet_backbone.models.network import StagedNetwork
from resnet_backbone.models.resnet import ResNet
from resnet_backbone.models.resnet_cifar import CifarResNet
from resnet_backbone.models.vgg import VGG

MODELS: dict[str, Callable[..., StagedNetwork]] = {
    "resnet18": partial(ResNet, 18),
    "resnet34": partial(ResNet, 34),
    "resnet50": partial(ResNet, 50),
    "resnet101": partial(ResNet, 101),
    "resnet152": partial(ResNet, 152),
    "plain18": partial(ResNet, 18, shortcut="none"),
    "plain34": partial(ResNet, 34, shortcut="none"),
    "cifar_resnet20": partial(CifarResNet, 20),
    "cifar_resnet32": partial(CifarResNet, 32),
    "cifar_resnet44": partial(CifarResNet, 44),
    "cifar_resnet56": partial(CifarResNet, 56),
    "cifar_resnet110": partial(CifarResNet, 110),
    "cifar_resnet1202": partial(CifarResNet, 1202),
    "cifar_plain20": partial(CifarResNet, 20, shortcut="none"),
    "cifar_plain32": partial(CifarResNet, 32, shortcut="none"),
    "cifar_plain44": partial(CifarResNet, 44, shortcut="none"),
    "cifar_plain56": partial(CifarResNet, 56, shortcut="none"),
    "cifar_plain110": partial(CifarResNet, 110, shortcut="none"),
    "vgg11": partial(VGG, 11),
    "vgg13": partial(VGG, 13),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    "vgg11_bn": partial(VGG, 11, norm="BN"),
    "vgg13_bn": partial(VGG, 13, norm="BN"),
    "vgg16_bn": partial(VGG, 16, norm="BN"),
    "vgg19_bn": partial(VGG, 19, norm="BN"),
}


def list_models() -> list[str]:
    """Names that :func:`build_model` knows; CIFAR networks exist at every other 6n+2 as well."""
    return list(MODELS)


def build_model(name: str, num_classes: int | None = None, **options) -> StagedNetwork:
    """Builds a network by name, with freshly initialized weights.

    Args:
        name: one of :func:`list_models`, or ``cifar_resnet<6n+2>`` / ``cifar_plain<6n+2>``.
        num_classes: logits; by default 1000, and 10 for the CIFAR networks.
        **options: arguments of the network's class, for example ``out_features=("res3", "res4",
            "res5")``, ``stride_in_1x1=False``, ``shortcut="A"``; see ``ResNet``,
            ``CifarResNet`` and ``VGG``.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    if name in MODELS:
        return MODELS[name](**options)
    cifar = re.fullmatch(r"cifar_(resnet|plain)(\d+)", name)
    if cifar:
        if cifar[1] == "plain":
            options["shortcut"] = "none"
        return CifarResNet(int(cifar[2]), **options)
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "list_models() gives the names"
    raise ValueError(f"unknown model {name!r}: {hint}")
