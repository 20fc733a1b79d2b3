"""Infers from keys and shapes which of this package's networks a set of tensors belongs to."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resnet_backbone.models import MODELS, VGG, BottleneckBlock, find_constructor
from resnet_backbone.models.baselines import INCEPTION, PRELU_NETS
from resnet_backbone.models.resnet import CIFAR_STAGE_NAMES
from resnet_backbone.models.resnet import DEPTHS as RESNET_DEPTHS
from resnet_backbone.models.resnet import STAGE_NAMES as RESNET_STAGES
from resnet_backbone.models.vgg import DEPTHS as VGG_DEPTHS
from resnet_backbone.models.vgg import STAGE_NAMES as VGG_STAGES
from resnet_backbone.weights.checkpoint import ModelSpec

# The first weight of each family, and the family's stages in order; pool5 has no tensors.
_STAGES_BY_FIRST_KEY: dict[str, tuple[str, ...]] = {
    "stem.conv1.weight": RESNET_STAGES,
    "stem.weight": CIFAR_STAGE_NAMES,
    "conv1.0.weight": VGG_STAGES[:-1],
}
FIRST_KEYS = tuple(_STAGES_BY_FIRST_KEY)
HEAD_NAMES = VGG.head_names  # of every network; ResNets have only the last, the linear one
COUNTER = "num_batches_tracked"
VISIBLE_OPTIONS = ("shortcut", "norm", "activation", "in_channels")  # visible in the tensors

Shapes = dict[str, tuple[int, ...]]


def infer_models(tensors: Mapping[str, Tensor]) -> list[ModelSpec]:
    """Returns every network that may have these tensors, each with a different function.

    There are two if no block has a projection: neither identity shortcuts and option A nor plain
    networks have tensors for them. The residual network comes first. Only options that differ from
    the name's defaults are set, and none that tensors do not show: ``stride_in_1x1``,
    ``caffe_pool``, ``dilations``, and the kind of batch norm. A norm with weight and bias but no
    statistics counts as GN. For a backbone that stops early, the shallowest network with these
    stages is returned. Raises ValueError: tensors of another network (saying what was found), or
    missing, unknown or wrongly shaped tensors (naming a key).
    """
    shapes = shapes_of(tensors)
    first = first_key(shapes)
    if _STAGES_BY_FIRST_KEY[first] is RESNET_STAGES:
        _refuse_relatives(shapes)
    base = _base_name(shapes, first)
    options = {"in_channels": _size(shapes, first, 4, 1), **_visible_options(shapes, first)}
    has_shortcuts = "shortcut" in constructor_options(base)
    shortcuts = _shortcut_options(shapes, base) if has_shortcuts else [{}]
    num_classes = None
    if "linear.weight" in shapes:
        num_classes = _size(shapes, "linear.weight", 2, 0)
    specs = [_spec(base, num_classes, {**options, **shortcut}) for shortcut in shortcuts]
    deepest_stage(shapes)  # refuses gaps
    check_tensors(tensors, specs[0])
    return specs


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Checks that tensors are exactly a network's; head and deeper stages may be missing.

    Raises ValueError: names the first key that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        expected = shapes_of(spec.build().state_dict())
    parts = {key.partition(".")[0] for key in tensors}
    if "linear" not in parts:
        expected = {k: shape for k, shape in expected.items() if k.partition(".")[0] in parts}
    problem = misfit(expected, shapes_of(tensors), spell(spec))
    if problem:
        raise ValueError(problem)


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Returns the shapes of all tensors except counters, which nothing reads."""
    return {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith(COUNTER)}


def misfit(expected: Shapes, found: Shapes, network: str) -> str:
    """Describes the first missing, unknown or wrongly shaped tensor; "" if all fit."""
    missing = [key for key in expected if key not in found]
    if missing:
        return f"{len(missing)} tensors of {network} are missing, the first is {missing[0]}"
    for key, shape in expected.items():
        if found[key] != shape:
            return f"{key} has shape {found[key]}, but {shape} in {network}"
    unknown = next((key for key in found if key not in expected), None)
    return "" if unknown is None else f"{network} has no {unknown}"


def check_stated(
    stated: ModelSpec, tensors: Mapping[str, Tensor], who: str = "its metadata say"
) -> None:
    """Checks that tensors belong to the stated network.

    Raises ValueError: another depth, shortcut, norm or number of classes; it names both networks.
    """
    found = infer_models(tensors)[0]
    if stated.num_classes is None:  # not stated
        stated = replace(stated, num_classes=found.num_classes)
    said = f"{who} {_with_classes(stated)}, but its tensors are {_with_classes(found)}"
    name = stated.name.rpartition("/")[2]  # without another library's prefix
    same_family = {found.name, found.name.replace("resnet", "plain")}
    if name not in MODELS and name not in same_family:  # a CIFAR network may have any depth
        raise ValueError(said)
    if stated.num_classes is not None and found.num_classes is None:
        raise ValueError(f"{said}: linear.weight is missing")
    try:
        check_tensors(tensors, replace(stated, name=name))
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{said}: {error}") from error


def _with_classes(spec: ModelSpec) -> str:
    return f"{spell(spec)} with {spec.num_classes or 'no'} classes"


def deepest_stage(keys: Iterable[str]) -> str:
    """Returns the last stage among keys of this package: "res5", "conv4", ...

    Raises ValueError: they belong to none of this package's networks, or lack an earlier stage.
    """
    stages = _STAGES_BY_FIRST_KEY[first_key(keys)]
    found = {key.partition(".")[0] for key in keys}
    if found & {*INCEPTION}:
        stages = ("conv1", "conv2", *INCEPTION)
    present = [name for name in stages if name in found]
    if present != list(stages[: len(present)]):
        missing = next(name for name in stages if name not in found)
        raise ValueError(f"there are tensors of {present[-1]}, but none of {missing}")
    return present[-1]


def spell(spec: ModelSpec) -> str:
    """Returns a network's name with its visible options: "resnet50 with norm='GN'"."""
    shown = {key: value for key, value in spec.options.items() if key in VISIBLE_OPTIONS}
    options = ", ".join(f"{key}={value!r}" for key, value in shown.items())
    return f"{spec.name} with {options}" if options else spec.name


def constructor_options(name: str) -> dict[str, Any]:
    """Returns the default constructor arguments of a network of this package.

    Raises ValueError: a name that ``build_model`` does not know.
    """
    parameters = inspect.signature(find_constructor(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def first_key(keys: Iterable[str]) -> str:
    """Returns the key of the first convolution, among keys of one of this package's networks."""
    known = set(keys)
    for key in FIRST_KEYS:
        if key in known:
            return key
    example = min(known, default="none at all")
    raise ValueError(
        f"there is none of the keys {', '.join(FIRST_KEYS)}, of which every network of this "
        f"package has one; there is {example}"
    )


def _size(shapes: Shapes, key: str, dimensions: int, axis: int) -> int:
    shape = shapes.get(key)
    if shape is None:
        raise ValueError(f"{key} is missing")
    if len(shape) != dimensions:
        raise ValueError(f"{key} has shape {shape}, but needs {dimensions} dimensions")
    return shape[axis]


def _refuse_relatives(shapes: Shapes) -> None:
    """Raises ValueError for ResNeXts, wide ResNets and other stems, which have a ResNet's keys."""
    kernel, other = _size(shapes, "stem.conv1.weight", 4, 2), ""
    if kernel != 7:
        other = f"stem.conv1.weight is {kernel}x{kernel}, not 7x7: a ResNet with another stem"
    elif "res2.0.conv3.weight" in shapes:
        width = _size(shapes, "res2.0.conv1.weight", 4, 0)
        per_group = _size(shapes, "res2.0.conv2.weight", 4, 1)
        if per_group != width:
            other = (
                f"res2.0.conv2.weight has {per_group} input channels for {width}: a grouped "
                "convolution (ResNeXt)"
            )
        elif width != 64:
            other = f"res2.0.conv1.weight has {width} channels, not 64: a wide ResNet"
    if other:
        raise ValueError(f"{other}, which this package does not have")


def _counts(shapes: Shapes, stages: Sequence[str]) -> tuple[int, ...]:
    """Returns the number of blocks (VGG: convolutions) in each stage that has tensors."""
    found = defaultdict(set)
    for key in shapes:
        match = re.match(r"([a-z]+\d)\.(\d{1,6})\.", key, re.ASCII)
        if match and match[1] in stages:
            found[match[1]].add(int(match[2]))
    for stage, indices in found.items():
        if indices != set(range(len(indices))):
            raise ValueError(
                f"{stage} has tensors of {stage}.{max(indices)}, but not of all blocks before"
            )
    return tuple(len(found[stage]) for stage in stages if stage in found)


def _base_name(shapes: Shapes, first: str) -> str:
    """Returns the network's name before options are considered."""
    stages = _STAGES_BY_FIRST_KEY[first]
    counts = _counts(shapes, stages)
    if first == "conv1.0.weight" and _size(shapes, first, 4, 2) == 7:
        return _baseline_name(shapes, counts)
    if first == "conv1.0.weight":
        for depth, convs in VGG_DEPTHS.items():
            if convs[: len(counts)] == counts:
                return f"vgg{depth}"
        raise ValueError(f"no VGG has {counts} convolutions in its stages")
    if first == "stem.weight":
        if len(set(counts)) > 1:
            raise ValueError(
                f"a CIFAR network has the same number of blocks in each stage, not {counts}"
            )
        return f"cifar_resnet{6 * (counts or (1,))[0] + 2}"
    bottleneck = any(re.fullmatch(r"res\d\.0\.conv3\.weight", key) for key in shapes)
    for depth, (block, blocks) in RESNET_DEPTHS.items():
        if blocks[: len(counts)] == counts and (block is BottleneckBlock) == bottleneck:
            return f"resnet{depth}"
    kind = "bottleneck" if bottleneck else "basic"
    raise ValueError(f"no ResNet of the paper has {counts} {kind} blocks in its stages")


def _baseline_name(shapes: Shapes, counts: tuple[int, ...]) -> str:
    """Names a PReLU-net or BN-Inception, which unlike VGGs have a 7x7 kernel in conv1."""
    widths = tuple(_size(shapes, f"conv{n}.0.weight", 4, 0) for n in range(1, len(counts) + 1))
    if widths[0] == 64:
        return "bn_inception"
    for model, (depth, channels) in PRELU_NETS.items():
        if (counts, widths) == ((1, depth, depth, depth)[: len(counts)], channels[: len(counts)]):
            return f"prelu_net_{model.lower()}"
    raise ValueError(f"no PReLU-net has {counts} convolutions with {widths} channels")


def _visible_options(shapes: Shapes, first: str) -> dict[str, Any]:
    """Returns norm and activation, as the first layer shows them."""
    layer = first.removesuffix("weight")
    marks = {
        "norm.running_mean": "BN",
        "norm.running_var": "BN",
        "norm.weight": "GN",
        "bias": "",
    }
    norm = next((norm for mark, norm in marks.items() if layer + mark in shapes), None)
    if norm is None:
        raise ValueError(f"{first} has neither a norm ({layer}norm.weight) nor {layer}bias")
    prelu = layer + "activation.weight" in shapes
    return {"norm": norm, "activation": "prelu" if prelu else "relu"}


def _shortcut_options(shapes: Shapes, base: str) -> list[dict[str, str]]:
    """Returns the shortcut option, or both candidates if shortcuts have no tensors."""
    blocks = {match[0] for key in shapes if (match := re.match(r"res\d\.\d+", key))}
    default = constructor_options(base)["shortcut"]
    if not blocks:
        return [{"shortcut": default}]
    if any(f"{block}.gate.weight" in shapes for block in blocks):
        return [{"shortcut": "highway"}]
    reshaping = {block for block in blocks if _changes_shape(shapes, block)}
    projecting = {block for block in blocks if f"{block}.shortcut.weight" in shapes}
    if projecting - reshaping:
        return [{"shortcut": "C"}]
    if projecting:
        return [{"shortcut": "B"}]
    return [{"shortcut": "A" if reshaping else default}, {"shortcut": "none"}]


def _changes_shape(shapes: Shapes, block: str) -> bool:
    last = "conv3" if f"{block}.conv3.weight" in shapes else "conv2"
    into = _size(shapes, f"{block}.conv1.weight", 4, 1)
    return into != _size(shapes, f"{block}.{last}.weight", 4, 0)


def _spec(base: str, num_classes: int | None, options: Mapping[str, Any]) -> ModelSpec:
    """Returns the name that implies most of the options, with the remaining ones."""
    name = base
    if options.get("shortcut") == "none":
        plain = base.replace("resnet", "plain")
        name = plain if plain in MODELS or plain.startswith("cifar") else base
    elif base.startswith("vgg") and options["norm"] == "BN":
        name = f"{base}_bn"
    defaults = constructor_options(name)
    return ModelSpec(name, num_classes, {k: v for k, v in options.items() if v != defaults[k]})
