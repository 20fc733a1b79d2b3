"""Shared parts of key maps: tables of key pairs, extra tensors, and supported networks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_backbone.models import list_models
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.weights.architecture import COUNTER, constructor_options, first_key
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError

Tensors = Mapping[str, Tensor]
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Layout:
    """A library's names for a network's tensors.

    ``to_ours`` and ``from_ours`` are pure; tensors are not copied unless their values change.
    ``to_ours`` inverts ``from_ours`` exactly. The reverse holds too, with the exceptions in the
    docstring of the layout's module.
    """

    name: str
    matches: Callable[[Collection[str]], bool]  # a quick test of keys
    read: Callable[[Tensors], dict[str, Tensor]]  # to_ours for this library
    write: Callable[[Tensors, ModelSpec], dict[str, Tensor]]  # from_ours for this library
    usage: Callable[[Checkpoint, Path], list[str]]  # lines of Python or YAML that load a file

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Converts a library's tensors to this package's keys, without ``num_batches_tracked``.

        Missing tensors are left to ``infer_models``. Raises ValueError: a key that the library's
        versions of the paper's networks do not have.
        """
        return without_counters(self.read(tensors))

    def from_ours(self, tensors: Tensors, model: ModelSpec) -> dict[str, Tensor]:
        """Converts our tensors for a strict load in the library; see :func:`check_support`."""
        check_support(self.name, model)
        return self.write(tensors, model)


class Module(NamedTuple):
    """A convolution and its norm: our name, and the library's names for the two."""

    ours: str
    conv: str
    norm: str = ""  # empty if there is none


def resnet_modules(
    stem: tuple[str, str], name: Callable[[int, int, str], tuple[str, str]]
) -> list[Module]:
    """Returns the convolutions of ResNets of all depths, with a library's names for them.

    ``name`` maps stage (2 to 5), block (from 0) and our name of the layer, "conv1" to "conv3" or
    "shortcut", to the library's names of convolution and norm.
    """
    modules = [Module("stem.conv1", *stem)]
    for stage in range(2, 6):
        for block in range(max(blocks[stage - 2] for _, blocks in DEPTHS.values())):
            for layer in ("conv1", "conv2", "conv3", "shortcut"):
                modules.append(Module(f"res{stage}.{block}.{layer}", *name(stage, block, layer)))
    return modules


def torch_keys(modules: Iterable[Module], bias: bool = False) -> dict[str, str]:
    """Returns library's key -> our key for PyTorch modules; ``bias`` if layers may have one."""
    table = {}
    for module in modules:
        for tensor in ("weight", "bias") if bias else ("weight",):
            table[f"{module.conv}.{tensor}"] = f"{module.ours}.{tensor}"
        for tensor in (*NORM_TENSORS, COUNTER) if module.norm else ():
            table[f"{module.norm}.{tensor}"] = f"{module.ours}.norm.{tensor}"
    return table


def linear_keys(layers: Mapping[str, str]) -> dict[str, str]:
    """Returns library's key -> our key for linear layers."""
    return torch_keys((Module(ours, theirs) for theirs, ours in layers.items()), bias=True)


def rename(tensors: Tensors, table: Mapping[str, str], network: str) -> dict[str, Tensor]:
    """Renames tensors by a table of a network's keys; ``network`` describes it in messages.

    Raises ValueError: a key is not in the table, or two keys name one tensor.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key not in table:
            raise ValueError(f"key {key!r} is not one of {network}{_explain(key)}")
        if table[key] in renamed:
            raise ValueError(f"key {key!r} names a tensor that another key names, too")
        renamed[table[key]] = value
    return renamed


def rename_back(tensors: Tensors, table: Mapping[str, str]) -> dict[str, Tensor]:
    """Renames our tensors to the library's keys, the first if the table has several."""
    inverse = {ours: theirs for theirs, ours in reversed(table.items())}
    return rename(tensors, inverse, "the networks that this package and the library share")


# Parts of the paper's successors, as torchvision, timm and others name them.
_FOREIGN_PARTS = {
    "a squeeze-and-excitation or attention layer": (".se.", ".se_module.", ".attn."),
    "an anti-aliasing filter": (".filt",),
    "the deep stem of ResNet-C/D": (".conv1.0.", ".conv1.1.", ".conv1.3.", ".conv1.4."),
    "the pooled shortcut of ResNet-D": (".downsample.2.",),
    "the shortcut of a CIFAR network": (".shortcut.0.", ".shortcut.1."),
}


def _explain(key: str) -> str:
    for part, marks in _FOREIGN_PARTS.items():
        if any(mark in f".{key}" for mark in marks):
            return f": it looks like {part}"
    return ""


def norm_layers(tensors: Iterable[str]) -> list[str]:
    """Returns our names of layers with a norm: "res2.0.conv1", ..."""
    return [key.removesuffix(".norm.weight") for key in tensors if key.endswith(".norm.weight")]


def without_counters(tensors: Tensors) -> dict[str, Tensor]:
    """Returns the tensors without ``num_batches_tracked``, which nothing reads."""
    return {key: value for key, value in tensors.items() if not key.endswith(COUNTER)}


def with_counters(tensors: Tensors) -> dict[str, Tensor]:
    """Adds a ``num_batches_tracked`` of 0 after each running variance."""
    completed = {}
    for key, value in without_counters(tensors).items():
        completed[key] = value
        if key.endswith(".running_var"):
            counter = torch.tensor(0, device=value.device)
            completed[key.removesuffix("running_var") + COUNTER] = counter
    return completed


def check_statistics(tensors: Tensors, library: str) -> None:
    """Raises ValueError if a norm lacks running statistics, which the library's have."""
    for layer in norm_layers(tensors):
        if f"{layer}.norm.running_mean" not in tensors:
            raise ValueError(
                f"the norm of {layer} has no running_mean, but {library} have batch norm"
            )


def cancel_biases(tensors: Tensors) -> dict[str, Tensor]:
    """Moves biases of convolutions before a batch norm into its running mean.

    ``running_mean - bias`` gives the same function in training and evaluation, and this package's
    convolutions have no bias there. Raises ValueError: the norm has no running mean.
    """
    changed = dict(tensors)
    for layer in norm_layers(tensors):
        bias, mean = f"{layer}.bias", f"{layer}.norm.running_mean"
        if bias in changed and mean not in changed:
            raise ValueError(f"{bias} comes before a batch norm, but there is no {mean}")
        if bias in changed:
            changed[mean] = changed[mean] - changed.pop(bias)
    return changed


# Support of libraries

# The networks of this package that torchvision and timm have under the same names.
LIBRARY_NETWORKS = tuple(name for name in list_models() if name.startswith(("resnet", "vgg")))
_SAME_TENSORS = {"FrozenBN": "BN", "SyncBN": "BN", None: ""}


@dataclass(frozen=True)
class Support:
    """The networks that a library builds with the same function as ours."""

    networks: frozenset[tuple[str, str]]  # (family, norm), norm being "BN", "GN" or "" for none
    stride_in_1x1: bool = True  # bottlenecks may have their stride in the first 1x1 convolution
    in_channels: bool = True  # images may have any number of channels
    dilations: bool = False  # stages are dilated as in this package


_BN_NETWORKS = frozenset({("ResNet", "BN"), ("VGG", ""), ("VGG", "BN")})
SUPPORT = {
    "torchvision": Support(_BN_NETWORKS, stride_in_1x1=False, in_channels=False),
    "timm": Support(_BN_NETWORKS, stride_in_1x1=False),
    "huggingface": Support(frozenset({("ResNet", "BN")})),
    "detectron2": Support(_BN_NETWORKS | {("ResNet", "GN")}, dilations=True),
    "caffe2": Support(frozenset({("ResNet", "BN"), ("ResNet", "GN"), ("VGG", "")}), dilations=True),
}


def check_support(library: str, model: ModelSpec) -> None:
    """Refuses a network that a library does not have.

    ``stride_in_1x1`` is checked only if the specification has it. Raises WeightsError: says why,
    and which layouts support the network.
    """
    problem = _problem(SUPPORT[library], model) if library in SUPPORT else ""
    if problem:
        others = [name for name, support in SUPPORT.items() if not _problem(support, model)]
        able = ", ".join([*others, "resnet_backbone"])
        raise WeightsError(f"{library} has no such network: {problem}; these do (--to): {able}")


def _problem(support: Support, model: ModelSpec) -> str:
    name, options = model.name, {**constructor_options(model.name), **model.options}
    if not name.startswith(("resnet", "plain", "vgg")):
        return f"only this package has {name}"
    norm = _SAME_TENSORS.get(options["norm"], options["norm"])
    for key, usual in (("shortcut", "B"), ("activation", "relu"), ("caffe_pool", False)):
        if options.get(key, usual) != usual:
            return f"{name} has {key}={options[key]!r}"
    if ("VGG" if name.startswith("vgg") else "ResNet", norm) not in support.networks:
        return f"{name} has norm={options['norm']!r}"
    bottleneck = name in ("resnet50", "resnet101", "resnet152")
    if model.options.get("stride_in_1x1") and bottleneck and not support.stride_in_1x1:
        return "its bottlenecks have their stride in the 3x3 convolution (stride_in_1x1=False)"
    if options["in_channels"] != 3 and not support.in_channels:
        return f"its networks take 3 channels, not {options['in_channels']}"
    dilated = max(options.get("dilations", (1,))) > 1 or options.get("multi_grid")
    if dilated and not support.dilations:
        return "it dilates the first block of a stage by the rate of the stage before"
    return ""


class OtherNetwork(WeightsError):
    """Weights of a network that has the tensors of one of ours, but another function."""


def in_channels(checkpoint: Checkpoint) -> int:
    """Returns the number of channels of a network's images."""
    return checkpoint.tensors[first_key(checkpoint.tensors)].shape[1]


# Usage of a written file


def spell_numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.9g}" for value in values) + "]"


def spell_transform(preprocessing: Preprocessing) -> str:
    resize, crop = preprocessing.center_crop()
    mean, std = spell_numbers(preprocessing.mean), spell_numbers(preprocessing.std)
    return (
        f"Compose([Resize({resize}), CenterCrop({crop}), ToTensor(), "
        f"Normalize({mean}, {std})])  # RGB, 0..1"
    )
