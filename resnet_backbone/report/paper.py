"""Published results of the networks, as they are printed (errors in %)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """What is printed about one network.

    Attributes:
        error: CIFAR-10 test error; on ImageNet top-1 / top-5, 10-crop. Of the paper.
        source: where the paper has it.
        multi_scale: ImageNet top-1 / top-5, multi-scale dense testing (paper, Table 4).
        others: what others report: CIFAR-10 with the 50k split; ImageNet top-1, centre crop.
    """

    error: str
    source: str
    multi_scale: str = ""
    others: str = ""


# By network and shortcut option; plain networks have the option "none".
PUBLISHED: dict[tuple[str, str], Published] = {
    # Table 6; reimplementations, and akamaster/pytorch_resnet_cifar10's README for 32 and 44
    ("cifar_resnet20", "A"): Published("8.75", "Table 6", others="8.0-8.8"),
    ("cifar_resnet32", "A"): Published("7.51", "Table 6", others="7.37"),
    ("cifar_resnet44", "A"): Published("7.17", "Table 6", others="6.90"),
    ("cifar_resnet56", "A"): Published("6.97", "Table 6", others="6.6-7.4"),
    ("cifar_resnet110", "A"): Published(
        "6.43, mean 6.61 ± 0.16", "Table 6, best of 5", others="6.3-7.1"
    ),
    ("cifar_resnet1202", "A"): Published("7.93", "Table 6"),
    # read off the curves of Fig. 6, left; it has no numbers for 32 and 44
    ("cifar_plain20", "none"): Published("about 9", "Fig. 6", others="9.3-9.9"),
    ("cifar_plain56", "none"): Published("about 13", "Fig. 6", others="12.5-13.5"),
    ("cifar_plain110", "none"): Published("above 60", "Fig. 6"),
    # Tables 2, 3 and 4; others: torchvision V1 for 18 and 34, the released weights for 50 and more
    ("plain18", "none"): Published("27.94 / -", "Table 2"),
    ("plain34", "none"): Published("28.54 / 10.02", "Tables 2, 3"),
    ("resnet18", "A"): Published("27.88 / -", "Table 2"),
    ("resnet18", "B"): Published("-", "", others="30.24"),
    ("resnet34", "A"): Published("25.03 / 7.76", "Tables 2, 3"),
    ("resnet34", "B"): Published("24.52 / 7.46", "Table 3", "21.84 / 5.71", "26.69"),
    ("resnet34", "C"): Published("24.19 / 7.40", "Table 3", "21.53 / 5.60"),
    ("resnet50", "B"): Published("22.85 / 6.71", "Table 3", "20.74 / 5.25", "24.7"),
    ("resnet101", "B"): Published("21.75 / 6.05", "Table 3", "19.87 / 4.60", "23.6"),
    ("resnet152", "B"): Published("21.43 / 5.71", "Table 3", "19.38 / 4.49", "23.0"),
    ("vgg16", ""): Published("28.07 / 9.33", "Table 3", "24.4 / 7.1"),
    ("torchvision/googlenet", ""): Published("- / 9.15", "Table 3", "- / 7.89"),
}


class Network(NamedTuple):
    """A network's name taken apart.

    Attributes:
        family: "ResNet", "plain", "VGG", or the name itself where it is another network.
        depth: number of layers; 0 for other networks.
        cifar: whether it is one of the 6n+2 layers for CIFAR-10.
        shortcut: "A", "B", "C", "highway" or "none"; "" outside of these families.
        others: further options that make it another network than the paper's.
    """

    family: str
    depth: int
    cifar: bool
    shortcut: str
    others: dict[str, Any]

    @property
    def title(self) -> str:
        """Such as "ResNet-34 A", "plain-20", "VGG-16"."""
        title = f"{self.family}-{self.depth}" if self.depth else self.family
        if self.shortcut not in ("", "none", "A" if self.cifar else "B"):
            title += f" {self.shortcut}"
        extra = ", ".join(f"{key}={value}" for key, value in self.others.items())
        return f"{title} ({extra})" if extra else title

    @property
    def blocks(self) -> int | None:
        """n of the 6n+2 layers."""
        return (self.depth - 2) // 6 if self.cifar else None


def parse_network(name: str, options: Mapping[str, Any] | None = None) -> Network:
    """Takes a model's name and options apart; any name is accepted."""
    others = dict(options or {})
    if others.get("stride_in_1x1") is True:
        del others["stride_in_1x1"]  # the paper, and the default
    vgg = re.fullmatch(r"vgg(\d+)", name)
    if vgg:
        return Network("VGG", int(vgg[1]), False, "", others)
    match = re.fullmatch(r"(cifar_)?(resnet|plain)(\d+)", name)
    if not match:
        return Network(name, 0, False, "", others)
    cifar = match[1] is not None
    shortcut = str(others.pop("shortcut", "A" if cifar else "B"))
    if match[2] == "plain":
        shortcut = "none"
    family = "plain" if shortcut == "none" else "ResNet"
    return Network(family, int(match[3]), cifar, shortcut, others)


def published(network: Network) -> Published | None:
    """What is printed about this very network, or None."""
    if network.others:
        return None
    prefix = "cifar_" if network.cifar else ""
    depth = network.depth or ""
    return PUBLISHED.get((f"{prefix}{network.family.lower()}{depth}", network.shortcut))


def recipe_iterations(network: Network) -> int:
    """Length of the published training: sections 3.4 and 4.2; VGG's is of arXiv 1409.1556."""
    if network.cifar:
        return 64_000
    return 370_000 if network.family == "VGG" else 600_000
