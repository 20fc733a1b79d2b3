"""The JSON files that timm and transformers keep beside weights."""

from __future__ import annotations

import math
from typing import Any

from resnet_backbone.models import BottleneckBlock
from resnet_backbone.models.resnet import DEPTHS, STAGE_WIDTHS
from resnet_backbone.weights.architecture import FIRST_KEYS
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.conventions import FILTERS
from resnet_backbone.weights.preprocessing import Preprocessing

USUAL_TEST = (256, 224)  # shorter side and crop; written where the weights do not say theirs


def centre_crop(preprocessing: Preprocessing) -> tuple[int, int]:
    """(shorter side, centre crop) in pixels of the test."""
    if preprocessing.resize_size is None or preprocessing.crop_size is None:
        return USUAL_TEST
    return preprocessing.resize_size, preprocessing.crop_size


def library_name(checkpoint: Checkpoint) -> str:
    """The network's name in torchvision and timm, where batch norm is part of a VGG's."""
    name = checkpoint.model.name.rpartition("/")[2].removesuffix("_bn")
    with_norm = name.startswith("vgg") and any(".norm." in key for key in checkpoint.tensors)
    return f"{name}_bn" if with_norm else name


def in_channels(checkpoint: Checkpoint) -> int:
    key = next(key for key in FIRST_KEYS if key in checkpoint.tensors)
    return checkpoint.tensors[key].shape[1]


def timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json`` of timm: which network, and its ``pretrained_cfg``."""
    preprocessing, model = checkpoint.preprocessing, checkpoint.model
    is_vgg = model.name.startswith("vgg")
    resize, crop = centre_crop(preprocessing)
    num_classes = model.num_classes or 0
    return {
        "architecture": library_name(checkpoint),
        "num_classes": num_classes,
        "pretrained_cfg": {
            "input_size": [in_channels(checkpoint), crop, crop],
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
    """The share from which timm gets this shorter side back: int(crop / share)."""
    share = crop / resize
    return share if int(crop / share) == resize else math.nextafter(share, 0)


def hugging_face_configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of transformers."""
    return {
        "config.json": _hugging_face_model(checkpoint),
        "preprocessor_config.json": _hugging_face_processor(checkpoint.preprocessing),
    }


def _hugging_face_model(checkpoint: Checkpoint) -> dict[str, Any]:
    model = checkpoint.model
    block, depths = DEPTHS[int(model.name.rpartition("resnet")[2])]
    num_stages = len({key[:4] for key in checkpoint.tensors if key.startswith("res")})
    config = {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "num_channels": in_channels(checkpoint),
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


def _hugging_face_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    resize, crop = centre_crop(preprocessing)
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
