"""Builds classifiers of this package, torchvision and timm by name; weights and checkpoints."""

from __future__ import annotations

import difflib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from resnet_backbone.models import StagedNetwork
from resnet_backbone.models.layers import TRAINABLE_BATCH_NORMS
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.weights import (
    ModelSpec,
    Preprocessing,
    WeightsError,
    save_weights,
)
from resnet_backbone.weights.checkpoint import MODEL_KEY
from resnet_backbone.weights.load import load_tensors
from resnet_backbone.weights.reading import read_header, read_network, read_source

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGED, STATE = "model.safetensors", "averaged.safetensors", "state.pt"
FOLDER, DAMAGED = "checkpoints", ".damaged"
CLASSES_KEY = "resnet_backbone.class_names"  # in a file's metadata: JSON, in the order of logits
LEFT_BEHIND = (".*.tmp", ".partial-*")  # remains of killed runs; the second of earlier versions
AUXILIARY_WEIGHT = 0.3  # of GoogLeNet's auxiliary classifiers (arXiv 1409.4842, section 5)


class NetworkSpec(ModelSpec):
    """A network of this package, of torchvision (``torchvision/<name>``) or of timm."""

    def build(self, **options: Any) -> nn.Module:
        """Builds the network; ValueError for an unknown name or option."""
        library, slash, name = self.name.partition("/")
        if not slash:
            return super().build(**options)
        builders = {"torchvision": _from_torchvision, "timm": _from_timm}
        if library not in builders:
            raise ValueError(f"model {self.name!r}: write torchvision/<name> or timm/<name>")
        options = {**self.options, **options}
        try:
            return builders[library](name, self.num_classes, options)
        except TypeError as error:
            raise ValueError(f"model.options {options}: {error}") from error


def _from_torchvision(name: str, num_classes: int, options: dict) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _from_timm(name: str, num_classes: int, options: dict) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError("timm/ names need timm: pip install timm") from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)


def _unknown(library: str, name: str, names: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return ValueError(f"{library} has no classifier {name!r}: did you mean {library}/{near[0]}?")


def logits_of(outputs: Any) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """Returns a network's logits, and (weight in the loss, logits) of auxiliary classifiers."""
    if isinstance(outputs, Tensor):
        return outputs, []
    main, *others = outputs
    return main, [(AUXILIARY_WEIGHT, other) for other in others if other is not None]


def describe(model: nn.Module, preprocessing: Preprocessing) -> Preprocessing:
    """Sets the stride position and BN epsilon of a preprocessing from the network."""
    epsilons = {
        module.eps for module in model.modules() if isinstance(module, TRAINABLE_BATCH_NORMS)
    }
    epsilon = epsilons.pop() if len(epsilons) == 1 else preprocessing.bn_eps
    return replace(preprocessing, stride_in_1x1=_stride_in_1x1(model), bn_eps=epsilon)


def _stride_in_1x1(model: nn.Module) -> bool | None:
    """Returns whether bottlenecks stride in their first 1x1; None if none strides."""
    for block in model.modules():
        convs = [getattr(block, name, None) for name in ("conv1", "conv2", "conv3")]
        if all(isinstance(conv, nn.Conv2d) for conv in convs) and convs[0].kernel_size == (1, 1):
            if max(convs[0].stride + convs[1].stride) > 1:
                return convs[0].stride[0] > 1
    return None


def save_network(
    path: str | Path,
    model: nn.Module,
    spec: NetworkSpec,
    preprocessing: Preprocessing,
    run: str = "",
    class_names: Sequence[str] = (),
) -> None:
    """Writes weights with their network, training run, input and class names as metadata."""
    facts = {MODEL_KEY: spec.to_json()}
    if class_names:
        facts[CLASSES_KEY] = json.dumps(list(class_names))
    save_weights(model, path, preprocessing, facts, run=run)


def read_class_names(path: str | Path) -> list[str]:
    """Reads the class names from a file of :func:`save_network`; [] if it has none."""
    try:
        with safe_open(path, framework="pt") as file:
            return [str(name) for name in json.loads((file.metadata() or {})[CLASSES_KEY])]
    except (KeyError, OSError, SafetensorError, ValueError):
        return []


def read_spec(path: str | Path) -> NetworkSpec | None:
    """Reads which network a weight file names; None if it does not; WeightsError if unreadable."""
    spec = read_header(path).model
    return None if spec is None else NetworkSpec(spec.name, spec.num_classes, spec.options)


def load_network(
    model: nn.Module, path: str | Path, preprocessing: str = "", new_head: bool = False
) -> Preprocessing:
    """Loads weights into a network of any library, and returns their preprocessing.

    Networks of this package are checked as in :func:`resnet_backbone.load_weights`; others must
    match the file key by key. With ``new_head``, the last linear layer stays as initialized.
    Raises WeightsError: the network is left unchanged.
    """
    head = _head_of(model) if new_head else {}
    if not isinstance(model, StagedNetwork):
        return load_exactly(model, path, preprocessing, head)
    read = read_network(path, preprocessing)
    load_tensors(model, read._replace(tensors={**read.tensors, **head}), str(path))
    return read.preprocessing


def _head_of(model: nn.Module) -> dict[str, Tensor]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise WeightsError(
            f"{type(model).__name__} has no linear head to leave out: load all of it"
        )
    prefix = f"{linear[-1]}."
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}


def load_exactly(
    model: nn.Module,
    path: str | Path,
    preprocessing: str = "",
    instead: Mapping[str, Tensor] = MappingProxyType({}),
) -> Preprocessing:
    """Loads a file with exactly the network's keys; tensors in ``instead`` replace the file's."""
    read, found, *_ = read_source(path, preprocessing)
    tensors = {**read, **instead}
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [k for k in {**own, **tensors} if k not in tensors or own.get(k) != tensors[k].shape]
    if wrong:
        raise WeightsError(
            f"{path} belongs to another network: {len(wrong)} tensors differ, first {wrong[0]}"
        )
    model.load_state_dict(tensors)
    return found


@dataclass
class Checkpoints:
    """The folders ``checkpoints/<iteration>/`` of a run, which are written atomically."""

    run: Path  # the run folder
    spec: NetworkSpec
    preprocessing: Preprocessing
    keep: int = 2  # number of newest checkpoints to keep
    keep_every: int = 0  # checkpoints at multiples of these iterations are kept, too; 0: none
    class_names: Sequence[str] = ()

    def save(
        self, iteration: int, model: nn.Module, state: dict, averaged: nn.Module | None = None
    ) -> Path:
        """Writes the checkpoint of an iteration unless it exists, and returns its folder.

        Averaged weights are written to a second file, for use before the run ends.
        """
        final = self.run / FOLDER / f"{iteration:08d}"
        if final.exists():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(final) as partial:
            partial.mkdir()
            self.write_weights(partial / WEIGHTS, model)
            if averaged is not None:
                self.write_weights(partial / AVERAGED, averaged)
            torch.save(state, partial / STATE)
        for old in checkpoints_in(self.run)[: -self.keep]:
            if not self.keep_every or int(old.name) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def write_weights(self, path: Path, model: nn.Module) -> None:
        """Writes weights with all that is known of them."""
        run = self.run.resolve().name
        save_network(path, model, self.spec, self.preprocessing, run, self.class_names)

    def load_latest(self, model: nn.Module, clean: bool = True) -> dict | None:
        """Loads the newest checkpoint's weights and returns its state; None without a checkpoint.

        Also sets ``preprocessing`` to the input of these weights. A damaged checkpoint is skipped
        with a warning; one process, to `clean`, renames it after an older one was loaded.

        Raises:
            WeightsError: there are checkpoints, but none can be read.
        """
        for pattern in LEFT_BEHIND if clean else ():
            for left in (self.run / FOLDER).glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
        damaged: list[Path] = []
        for folder in reversed(checkpoints_in(self.run)):
            try:
                state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
                self.preprocessing = load_exactly(model, folder / WEIGHTS)
                for other in damaged if clean else ():
                    os.replace(other, other.with_name(other.name + DAMAGED))
                return state
            except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
                damaged.append(folder)
                problem = " ".join(str(error).split())
                logger.warning("%s cannot be used (%s); trying an older one", folder, problem)
        if damaged:
            raise WeightsError(f"{self.run}: none of {len(damaged)} checkpoints can be read")
        return None


def checkpoints_in(run: str | Path) -> list[Path]:
    """Returns the folders of a run's complete checkpoints, oldest first."""
    found = (path for path in (Path(run) / FOLDER).glob("*") if path.name.isdigit())
    return sorted(found, key=lambda path: int(path.name))


def newest_weights(run: str | Path) -> str:
    """Returns the newest checkpoint's weights, averaged ones if it has them; "" without one."""
    found = checkpoints_in(run)
    if not found:
        return ""
    averaged = found[-1] / AVERAGED
    return str(averaged if averaged.is_file() else found[-1] / WEIGHTS)
