"""Detectron2's checkpointer: weights from any source, checked before anything is loaded.

Checkpoints are whole or not there, and never hold numbers that are not finite.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.files import open_weights
from resnet_backbone.detection.checkpoint.fit import (
    add_folded_statistics,
    refuse_folded,
    refuse_misfit,
    report_random,
)
from resnet_backbone.detection.checkpoint.inputs import (
    NAME_KEY,
    describe_input,
    detector_input,
    networks,
    origin_input,
    refuse_other_input,
)
from resnet_backbone.models import StagedNetwork
from resnet_backbone.runtime.files import put_in_place, write_text
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.conventions import UnknownInput
from resnet_backbone.weights.keymaps.detectron2 import HEAD_LAYERS
from resnet_backbone.weights.load import check_architecture, check_settings, fitting_tensors
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError
from resnet_backbone.weights.readers import PREPROCESSING_KEY, RawFile
from resnet_backbone.weights.reading import read_network, single_precision

LAST = "last_checkpoint"  # a file in the run folder that names its newest checkpoint
PARTIAL = ".partial"


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
    check_settings(network, weights.stated, source)
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


# Saving


class AtomicWriter(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` whose files appear under their names when they are whole.

    Attributes:
        marks_last: whether what is saved is what ``--resume`` goes on from.
    """

    marks_last = True

    def save(self, name: str, **kwargs: Any) -> None:
        """As fvcore's, which writes in place.

        Raises:
            OSError: the file cannot be written; the one that it would replace is there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: one.state_dict() for key, one in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            torch.save(content, path + PARTIAL)
            put_in_place(path + PARTIAL, path)
        except (OSError, RuntimeError) as error:  # the second is of PyTorch's file writer
            with suppress(FileNotFoundError):
                os.remove(path + PARTIAL)  # a full disk has its room back
            cause = " ".join(str(error).split())
            raise OSError(f"{path} cannot be written ({cause})") from error
        if self.marks_last:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, LAST), last_filename_basename)


class AtomicCheckpointer(Checkpointer, AtomicWriter):
    """:class:`Checkpointer` that writes as :class:`AtomicWriter`."""

    def __init__(self, *args: Any, marks_last: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.marks_last = marks_last


def find_last_checkpoint(folder: str) -> str:
    """The checkpoint from which a run goes on; "" where there is none."""
    mark = os.path.join(folder, LAST)
    if not os.path.isfile(mark):
        return ""
    with open(mark, encoding="utf-8") as file:
        return os.path.join(folder, file.read().strip())


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
