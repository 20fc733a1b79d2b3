"""What weights are and say of themselves: for a program, and for a person who has found a file."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from resnet_backbone.models import BottleneckBlock
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.weights.architecture import infer_models, spell
from resnet_backbone.weights.checkpoint import (
    MEAN_IMAGE_KEY,
    Checkpoint,
    FileMetadata,
    ModelSpec,
    has_bottlenecks,
)
from resnet_backbone.weights.keymaps import LAYOUTS, recognize
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    one_line,
)
from resnet_backbone.weights.readers import RawFile, find_file, read_tensors
from resnet_backbone.weights.reading import (
    UnknownInput,
    agreed_preprocessing,
    read_checkpoint,
    read_source,
    weights_alone,
    with_stride,
)
from resnet_backbone.weights.sources import resolve


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        source: as it was given.
        container: "safetensors", "pickle", ...
        sha256: of the file; empty for a sharded one.
        layout: whose key names it has, a name of ``LAYOUTS``.
        tensors: under this package's names.
        models: the networks that they fit.
        checkpoint: all of it, where nothing is missing.
        missing: what is unknown, and how to say it.
        options: of tools/convert_weights.py that say it.
    """

    source: str
    container: str
    sha256: str
    layout: str
    tensors: dict[str, Tensor]
    models: tuple[ModelSpec, ...]
    checkpoint: Checkpoint | None
    missing: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The findings as text, one fact a line, each behind its name."""
        size = sum(value.nbytes for value in self.tensors.values())
        parameters = sum(prod(value.shape) for key, value in self._parameters())
        text = {
            "source": self.source,
            "container": f"{self.container}, {size / 1e6:.1f} MB of tensors",
            "sha256": self.sha256 or "(several files)",
            "key names": self.layout,
            "network": " or ".join(_describe(model) for model in self._models()),
            "parameters": f"{parameters:,}",
            "types": _count_dtypes(self.tensors),
        }
        if self.checkpoint is not None:
            text |= _describe_input(self.checkpoint.preprocessing)
            origin = self.checkpoint.origin
            known = (origin.format, origin.file, origin.run)
            text["origin"] = ", ".join(part for part in known if part)
        lines = [f"{name + ':':15}{value}" for name, value in text.items()]
        return [*lines, *(f"{'not stated:':15}{text}" for text in self.missing)]

    def _models(self) -> tuple[ModelSpec, ...]:
        return self.models if self.checkpoint is None else (self.checkpoint.model,)

    def _parameters(self) -> list[tuple[str, Tensor]]:
        statistics = ("running_mean", "running_var")
        return [item for item in self.tensors.items() if not item[0].endswith(statistics)]


def inspect_source(
    source: str | os.PathLike,
    preprocessing: str | Preprocessing = "",
    model: ModelSpec | None = None,
) -> Inspection:
    """Looks at weights from any source; what they do not say is no error here.

    Args:
        source, preprocessing, model: see :func:`resnet_backbone.weights.read_checkpoint`.

    Raises:
        WeightsError: missing, damaged or hostile file, keys or shapes of no network of this
            package, contradictions.
    """
    raw = read_tensors(resolve(source).path)
    weights = {key: value for key, value in raw.tensors.items() if key != MEAN_IMAGE_KEY}
    try:
        layout = recognize(weights)
        tensors = weights_alone(LAYOUTS[layout].to_ours(weights))
        models = tuple(infer_models(tensors))
    except ValueError as error:
        raise WeightsError(f"{source}: {one_line(error)}") from error
    checkpoint, missing, options = None, [], []
    ambiguous = len(models) > 1 and model is None
    try:
        checkpoint = read_checkpoint(source, preprocessing, model, raw)
    except UnknownInput:
        missing, options = _unknown_input(tensors), ["--preprocessing NAME"]
    except WeightsError:
        if not ambiguous:
            raise
    if checkpoint is None and ambiguous:
        names = " or --model ".join(spec.name for spec in models)
        missing.append(f"which of these networks it is: add --model {names}")
        options.append("--model NAME")
    return Inspection(
        str(source),
        raw.container,
        raw.sha256,
        layout,
        tensors,
        models,
        checkpoint,
        tuple(missing),
        tuple(options),
    )


def _unknown_input(tensors: dict[str, Tensor]) -> list[str]:
    missing = [
        "the input that it was trained on; name it with --preprocessing "
        f"{', '.join(PREPROCESSINGS)}, or all of --channel-order --value-range --mean --std"
    ]
    if has_bottlenecks(tensors):
        missing.append("the stride of its bottlenecks; the same name says it")
    return missing


def _describe(model: ModelSpec) -> str:
    head = "no head" if model.num_classes is None else f"{model.num_classes} classes"
    return f"{spell(model)}, {head}"


def _count_dtypes(tensors: dict[str, Tensor]) -> str:
    counts = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())


def _describe_input(preprocessing: Preprocessing) -> dict[str, str]:
    test = [f"shorter side {preprocessing.resize_size}", f"crop {preprocessing.crop_size}"]
    if preprocessing.interpolation:
        test.append(preprocessing.interpolation)
    image = preprocessing.mean_image
    stride = preprocessing.stride_in_1x1
    return {
        "input": f"{preprocessing.channel_order}, 0..{preprocessing.value_range:g}, "
        f"mean {list(preprocessing.mean)}, std {list(preprocessing.std)}",
        **({"mean image": "x".join(map(str, image.shape[1:]))} if image is not None else {}),
        "stride_in_1x1": "-" if stride is None else str(stride),
        "BN eps": str(preprocessing.bn_eps),
        "test": ", ".join(test) if preprocessing.crop_size else "not known",
        "stated by": preprocessing.source or "-",
    }


def default_size(checkpoint: Checkpoint) -> int:
    """Side in pixels of images to try a network on."""
    return 32 if Path(checkpoint.model.name).name.startswith("cifar") else 224


class Description(NamedTuple):
    """What a weights file says of itself.

    Attributes:
        preprocessing: the input that it expects, without mean image.
        model: {"name", "num_classes", "options"} of the network, empty if it does not say.
        has_mean_image: it holds a per-pixel mean beside the channel means.
    """

    preprocessing: Preprocessing
    model: dict
    has_mean_image: bool


def describe_weights(
    path: str | os.PathLike, preprocessing: str | Preprocessing = "", raw: RawFile | None = None
) -> Description:
    """Reads what weights say of themselves; of our own files only the header.

    Args:
        path, preprocessing, raw: see :func:`read_checkpoint`.

    Raises:
        WeightsError: missing or damaged file, no preprocessing.
    """
    found = resolve(path)
    file = find_file(found.path)
    if file.suffix == ".safetensors":
        said = FileMetadata.read(file)
        if said.preprocessing is not None or found.preprocessing is not None:
            known = agreed_preprocessing(str(path), found, said, preprocessing)
            return _description(known, said.model, said.has_mean_image, path)
    read = read_source(path, preprocessing, raw)
    has_mean_image = read.preprocessing.mean_image is not None
    return _description(read.preprocessing, read.stated, has_mean_image, path)


def _description(
    known: Preprocessing, model: ModelSpec | None, has_mean_image: bool, path: str | os.PathLike
) -> Description:
    stated = {} if model is None else asdict(model)
    return Description(stated_input(known, model, str(path)), stated, has_mean_image)


def read_header(path: str | os.PathLike) -> FileMetadata:
    """What a local safetensors file says of itself, without its weights.

    Raises:
        WeightsError: the file is missing, damaged or of a later version.
    """
    return FileMetadata.read(find_file(path))


def stated_input(known: Preprocessing, stated: ModelSpec | None, source: str) -> Preprocessing:
    """:func:`with_stride` by the name of the network alone, where no tensor was read."""
    match = re.fullmatch(
        r"(?:\w+/)?(?:\w+_)?(?:resnet|plain)(\d+)\w*", stated.name if stated else ""
    )
    block, _ = DEPTHS.get(int(match[1]) if match else 0, (None, ()))
    return with_stride(known, stated, None, source) if block is BottleneckBlock else known
