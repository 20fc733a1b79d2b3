"""``--weights FILE``: a detector takes over what a classifier's weights file says of its input."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.models.resnet import DEPTHS, BottleneckBlock
from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.weights import Preprocessing, WeightsError
from resnet_backbone.weights.files import Description, describe_weights
from resnet_backbone.weights.preprocessing import same_mean, same_std

STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
# Norms with the tensors of batch norm.
BATCH_NORMS = ("BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN")


def take_over(cfg: CfgNode, path: str, given: Collection[str] = ()) -> list[str]:
    """Sets ``MODEL.WEIGHTS`` and the input that the weights were trained on, in place.

    What a file says of its input (``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``,
    ``MODEL.RESNETS.STRIDE_IN_1X1``) replaces the config's values; the network that it names is
    compared with the config's, which stays. A file without preprocessing follows
    ``RESNET_BACKBONE.WEIGHTS_PREPROCESSING``.

    Args:
        cfg: not frozen.
        path: ``.safetensors``, for example ``final.safetensors`` of ``tools/train_classifier.py``.
        given: keys that the user set; a value of theirs that contradicts the file is an error.

    Returns:
        What was taken over, one line each.

    Raises:
        UsageError: ``MODEL.WEIGHTS`` among the given keys, a contradiction, another network.
        WeightsError: the file is missing or damaged, or does not say its input.
    """
    if "MODEL.WEIGHTS" in given:
        raise UsageError(f"--weights {path} and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: give one")
    if not path.endswith(".safetensors"):
        raise UsageError(
            f"--weights {path}: takes a classifier's .safetensors; a detector's checkpoint goes "
            f"on from MODEL.WEIGHTS {path}"
        )
    found = describe_weights(path, backbone_node(cfg).WEIGHTS_PREPROCESSING)
    if found.model:
        _check_network(cfg, network_keys(found.model, path), found.model["name"], path)
    lines = [f"{path}: a {found.model['name']}" if found.model else f"{path}: a network unnamed"]
    lines[0] += f", trained on {found.preprocessing.source or 'data that it does not name'}"
    for key, value in _input_keys(cfg, found).items():
        lines += _set(cfg, key, value, key in given, path)
    if found.has_mean_image:
        lines.append(
            "MODEL.PIXEL_MEAN holds the channel means of the file's mean image, which fits "
            "no image of another size"
        )
    cfg.MODEL.WEIGHTS = path
    return lines


def _input_keys(cfg: CfgNode, found: Description) -> dict[str, Any]:
    """The config's input settings as the file asks for them."""
    expected: Preprocessing = found.preprocessing
    wanted = {
        "INPUT.FORMAT": expected.channel_order,
        "MODEL.PIXEL_MEAN": [round(value, 4) for value in expected.pixel_mean_255()],
        "MODEL.PIXEL_STD": [round(value, 4) for value in expected.pixel_std_255()],
    }
    stride = expected.stride_in_1x1
    if stride is None and re.match("torchvision/|timm/", found.model.get("name", "")):
        stride = False  # theirs is always in the 3x3
    if stride is not None and _has_bottlenecks(cfg):
        wanted[STRIDE] = stride
    return wanted


def _has_bottlenecks(cfg: CfgNode) -> bool:
    """False where the backbone is known to have no block that ``STRIDE_IN_1X1`` could move."""
    if "vgg" in cfg.MODEL.BACKBONE.NAME:
        return False
    return DEPTHS.get(cfg.MODEL.RESNETS.DEPTH, (BottleneckBlock,))[0] is BottleneckBlock


def _set(cfg: CfgNode, key: str, value: Any, given: bool, path: str) -> list[str]:
    """Sets one key; the line that says so, none where it has that value already."""
    have = read_key(cfg, key)
    same = {"MODEL.PIXEL_MEAN": same_mean, "MODEL.PIXEL_STD": same_std}.get(key)
    agree = same(have, value) if same else have == value
    if given and not agree:
        raise UsageError(
            f"{key} {have} contradicts {path}, which was trained with {value}: leave {key} out"
        )
    if given or have == value:
        return []
    cfg.merge_from_list([key, value])
    return [f"{key} {have} -> {value}"]


def read_key(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def network_keys(model: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The config keys that build the network of a file's metadata, with their values.

    Raises:
        WeightsError: a network that no backbone here is.
    """
    match = re.fullmatch(r"(?:(?:torchvision|timm)/)?(resnet|plain|vgg)(\d+)(_bn)?", model["name"])
    family, depth = (match[1], int(match[2])) if match else ("", 0)
    options = model["options"]
    keys = {"RESNET_BACKBONE.ACTIVATION": options.get("activation", "relu")}
    if family == "vgg" and depth in VGG_DEPTHS:
        norm = options.get("norm", "BN" if match[3] else "")
        return {"RESNET_BACKBONE.VGG.DEPTH": depth, "RESNET_BACKBONE.VGG.NORM": norm, **keys}
    if family and depth in DEPTHS:
        plain = "none" if family == "plain" else "B"
        return {
            "MODEL.RESNETS.DEPTH": depth,
            "RESNET_BACKBONE.SHORTCUT": options.get("shortcut", plain),
            **keys,
            "MODEL.RESNETS.NORM": options.get("norm", "BN"),
            "RESNET_BACKBONE.CAFFE_POOL": options.get("caffe_pool", False),
        }
    known = f"ResNet-{'/'.join(map(str, DEPTHS))}, their plain twins, VGG-11/13/16/19"
    raise WeightsError(f"{path} is a {model['name']}; detectors here have {known}: train one")


def _check_network(cfg: CfgNode, keys: Mapping[str, Any], name: str, path: str) -> None:
    """Refuses a file of another network than the config's; unknown backbones pass here."""
    backbone, of_vgg = cfg.MODEL.BACKBONE.NAME, "MODEL.RESNETS.DEPTH" not in keys
    if not backbone.startswith(("build_paper_resnet", "build_vgg")):
        return
    if backbone.startswith("build_vgg") != of_vgg:
        other = "VGG_16" if of_vgg else f"R_{keys['MODEL.RESNETS.DEPTH']}"
        raise UsageError(
            f"{path} is a {name}, MODEL.BACKBONE.NAME is {backbone}: take a config such as "
            f"configs/detection/voc/faster_rcnn_{other}_FPN.yaml"
        )
    differ = {key: value for key, value in keys.items() if not _agree(read_key(cfg, key), value)}
    if differ:
        have = ", ".join(f"{key} is {read_key(cfg, key)!r}" for key in differ)
        mend = " ".join(
            f"{key} {value if value != '' else repr('')}" for key, value in differ.items()
        )
        raise UsageError(f"{path} is a {name} of other settings: {have}; set {mend}")


def _agree(have: Any, value: Any) -> bool:
    return have == value or (have in BATCH_NORMS and value in BATCH_NORMS)
