"""Checks the input settings of a config or detector against its weights, or sets them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.files import (
    FORMAT,
    MEAN,
    NAME_KEY,
    STD,
    STRIDE,
    agree,
    detector_input,
    input_keys,
    open_weights,
    refuse_other_input,
)
from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.models import BottleneckBlock, StagedNetwork
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.weights import Preprocessing, WeightsError, describe_weights
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.checkpoint import FileMetadata, ModelSpec
from resnet_backbone.weights.load import (
    check_architecture,
    explain_misfit,
    pools_as_caffe,
    stride_of,
)
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS

logger = logging.getLogger(__name__)
NODE_KEY = "RESNET_BACKBONE.WEIGHTS_INPUT"
POOL = "RESNET_BACKBONE.CAFFE_POOL"
BATCH_NORMS = {"BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN"}  # with the same tensors
_BARE = ("", "bottom_up.")  # prefixes of a network alone or in an FPN, not in a detector
DERIVED = ("running_mean", "running_var")  # absent from files with folded statistics


def prepare_weights(
    cfg: CfgNode, given: Collection[str] = (), *, weights: str = "", resume_from: str = ""
) -> list[str]:
    """Applies ``RESNET_BACKBONE.WEIGHTS_INPUT`` before data are read or a model is built.

    "check" compares the config's input keys with the training of the weights; "set" replaces them
    and then becomes "check". Returns lines that say what was set or could not be checked. Errors
    are those of :func:`use_weights_input`.

    Args:
        given: keys set by the user; it is an error if they contradict the weights.
        weights: value of ``--weights``, equivalent to ``MODEL.WEIGHTS`` with "set".
        resume_from: a checkpoint that is loaded instead of ``MODEL.WEIGHTS``.
    """
    mode = cfg.RESNET_BACKBONE.WEIGHTS_INPUT
    if mode not in ("check", "set"):
        raise UsageError(f"{NODE_KEY} must be check or set, not {mode!r}")
    if weights and "MODEL.WEIGHTS" in given:
        raise UsageError(
            f"--weights {weights} and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: give only one"
        )
    if weights and mode == "check" and NODE_KEY in given:
        raise UsageError(f"--weights {weights} sets the input keys: leave {NODE_KEY} out")
    named, lines = weights or cfg.MODEL.WEIGHTS, []
    source = resume_from or named
    if source and (weights or mode == "set"):
        lines = use_weights_input(cfg, source, given)
    elif source:
        expected = _describe(cfg, source)[0].preprocessing
        if expected is None:
            text = "does not state which input it was trained on: taken to be the config's"
            lines = [f"{source} {text}"]
        else:
            refuse_other_input(config_input(cfg), expected, source)
    cfg.MODEL.WEIGHTS, cfg.RESNET_BACKBONE.WEIGHTS_INPUT = named, "check"
    return lines


def require_weights(cfg: CfgNode) -> None:
    """Raises UsageError if ``MODEL.WEIGHTS`` is empty, for uses other than training."""
    if not cfg.MODEL.WEIGHTS:
        raise UsageError(
            "MODEL.WEIGHTS is empty: add MODEL.WEIGHTS FILE, a checkpoint that train-net "
            "wrote, such as output/run/model_final.pth"
        )


def use_weights_input(cfg: CfgNode, source: str, given: Collection[str] = ()) -> list[str]:
    """Sets ``MODEL.WEIGHTS`` and the input that the weights were trained on, in place.

    Replaces the config's values of the input (``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``,
    ``MODEL.PIXEL_STD``, ``MODEL.RESNETS.STRIDE_IN_1X1``) and of the pooling
    (``RESNET_BACKBONE.CAFFE_POOL``) with those of the weights. The config's network is not changed
    but must match. Weights that do not state their input use
    ``RESNET_BACKBONE.WEIGHTS_PREPROCESSING``. Returns lines that say what was set.

    Args:
        cfg: not frozen; without the node ``RESNET_BACKBONE`` its defaults apply.
        source: see :class:`resnet_backbone.detection.Checkpointer`.
        given: keys set by the user, which are not changed.

    Raises:
        UsageError: a key of `given` contradicts the weights, or the network differs.
        WeightsError: the weights are missing or damaged, or their input is unknown.
    """
    found, name = _describe(cfg, source, but=(POOL,) if "RESNET_BACKBONE" in cfg else ())
    if found.preprocessing is None:
        raise WeightsError(
            f"{source} does not state which input it was trained on: name it ({NAME_KEY} msra, "
            f"caffe_vgg or torchvision), or set {FORMAT}, {MEAN}, {STD} and {STRIDE} yourself with "
            f"{NODE_KEY} check"
        )
    data = found.preprocessing.source or "data that it does not name"
    lines = [f"{source}: a {name}; its input is that of {data}"]
    pool = None if name == "detector" else pools_as_caffe(found.model, found.preprocessing)
    for key, value in {**input_keys(found.preprocessing), POOL: pool}.items():
        if value is None or key == STRIDE and not has_bottlenecks(cfg):
            continue
        have = read_key(cfg, key)
        if key in (MEAN, STD) and len(have) != len(value):
            raise UsageError(
                f"{key} has {len(have)} values, one a channel, but {source} has {len(value)}: it "
                "fits images of that many channels only"
            )
        if key in given and not agree(key, have, value):
            raise UsageError(
                f"{key} {have} contradicts {source}, which was trained with {value}: leave {key} "
                "out"
            )
        if key not in given and have != value:
            cfg.merge_from_list([key, value])
            lines.append(f"{key} {have} -> {value}")
    if found.has_mean_image:
        lines.append("MODEL.PIXEL_MEAN holds the channel means of the file's mean image")
    cfg.MODEL.WEIGHTS = source
    if "RESNET_BACKBONE" in cfg:
        cfg.RESNET_BACKBONE.WEIGHTS_INPUT = "check"
    return lines


def with_weights_input(cfg: CfgNode) -> CfgNode:
    """Returns a copy of a config, after :func:`use_weights_input` if the config says "set"."""
    copy = cfg.clone()
    if copy.MODEL.WEIGHTS and backbone_node(copy).WEIGHTS_INPUT == "set":
        copy.defrost()
        for line in use_weights_input(copy, copy.MODEL.WEIGHTS):
            logger.info("weights: %s", line)
    return copy


def _describe(cfg: CfgNode, source: str, but: Sequence[str] = ()) -> tuple[FileMetadata, str]:
    """Returns the metadata and kind of weights; refuses another network than the config's.

    Config keys in `but` may differ from the network's.
    """
    name, opened = backbone_node(cfg).WEIGHTS_PREPROCESSING, open_weights(source)
    if opened.is_detector:
        return FileMetadata(detector_input(opened, source, name)), "detector"
    found = opened.read(describe_weights, name)
    if not found.model:
        return found, "network without a name in the file"
    _check_network(cfg, found.model, source, but)
    return found, found.model.name


def read_key(cfg: CfgNode, key: str) -> Any:
    """Returns the value of a dotted key; our node's keys work even if the config lacks it."""
    if key.startswith("RESNET_BACKBONE."):
        cfg, key = backbone_node(cfg), key.removeprefix("RESNET_BACKBONE.")
    return reduce(getattr, key.split("."), cfg)


def network_keys(model: ModelSpec, path: str) -> dict[str, Any]:
    """Returns the config keys, with values, that build the network named in weights."""
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
            POOL: options.get("caffe_pool", False),
        }
    known = f"ResNet-{'/'.join(map(str, DEPTHS))}, their plain twins, VGG-11/13/16/19"
    raise WeightsError(f"{path} is a {model.name}; detectors here have {known}: train one")


def _check_network(cfg: CfgNode, model: ModelSpec, path: str, but: Sequence[str]) -> None:
    """Refuses a file of another network than the config's; unknown backbones pass."""
    keys, backbone = network_keys(model, path), cfg.MODEL.BACKBONE.NAME
    of_vgg = "MODEL.RESNETS.DEPTH" not in keys
    if not backbone.startswith(("build_paper_resnet", "build_vgg")):
        return
    if backbone.startswith("build_vgg") != of_vgg:
        other = "VGG_16" if of_vgg else f"R_{keys['MODEL.RESNETS.DEPTH']}"
        raise UsageError(
            f"{path} is a {model.name}, but MODEL.BACKBONE.NAME is {backbone}: use a config such "
            f"as voc/faster_rcnn_{other}_FPN"
        )
    found, mend = [], []
    for key, value in keys.items():
        have = read_key(cfg, key)
        if key not in but and have != value and not {have, value} <= BATCH_NORMS:
            found.append(f"{key} is {have!r}")
            mend.append(f"{key} {value or repr(value)}")
    if found:
        given, wanted = ", ".join(found), " ".join(mend)
        raise UsageError(f"{path} is a {model.name} with other settings: {given}; set {wanted}")


def config_input(cfg: CfgNode) -> Preprocessing | None:
    """Returns the input that a config specifies; None if it is not an RGB or BGR image."""
    stride = cfg.MODEL.RESNETS.STRIDE_IN_1X1 if has_bottlenecks(cfg) else None
    return _stated(cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, stride)


def describe_input(model: nn.Module) -> Preprocessing | None:
    """Returns the input that a detector feeds our backbone; None if absent or unknown."""
    network = next(iter(networks(model).values()), None)
    known, mean = getattr(network, "input_settings", None), getattr(model, "pixel_mean", None)
    if known is not None or network is None or mean is None:
        return known
    # Built without a config: ask the meta-architecture (semantic ones do not state the format).
    order, std = getattr(model, "input_format", None), model.pixel_std
    return _stated(order, mean.flatten().tolist(), std.flatten().tolist(), stride_of(network))


def networks(model: nn.Module) -> dict[str, StagedNetwork]:
    """Returns this package's networks inside a detector by key prefix."""
    modules = model.named_modules()
    return {f"{name}.": part for name, part in modules if isinstance(part, StagedNetwork)}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of one network under its own keys."""
    names = (key for key in tensors if key.startswith(prefix) and not key.endswith(INPUT_SETTINGS))
    return {name.removeprefix(prefix): tensors[name] for name in names}


def find_network(model: nn.Module) -> StagedNetwork:
    """Returns this package's first network inside a detector; WeightsError if there is none."""
    for network in networks(model).values():
        return network
    raise WeightsError(
        "this detector has none of our backbones: set MODEL.BACKBONE.NAME, for example to "
        "build_paper_resnet_fpn_backbone"
    )


def has_bottlenecks(cfg: CfgNode) -> bool:
    """Returns False if the backbone has no blocks to which ``STRIDE_IN_1X1`` applies."""
    if "vgg" in cfg.MODEL.BACKBONE.NAME:
        return False
    return DEPTHS.get(cfg.MODEL.RESNETS.DEPTH, (BottleneckBlock,))[0] is BottleneckBlock


def _stated(order, mean, std, stride: bool | None) -> Preprocessing | None:
    if order not in ("RGB", "BGR") or len(mean) != 3 or len(std) != 3:
        return None
    return Preprocessing(
        order, 255.0, tuple(mean), tuple(std), stride_in_1x1=stride, source="a Detectron2 config"
    )


def check_input(model: nn.Module, expected: Preprocessing, where: str) -> None:
    """Refuses weights that were trained on other input than this detector's."""
    network = find_network(model)
    refuse_other_input(describe_input(model), expected, where)
    check_architecture(network, expected, where)


class StatesInput(nn.Module):
    """A network that records in its detector's state dict which input it was trained on.

    If :attr:`input_settings` is known, a detector's state dict has the entry ``input_settings``
    (see :meth:`Preprocessing.to_tensor`). Loading one with other settings is an error, even with
    Detectron2's own tools. State dicts without the entry can be loaded. State dicts of the network
    or its feature pyramid alone contain only weights.
    """

    input_settings: Preprocessing | None = None  # from the config; None: not checked
    # name and input of MODEL.WEIGHTS if the name implies it, for state dicts without the entry
    origin: tuple[str, Preprocessing] | None = None
    weights_preprocessing: str = ""  # RESNET_BACKBONE.WEIGHTS_PREPROCESSING

    def check_settings(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Refuses a detector's state dict whose part below `prefix` does not fit this network.

        Tensors of another shape may be absent, since Detectron2 drops them.
        """
        if self.input_settings is None or prefix in _BARE:
            return
        stated = state_dict.get(prefix + INPUT_SETTINGS)
        if stated is not None:
            expected = Preprocessing.from_tensor(stated)
            refuse_other_input(self.input_settings, expected, "the checkpoint")
        elif self.origin is not None and any(key.startswith(prefix) for key in state_dict):
            name, expected = self.origin
            refuse_other_input(self.input_settings, expected, f"MODEL.WEIGHTS {name}")
        self._refuse_part(state_dict, prefix)

    def _refuse_part(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Raises where loaders with ``strict=False``, such as Detectron2's, would only warn."""
        own = {prefix + key for key in self.state_dict()}
        found = {key for key in state_dict if key.startswith(prefix)}
        if not found:
            raise WeightsError(
                f"the checkpoint has nothing for the backbone, whose names begin with {prefix}; "
                "resnet_backbone.detection.Checkpointer loads weights under other names (a part "
                "of a detector has its own load_state_dict)"
            )
        left_out = tuple(f"{prefix}{name}." for name in (INPUT_SETTINGS, *self.left_out))
        lacking = {key for key in own - found if not key.endswith(DERIVED)}
        unknown = {key for key in found - own if not f"{key}.".startswith(left_out)}
        differ = sorted(key for key in lacking | unknown if not key.endswith(COUNTER))
        if differ:
            problem = (
                f"{len(differ)} tensors are missing, extra, or of another shape, such as "
                f"{differ[0]}"
            )
            cause = explain_misfit(self, below(prefix, state_dict), problem)
            raise WeightsError(f"the checkpoint belongs to another backbone: {cause}")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.input_settings is not None and prefix not in _BARE:
            destination[prefix + INPUT_SETTINGS] = self.input_settings.to_tensor()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.check_settings(state_dict, prefix)
        state_dict.pop(prefix + INPUT_SETTINGS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
