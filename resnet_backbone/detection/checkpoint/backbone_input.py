"""What a detector feeds its backbone, and the refusal of weights that know another input.

The facts are ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD`` and
``MODEL.RESNETS.STRIDE_IN_1X1``. With a wrong one weights load without complaint and cost accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.files import WeightsFile
from resnet_backbone.models import BottleneckBlock, StagedNetwork
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.load import stride_of
from resnet_backbone.weights.preprocessing import (
    INPUT_SETTINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    same_mean,
    same_std,
)
from resnet_backbone.weights.sources import (
    BY_ADDRESS,
    CATALOG,
    DETECTRON2_DEFAULT,
    stated_convention,
)

FORMAT, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
NAME_KEY = "RESNET_BACKBONE.WEIGHTS_PREPROCESSING"  # says the input of weights that do not
_BARE = ("", "bottom_up.")  # where a network is in no detector, but alone or in an FPN
# Names of Detectron2's zoo for the detectors that our backbones fit, all trained on the defaults of
# its config. Those of gn and syncbn have their stride elsewhere, dconv has other layers.
ZOO = re.compile(
    r"(COCO-\w+|LVISv\d.\d-\w+|Cityscapes|PascalVOC-Detection|Detectron1-Comparisons|Misc)"
    r"/(?!\w*(gn|syncbn|dconv))\w+_R_(50|101)_\w+/"
)


def config_input(cfg: CfgNode) -> Preprocessing | None:
    """The input that a config gives its backbone; None if it is not an image in RGB or BGR."""
    stride = cfg.MODEL.RESNETS.STRIDE_IN_1X1 if has_bottlenecks(cfg) else None
    return _stated(cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, stride)


def describe_input(model: nn.Module) -> Preprocessing | None:
    """The input that a Detectron2 meta-architecture gives its backbone.

    None if it does not say, or if the backbone is not one of ours.
    """
    network = next(iter(networks(model)), None)
    known, mean = getattr(network, "input_settings", None), getattr(model, "pixel_mean", None)
    if known is not None or network is None or mean is None:
        return known
    # Made without a config: what the meta-architecture says, which of those for labels is no format
    order, std = getattr(model, "input_format", None), model.pixel_std
    return _stated(order, mean.flatten().tolist(), std.flatten().tolist(), stride_of(network))


def networks(model: nn.Module) -> list[StagedNetwork]:
    """The networks of this package inside a detector."""
    return [module for module in model.modules() if isinstance(module, StagedNetwork)]


def origin_input(source: str) -> Preprocessing | None:
    """The input that published weights need, where their name or the end of their path says it.

    Args:
        source: such as ``detectron2://ImageNetPretrained/MSRA/R-50.pkl``, or a copy of it in a
            folder ``ImageNetPretrained/MSRA``; detectors of Detectron2's zoo likewise. Nothing is
            fetched or read.
    """
    source = CATALOG.get(source.removeprefix("catalog://"), source)
    for address, known in BY_ADDRESS.items():
        folder = address.split("/", 4)[-1]  # https: / / host / project / folder
        if folder in source:
            return known
    return DETECTRON2_DEFAULT if ZOO.search(source) else None


def has_bottlenecks(cfg: CfgNode) -> bool:
    """False where the backbone is known to have no block that ``STRIDE_IN_1X1`` could move."""
    if "vgg" in cfg.MODEL.BACKBONE.NAME:
        return False
    return DEPTHS.get(cfg.MODEL.RESNETS.DEPTH, (BottleneckBlock,))[0] is BottleneckBlock


def _stated(order, mean, std, stride: bool | None) -> Preprocessing | None:
    if order not in ("RGB", "BGR") or len(mean) != 3 or len(std) != 3:
        return None
    return Preprocessing(
        order, 255.0, tuple(mean), tuple(std), stride_in_1x1=stride, source="a Detectron2 config"
    )


def differences(actual: Preprocessing, expected: Preprocessing) -> list[tuple[str, Any, Any]]:
    """(config key, value of `actual`, value of `expected`) for each key that matters and differs.

    Strides are compared where both are known.
    """
    wanted_mean, wanted_std = expected.pixel_mean_255(), expected.pixel_std_255()
    mean, std = actual.pixel_mean_255(), actual.pixel_std_255()
    strides = actual.stride_in_1x1, expected.stride_in_1x1
    found = []
    if actual.channel_order != expected.channel_order:
        found.append((FORMAT, actual.channel_order, expected.channel_order))
    if not same_mean(mean, wanted_mean):
        found.append((MEAN, _numbers(mean), _numbers(wanted_mean)))
    if not same_std(std, wanted_std):
        found.append((STD, _numbers(std), _numbers(wanted_std)))
    if None not in strides and strides[0] != strides[1]:
        found.append((STRIDE, *strides))
    return found


def refuse_other_input(actual: Preprocessing, expected: Preprocessing, where: str) -> None:
    """Refuses weights that were trained on other input than a detector gives them.

    Raises:
        WeightsError: one line with each config key, its value and the right one to write.
    """
    wrong = differences(actual, expected)
    if wrong:
        found = ", ".join(f"{key} is {have}" for key, have, _ in wrong)
        mend = " ".join(f"{key} {_quoted(want)}" for key, _, want in wrong)
        raise WeightsError(f"{where} was trained on other input: {found}; set {mend}")


def _quoted(value: Any) -> str:
    return str(value) if isinstance(value, bool) else f'"{value}"'


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def detector_input(file: WeightsFile, source: str, name: str) -> Preprocessing | None:
    """The input that a detector's checkpoint was trained on; None if it is unknown.

    Args:
        source: as the user wrote it.
        name: of ``PREPROCESSINGS``, for a file that does not say it; "" for none.

    Raises:
        WeightsError: the file and `name` say different things.
    """
    stated, named = stated_convention(file.file), get_preprocessing(name) if name else None
    if stated is None:
        return named or origin_input(source)
    if named is not None and differences(stated, named):
        raise WeightsError(
            f"{source} carries its own preprocessing, which is not {name!r}: leave {NAME_KEY} out"
        )
    return stated


# What files with folded statistics leave out: they are then those of an identity.
DERIVED = ("running_mean", "running_var")


class StatesInput(nn.Module):
    """A network that says in its detector's state dict which input it was trained on.

    Where :attr:`input_settings` is known, the state dict of a module around this one has the entry
    ``input_settings`` (see :meth:`Preprocessing.to_tensor`), and loading one that says otherwise is
    an error. That holds for whatever loads and saves the detector, such as Detectron2's
    ``DefaultPredictor`` and ``DefaultTrainer``. State dicts without the entry load, and those of
    the network or its feature pyramid alone hold weights only.

    Attributes:
        input_settings: what the config gives the network; None: not known, not checked.
        origin: name and input of ``MODEL.WEIGHTS`` where the name alone says the input: state
            dicts that do not speak for themselves are taken to come from there.
        weights_preprocessing: the config's ``RESNET_BACKBONE.WEIGHTS_PREPROCESSING``.
    """

    input_settings: Preprocessing | None = None
    origin: tuple[str, Preprocessing] | None = None
    weights_preprocessing: str = ""

    def check_settings(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Refuses a detector's state dict whose part below `prefix` does not fit this network.

        Raises:
            WeightsError: the entry names another input; the network's tensors are not all there,
                which is so when Detectron2 leaves out those of another shape, or others are.
        """
        if self.input_settings is None or prefix in _BARE:
            return
        stated = state_dict.get(prefix + INPUT_SETTINGS)
        if stated is not None:
            refuse_other_input(
                self.input_settings, Preprocessing.from_tensor(stated), "the checkpoint"
            )
        elif self.origin is not None and any(key.startswith(prefix) for key in state_dict):
            name, expected = self.origin
            refuse_other_input(self.input_settings, expected, f"MODEL.WEIGHTS {name}")
        self._refuse_part(state_dict, prefix)

    def _refuse_part(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """For those who load with ``strict=False`` and warn, as Detectron2's checkpointer."""
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
            raise WeightsError(
                f"the checkpoint is of another backbone: {len(differ)} tensors are in one of the "
                f"two alone or of another shape, such as {differ[0]}; is it another depth?"
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.input_settings is not None and prefix not in _BARE:
            destination[prefix + INPUT_SETTINGS] = self.input_settings.to_tensor()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.check_settings(state_dict, prefix)
        state_dict.pop(prefix + INPUT_SETTINGS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
