"""Detectron2's checkpointer for weights from any source, checked before anything is loaded."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from resnet_backbone.detection.checkpoint.classes import CLASS_LAYERS, carry_over_classes
from resnet_backbone.detection.checkpoint.files import (
    LAST,
    WeightsFile,
    detector_input,
    open_weights,
)
from resnet_backbone.detection.checkpoint.input_check import (
    below,
    check_input,
    describe_input,
    find_network,
    networks,
)
from resnet_backbone.detection.config import backbone_node
from resnet_backbone.models import FrozenBatchNorm2d, StagedNetwork
from resnet_backbone.models.layers import BATCH_NORMS, TRAINABLE_BATCH_NORMS
from resnet_backbone.runtime.files import whole_file, write_text
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.keymaps.detectron2 import HEAD_LAYERS
from resnet_backbone.weights.load import check_settings, explain_misfit, fitting_tensors
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS, WeightsError
from resnet_backbone.weights.readers import PREPROCESSING_KEY
from resnet_backbone.weights.reading import read_network, single_precision

logger = logging.getLogger(__name__)
# Buffers that are set by the config or not used.
NOT_WEIGHTS = re.compile(rf"pixel_(mean|std)$|.*\.(num_batches_tracked|{INPUT_SETTINGS})$")
RES5 = "roi_heads.res5."


class Checkpointer(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` for weights from any source, which loads all or nothing.

    It accepts everything that :func:`resnet_backbone.weights.read_checkpoint` reads, as well as
    Detectron2's ``catalog://`` names and addresses, and detects the kind by content. Weights of a
    backbone or classifier go into the backbone, and C4's res5 or a VGG's fc6 and fc7 into the
    region head. Whole detectors, ours or Detectron2's, load as in Detectron2. Files are read as
    data: nothing in them is executed. Checkpoints are written atomically.

    Refuses weights trained on other input or with another stride, as far as the weights, their
    origin or `preprocessing` state it, and weights that do not fill the backbone. Resuming and
    evaluation also refuse other classes; for fine-tuning on other classes see
    :func:`carry_over_classes`. After an error the detector is unchanged.

    Args:
        preprocessing: see :func:`resnet_backbone.weights.read_checkpoint`.
        class_names: the detector's, in order; empty if unknown, then they are not checked.
        marks_last: whether ``--resume`` continues from the saved checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        preprocessing: str = "",
        class_names: Sequence[str] = (),
        marks_last: bool = True,
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.preprocessing, self.marks_last = preprocessing, marks_last
        self.class_names = list(class_names)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, model: nn.Module, save_dir: str = "", **kwargs
    ) -> Checkpointer:
        """Creates a checkpointer with the class names and preprocessing of a config."""
        node = backbone_node(cfg)
        return cls(
            model,
            save_dir,
            preprocessing=node.WEIGHTS_PREPROCESSING,
            class_names=[*node.CLASS_NAMES, *node.STUFF_CLASS_NAMES],
            **kwargs,
        )

    def save(self, name: str, **kwargs) -> None:
        """Like fvcore's, but writes atomically: an OSError leaves the old checkpoint."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), "class_names": self.class_names}
        content |= {key: one.state_dict() for key, one in self.checkpointables.items()}
        described = describe_input(self.model)
        if described is not None:
            content[PREPROCESSING_KEY] = described.to_json()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        for left in Path(self.save_dir).glob(".*.pth.*.tmp"):  # left by killed processes
            left.unlink()
        with whole_file(path) as temporary:
            torch.save({**content, **kwargs}, temporary)
        if self.marks_last:
            write_text(os.path.join(self.save_dir, LAST), f"{name}.pth")

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, needs_detector: bool = False
    ) -> dict[str, Any]:
        """Loads weights, and returns the other contents of a detector's checkpoint.

        Args:
            checkpointables: None to resume or evaluate: a detector's checkpoint must fill every
                layer. ``[]`` to start training: any classes, and the backbone alone is enough.
            needs_detector: refuse weights of a backbone alone.
        """
        if not path:
            return super().load(path, checkpointables)
        file = open_weights(path)
        if not file.is_detector:
            if needs_detector:
                raise WeightsError(
                    f"MODEL.WEIGHTS {path} holds only a backbone or a classifier; give a "
                    "checkpoint of a whole detector, such as output/run/model_final.pth"
                )
            self._load_backbone(file)
            return {}
        self._file, self._source, self._starts = file, path, checkpointables is not None
        try:
            return super().load(str(file.file.path), checkpointables)
        finally:
            self._file = self._parsed_url_during_load = None  # so it still works after an error

    def _named_input(self) -> str:
        """Returns the preprocessing given to the constructor, else the one from the config."""
        known = [network.weights_preprocessing for network in networks(self.model).values()]
        return next(filter(None, (self.preprocessing, *known)), "")

    def _load_backbone(self, file: WeightsFile) -> None:
        model, where = self.model, file.source
        weights, network = file.read(read_network, self._named_input()), find_network(model)
        check_input(model, weights.preprocessing, where)
        tensors = single_precision(weights.tensors)
        fitting = fitting_tensors(network, tensors, where)
        check_settings(network, weights, where)
        refuse_folded(network, fitting, where)
        head = _head_tensors(model, tensors, where)
        network.load_state_dict(fitting, strict=False)
        state = model.state_dict()
        for key, value in head.items():
            state[key].copy_(value)
        self.logger.info(f"Loaded the backbone from {where}")

    def _load_file(self, filename: str) -> dict[str, Any]:
        return self._file.content()

    def _load_model(self, checkpoint: dict[str, Any]):
        model, tensors, where = self.model, checkpoint["model"], self._source
        expected = detector_input(self._file, where, self._named_input())
        if expected is not None:
            check_input(model, expected, where)
        checkpoint.pop(PREPROCESSING_KEY, None)
        classes = checkpoint.pop("class_names", None) or self.class_names
        if not self._starts and self.class_names and classes != self.class_names:
            raise WeightsError(
                f"{where} was trained on the classes {classes}, but these data have "
                f"{self.class_names}: use the config.yaml of its run, or set "
                "RESNET_BACKBONE.CLASS_NAMES to its classes"
            )
        if checkpoint.pop("matching_heuristics", False):
            is_caffe2 = checkpoint.get("__author__") == "Caffe2"
            tensors = align_and_update_state_dicts(model.state_dict(), tensors, is_caffe2)
            add_folded_statistics(model, tensors, where)
            checkpoint["model"] = tensors
        if self.class_names and classes != self.class_names:
            own = model.state_dict()
            tensors = carry_over_classes(own, tensors, classes, self.class_names, where)
            checkpoint["model"] = tensors
        refuse_misfit(model, tensors, where, whole=not self._starts)
        return super()._load_model(checkpoint)


def _head_tensors(model: nn.Module, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Returns the tensors for the backbone's layers in a detector's region head.

    VGG files may lack the classifier; then fc6 and fc7 are initialized at random.
    """
    head, random = {}, []
    for key, own in model.state_dict().items():
        target = next((prefix for prefix in HEAD_LAYERS if key.startswith(prefix)), None)
        if target is None or key.endswith(COUNTER):
            continue
        source = HEAD_LAYERS[target] + key[len(target) :]
        if source.startswith("res5.norm."):  # an extra norm that only detectors have
            random.append(key)
        elif source not in tensors:
            kind = "C4" if source.startswith("res5.") else "VGG"
            if kind == "C4" or {"fc6.weight", "fc7.weight"} & tensors.keys():
                raise WeightsError(f"{path} lacks {source}, a layer of the {kind} head")
            random.append(key)
        elif tensors[source].shape != own.shape:
            raise WeightsError(
                f"{path}: {source} has shape {tuple(tensors[source].shape)}, but the head needs "
                f"{tuple(own.shape)} ({key})"
            )
        else:
            head[key] = tensors[source]
    report_random(random, path)
    return head


def refuse_not_finite(model: nn.Module) -> None:
    """Raises FloatingPointError on all processes, which must all call it, if any has NaN or inf."""
    state = model.state_dict().items()
    found = next((key for key, value in state if not value.isfinite().all()), "")
    bad = [key for key in comm.all_gather(found) if key]
    if bad:
        raise FloatingPointError(f"the weights are not finite ({bad[0]}), no checkpoint is written")


def refuse_misfit(model: nn.Module, tensors: Mapping[str, Tensor], where: str, whole: bool) -> None:
    """Refuses a checkpoint that does not fill all required layers.

    Tensors have the model's keys or, if Detectron2's name matching did not place them, suffixes of
    these. Unless all are needed (`whole`), class-dependent layers may have another shape and all
    but the backbone may be missing; the log lists what is then initialized at random.
    """
    own = {k: v.shape for k, v in model.state_dict().items() if not NOT_WEIGHTS.match(k)}
    prefixes = (*(networks(model) or ("backbone.",)), RES5)
    found = {key: _shape(key, tensors) for key in own}
    reshaped = [key for key, shape in found.items() if shape not in (None, own[key])]
    refused = [key for key in reshaped if whole or not CLASS_LAYERS.match(key)]
    if refused:
        key, hint = refused[0], ""
        if CLASS_LAYERS.match(key):
            hint = "; is the number of classes, or RESNET_BACKBONE.GLOBAL_CONTEXT, another?"
        raise WeightsError(
            f"{where}: {len(refused)} tensors have another shape, such as {key}: "
            f"{tuple(found[key])}, but this detector has {tuple(own[key])}{hint}"
        )
    for prefix, network in networks(model).items():
        unknown = next(_unknown(prefix, network, own, tensors), None)
        if unknown:
            body = below(prefix, tensors)
            problem = explain_misfit(network, body, f"this detector has no {unknown}")
            raise WeightsError(f"{where}: {problem}")
    missing = [key for key in own if key not in tensors and key not in reshaped]
    lacking = [key for key in missing if whole or key.startswith(prefixes)]
    if lacking:
        raise WeightsError(
            f"{where} lacks {len(lacking)} of this detector's tensors, such as {lacking[0]}; is it "
            "another architecture, or only a part of a detector?"
        )
    report_random([*missing, *reshaped], where)


def _shape(key: str, tensors: Mapping[str, Tensor]) -> torch.Size | None:
    """Returns the shape of the tensor under the longest matching suffix of a key."""
    parts = key.split(".")
    names = (".".join(parts[index:]) for index in range(len(parts) - 1))
    return next((tensors[name].shape for name in names if name in tensors), None)


def _unknown(
    prefix: str, network: StagedNetwork, own: Iterable[str], tensors: Iterable[str]
) -> Iterator[str]:
    """Yields tensors of a deeper network, except stages and heads that a backbone leaves out."""
    left_out = tuple(f"{name}." for name in network.left_out)
    stages = re.compile(rf"({'|'.join(network.stage_names)})\.\d+\.")
    for key in tensors:
        name = key.removeprefix(prefix)
        known = key in own or NOT_WEIGHTS.match(key) or name.startswith(left_out)
        if not known and (name != key or stages.match(name)):
            yield key


def report_random(keys: list[str], where: str) -> None:
    """Logs the parts of a model whose tensors a file does not fill."""
    if keys:
        parts = Counter(".".join(key.split(".")[:2]) for key in keys)
        logger.info(
            "%s: layers that are missing or have other classes start at random: %s",
            where,
            ", ".join(f"{part} ({count} tensors)" for part, count in parts.items()),
        )


def add_folded_statistics(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Adds statistics to a file with only scale and shift of batch norms (Detectron1), in place.

    The statistics are folded into these: mean 0 and variance 1 - eps give the same function.
    """
    if any(key.endswith("running_var") for key in tensors):
        return
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and f"{name}.weight" in tensors:
            tensors[f"{name}.running_mean"] = torch.zeros(len(tensors[f"{name}.weight"]))
            tensors[f"{name}.running_var"] = 1 - module.eps + tensors[f"{name}.running_mean"]
    refuse_folded(model, tensors, where)


def refuse_folded(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses to train batch norms whose statistics are folded into their scale and shift."""
    # With folded statistics, every variance in the file is an identity's.
    variances = [value for key, value in tensors.items() if key.endswith("running_var")]
    identity = FrozenBatchNorm2d(1).running_var
    if not variances or not all(torch.allclose(value, identity, 0, 1e-6) for value in variances):
        return
    if all(bool((v == 1).all()) for k, v in tensors.items() if k.endswith("norm.weight")):
        return  # a network that was never trained
    for name, module in model.named_modules():
        if isinstance(module, TRAINABLE_BATCH_NORMS):
            raise WeightsError(
                f"{where} has folded batch norms, with which {name} "
                "cannot be trained: set MODEL.RESNETS.NORM FrozenBN"
            )
