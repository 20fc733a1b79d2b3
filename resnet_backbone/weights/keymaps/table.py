"""What key maps share: tables of key pairs, tensors of one side alone, and what a library has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_backbone.models import list_models
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.weights.architecture import COUNTER, FIRST_KEYS, constructor_options
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError

Tensors = Mapping[str, Tensor]
OURS = "the networks that this package and the library share"
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", COUNTER)


@dataclass(frozen=True)
class Layout:
    """How one library names a network's tensors.

    Attributes:
        name: of ``LAYOUTS``.
        matches: keys -> whether they look like this library's; a cheap look, ``to_ours`` checks.
        to_ours: the library's tensors -> the same under this package's keys, without
            ``num_batches_tracked``. ValueError for a key that the library's networks of the
            paper do not have; that none is missing is for ``infer_models`` to say.
        from_ours: (tensors, network) -> the library's tensors, whole for a strict load there.
            ValueError for a network that the library does not have, with those that do.
        usage: (as it was written, where) -> lines of Python or YAML that load it.

    Both are pure; tensors are not copied unless their values change. ``to_ours`` of
    ``from_ours`` gives back the very tensors, and the other way round too wherever the docstring
    of the layout's module names no exception.
    """

    name: str
    matches: Callable[[Collection[str]], bool]
    to_ours: Callable[[Tensors], dict[str, Tensor]]
    from_ours: Callable[[Tensors, ModelSpec], dict[str, Tensor]]
    usage: Callable[[Checkpoint, Path], list[str]]


class Module(NamedTuple):
    """A convolution and the norm behind it: our name, and the library's names of the two.

    The norm's is empty where there is none.
    """

    ours: str
    conv: str
    norm: str


def resnet_modules(
    stem: tuple[str, str], name: Callable[[int, int, str], tuple[str, str]]
) -> list[Module]:
    """All convolutions that a ResNet of any depth has.

    Args:
        stem: the library's names of the stem's convolution and norm.
        name: the same for the others, from stage (2 to 5), block (from 0) and our name of the
            layer, "conv1" to "conv3" or "shortcut".
    """
    modules = [Module("stem.conv1", *stem)]
    for stage in range(2, 6):
        for block in range(max(blocks[stage - 2] for _, blocks in DEPTHS.values())):
            for layer in ("conv1", "conv2", "conv3", "shortcut"):
                modules.append(Module(f"res{stage}.{block}.{layer}", *name(stage, block, layer)))
    return modules


def torch_keys(modules: list[Module], bias: bool = False) -> Iterator[tuple[str, str]]:
    """(library's key, our key) of PyTorch modules.

    Args:
        bias: the convolutions may have one.
    """
    for module in modules:
        yield f"{module.conv}.weight", f"{module.ours}.weight"
        if bias:
            yield f"{module.conv}.bias", f"{module.ours}.bias"
        for tensor in NORM_TENSORS if module.norm else ():
            yield f"{module.norm}.{tensor}", f"{module.ours}.norm.{tensor}"


def linear_keys(theirs: str, ours: str = "linear") -> list[tuple[str, str]]:
    """(library's key, our key) of a linear layer."""
    return [(f"{theirs}.{tensor}", f"{ours}.{tensor}") for tensor in ("weight", "bias")]


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """Our key -> theirs; of several of theirs the first."""
    return {ours: theirs for theirs, ours in reversed(table.items())}


def rename(tensors: Tensors, table: Mapping[str, str], network: str) -> dict[str, Tensor]:
    """The same tensors under the keys of a table.

    Args:
        network: what the table's keys belong to, for the error.

    Raises:
        ValueError: for a key that is not in the table, or two that name one tensor.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key not in table:
            raise ValueError(f"key {key!r} is not one of {network}{_explain(key)}")
        if table[key] in renamed:
            raise ValueError(f"key {key!r} names a tensor that is there under another key too")
        renamed[table[key]] = value
    return renamed


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


def without_counters(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors less ``num_batches_tracked``, which nothing reads."""
    return {key: value for key, value in tensors.items() if not key.endswith(COUNTER)}


def with_counters(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors, each running variance followed by a ``num_batches_tracked`` of 0."""
    completed = {}
    for key, value in without_counters(tensors).items():
        completed[key] = value
        if key.endswith(".running_var"):
            counter = torch.tensor(0, device=value.device)
            completed[key.removesuffix("running_var") + COUNTER] = counter
    return completed


def check_statistics(tensors: Tensors, library: str) -> None:
    """Refuses norms without running statistics where the library's are batch norms."""
    for key in tensors:
        norm = key.removesuffix(".norm.weight")
        if norm != key and f"{norm}.norm.running_mean" not in tensors:
            raise ValueError(
                f"the norm of {norm} has no running_mean, but {library} have batch norm"
            )


def cancel_biases(tensors: Tensors) -> dict[str, Tensor]:
    """Moves biases of convolutions before a batch norm into its running mean.

    ``running_mean - bias`` gives the same function in training and evaluation; this package has
    no bias there.

    Raises:
        ValueError: for a bias before a norm without running mean.
    """
    changed = dict(tensors)
    for norm_weight in [key for key in tensors if key.endswith(".norm.weight")]:
        module = norm_weight.removesuffix("norm.weight")
        bias_key, mean_key = module + "bias", module + "norm.running_mean"
        if bias_key not in changed:
            continue
        if mean_key not in changed:
            raise ValueError(f"{bias_key} comes before a batch norm, but there is no {mean_key}")
        changed[mean_key] = changed[mean_key] - changed.pop(bias_key)
    return changed


def with_zero_biases(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors under our keys with a zero bias for each convolution before a norm."""
    completed = dict(tensors)
    for key, value in tensors.items():
        module = key.removesuffix("norm.weight")
        if module != key:
            completed[module + "bias"] = torch.zeros_like(value)
    return completed


# What a library has

# The networks of this package that torchvision and timm have under the same names.
LIBRARY_NETWORKS = tuple(name for name in list_models() if name.startswith(("resnet", "vgg")))
_SAME_TENSORS = {"FrozenBN": "BN", "SyncBN": "BN", None: ""}


@dataclass(frozen=True)
class Support:
    """Networks that a library builds with the same function.

    Attributes:
        networks: (family, norm) pairs, norm being "BN", "GN" or "" for none.
        stride_in_1x1: bottlenecks may have their stride in the first 1x1 convolution.
        in_channels: images may have other than three channels.
        dilations: stages are dilated as this package's are.
    """

    networks: frozenset[tuple[str, str]]
    stride_in_1x1: bool = True
    in_channels: bool = True
    dilations: bool = False


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

    ``stride_in_1x1`` is looked at only where the specification has it.

    Raises:
        ValueError: saying why, and which layouts take the network.
    """
    problem = _problem(SUPPORT[library], model)
    if problem:
        others = [name for name, support in SUPPORT.items() if not _problem(support, model)]
        able = " and ".join([*others, "resnet_backbone"])
        raise ValueError(f"{library} has no such network: {problem}; layouts that do: {able}")


def _problem(support: Support, model: ModelSpec) -> str:
    options = {**constructor_options(model.name), **model.options}
    family, norm = _family(model.name), _SAME_TENSORS.get(options["norm"], options["norm"])
    if family == "CIFAR":
        return f"{model.name} is one of the paper's CIFAR networks"
    for key, usual in (("shortcut", "B"), ("activation", "relu"), ("caffe_pool", False)):
        if options.get(key, usual) != usual:
            return f"{model.name} has {key}={options[key]!r}"
    if (family, norm) not in support.networks:
        return f"{model.name} has norm={options['norm']!r}"
    return _limits(support, model, options)


def _limits(support: Support, model: ModelSpec, options: dict[str, Any]) -> str:
    bottleneck = model.name in ("resnet50", "resnet101", "resnet152")
    if model.options.get("stride_in_1x1") and bottleneck and not support.stride_in_1x1:
        return "its bottlenecks have their stride in the 3x3 convolution (stride_in_1x1=False)"
    if options["in_channels"] != 3 and not support.in_channels:
        return f"its networks take 3 channels, not {options['in_channels']}"
    dilated = max(options.get("dilations", (1,))) > 1 or options.get("multi_grid")
    if dilated and not support.dilations:
        return "it dilates the first block of a stage by the rate of the stage before"
    return ""


def _family(name: str) -> str:
    if name.startswith("cifar"):
        return "CIFAR"
    return "VGG" if name.startswith("vgg") else "ResNet"


def shorten(text: str) -> str:
    """What a file says, for a message."""
    return " ".join(text.split())[:80]


class OtherNetwork(WeightsError):
    """Weights of a network with the tensors of one of ours and another function."""


def library_name(checkpoint: Checkpoint) -> str:
    """The network's name in torchvision and timm, where batch norm is part of a VGG's."""
    name = checkpoint.model.name.rpartition("/")[2].removesuffix("_bn")
    with_norm = name.startswith("vgg") and any(".norm." in key for key in checkpoint.tensors)
    return f"{name}_bn" if with_norm else name


def in_channels(checkpoint: Checkpoint) -> int:
    """Of the images that a checkpoint's network takes."""
    key = next(key for key in FIRST_KEYS if key in checkpoint.tensors)
    return checkpoint.tensors[key].shape[1]


# How a written file is used


def spell_numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.9g}" for value in values) + "]"


def spell_transform(preprocessing: Preprocessing) -> str:
    resize, crop = preprocessing.center_crop()
    mean, std = spell_numbers(preprocessing.mean), spell_numbers(preprocessing.std)
    return (
        f"transform = Compose([Resize({resize}), CenterCrop({crop}), ToTensor(), "
        f"Normalize({mean}, {std})])  # RGB, 0..1"
    )
