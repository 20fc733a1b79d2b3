"""``RESNET_BACKBONE.WEIGHTS_INPUT``: a config's input keys are checked against weights, or set.

The keys are ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD`` and
``MODEL.RESNETS.STRIDE_IN_1X1``. With a wrong one weights load without complaint and cost accuracy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from resnet_backbone.detection.checkpoint.backbone_input import (
    FORMAT,
    MEAN,
    NAME_KEY,
    STD,
    STRIDE,
    config_input,
    detector_input,
    has_bottlenecks,
    origin_input,
    refuse_other_input,
)
from resnet_backbone.detection.checkpoint.files import open_weights
from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.weights import Preprocessing, WeightsError, describe_weights
from resnet_backbone.weights.checkpoint import ModelSpec
from resnet_backbone.weights.preprocessing import same_mean, same_std
from resnet_backbone.weights.reading import UnknownInput

logger = logging.getLogger(__name__)

NODE_KEY = "RESNET_BACKBONE.WEIGHTS_INPUT"
# Norms with the tensors of batch norm.
BATCH_NORMS = ("BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN")


def prepare_weights(
    cfg: CfgNode, given: Collection[str] = (), *, weights: str = "", resume_from: str = ""
) -> list[str]:
    """Does what ``RESNET_BACKBONE.WEIGHTS_INPUT`` says, before data are read or a model is built.

    "check" compares the config's input keys with what the weights were trained on, "set" replaces
    them (see :func:`use_weights_input`) and leaves "check" behind: the config is then final.

    Args:
        cfg: not frozen.
        given: keys that the user set; a value of theirs that contradicts the weights is an error.
        weights: ``--weights FILE``: ``MODEL.WEIGHTS FILE`` and "set".
        resume_from: a checkpoint that is loaded in place of ``MODEL.WEIGHTS``.

    Returns:
        What was set, or could not be checked, one line each.

    Raises:
        UsageError: another value of the key, a contradiction, another network.
        WeightsError: the weights are missing, damaged, or were trained on other input.
    """
    mode = cfg.RESNET_BACKBONE.WEIGHTS_INPUT
    if mode not in ("check", "set"):
        raise UsageError(f"{NODE_KEY} is check or set, not {mode!r}")
    if weights:
        if "MODEL.WEIGHTS" in given:
            raise UsageError(f"--weights {weights} and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: give one")
        if mode == "check" and NODE_KEY in given:
            raise UsageError(f"--weights {weights} sets the input keys: leave {NODE_KEY} out")
        cfg.MODEL.WEIGHTS, mode = weights, "set"
    source, lines = resume_from or cfg.MODEL.WEIGHTS, []
    if source:
        follow = _use_input if mode == "set" else check_weights
        lines = follow(cfg, source, given)
    cfg.RESNET_BACKBONE.WEIGHTS_INPUT = "check"
    return lines


def require_weights(cfg: CfgNode) -> None:
    """For a detector that is not trained.

    Raises:
        UsageError: ``MODEL.WEIGHTS`` is empty.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UsageError(
            "MODEL.WEIGHTS is empty: add MODEL.WEIGHTS FILE, a checkpoint that tools/train_net.py "
            "wrote, such as output/run/model_final.pth"
        )


def check_weights(cfg: CfgNode, source: str, given: Collection[str] = ()) -> list[str]:
    """Compares a config with what weights say of their input and network; it is not changed.

    Args:
        given: not looked at: all values count, whoever set them.

    Returns:
        A line for a detector's checkpoint that says no input and cannot be checked.

    Raises:
        WeightsError: another input, with the keys, both values and what to write; weights of a
            backbone that say no input.
        UsageError: another network.
    """
    found, actual = _describe(cfg, source), config_input(cfg)
    if found.model:
        _check_network(cfg, network_keys(found.model, source), found.model.name, source)
    if found.input is None:
        return [f"{source} does not say which input it was trained on: taken to be the config's"]
    if actual is None:
        raise WeightsError(f"{source}: INPUT.FORMAT must be RGB or BGR to use these weights")
    refuse_other_input(actual, found.input, source)
    return []


def use_weights_input(cfg: CfgNode, source: str, given: Collection[str] = ()) -> list[str]:
    """Sets ``MODEL.WEIGHTS`` and the input that the weights were trained on, in place.

    What weights say of their input (``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``,
    ``MODEL.RESNETS.STRIDE_IN_1X1``) replaces the config's values; the network that they name is
    compared with the config's, which stays. Weights without preprocessing follow
    ``RESNET_BACKBONE.WEIGHTS_PREPROCESSING``.

    Args:
        cfg: not frozen; without the node ``RESNET_BACKBONE`` its defaults count.
        source: of a backbone, a classifier or a whole detector; see
            :class:`resnet_backbone.detection.Checkpointer`.
        given: see :func:`prepare_weights`.

    Returns, raises: see :func:`prepare_weights`.
    """
    lines = _use_input(cfg, source, given)
    cfg.MODEL.WEIGHTS = source
    if "RESNET_BACKBONE" in cfg:
        cfg.RESNET_BACKBONE.WEIGHTS_INPUT = "check"
    return lines


def with_weights_input(cfg: CfgNode) -> CfgNode:
    """A copy of a config, after :func:`use_weights_input` where the config says "set"."""
    copy = cfg.clone()
    if copy.MODEL.WEIGHTS and backbone_node(copy).WEIGHTS_INPUT == "set":
        copy.defrost()
        for line in use_weights_input(copy, copy.MODEL.WEIGHTS):
            logger.info("weights: %s", line)
    return copy


def _use_input(cfg: CfgNode, source: str, given: Collection[str]) -> list[str]:
    found = _describe(cfg, source)
    if found.input is None:
        raise WeightsError(
            f"{source} does not say which input it was trained on: name it ({NAME_KEY} msra, "
            f"caffe_vgg or torchvision), or set {FORMAT}, {MEAN}, {STD} and {STRIDE} yourself with "
            f"{NODE_KEY} check"
        )
    if found.model:
        _check_network(cfg, network_keys(found.model, source), found.model.name, source)
    what = "a detector" if found.is_detector else "a network that it does not name"
    lines = [f"{source}: a {found.model.name}" if found.model else f"{source}: {what}"]
    lines[0] += f", trained on {found.input.source or 'data that it does not name'}"
    for key, value in _input_keys(cfg, found.input).items():
        lines += _set(cfg, key, value, key in given, source)
    if found.has_mean_image:
        lines.append(
            "MODEL.PIXEL_MEAN holds the channel means of the file's mean image, which fits "
            "no image of another size"
        )
    return lines


class _Described(NamedTuple):
    """What weights say of themselves."""

    input: Preprocessing | None
    model: ModelSpec | None = None
    has_mean_image: bool = False
    is_detector: bool = False


def _describe(cfg: CfgNode, source: str) -> _Described:
    name, opened = backbone_node(cfg).WEIGHTS_PREPROCESSING, open_weights(source)
    if opened.is_detector:
        return _Described(detector_input(opened, source, name), is_detector=True)
    try:
        found = describe_weights(opened.source, name or origin_input(source) or "", opened.raw())
    except UnknownInput as error:
        raise UnknownInput(source, NAME_KEY) from error
    return _Described(found.preprocessing, found.model, found.has_mean_image)


def _input_keys(cfg: CfgNode, expected: Preprocessing) -> dict[str, Any]:
    """The config's input settings as the weights ask for them."""
    wanted = {
        FORMAT: expected.channel_order,
        MEAN: [round(value, 4) for value in expected.pixel_mean_255()],
        STD: [round(value, 4) for value in expected.pixel_std_255()],
    }
    if expected.stride_in_1x1 is not None and has_bottlenecks(cfg):
        wanted[STRIDE] = expected.stride_in_1x1
    return wanted


def _set(cfg: CfgNode, key: str, value: Any, given: bool, path: str) -> list[str]:
    """Sets one key; the line that says so, none where it has that value already."""
    have = read_key(cfg, key)
    same = {MEAN: same_mean, STD: same_std}.get(key)
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
    """The value of a dotted key; of our node also where a config was made without it."""
    if key.startswith("RESNET_BACKBONE."):
        cfg, key = backbone_node(cfg), key.removeprefix("RESNET_BACKBONE.")
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def network_keys(model: ModelSpec, path: str) -> dict[str, Any]:
    """The config keys that build the network that weights name, with their values.

    Raises:
        WeightsError: a network that no backbone here is.
    """
    match = re.fullmatch(r"(?:(?:torchvision|timm)/)?(resnet|plain|vgg)(\d+)(_bn)?", model.name)
    family, depth = (match[1], int(match[2])) if match else ("", 0)
    options = model.options
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
    raise WeightsError(f"{path} is a {model.name}; detectors here have {known}: train one")


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
