"""Detectron2's checkpointer: weights from any source, checked before anything is loaded.

Checkpoints are whole or not there, and never hold numbers that are not finite.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.backbone_input import (
    NAME_KEY,
    describe_input,
    detector_input,
    networks,
    origin_input,
    refuse_other_input,
)
from resnet_backbone.detection.checkpoint.files import AtomicWriter, open_weights
from resnet_backbone.models import FrozenBatchNorm2d, StagedNetwork
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.keymaps.detectron2 import HEAD_LAYERS
from resnet_backbone.weights.load import (
    BATCH_NORMS,
    check_architecture,
    check_settings,
    fitting_tensors,
)
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS, Preprocessing, WeightsError
from resnet_backbone.weights.readers import PREPROCESSING_KEY, RawFile
from resnet_backbone.weights.reading import UnknownInput, read_network, single_precision

logger = logging.getLogger(__name__)

# The layers of Detectron2's detectors whose size follows the number of classes.
CLASS_LAYERS = re.compile(
    r"roi_heads\.box_predictor\."
    r"|roi_heads\.mask_head\.(predictor|coarse_head\.prediction|point_head)\."
    r"|roi_heads\.keypoint_head\.score_lowres\."
    r"|head\.cls_score\."
    r"|sem_seg_head\.(predictor|coarse_sem_seg_head\.predictor|point_head)\."
)
# Buffers that a config gives, or that nothing reads.
NOT_WEIGHTS = re.compile(rf"pixel_(mean|std)$|.*\.(num_batches_tracked|{INPUT_SETTINGS})$")
RES5 = "roi_heads.res5."


def find_network(model: nn.Module) -> StagedNetwork:
    """The one network of this package inside a detector."""
    for network in networks(model):
        return network
    raise WeightsError(
        "this detector has none of our backbones: set MODEL.BACKBONE.NAME, for example to "
        "build_paper_resnet_fpn_backbone"
    )


def check_input(model: nn.Module, expected: Preprocessing, where: str) -> None:
    """Refuses weights that were trained on other input than this detector gives them.

    Raises:
        WeightsError: naming the config key, its value and the right one.
    """
    network, actual = find_network(model), describe_input(model)
    if actual is None:
        raise WeightsError(f"{where}: INPUT.FORMAT must be RGB or BGR to use these weights")
    refuse_other_input(actual, expected, where)
    check_architecture(network, expected, where)


class Checkpointer(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` for weights from any source, which loads all or nothing.

    What :func:`resnet_backbone.weights.read_checkpoint` reads, and ``catalog://`` names and
    addresses that Detectron2 knows, are told apart by their content. Weights of a backbone or a
    classifier go into the backbone, res5 of C4 and fc6, fc7 of a VGG into the region head. Whole
    detectors, ours or of Detectron2's zoo, load as Detectron2 does it. Files are read as data:
    nothing in them is executed.

    Weights that were trained on another input or stride than the detector's are refused, where
    they, their origin or `preprocessing` say it. So are weights that lack tensors of the backbone
    or have others in another shape, and checkpoints with other classes than those of `class_names`
    when they are resumed or evaluated. The detector is unchanged after an error.

    Args:
        preprocessing: see :func:`resnet_backbone.weights.read_checkpoint`.
        class_names: of the detector, in order; empty: not known, not checked.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        preprocessing: str = "",
        class_names: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.preprocessing = preprocessing
        self.class_names = list(class_names)

    def save(self, name: str, **kwargs) -> None:
        described = describe_input(self.model)
        if described is not None:
            kwargs[PREPROCESSING_KEY] = described.to_json()
        super().save(name, class_names=self.class_names, **kwargs)

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, needs_detector: bool = False
    ) -> dict[str, Any]:
        """Loads weights; see :class:`Checkpointer`.

        Args:
            checkpointables: None resumes a training or evaluates: a detector's checkpoint must
                fill every layer. ``[]`` means weights to start a training from, of any classes:
                other parts than the backbone may be missing.
            needs_detector: refuses weights of a backbone alone.

        Returns:
            What a detector's checkpoint holds beside its weights and `checkpointables`.

        Raises:
            WeightsError: with the file, the reason and what to write.
        """
        if not path:
            return super().load(path, checkpointables)
        file = open_weights(path)
        if not file.is_detector:
            if needs_detector:
                raise WeightsError(
                    f"MODEL.WEIGHTS {path} holds a backbone or a classifier alone; give a "
                    "checkpoint of a whole detector, such as output/run/model_final.pth"
                )
            load_backbone(self.model, file.source, self._named_input(), file.raw())
            self.logger.info(f"Loaded the backbone from {path}")
            return {}
        self._file, self._source, self._starts = file, path, checkpointables is not None
        try:
            return super().load(str(file.file.path), checkpointables)
        finally:
            self._file = self._parsed_url_during_load = None  # else no use after an error

    def _named_input(self) -> str:
        """The preprocessing that its maker names, or else the config of the backbone."""
        known = (network.weights_preprocessing for network in networks(self.model))
        return self.preprocessing or next(known, "")

    def _load_file(self, filename: str) -> dict[str, Any]:
        return self._file.content()

    def _load_model(self, checkpoint: dict[str, Any]):
        expected = detector_input(self._file, self._source, self._named_input())
        if expected is not None:
            check_input(self.model, expected, self._source)
        checkpoint.pop(PREPROCESSING_KEY, None)
        classes = checkpoint.pop("class_names", None) or self.class_names
        if not self._starts and self.class_names and classes != self.class_names:
            raise WeightsError(
                f"{self._source} was trained on the classes {classes}, these data have "
                f"{self.class_names}: use the config.yaml of its run, or set "
                "RESNET_BACKBONE.CLASS_NAMES to its classes"
            )
        checkpoint["model"] = _named_for(self.model, checkpoint, self._source)
        refuse_misfit(self.model, checkpoint["model"], self._source, whole=not self._starts)
        return super()._load_model(checkpoint)


def _named_for(model: nn.Module, checkpoint: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors under the detector's names."""
    tensors = checkpoint["model"]
    if checkpoint.pop("matching_heuristics", False):
        is_caffe2 = checkpoint.get("__author__") == "Caffe2"
        tensors = align_and_update_state_dicts(model.state_dict(), tensors, is_caffe2)
        add_folded_statistics(model, tensors, where)
    return tensors


def load_backbone(
    model: nn.Module, source: str, preprocessing: str = "", raw: RawFile | None = None
) -> None:
    """Loads ImageNet weights into a detector: backbone, C4's res5, VGG's fc6 and fc7.

    Args:
        source, preprocessing, raw: see :func:`resnet_backbone.weights.read_checkpoint`.

    Raises:
        WeightsError: input or stride mismatch, missing or wrongly shaped tensors. The detector
            is unchanged then.
    """
    try:
        weights = read_network(source, preprocessing or origin_input(source) or "", raw=raw)
    except UnknownInput as error:
        raise UnknownInput(source, NAME_KEY) from error
    network = find_network(model)
    check_input(model, weights.preprocessing, source)
    tensors = single_precision(weights.tensors)
    fitting = fitting_tensors(network, tensors, source)
    check_settings(network, weights.model, source)
    refuse_folded(network, fitting, source)
    head = _head_tensors(model, tensors, source)
    network.load_state_dict(fitting, strict=False)
    state = model.state_dict()
    for key, value in head.items():
        state[key].copy_(value)


def _head_tensors(model: nn.Module, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors for the layers that a detector keeps in its region head.

    A VGG file without classifier is whole; its fc6 and fc7 then start at random.
    """
    head, random = {}, []
    for key, own in model.state_dict().items():
        target = next((prefix for prefix in HEAD_LAYERS if key.startswith(prefix)), None)
        if target is None or key.endswith(COUNTER):
            continue
        source = HEAD_LAYERS[target] + key[len(target) :]
        if source not in tensors:
            if source.startswith("res5.") or {"fc6.weight", "fc7.weight"} & tensors.keys():
                kind = "C4" if source.startswith("res5.") else "VGG"
                raise WeightsError(f"{path} lacks {source}, a layer of the {kind} head")
            random.append(key)
        elif tensors[source].shape != own.shape:
            raise WeightsError(
                f"{path}: {source} has shape {tuple(tensors[source].shape)}, the head needs "
                f"{tuple(own.shape)} ({key})"
            )
        else:
            head[key] = tensors[source]
    report_random(random, path)
    return head


class AtomicCheckpointer(Checkpointer, AtomicWriter):
    """:class:`Checkpointer` that writes as :class:`AtomicWriter`."""

    def __init__(self, *args: Any, marks_last: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.marks_last = marks_last


def refuse_not_finite(model: nn.Module) -> None:
    """All processes must call it.

    Raises:
        FloatingPointError: on every process, if any has a weight or statistic that is NaN or
            infinite.
    """
    state = model.state_dict().items()
    found = next((key for key, value in state if not value.isfinite().all()), "")
    bad = [key for key in comm.all_gather(found) if key]
    if bad:
        raise FloatingPointError(f"the weights are not finite ({bad[0]}), no checkpoint is written")


# What fits


class Misfit(NamedTuple):
    """Keys of a model and of a file that do not go together; all empty where all fit."""

    missing: list[str]
    reshaped: dict[str, Tensor]  # key of the model -> the file's tensor
    unknown: list[str]


def find_misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> Misfit:
    """What a model lacks, what has another shape, and what of a backbone it has no layer for.

    Args:
        tensors: under the model's keys. Detectron2's matching of names leaves those that it found
            no place for, also because of their shape, under the ends of keys.
    """
    own = {k: v for k, v in model.state_dict().items() if not NOT_WEIGHTS.match(k)}
    found = {key: _named(key, tensors) for key in own}
    reshaped = {k: v for k, v in found.items() if v is not None and v.shape != own[k].shape}
    missing = [key for key in own if key not in tensors and key not in reshaped]
    return Misfit(missing, reshaped, _unknown(model, own, tensors))


def _named(key: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    parts = key.split(".")
    names = (".".join(parts[index:]) for index in range(len(parts) - 1))
    return next((tensors[name] for name in names if name in tensors), None)


def _unknown(
    model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[str]:
    """A deeper network's blocks; the stages and the head that a backbone leaves out are none."""
    found = []
    for prefix, network in _networks(model).items():
        left_out = tuple(f"{name}." for name in network.left_out)
        stages = re.compile(rf"({'|'.join(network.stage_names)})\.\d+\.")
        for key in tensors:
            name = key.removeprefix(prefix)
            ours = name != key or stages.match(name)
            known = key in own or NOT_WEIGHTS.match(key) or name.startswith(left_out)
            if ours and not known:
                found.append(key)
    return found


def _networks(model: nn.Module) -> dict[str, StagedNetwork]:
    """Prefix of the keys -> network of this package."""
    modules = model.named_modules()
    return {f"{name}.": part for name, part in modules if isinstance(part, StagedNetwork)}


def refuse_misfit(model: nn.Module, tensors: Mapping[str, Tensor], where: str, whole: bool) -> None:
    """Refuses a checkpoint that does not fill all required layers.

    Args:
        whole: every tensor must be there, as for evaluation and resuming. Otherwise the backbone
            must be, layers that depend on the number of classes may have another shape, and
            other parts may be missing as a whole; a line says which then start at random.

    Raises:
        WeightsError: naming a tensor and its shapes.
    """
    misfit = find_misfit(model, tensors)
    prefixes = (*(_networks(model) or ("backbone.",)), RES5)
    if not any(key.startswith(prefixes) for key in tensors):
        raise WeightsError(
            f"{where} has no tensor of this detector's backbone, whose names begin with "
            f"{prefixes[0]}; it has {min(tensors, default='none')}"
        )
    reshaped = [key for key in misfit.reshaped if whole or not CLASS_LAYERS.match(key)]
    if reshaped:
        key = reshaped[0]
        hint = ""
        if CLASS_LAYERS.match(key):
            hint = "; is the number of classes, or RESNET_BACKBONE.GLOBAL_CONTEXT, another?"
        raise WeightsError(
            f"{where}: {len(reshaped)} tensors are of another shape, such as {key}: "
            f"{tuple(misfit.reshaped[key].shape)}, this detector has "
            f"{tuple(model.state_dict()[key].shape)}{hint}"
        )
    if misfit.unknown:
        raise WeightsError(
            f"{where}: this detector's backbone has no {misfit.unknown[0]}; is it another depth?"
        )
    lacking = [key for key in misfit.missing if whole or key.startswith(prefixes)]
    if lacking:
        raise WeightsError(
            f"{where} lacks {len(lacking)} of this detector's tensors, such as {lacking[0]}; is it "
            "of another architecture, or weights of less than the whole detector?"
        )
    report_random([*misfit.missing, *misfit.reshaped], where)


def _part(key: str) -> str:
    """The part of a detector that a tensor belongs to: ``roi_heads.mask_head.``"""
    return ".".join(key.split(".")[:2]) + "."


def report_random(keys: list[str], where: str) -> None:
    """A line that names the parts whose tensors a file does not fill; none where it fills all."""
    if keys:
        parts = Counter(_part(key).rstrip(".") for key in keys)
        listed = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
        logger.info(
            "%s: layers of another number of classes, or not in the file, start at random: %s",
            where,
            listed,
        )


def add_folded_statistics(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Completes a file whose batch norms are a scale and a shift, such as Detectron1's, in place.

    The statistics are folded into these: mean 0 and variance 1 - eps give the same function.

    Raises:
        WeightsError: see :func:`refuse_folded`.
    """
    if any(key.endswith("running_var") for key in tensors):
        return
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and f"{name}.weight" in tensors:
            tensors[f"{name}.running_mean"] = torch.zeros(len(tensors[f"{name}.weight"]))
            tensors[f"{name}.running_var"] = 1 - module.eps + tensors[f"{name}.running_mean"]
    refuse_folded(model, tensors, where)


def refuse_folded(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses to train batch norms whose statistics are folded into their scale and shift.

    Raises:
        WeightsError: every variance in the file is that of an identity, and norms are not frozen.
    """
    variances = [value for key, value in tensors.items() if key.endswith("running_var")]
    identity = FrozenBatchNorm2d(1).running_var
    if not variances or not all(torch.allclose(value, identity, 0, 1e-6) for value in variances):
        return
    if all(bool((v == 1).all()) for k, v in tensors.items() if k.endswith("norm.weight")):
        return  # a network that was never trained
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS[:2]):
            raise WeightsError(
                f"{where} has the statistics of its batch norms folded in, with which {name} "
                "cannot learn: set MODEL.RESNETS.NORM FrozenBN"
            )
