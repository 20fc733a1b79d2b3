"""Classifiers of this package, torchvision and timm by name, their weights and checkpoints."""

from __future__ import annotations

import difflib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from resnet_backbone.models import StagedNetwork
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.weights import (
    ModelSpec,
    Preprocessing,
    WeightsError,
    load_weights,
    save_weights,
)
from resnet_backbone.weights.checkpoint import MODEL_KEY
from resnet_backbone.weights.load import load_tensors
from resnet_backbone.weights.reading import read_header, read_network, read_source

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGED, STATE = "model.safetensors", "averaged.safetensors", "state.pt"
FOLDER, DAMAGED = "checkpoints", ".damaged"
CLASSES_KEY = "resnet_backbone.class_names"  # of a file's metadata: JSON, in the order of logits
LEFT_BEHIND = (".*.tmp", ".partial-*")  # what a kill can leave; the second by earlier versions
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
AUXILIARY_WEIGHT = 0.3  # of GoogLeNet's auxiliary classifiers (arXiv 1409.4842, section 5)


class NetworkSpec(ModelSpec):
    """A network of this package, of torchvision (``torchvision/<name>``) or of timm."""

    def build(self, **options: Any) -> nn.Module:
        """As the base class builds ours; ValueError for an unknown name or option."""
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
    """The logits of a network's outputs, and auxiliary ones with their weights in the loss."""
    if isinstance(outputs, Tensor):
        return outputs, []
    main, *others = outputs
    return main, [(AUXILIARY_WEIGHT, other) for other in others if other is not None]


@contextmanager
def evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Inside, networks are in evaluation mode; afterwards each module is in its own again."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def describe(model: nn.Module, preprocessing: Preprocessing) -> Preprocessing:
    """Adds to a preprocessing what the network itself settles: stride position and BN epsilon."""
    epsilons = {module.eps for module in model.modules() if isinstance(module, NORMS)}
    epsilon = epsilons.pop() if len(epsilons) == 1 else preprocessing.bn_eps
    return replace(preprocessing, stride_in_1x1=_stride_in_1x1(model), bn_eps=epsilon)


def _stride_in_1x1(model: nn.Module) -> bool | None:
    """Whether bottlenecks stride in their first 1x1; None if none strides."""
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
    """Writes weights that say their network, training run, input and the names of the classes."""
    facts = {MODEL_KEY: spec.to_json()}
    if class_names:
        facts[CLASSES_KEY] = json.dumps(list(class_names))
    save_weights(model, path, preprocessing, facts, run=run)


def read_class_names(path: str | Path) -> list[str]:
    """The names of the classes that a file of :func:`save_network` states; [] where it does not."""
    try:
        with safe_open(path, framework="pt") as file:
            return [str(name) for name in json.loads((file.metadata() or {})[CLASSES_KEY])]
    except (KeyError, OSError, SafetensorError, ValueError):
        return []


def read_spec(path: str | Path) -> NetworkSpec | None:
    """The network that a weights file names; None if it does not; WeightsError if unreadable."""
    spec = read_header(path).model
    return None if spec is None else NetworkSpec(spec.name, spec.num_classes, spec.options)


def load_all_but_head(model: nn.Module, path: str | Path, preprocessing: str = "") -> Preprocessing:
    """:func:`load_network` of one with other classes: its last linear layer is left out."""
    *_, head = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    own = {key: value for key, value in model.state_dict().items() if key.startswith(f"{head}.")}
    if not isinstance(model, StagedNetwork):
        return load_exactly(model, path, preprocessing, own)
    read = read_network(path, preprocessing)
    load_tensors(model, read._replace(tensors={**read.tensors, **own}), str(path))
    return read.preprocessing


def load_network(model: nn.Module, path: str | Path, preprocessing: str = "") -> Preprocessing:
    """Loads weights into a network of any library, all or nothing, or raises a WeightsError.

    Networks of this package are checked as in :func:`resnet_backbone.load_weights`; others must
    match the file key by key.
    """
    if isinstance(model, StagedNetwork):
        return load_weights(model, path, preprocessing)
    return load_exactly(model, path, preprocessing)


def load_exactly(
    model: nn.Module,
    path: str | Path,
    preprocessing: str = "",
    instead: Mapping[str, Tensor] = MappingProxyType({}),
) -> Preprocessing:
    """Loads a file that has the network's keys, counters too; ``instead`` replaces some of it."""
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
    """The folders ``checkpoints/<iteration>/`` of a run, each of which is whole or not there."""

    run: Path  # its folder
    spec: NetworkSpec
    preprocessing: Preprocessing
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # iterations whose multiples stay for good; 0: none
    class_names: Sequence[str] = ()

    def save(
        self, iteration: int, model: nn.Module, state: dict, averaged: nn.Module | None = None
    ) -> Path:
        """Writes the checkpoint of an iteration, unless it is there already.

        Averaged weights are written beside the others, for use before the run ends.
        """
        final = self.run / FOLDER / f"{iteration:08d}"
        if final.exists():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        facts = (self.spec, self.preprocessing, self.run.resolve().name, self.class_names)
        with whole_file(final) as partial:
            partial.mkdir()
            save_network(partial / WEIGHTS, model, *facts)
            if averaged is not None:
                save_network(partial / AVERAGED, averaged, *facts)
            torch.save(state, partial / STATE)
        for old in checkpoints_in(self.run)[: -self.keep]:
            if not self.keep_every or int(old.name) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def load_latest(self, model: nn.Module, clean: bool = True) -> dict | None:
        """Loads the newest checkpoint's weights; its state, or None if there is no checkpoint.

        ``preprocessing`` is then what these weights expect. A damaged checkpoint is passed over
        with a warning, and one process, to `clean`, sets it aside once an older one was loaded.

        Raises:
            WeightsError: there are checkpoints, and none can be read.
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
    """The folders of a run's complete checkpoints, oldest first; their names are iterations."""
    found = (path for path in (Path(run) / FOLDER).glob("*") if path.name.isdigit())
    return sorted(found, key=lambda path: int(path.name))


def newest_weights(run: str | Path) -> str:
    """The weights of a run's newest checkpoint that evaluations use; empty if there is none."""
    found = checkpoints_in(run)
    if not found:
        return ""
    averaged = found[-1] / AVERAGED
    return str(averaged if averaged.is_file() else found[-1] / WEIGHTS)
