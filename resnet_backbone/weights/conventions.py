"""The input that known origins' weights were trained on, each with the place where that is said.

The one table of conventions. What a library keeps in a machine-readable form (torchvision, timm,
Hugging Face) is read there and not copied. Of an unknown origin nothing is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from resnet_backbone.models import list_models
from resnet_backbone.weights.input_settings import INPUT_SETTINGS, from_tensor
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
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
# The networks of this package that torchvision and timm have under the same names.
LIBRARY_NETWORKS = tuple(name for name in list_models() if name.startswith(("resnet", "vgg")))
# timm's retired names of weights for these networks, "tv_resnet50" and "gluon_resnet50_v1b".
_RETIRED = re.compile(r"^(?:tv|ssl|swsl)_(?=resnet)|^gluon_(resnet\d+)_v1b$")
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling, as in preprocessor_config.json


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
        interpolation=_known_filter(transform.interpolation.value),
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


class OtherNetwork(WeightsError):
    """Weights of a network with the tensors of one of ours and another function."""


def check_timm_network(config: Mapping[str, Any], where: str) -> None:
    """Refuses timm's relatives of our networks that no tensor shows, such as resnetblur50.

    Args:
        config: ``architecture`` and, where they are written, ``model_args``, ``global_pool``.
        where: the config, for the message.

    Raises:
        OtherNetwork: another architecture, or arguments that make it another function.
    """
    architecture = _short(str(config["architecture"]).partition(".")[0])
    if _RETIRED.sub(r"\1", architecture) not in LIBRARY_NETWORKS:
        raise OtherNetwork(
            f"{where}: timm's {architecture} is not among this package's networks, which are "
            f"{', '.join(LIBRARY_NETWORKS)}: use it in timm itself"
        )
    arguments = dict(config.get("model_args") or {})
    pools = {config.get("global_pool", "avg"), arguments.pop("global_pool", "avg")}
    changed = sorted(arguments.keys() - {"num_classes", "in_chans"})
    if changed or not pools <= {"avg", "fastavg", "", None}:
        what = _short(", ".join(changed)) or "global_pool"
        raise OtherNetwork(
            f"{where}: timm builds this {architecture} with {what} of its own, which can make it "
            "another function: use it in timm itself"
        )


def _short(text: str) -> str:
    return " ".join(text.split())[:80]


def check_hugging_face_network(config: Mapping[str, Any], where: str) -> None:
    """Refuses transformers' ResNets that are none of ours and have the same tensors.

    Raises:
        OtherNetwork: another activation, or a first stage that halves the resolution.
        ValueError: ``downsample_in_bottleneck`` is not true or false.
    """
    for key, ours in (("hidden_act", "relu"), ("downsample_in_first_stage", False)):
        value = config.get(key, ours)
        if value != ours:
            raise OtherNetwork(
                f"{where}: {key} is {_short(repr(value))}, in this package's networks it is "
                f"{ours!r}: the same tensors are another function, use them in transformers itself"
            )
    if not isinstance(config.get("downsample_in_bottleneck", False), bool):
        raise ValueError("downsample_in_bottleneck is not true or false")


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
                return from_tensor(value)
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


def timm_preprocessing(config: Mapping[str, Any], source: str) -> Preprocessing:
    """The convention of a timm ``pretrained_cfg``; its test is at the size of training."""
    size = config["input_size"][-1]
    centred = config.get("crop_mode", "center") == "center" and config.get("crop_pct")
    return Preprocessing(
        "RGB",
        1.0,
        tuple(config["mean"]),
        tuple(config["std"]),
        stride_in_1x1=False,
        source=source,
        resize_size=int(size / config["crop_pct"]) if centred else None,
        crop_size=size if centred else None,
        interpolation=_known_filter(config.get("interpolation", "")),
    )


def _known_filter(name: Any) -> str:
    return name if name in FILTERS.values() else ""


def hugging_face_preprocessing(
    processor: Mapping[str, Any], stride_in_1x1: bool | None
) -> Preprocessing:
    """The convention of a ``preprocessor_config.json``.

    Args:
        stride_in_1x1: ``downsample_in_bottleneck`` of the config.json beside it.
    """
    value_range = 1.0
    if not processor.get("do_rescale", True):
        value_range = 255.0
    elif "rescale_factor" in processor:
        value_range = round(255.0 * processor["rescale_factor"], 6)
    normalizes = processor.get("do_normalize", True)
    resize, crop = _hugging_face_sizes(processor)
    return Preprocessing(
        "BGR" if processor.get("do_flip_channel_order") else "RGB",
        value_range,
        tuple(processor["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
        tuple(processor["image_std"]) if normalizes else (1.0, 1.0, 1.0),
        stride_in_1x1=stride_in_1x1,
        source="preprocessor_config.json and config.json beside the weights",
        resize_size=resize,
        crop_size=crop,
        interpolation=FILTERS.get(processor.get("resample"), ""),
    )


def _hugging_face_sizes(processor: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Shorter side and centre crop; (None, None) for tests of another kind."""
    size = processor.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge")
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    if not isinstance(size, int) or not processor.get("do_resize", True):
        return None, None
    if kind.startswith("ConvNext"):  # transformers' ConvNextImageProcessor.resize
        crop_pct = processor.get("crop_pct") or 224 / 256
        return (int(size / crop_pct), size) if size < 384 else (None, None)
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    crop = crop.get("height") if isinstance(crop, dict) else crop
    return (size, crop) if crop else (None, None)
