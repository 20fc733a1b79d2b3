"""Detectron2's checkpointer for weights from any source, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.files import (
    PREPROCESSING_KEY,
    DetectorFile,
    backbone_source,
    open_weights,
)
from resnet_backbone.detection.checkpoint.fit import (
    add_folded_statistics,
    refuse_folded,
    refuse_misfit,
    report_random,
)
from resnet_backbone.detection.checkpoint.inputs import (
    NAME_KEY,
    describe_input,
    differences,
    networks,
    origin_input,
    refuse_other_input,
)
from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.keymaps.detectron2 import HEAD_LAYERS
from resnet_backbone.weights.load import check_architecture, check_settings, fitting_tensors
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError, get_preprocessing
from resnet_backbone.weights.reading import UnknownInput, read_network, single_precision

__all__ = ["Checkpointer", "check_input", "describe_input", "find_network", "load_backbone"]


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
        file = open_weights(path) if path else None
        if path and file is None:
            if needs_detector:
                raise WeightsError(
                    f"MODEL.WEIGHTS {path} holds a backbone or a classifier alone; give a "
                    "checkpoint of a whole detector, such as output/run/model_final.pth"
                )
            load_backbone(self.model, backbone_source(path), self._named_input())
            self.logger.info(f"Loaded the backbone from {path}")
            return {}
        self._file, self._source, self._starts = file, path, checkpointables is not None
        try:
            return super().load(file.path if file else path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # else it could not be used after an error

    def _named_input(self) -> str:
        """The preprocessing that its maker names, or else the config of the backbone."""
        known = (network.weights_preprocessing for network in networks(self.model))
        return self.preprocessing or next(known, "")

    def _load_file(self, filename: str) -> dict[str, Any]:
        return self._file.read()

    def _load_model(self, checkpoint: dict[str, Any]):
        file: DetectorFile = self._file
        expected = detector_input(file, self._source, self._named_input())
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
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if checkpoint.pop("matching_heuristics", False):
        is_caffe2 = checkpoint.get("__author__") == "Caffe2"
        tensors = align_and_update_state_dicts(model.state_dict(), tensors, is_caffe2)
        add_folded_statistics(model, tensors, where)
    return tensors


def detector_input(file: DetectorFile, source: str, name: str) -> Preprocessing | None:
    """The input that a detector's checkpoint was trained on; None if nobody says it.

    Args:
        source: as the user wrote it.
        name: of ``PREPROCESSINGS``, for a file that does not say it; "" for none.

    Raises:
        WeightsError: the file and `name` say different things.
    """
    stated, named = file.stated_input(), get_preprocessing(name) if name else None
    if stated is None:
        return named or origin_input(source)
    if named is not None and differences(stated, named):
        raise WeightsError(
            f"{source} carries its own preprocessing, which is not {name!r}: leave {NAME_KEY} out"
        )
    return stated


def load_backbone(model: nn.Module, source: str, preprocessing: str = "") -> None:
    """Loads ImageNet weights into a detector: backbone, C4's res5, VGG's fc6 and fc7.

    Args:
        source, preprocessing: see :func:`resnet_backbone.weights.read_checkpoint`.

    Raises:
        WeightsError: input or stride mismatch, missing or wrongly shaped tensors. The detector
            is unchanged then.
    """
    try:
        weights = read_network(source, preprocessing or origin_input(source) or "")
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
