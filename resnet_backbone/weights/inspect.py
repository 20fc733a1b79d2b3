"""Describes weights of unknown origin for the user."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from resnet_backbone.weights import PREPROCESSINGS, Checkpoint, ModelSpec, Preprocessing
from resnet_backbone.weights.architecture import infer_models, spell
from resnet_backbone.weights.checkpoint import MEAN_IMAGE_KEY, has_bottlenecks
from resnet_backbone.weights.keymaps import find_network
from resnet_backbone.weights.preprocessing import WeightsError, named
from resnet_backbone.weights.readers import RawFile, read_tensors
from resnet_backbone.weights.reading import UnknownInput, read_checkpoint, split_key
from resnet_backbone.weights.sources import resolve


def inspect_source(
    source: str | os.PathLike,
    preprocessing: str | Preprocessing = "",
    model: ModelSpec | None = None,
) -> tuple[list[str], list[str]]:
    """Describes weights from any source; missing information is reported, not an error.

    Raises WeightsError: a missing, damaged or hostile file, keys or shapes of no network of this
    package, contradictions.

    Args:
        source, preprocessing, model: see :func:`resnet_backbone.weights.read_checkpoint`.

    Returns:
        (lines of text, one fact each; the convert-weights options that supply missing information)
    """
    file, key = split_key(source)
    raw = read_tensors(resolve(file).path)
    weights = {**(raw.part(key) if key else raw.tensors)}
    weights.pop(MEAN_IMAGE_KEY, None)
    with named(source):
        layout, tensors = find_network(weights, str(source))
        models = infer_models(tensors)
    ambiguous, missing, options, facts = len(models) > 1 and model is None, [], [], {}
    try:
        checkpoint = read_checkpoint(source, preprocessing, model, raw)
        models, facts = [checkpoint.model], _describe_input(checkpoint)
    except UnknownInput:
        options.append("--preprocessing NAME")
        missing.append(
            "the input that it was trained on; give --preprocessing "
            f"{', '.join(PREPROCESSINGS)}, or all of --channel-order --value-range --mean --std"
        )
        if has_bottlenecks(tensors):
            missing.append(
                "where its bottlenecks have their stride; --preprocessing msra or torchvision "
                "states this, too; otherwise add --stride-in-1x1"
            )
    except WeightsError:
        if not ambiguous:
            raise
    if ambiguous and not facts:
        names = " or --model ".join(spec.name for spec in models)
        missing.append(f"which of these networks it is: add --model {names}")
        options.append("--model NAME")
    facts = {"source": source, **_describe_file(raw, layout, tensors, models), **facts}
    lines = [f"{name + ':':15}{value}" for name, value in facts.items()]
    return [*lines, *(f"{'not stated:':15}{text}" for text in missing)], options


def _describe_file(
    raw: RawFile, layout: str, tensors: Mapping[str, Tensor], models: Sequence[ModelSpec]
) -> dict[str, str]:
    size = sum(value.nbytes for value in tensors.values())
    statistics = ("running_mean", "running_var")
    parameters = [x.numel() for key, x in tensors.items() if not key.endswith(statistics)]
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    networks = [f"{spell(spec)}, {spec.num_classes or 'no'} classes" for spec in models]
    return {
        "container": f"{raw.container}, {size / 1e6:.1f} MB of tensors",
        "sha256": raw.sha256 or "(several files)",
        "key names": layout,
        "network": " or ".join(networks).replace("no classes", "no head"),
        "parameters": f"{sum(parameters):,}",
        "types": ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common()),
    }


def _describe_input(checkpoint: Checkpoint) -> dict[str, str]:
    own, origin = checkpoint.preprocessing, checkpoint.origin
    stride, image = own.stride_in_1x1, own.mean_image
    test = (f"shorter side {own.resize_size}", f"crop {own.crop_size}", own.interpolation)
    return {
        "input": f"{own.channel_order}, 0..{own.value_range:g}, "
        f"mean {list(own.mean)}, std {list(own.std)}",
        **({"mean image": "x".join(map(str, image.shape[1:]))} if image is not None else {}),
        "stride_in_1x1": "-" if stride is None else str(stride),
        "BN eps": str(own.bn_eps),
        "test": ", ".join(filter(None, test)) if own.crop_size else "not known",
        "stated by": own.source or "-",
        "origin": ", ".join(filter(None, (origin.format, origin.file, origin.run))),
    }


def default_size(checkpoint: Checkpoint) -> int:
    """Returns the side in pixels of images on which to run a network."""
    return 32 if Path(checkpoint.model.name).name.startswith("cifar") else 224
