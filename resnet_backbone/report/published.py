"""Published results as printed, each with its data and its source.

"paper" is arXiv 1512.03385. Reimplementations of detectors are the best of the named sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class PublishedErrors(NamedTuple):
    error: str  # paper: CIFAR-10 test error; ImageNet top-1 / top-5, 10-crop
    source: str  # table or figure of the paper
    multi_scale: str = ""  # paper, Table 4: ImageNet top-1 / top-5, multi-scale dense testing
    others: str = ""  # others: CIFAR-10 with the 50k split; ImageNet top-1, center crop


# By network and shortcut option; plain networks have the option "none".
ERRORS: dict[tuple[str, str], PublishedErrors] = {
    # Table 6; others: the README of akamaster/pytorch_resnet_cifar10
    ("cifar_resnet20", "A"): PublishedErrors("8.75", "Table 6", others="8.27"),
    ("cifar_resnet32", "A"): PublishedErrors("7.51", "Table 6", others="7.37"),
    ("cifar_resnet44", "A"): PublishedErrors("7.17", "Table 6", others="6.90"),
    ("cifar_resnet56", "A"): PublishedErrors("6.97", "Table 6", others="6.61"),
    ("cifar_resnet110", "A"): PublishedErrors(
        "6.43, mean 6.61 ± 0.16", "Table 6, best of 5", others="6.32"
    ),
    ("cifar_resnet1202", "A"): PublishedErrors("7.93", "Table 6"),
    # read off the curves of Fig. 6, left; no numbers for 32 and 44; others: reimplementations
    ("cifar_plain20", "none"): PublishedErrors("about 9", "Fig. 6", others="9.3-9.9"),
    ("cifar_plain56", "none"): PublishedErrors("about 13", "Fig. 6", others="12.5-13.5"),
    ("cifar_plain110", "none"): PublishedErrors("above 60", "Fig. 6"),
    # Tables 2, 3 and 4; others: torchvision V1 for 18 and 34, the released weights for 50 and more
    ("plain18", "none"): PublishedErrors("27.94 / -", "Table 2"),
    ("plain34", "none"): PublishedErrors("28.54 / 10.02", "Tables 2, 3"),
    ("resnet18", "A"): PublishedErrors("27.88 / -", "Table 2"),
    ("resnet18", "B"): PublishedErrors("-", "", others="30.24"),
    ("resnet34", "A"): PublishedErrors("25.03 / 7.76", "Tables 2, 3"),
    ("resnet34", "B"): PublishedErrors("24.52 / 7.46", "Table 3", "21.84 / 5.71", "26.69"),
    ("resnet34", "C"): PublishedErrors("24.19 / 7.40", "Table 3", "21.53 / 5.60"),
    ("resnet50", "B"): PublishedErrors("22.85 / 6.71", "Table 3", "20.74 / 5.25", "24.7"),
    ("resnet101", "B"): PublishedErrors("21.75 / 6.05", "Table 3", "19.87 / 4.60", "23.6"),
    ("resnet152", "B"): PublishedErrors("21.43 / 5.71", "Table 3", "19.38 / 4.49", "23.0"),
    ("vgg16", ""): PublishedErrors("28.07 / 9.33", "Table 3", "24.4 / 7.1"),
    ("prelu_net_b", ""): PublishedErrors("24.27 / 7.38", "Table 3", "21.59 / 5.71"),
    ("bn_inception", ""): PublishedErrors("- / -", "Table 4", "21.99 / 5.81"),
    ("torchvision/googlenet", ""): PublishedErrors("- / 9.15", "Table 3", "- / 7.89"),
}


class Network(NamedTuple):
    family: str  # "ResNet", "plain", "VGG", or the name itself for other networks
    depth: int  # number of layers; 0 for other networks
    cifar: bool  # whether it is a CIFAR-10 network of 6n+2 layers
    shortcut: str  # "A", "B", "C", "highway" or "none"; "" for other families
    others: dict[str, Any]  # further options that differ from the paper's network

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
        """n of a CIFAR network's 6n+2 layers."""
        return (self.depth - 2) // 6 if self.cifar else None


def parse_network(name: str, options: Mapping[str, Any] | None = None) -> Network:
    """Parses a model's name and options; any name is accepted."""
    others = dict(options or {})
    for key in ("stride_in_1x1", "caffe_pool"):
        if others.get(key) is True:
            del others[key]  # the paper's
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


def published(network: Network) -> PublishedErrors | None:
    if network.others:
        return None
    prefix = "cifar_" if network.cifar else ""
    depth = network.depth or ""
    return ERRORS.get((f"{prefix}{network.family.lower()}{depth}", network.shortcut))


def recipe_iterations(network: Network) -> int:
    """Returns the published iterations (sections 3.4, 4.2; arXiv 1409.1556, 1502.01852)."""
    if network.cifar:
        return 64_000
    return {"VGG": 370_000, "prelu_net_b": 800_000}.get(network.family, 600_000)


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike"
    " person pottedplant sheep sofa train tvmonitor"
).split()
CLASS_COUNTS = {"coco": 80, "det": 200}

TF = "tf-faster-rcnn"
ZOO = "Detectron2's model zoo"
VOC_DATA = "VOC 07+12 trainval → 07 test"
COCO_DATA = "COCO 2014 train → val"
COCO_35K = "COCO 2014 trainval35k → minival"
COCO_2017 = "COCO train2017 → val2017"


class Number(NamedTuple):
    """A published number in percent, its data (training → test), and its source."""

    value: float
    data: str
    source: str


class Published(NamedTuple):
    """A detector's number in the paper and in the best public reimplementation, or a gain."""

    task: str  # a key of TASKS
    network: tuple[str, int]  # family, depth
    paper: Number | None
    public: Number | None
    over: tuple[str, int] | None = None  # for a gain, its reference network
    weights: str = ""  # file of self-supervised initial weights; "": supervised


class Task(NamedTuple):
    """A benchmark with published numbers, and their smallest protocol."""

    name: str  # with the metric
    metric: str  # of its published numbers
    test: str  # name of its test set
    names: str  # pattern of Detectron2's names of these test sets, or of the JSON file's
    sizes: Sequence[int]  # images of these test sets
    iterations: int  # of the training
    images_per_batch: int
    train_images: int  # of the paper's smallest set
    short_side: int  # of test images, in pixels

    def has_test_set(self, names: Sequence[str], images: int | None) -> bool:
        """Returns whether the numbers were measured on these test sets, by name or size."""
        known = len(names) == 1 and re.fullmatch(self.names, names[0]) is not None
        return known or images in self.sizes


# VOC 07: Faster R-CNN, arXiv 1506.01497, section 3.3. COCO: the paper's appendix A. DET: appendix
# B, which gives no schedule; val2 is one of several halves of val's 20,121 images.
TASKS = {
    "voc": Task(
        *("PASCAL VOC, AP50", "AP50", "VOC 2007 test", "voc_2007_test", (4_952,)),
        *(80_000, 2, 5_011, 600),
    ),
    "coco": Task(
        *("COCO, AP", "AP", "COCO val", "coco_20(14|17)_(val|minival)", (5_000, 40_504)),
        *(320_000, 16, 80_000, 600),
    ),
    "det": Task(
        *("ImageNet DET, AP", "AP50", "ImageNet DET val2", "val2", ()),
        *(0, 0, 0, 600),
    ),
}


def task_of(classes: Sequence[str], protocol: str) -> str:
    """Returns `protocol` if the classes are those of its benchmark, else ""."""
    if protocol == "voc":
        return "voc" if set(classes) == set(VOC_CLASSES) else ""
    return protocol if len(classes) == CLASS_COUNTS[protocol] else ""


def _gain(task: str, paper: tuple[float, float], public: tuple[float, float], *sources: str):
    """Returns the gain of ResNet-101 over VGG-16, both numbers from one source."""
    numbers = []
    for (high, low), data, source in zip((paper, public), sources[::2], sources[1::2], strict=True):
        text = f"{source}: {high:.1f} − {low:.1f}"
        numbers.append(Number(round(high - low, 1), data, text))
    return Published(task, RESNET_101, *numbers, over=VGG_16)


VGG_16, RESNET_50, RESNET_101 = ("VGG", 16), ("ResNet", 50), ("ResNet", 101)
MOCO = "MoCo's Detectron2 config, C4, mean of 5"
TABLE_7, TABLE_8 = (VOC_DATA, "Table 7"), (COCO_DATA, "Table 8")
ZOO_FPN = COCO_2017, f"{ZOO}, FPN, 3x"
DETECTORS = (
    Published("voc", VGG_16, Number(73.2, *TABLE_7), Number(75.7, VOC_DATA, f"{TF}, conv5")),
    Published("voc", RESNET_50, None, Number(81.3, VOC_DATA, MOCO)),
    *(
        Published("voc", RESNET_50, None, Number(value, VOC_DATA, source), weights=file)
        for file, value, source in (
            ("moco_v2_800ep_pretrain.pth.tar", 82.5, MOCO),
            ("swav_800ep_pretrain.pth.tar", 82.6, "arXiv 2103.03230, Table 5, C4"),
        )
    ),
    Published("voc", RESNET_101, Number(76.4, *TABLE_7), Number(79.8, VOC_DATA, f"{TF}, C4")),
    _gain("voc", (76.4, 73.2), (79.8, 75.7), *TABLE_7, VOC_DATA, TF),
    Published("coco", VGG_16, Number(21.2, *TABLE_8), Number(30.2, COCO_35K, f"{TF}, conv5")),
    Published("coco", RESNET_50, None, Number(40.2, *ZOO_FPN)),
    Published("coco", RESNET_101, Number(27.2, *TABLE_8), Number(42.0, *ZOO_FPN)),
    Published("coco", ("ResNet", 152), None, Number(36.1, COCO_35K, f"{TF}, C4")),
    _gain("coco", (27.2, 21.2), (35.4, 30.2), *TABLE_8, COCO_35K, TF),
    Published(
        "det",
        RESNET_101,
        Number(60.5, "DET train + val1 → val2", "Table 12, improved testing; an ensemble 63.6"),
        None,
    ),
)


class Improvement(NamedTuple):
    """A row of Table 9: ResNet-101 on COCO; AP50 and AP in percent, None if not printed."""

    name: str
    keys: tuple[str, ...]  # words in the names of our rows
    val: tuple[float, float] | None  # trained on train, measured on val
    test_dev: tuple[float, float] | None  # trained on trainval


# Each row adds to the one above.
IMPROVEMENTS = (
    Improvement("baseline", ("baseline",), (48.4, 27.2), None),
    Improvement("+ box refinement", ("refinement",), (49.9, 29.9), None),
    Improvement("+ global context", ("context",), (51.1, 30.0), (53.3, 32.2)),
    Improvement("+ multi-scale testing", ("multi",), (53.8, 32.5), (55.7, 34.9)),
    Improvement("ensemble of 3", ("ensemble",), None, (59.0, 37.4)),
)


class LocalizationErrors(NamedTuple):
    """A row of Table 13: errors on ImageNet's validation set in percent, None if not printed."""

    method: str
    testing: str  # "center crop", or "dense" for the whole image at several scales
    network: str  # also the classifier's; "ensemble" of several, of both
    true_class: float | None  # with the true class given
    top5: float | None  # with the classifier's five best classes


LOCALIZATION = (
    LocalizationErrors("VGG's", "center crop", "VGG-16", 33.1, None),
    LocalizationErrors("RPN", "center crop", "ResNet-101", 13.3, None),
    LocalizationErrors("RPN", "dense", "ResNet-101", 11.7, 14.4),
    LocalizationErrors("RPN + R-CNN", "dense", "ResNet-101", None, 10.6),
    LocalizationErrors("RPN + R-CNN", "dense", "ensemble", None, 8.9),
)
LOCALIZATION_IMAGES = 50_000  # in this validation set
