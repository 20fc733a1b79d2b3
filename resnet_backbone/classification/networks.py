"""Classifiers by name: this package's, torchvision's and timm's."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights import (
    ModelSpec,
    Preprocessing,
    WeightsError,
    load_weights,
    save_weights,
)
from resnet_backbone.weights.checkpoint import MODEL_KEY
from resnet_backbone.weights.inspect import read_header
from resnet_backbone.weights.reading import read_own_tensors

AUXILIARY_WEIGHT = 0.3  # of GoogLeNet's auxiliary classifiers (arXiv 1409.4842, section 5)


class NetworkSpec(ModelSpec):
    """A network of this package, of torchvision (``torchvision/<name>``) or of timm."""

    def build(self, **options: Any) -> nn.Module:
        """Builds the network with freshly initialized weights.

        Args:
            **options: constructor arguments added to the specification's own.

        Raises:
            ValueError: unknown name (with the nearest one) or option.
        """
        library, slash, name = self.name.partition("/")
        if not slash:
            return super().build(**options)
        builders = {"torchvision": _from_torchvision, "timm": _from_timm}
        if library not in builders:
            raise ValueError(
                f"unknown library in model {self.name!r}: write torchvision/<name> or timm/<name>"
            )
        options = {**self.options, **options}
        try:
            return builders[library](name, self.num_classes, options)
        except TypeError as error:
            raise ValueError(f"model.options {options}: {error}") from error


def _from_torchvision(name: str, num_classes: int, options: dict) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean torchvision/{near[0]}?" if near else "see torchvision.models"
        raise ValueError(f"torchvision has no classifier {name!r}: {hint}")
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _from_timm(name: str, num_classes: int, options: dict) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError("timm/ names need timm: pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean timm/{near[0]}?" if near else "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}: {hint}")
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)


def logits_of(outputs: Any) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """The logits of a network's outputs, and auxiliary ones with their weights in the loss."""
    if isinstance(outputs, Tensor):
        return outputs, []
    main, *others = outputs
    return main, [(AUXILIARY_WEIGHT, other) for other in others if other is not None]


def describe(model: nn.Module, preprocessing: Preprocessing) -> Preprocessing:
    """Adds to a preprocessing what the network itself settles: stride position and BN epsilon."""
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    epsilons = {module.eps for module in model.modules() if isinstance(module, norms)}
    values = {**preprocessing.__dict__, "stride_in_1x1": _stride_in_1x1(model)}
    if len(epsilons) == 1:
        values["bn_eps"] = epsilons.pop()
    return Preprocessing(**values)


def _stride_in_1x1(model: nn.Module) -> bool | None:
    """Whether bottlenecks, of any library, stride in their first 1x1; None if none strides."""
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
) -> None:
    """Writes weights that say which network they are of and which input they expect.

    Args:
        run: the training run that they come from.
    """
    save_weights(model, path, preprocessing, {MODEL_KEY: spec.to_json()}, run=run)


def read_spec(path: str | Path) -> NetworkSpec | None:
    """The network that a weights file names; None if it does not.

    Raises:
        WeightsError: the file cannot be read.
    """
    spec = read_header(path).model
    return None if spec is None else NetworkSpec(spec.name, spec.num_classes, spec.options)


def load_network(model: nn.Module, path: str | Path, preprocessing: str = "") -> Preprocessing:
    """Loads weights into a network of any library, all or nothing.

    Networks of this package are checked as in :func:`resnet_backbone.load_weights`; others must
    match the file key by key.

    Raises:
        WeightsError: see :func:`resnet_backbone.weights.read_weights`.
    """
    if isinstance(model, StagedNetwork):
        return load_weights(model, path, preprocessing)
    return load_exactly(model, path, preprocessing)


def load_exactly(model: nn.Module, path: str | Path, preprocessing: str = "") -> Preprocessing:
    """Loads a file whose keys are those of the network, counters too: all or nothing."""
    tensors, found = read_own_tensors(path, preprocessing)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [k for k in {**own, **tensors} if k not in tensors or own.get(k) != tensors[k].shape]
    if wrong:
        raise WeightsError(
            f"{path} is of another network: {len(wrong)} tensors differ, the first is {wrong[0]}"
        )
    model.load_state_dict(tensors)
    return found
