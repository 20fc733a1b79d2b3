"""Loads weights into networks, all or nothing, and saves them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_backbone import fast
from resnet_backbone.models import BottleneckBlock, StagedNetwork
from resnet_backbone.models.layers import BATCH_NORMS
from resnet_backbone.models.resnet import ResidualBlock
from resnet_backbone.weights.architecture import (
    COUNTER,
    constructor_options,
    deepest_stage,
    infer_models,
    misfit,
    shapes_of,
    spell,
)
from resnet_backbone.weights.checkpoint import (
    MODEL_KEY,
    Checkpoint,
    FileMetadata,
    ModelSpec,
    Origin,
    write_tensors,
)
from resnet_backbone.weights.preprocessing import PREPROCESSINGS, Preprocessing, WeightsError
from resnet_backbone.weights.reading import Weights, read_network


class WrongStride(WeightsError):
    """A network with its stride in the other convolution; ``expected`` is the weights' value."""

    def __init__(self, message: str, expected: bool):
        super().__init__(message)
        self.expected = expected


def check_architecture(model: nn.Module, preprocessing: Preprocessing, where: str) -> None:
    """Raises WeightsError if the weights' stride position or BN epsilon is not the network's."""
    expected, actual = preprocessing.stride_in_1x1, stride_of(model)
    if None not in (expected, actual) and expected != actual:
        raise WrongStride(
            f"{where} was trained with stride_in_1x1={expected}, but this network has {actual}: "
            f"build it with stride_in_1x1={expected}",
            expected,
        )
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.eps != preprocessing.bn_eps:
            raise WeightsError(
                f"{where} was trained with BN eps {preprocessing.bn_eps}, but {name} "
                f"has {module.eps}"
            )


def stride_of(model: nn.Module) -> bool | None:
    """Returns ``stride_in_1x1`` of a network's bottlenecks; None if it has no bottlenecks."""
    blocks = [module for module in model.modules() if isinstance(module, BottleneckBlock)]
    strides = [(block.conv1.stride, block.conv2.stride) for block in blocks]
    for first, second in strides:  # also in a wrapper or another library's network
        if (2, 2) in (first, second):
            return first == (2, 2)
    return getattr(model, "stride_in_1x1", None) if blocks else None


def describe_model(model: StagedNetwork) -> ModelSpec | None:
    """Returns the name and options that rebuild a network; None if it has no name.

    A backbone has ``num_classes=None``, and its ``out_features`` are not in the options.
    """
    try:
        candidates = infer_models(model.state_dict())
    except ValueError:
        return None
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    plain = bool(blocks) and blocks[0].gate is None and blocks[0].shortcut is None
    spec = candidates[-1] if plain else candidates[0]  # the last of two is a plain network
    options = dict(spec.options)
    stride = stride_of(model)
    if stride is not None:
        options["stride_in_1x1"] = stride
    pool = getattr(getattr(model, "stem", None), "pool", None)
    if pool is not None and pool.ceil_mode:
        options["caffe_pool"] = True
    for key in RATES:
        if any(rate != 1 for rate in getattr(model, key, ())):
            options[key] = list(getattr(model, key))
    # the tensors of a backbone that stops early do not show its depth
    name = re.sub(r"\d+", str(getattr(model, "depth", "")), spec.name, count=1)
    return replace(spec, name=name, options=options)


def pools_as_caffe(stated: ModelSpec | None, preprocessing: Preprocessing) -> bool | None:
    """Returns whether weights were trained with ``caffe_pool``, according to their file.

    None for the released Caffe weights: Detectron2 and others use padding, so both are common.
    """
    if stated is not None:
        return stated.options.get("caffe_pool", False)
    return None if preprocessing.same_input(PREPROCESSINGS["msra"]) else False


RATES = ("dilations", "multi_grid")  # options that no tensor shows


def check_settings(model: StagedNetwork, read: Weights | Checkpoint, where: str) -> None:
    """Checks the settings that no tensor shows: parameter-free shortcuts and the stem's pooling.

    Raises WeightsError: the network's differ from the weights'.
    """
    own, stated = describe_model(model), read.model
    if own is None:
        return
    built = {**constructor_options(own.name), **own.options}
    trained: dict[str, Any] = {}
    if stated is not None:
        trained = {**constructor_options(stated.name.rpartition("/")[2]), **stated.options}
    trained["caffe_pool"] = pools_as_caffe(stated, read.preprocessing)
    for key in ("shortcut", "caffe_pool"):
        if trained.get(key) is not None and key in built and trained[key] != built[key]:
            raise WeightsError(
                f"{where} was trained with {key}={trained[key]!r}, but this network has "
                f"{built[key]!r}: build it with {key}={trained[key]!r}"
            )


def fitting_tensors(
    model: StagedNetwork, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Returns the tensors for a network's state dict, without counters.

    Raises WeightsError: missing, unknown or wrongly shaped tensors.
    """
    own, left_out = shapes_of(model.state_dict()), tuple(f"{name}." for name in model.left_out)
    found = {k: shape for k, shape in shapes_of(tensors).items() if not k.startswith(left_out)}
    problem = misfit(own, found, "this network")
    if problem:
        raise WeightsError(f"{where}: {explain_misfit(model, tensors, problem)}")
    return {key: tensors[key] for key in own}


def explain_misfit(model: StagedNetwork, tensors: Mapping[str, Tensor], problem: str) -> str:
    """Adds the likely cause of a misfit, or how to fix it."""
    own = describe_model(model)
    body = {key: value for key, value in tensors.items() if not key.startswith("linear.")}
    try:
        file = infer_models(body)[0]
    except ValueError:
        return f"{problem}; is it another depth or norm?"
    if own is None or spell(own) != spell(file):
        name = "" if own is None else f", this network is a {spell(own)}"
        return f"the file is a {spell(file)}{name}: {problem}"
    classes = next(iter(tensors["linear.weight"].shape), 0) if "linear.weight" in tensors else 0
    if not classes:
        return f"{problem}; for a backbone without a head, give out_features"
    return (
        f"{problem}; in train-classifier add model.new_head=true; elsewhere build it with "
        f"num_classes={classes}, load, and put a new layer in place of "
        "network.linear (a backbone with out_features accepts any classes)"
    )


def build_model(
    name: str,
    num_classes: int | None = None,
    weights: str | os.PathLike = "",
    preprocessing: str | Preprocessing = "",
    **options: Any,
) -> StagedNetwork:
    """Builds a network by name, with weights if they are given.

    Args:
        name, num_classes, options: see :func:`resnet_backbone.models.build_model`.
        weights: a file, a folder, or an address such as ``torchvision://resnet50/IMAGENET1K_V2``,
            see :func:`read_checkpoint`. They set ``stride_in_1x1``, and if the file states them
            ``dilations`` and ``multi_grid``, unless these are given.
        preprocessing: for weights that do not state theirs, see :func:`read_checkpoint`.

    Returns:
        The network in training mode. With weights, its attribute ``preprocessing`` describes the
        input, and ``InputNormalizer(network.preprocessing)`` makes this input from images.

    Raises:
        ValueError: an unknown name.
        WeightsError: see :func:`load_weights`.
    """
    if not weights:
        return fast.build_model(name, num_classes, **options)
    known = constructor_options(name)
    read = read_network(weights, preprocessing)
    stride = read.preprocessing.stride_in_1x1
    if "stride_in_1x1" in known and stride is not None:
        options.setdefault("stride_in_1x1", stride)
    stated = read.model.options if read.model else {}
    options = {key: value for key, value in stated.items() if key in known} | options
    network = fast.build_model(name, num_classes, **options)
    load_tensors(network, read, str(weights))
    network.preprocessing = read.preprocessing
    return network


def load_weights(
    model: StagedNetwork, path: str | os.PathLike, preprocessing: str | Preprocessing = ""
) -> Preprocessing:
    """Loads weights into a network, and returns the preprocessing that its input now needs.

    A backbone ignores the file's head and deeper stages. All of the network's own tensors must be
    in the file, with the same shapes.

    Args:
        path, preprocessing: see :func:`read_checkpoint`.

    Raises:
        WeightsError: see :func:`read_checkpoint`; also missing, unknown or wrongly shaped tensors,
            and a ``stride_in_1x1``, BN epsilon or shortcut other than in the weights' training.
            The network is left unchanged.
    """
    read = read_network(path, preprocessing)
    load_tensors(model, read, str(path))
    return read.preprocessing


def load_tensors(model: StagedNetwork, read: Weights | Checkpoint, where: str) -> None:
    """Loads weights that were read from ``where``; see :func:`load_weights`."""
    if not hasattr(model, "left_out"):
        raise WeightsError(
            f"{where}: a {type(model).__name__} is not one of this package's networks: give the "
            "network itself (of DistributedDataParallel, its module)"
        )
    if hasattr(model, "_orig_mod"):
        raise WeightsError(f"{where}: load into the network before torch.compile")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise WeightsError(f"{where}: the network is on the meta device: call to_empty() first")
    fitting = fitting_tensors(model, read.tensors, where)
    check_architecture(model, read.preprocessing, where)
    check_settings(model, read, where)
    model.load_state_dict(fitting, strict=False)


def save_weights(
    model: nn.Module,
    path: str | os.PathLike,
    preprocessing: Preprocessing,
    metadata: Mapping[str, str] | None = None,
    *,
    run: str = "",
) -> None:
    """Writes a network's weights atomically, with their preprocessing as metadata.

    The metadata also name the network if it is one of this package.

    Args:
        metadata: further metadata; ``MODEL_KEY`` names the network of another library.
        run: the training run that the weights come from.

    Raises:
        WeightsError: a suffix other than ``.safetensors``; for this package's networks, a
            preprocessing with another stride or BN epsilon.
    """
    metadata, spec, stride = metadata or {}, None, stride_of(model)
    if stride is not None or isinstance(model, StagedNetwork):
        check_architecture(model, preprocessing, "what the preprocessing describes")
    if stride is not None:
        preprocessing = replace(preprocessing, stride_in_1x1=stride)
    if isinstance(model, StagedNetwork) and MODEL_KEY not in metadata:
        spec = describe_model(model)
    origin = Origin(run=run, reference=preprocessing.source) if run else None
    texts = {**FileMetadata(preprocessing, spec, origin).texts(), **metadata}
    write_tensors(model.state_dict(), preprocessing, texts, path)


def build_network(checkpoint: Checkpoint, where: str = "the checkpoint") -> StagedNetwork:
    """Builds a checkpoint's network with its weights in fp32, in evaluation mode.

    Without a head it is a backbone that returns its deepest stage. Stride and BN epsilon come from
    the preprocessing.

    Raises:
        WeightsError: tensors that do not fit the network.
    """
    network = network_on_meta(checkpoint)
    fitting = fitting_tensors(network, checkpoint.tensors, where)
    state = {key: value.float().clone() for key, value in fitting.items()}
    counters = [key for key in network.state_dict() if key.endswith(COUNTER)]
    state |= {key: torch.zeros((), dtype=torch.long) for key in counters}
    network.load_state_dict(state, assign=True)
    return network.to(memory_format=torch.channels_last)  # as networks are built


def network_on_meta(checkpoint: Checkpoint) -> StagedNetwork:
    """Builds a checkpoint's network on the meta device, to skip the initialization."""
    options = {}
    if checkpoint.model.num_classes is None:
        options["out_features"] = (deepest_stage(checkpoint.tensors),)
    with torch.device("meta"):
        network = checkpoint.model.build(**options).eval()
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            module.eps = checkpoint.preprocessing.bn_eps
    return network
