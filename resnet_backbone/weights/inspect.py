"""What weights are and say of themselves: for a program, and for a person who has found a file."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
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
)
from resnet_backbone.weights.readers import RawFile, find_file, read_tensors
from resnet_backbone.weights.reading import (
    UnknownInput,
    agreed_preprocessing,
    named,
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
        file: what lies there.
        layout: whose key names it has, a name of ``LAYOUTS``.
        tensors: under this package's names.
        models: the networks that they fit.
        checkpoint: all of it, where nothing is missing.
        missing: what is unknown, and how to say it.
        options: of tools/convert_weights.py that say it.
    """

    source: str
    file: RawFile
    layout: str
    tensors: dict[str, Tensor]
    models: list[ModelSpec]
    checkpoint: Checkpoint | None = None
    missing: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The findings as text, one fact a line, each behind its name."""
        size = sum(value.nbytes for value in self.tensors.values())
        statistics = ("running_mean", "running_var")
        counts = [x.numel() for key, x in self.tensors.items() if not key.endswith(statistics)]
        models = self.models if self.checkpoint is None else [self.checkpoint.model]
        text = {
            "source": self.source,
            "container": f"{self.file.container}, {size / 1e6:.1f} MB of tensors",
            "sha256": self.file.sha256 or "(several files)",
            "key names": self.layout,
            "network": " or ".join(_describe(model) for model in models),
            "parameters": f"{sum(counts):,}",
            "types": _count_dtypes(self.tensors),
        }
        if self.checkpoint is not None:
            text |= _describe_input(self.checkpoint.preprocessing)
            origin = self.checkpoint.origin
            known = (origin.format, origin.file, origin.run)
            text["origin"] = ", ".join(part for part in known if part)
        lines = [f"{name + ':':15}{value}" for name, value in text.items()]
        return [*lines, *(f"{'not stated:':15}{text}" for text in self.missing)]


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
    with named(source):
        layout = recognize(weights)
        tensors = weights_alone(LAYOUTS[layout].to_ours(weights))
        models = infer_models(tensors)
    found = Inspection(str(source), raw, layout, tensors, models)
    ambiguous = len(models) > 1 and model is None
    try:
        return replace(found, checkpoint=read_checkpoint(source, preprocessing, model, raw))
    except UnknownInput:
        found.missing.extend(_unknown_input(tensors))
        found.options.append("--preprocessing NAME")
    except WeightsError:
        if not ambiguous:
            raise
    if ambiguous:
        names = " or --model ".join(spec.name for spec in models)
        found.missing.append(f"which of these networks it is: add --model {names}")
        found.options.append("--model NAME")
    return found


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
    file, said = find_file(found.path), None
    if file.suffix == ".safetensors":
        said = FileMetadata.read(file)
    if said and (said.preprocessing is not None or found.preprocessing is not None):
        known, model = agreed_preprocessing(str(path), found, said, preprocessing), said.model
        has_mean_image = said.has_mean_image
    else:
        _, known, model, _ = read_source(path, preprocessing, raw)
        has_mean_image = known.mean_image is not None
    # the network's name alone says whether it has bottlenecks: no tensor was read
    match = re.fullmatch(r"(?:\w+/)?(?:\w+_)?(?:resnet|plain)(\d+)\w*", model.name if model else "")
    block, _ = DEPTHS.get(int(match[1]) if match else 0, (None, ()))
    if block is BottleneckBlock:
        known = with_stride(known, model, None, str(path))
    return Description(known, asdict(model) if model else {}, has_mean_image)


def read_header(path: str | os.PathLike) -> FileMetadata:
    """What a local safetensors file says of itself, without its weights.

    Raises:
        WeightsError: the file is missing, damaged or of a later version.
    """
    return FileMetadata.read(find_file(path))
