"""The input that weights were trained on: what their origin says, and the one that all agree on.

The one table of conventions, each with the place where it is written down. What a library keeps in
a machine-readable form (torchvision, timm, Hugging Face) is read there and not copied. Of an
unknown origin nothing is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from resnet_backbone.models import BottleneckBlock
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.weights.architecture import constructor_options
from resnet_backbone.weights.checkpoint import FileMetadata, ModelSpec
from resnet_backbone.weights.preprocessing import (
    INPUT_SETTINGS,
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    known_filter,
    one_line,
)
from resnet_backbone.weights.readers import PREPROCESSING_KEY, RawFile

MODEL_ZOO = "facebookresearch/detectron2, MODEL_ZOO.md and detectron2/checkpoint/catalog.py"
GROUP_NORM_CONFIG = "facebookresearch/detectron2, configs/Misc/mask_rcnn_R_50_FPN_3x_gn.yaml"
CONVERT_SCRIPT = "facebookresearch/detectron2, tools/convert-torchvision-to-d2.py"
DETECTRON2, DETECTRON1 = (
    f"https://dl.fbaipublicfiles.com/{name}/" for name in ("detectron2", "detectron")
)
PYTORCH = "https://download.pytorch.org/models/"

_MSRA = replace(PREPROCESSINGS["msra"], source=f"{MODEL_ZOO}; {PREPROCESSINGS['msra'].source}")
_CONVERTED = replace(PREPROCESSINGS["torchvision"], source=CONVERT_SCRIPT)
DETECTRON2_DEFAULT = Preprocessing(
    "BGR",
    255.0,
    (103.53, 116.28, 123.675),
    (1.0, 1.0, 1.0),
    stride_in_1x1=True,
    source="facebookresearch/detectron2, MODEL_ZOO.md and detectron2/config/defaults.py",
)
_GROUP_NORM = replace(DETECTRON2_DEFAULT, stride_in_1x1=False, source=GROUP_NORM_CONFIG)

# Beginning of an address -> convention of all weights there.
BY_ADDRESS: dict[str, Preprocessing] = {
    f"{DETECTRON2}ImageNetPretrained/MSRA/": _MSRA,
    f"{DETECTRON2}ImageNetPretrained/torchvision/": _CONVERTED,
    f"{DETECTRON1}ImageNetPretrained/MSRA/": _MSRA,
    f"{DETECTRON1}ImageNetPretrained/47261647/": _GROUP_NORM,
    f"{DETECTRON1}ImageNetPretrained/47592356/": _GROUP_NORM,
}
# ``__author__`` of a Detectron2 pickle -> convention, where the script that writes it says so.
BY_AUTHOR: dict[str, Preprocessing] = {"torchvision": _CONVERTED}


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


def convention_of_content(file: RawFile) -> Preprocessing | None:
    """The convention of a file that its content identifies.

    Detectors with our backbone, and files that this package writes for Detectron2, by what they
    state; torchvision's files by their published hash, wherever they lie and whatever their name;
    Detectron2's pickles by an ``__author__`` that stands for one script.

    Raises:
        WeightsError: it states something unreadable.
    """
    try:
        if file.container in ("torch", "pickle") and PREPROCESSING_KEY in file.metadata:
            return Preprocessing.from_json(file.metadata[PREPROCESSING_KEY])
        for key, value in file.tensors.items():
            if key.endswith(f".{INPUT_SETTINGS}"):
                return Preprocessing.from_tensor(value)
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {one_line(error)}") from error
    if file.container != "torch":
        return BY_AUTHOR.get(file.metadata.get("__author__", ""))

    def is_this(weights: Any) -> bool:
        digits = published_hash(weights)
        return bool(digits) and file.sha256.startswith(digits)

    published = torchvision_entry(is_this)
    return None if published is None else torchvision_preprocessing(published)


def published_hash(weights: Any) -> str:
    match = re.search(r"-([0-9a-f]{8,})\.", weights.url)
    return match[1] if match else ""


# What file, origin and user agree on


class UnknownInput(WeightsError):
    """Weights whose preprocessing is unknown.

    Args:
        source: of the weights.
        option: where the caller's user says it: an option or a config key.
    """

    def __init__(self, source: str, option: str = ""):
        *names, last = PREPROCESSINGS
        where = f" ({option})" if option else ""
        super().__init__(
            f"{source} does not say which input it was trained on: name it{where}, "
            f"{', '.join(names)} or {last} (tools/convert_weights.py takes any other)"
        )
        self.source = source


def agreed_preprocessing(
    source: str,
    metadata: FileMetadata,
    origin: Preprocessing | None,
    content: Preprocessing | None,
    given: str | Preprocessing,
    stride_in_1x1: bool | None = None,
) -> Preprocessing:
    """The one preprocessing on which a file, its origin and the user agree.

    Args:
        source: the file, for messages.
        origin: what the place that it comes from says.
        content: what the file's content says beside its metadata.
        given: by the user; "" for none.
        stride_in_1x1: what a config.json beside the file says.

    Raises:
        UnknownInput: none of them says it.
        WeightsError: two of them say different things.
    """
    stated = {
        "its metadata": metadata.preprocessing,
        "its origin": origin,
        "its content": content,
        repr(given) if isinstance(given, str) else "the given one": (
            get_preprocessing(given) if given else None
        ),
    }
    known = [(who, value) for who, value in stated.items() if value is not None]
    if not known:
        raise UnknownInput(source)
    (who, first), *others = known
    for other, value in others:
        if not first.same_input(value):
            _contradiction(source, who, other)
        if first.stride_in_1x1 is None:
            first = replace(first, stride_in_1x1=value.stride_in_1x1)
    if stride_in_1x1 is not None:
        if first.stride_in_1x1 not in (None, stride_in_1x1):
            _contradiction(source, "the config.json beside it, by its stride,", who)
        first = replace(first, stride_in_1x1=stride_in_1x1)
    return first


def _contradiction(source: str, first: str, second: str) -> None:
    if first == "its metadata":
        raise WeightsError(f"{source} carries its own preprocessing, which is not {second}")
    raise WeightsError(f"{source}: {first} says another preprocessing than {second}")


def with_stride(
    known: Preprocessing, stated: ModelSpec | None, given: ModelSpec | None, source: str
) -> Preprocessing:
    """A preprocessing that says where bottlenecks have their stride, which no tensor shows.

    Args:
        stated, given: the network, as the file and as the user says.

    Raises:
        WeightsError: it is unknown, or file and user disagree.
    """
    of_network = _stride_of(stated or given)
    found = {value for value in (known.stride_in_1x1, of_network) if value is not None}
    if not found and stated is not None:
        found = {constructor_options(stated.name)["stride_in_1x1"]}
    if not found:
        raise WeightsError(
            f"{source}: the stride of its bottlenecks is unknown; name a preprocessing that has "
            "it, such as msra or torchvision"
        )
    if len(found) > 1:
        raise WeightsError(
            f"{source}: its network has stride_in_1x1={of_network}, its preprocessing "
            f"{known.stride_in_1x1}"
        )
    return replace(known, stride_in_1x1=found.pop())


def stated_input(known: Preprocessing, stated: ModelSpec | None, source: str) -> Preprocessing:
    """:func:`with_stride` by the name of the network alone, where no tensor was read."""
    match = re.fullmatch(
        r"(?:\w+/)?(?:\w+_)?(?:resnet|plain)(\d+)\w*", stated.name if stated else ""
    )
    block, _ = DEPTHS.get(int(match[1]) if match else 0, (None, ()))
    return with_stride(known, stated, None, source) if block is BottleneckBlock else known


def _stride_of(spec: ModelSpec | None) -> bool | None:
    """What a network's name and options say; torchvision's and timm's have it in the 3x3."""
    if spec is None:
        return None
    return False if "/" in spec.name else spec.options.get("stride_in_1x1")
