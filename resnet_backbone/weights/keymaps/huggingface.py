"""Hugging Face transformers' ResNets: key names, configs beside weights, and conventions.

``ResNetForImageClassification`` has its network under ``resnet.``; ``ResNetModel`` and
``ResNetBackbone`` have no prefix. Tensors with a head are written for the first, and tensors
without one for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resnet_backbone.models import BottleneckBlock
from resnet_backbone.models.resnet import DEPTHS, STAGE_WIDTHS
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.keymaps import table
from resnet_backbone.weights.keymaps.table import Layout, OtherNetwork, Tensors
from resnet_backbone.weights.preprocessing import FILTERS, Preprocessing, one_line

_PREFIX = "resnet."
_FIRST_KEY = "embedder.embedder.convolution.weight"


def _block_layer(stage: int, block: int, layer: str) -> tuple[str, str]:
    prefix = f"encoder.stages.{stage - 2}.layers.{block}."
    name = "shortcut" if layer == "shortcut" else f"layer.{int(layer[-1]) - 1}"
    return f"{prefix}{name}.convolution", f"{prefix}{name}.normalization"


_STEM = ("embedder.embedder.convolution", "embedder.embedder.normalization")
_BACKBONE = table.torch_keys(table.resnet_modules(_STEM, _block_layer))
_CLASSIFIER = {
    **{_PREFIX + theirs: ours for theirs, ours in _BACKBONE.items()},
    **table.linear_keys({"classifier.1": "linear"}),
}


def _read(tensors: Tensors) -> dict[str, Tensor]:
    names = _BACKBONE if _FIRST_KEY in tensors else _CLASSIFIER
    ours = table.rename(tensors, names, "a transformers ResNet")
    table.check_statistics(ours, "transformers' ResNets")
    return ours


def _write(tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
    names = _CLASSIFIER if "linear.weight" in tensors else _BACKBONE
    return table.with_counters(table.rename_back(tensors, names))


def check_hugging_face_network(config: Mapping[str, Any], where: str) -> None:
    """Refuses transformers' ResNets that have our tensors but another function.

    Raises OtherNetwork: another activation, or a first stage that halves the resolution. Raises
    ValueError: ``downsample_in_bottleneck`` is not true or false.
    """
    for key, ours in (("hidden_act", "relu"), ("downsample_in_first_stage", False)):
        value = config.get(key, ours)
        if value != ours:
            raise OtherNetwork(
                f"{where}: {key} is {one_line(repr(value), 80)}, in this package's networks it is "
                f"{ours!r}: the same tensors are another function; use them in transformers"
            )
    if not isinstance(config.get("downsample_in_bottleneck", False), bool):
        raise ValueError("downsample_in_bottleneck is not true or false")


def hugging_face_preprocessing(
    processor: Mapping[str, Any], stride_in_1x1: bool | None
) -> Preprocessing:
    """Returns the convention of a ``preprocessor_config.json``; config.json has the stride."""
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
    """Returns shorter side and center crop; (None, None) for tests of another kind."""
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


def hugging_face_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns transformers' ``config.json``."""
    model = checkpoint.model
    block, depths = DEPTHS[int(model.name.rpartition("resnet")[2])]
    num_stages = len({key[:4] for key in checkpoint.tensors if key.startswith("res")})
    config = {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "num_channels": table.in_channels(checkpoint),
        "embedding_size": 64,
        "hidden_sizes": [width * block.expansion for width in STAGE_WIDTHS[:num_stages]],
        "depths": list(depths[:num_stages]),
        "layer_type": "bottleneck" if block is BottleneckBlock else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": bool(checkpoint.preprocessing.stride_in_1x1),
        "torch_dtype": "float32",
    }
    if model.num_classes is not None:
        labels = {str(index): f"LABEL_{index}" for index in range(model.num_classes)}
        config["architectures"] = ["ResNetForImageClassification"]
        config["id2label"] = labels
        config["label2id"] = {label: int(index) for index, label in labels.items()}
    return config


def hugging_face_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns transformers' ``preprocessor_config.json``."""
    resize, crop = preprocessing.center_crop()
    filters = {name: number for number, name in FILTERS.items()}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "resample": filters[preprocessing.interpolation or "bilinear"],
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _usage(checkpoint: Checkpoint, path: Path) -> list[str]:
    kind = "ResNetForImageClassification" if checkpoint.model.num_classes else "ResNetModel"
    return [
        f'network = transformers.{kind}.from_pretrained("{path}")',
        f'processor = transformers.AutoImageProcessor.from_pretrained("{path}")',
        f"# which is {table.spell_transform(checkpoint.preprocessing)}",
    ]


HUGGINGFACE = Layout(
    "huggingface",
    lambda keys: bool({_FIRST_KEY, _PREFIX + _FIRST_KEY} & set(keys)),
    _read,
    _write,
    _usage,
)
