"""Checkpoints: tensors with their network and the input that it needs.

They are stored as safetensors. The header has the preprocessing, the network, the origin of the
weights and a version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from resnet_backbone.fast import build_model
from resnet_backbone.models import StagedNetwork
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.weights.preprocessing import JsonRecord, Preprocessing, WeightsError, one_line

METADATA_KEY = "resnet_backbone.preprocessing"
MODEL_KEY = "resnet_backbone.model"  # the network's name, number of classes and options
ORIGIN_KEY = "resnet_backbone.origin"
SCHEMA_KEY = "resnet_backbone.schema"  # absent before version 1
SCHEMA = 1
MEAN_IMAGE_KEY = "preprocessing.mean_image"  # a tensor beside the weights


@dataclass(frozen=True)
class ModelSpec(JsonRecord):
    """The network of some weights, with all that is needed to build it.

    Its name is one of ``list_models()`` or ``cifar_resnet<6n+2>``, or ``torchvision/<name>`` or
    ``timm/<name>`` for networks of those libraries.
    """

    name: str
    num_classes: int | None = None  # logits of the head; None without a head
    options: Mapping[str, Any] = field(default_factory=dict)  # constructor arguments

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise ValueError("it has no network name")
        classes, options = self.num_classes, self.options
        if classes is not None and (type(classes) is not int or classes < 1):
            raise ValueError(f"num_classes {classes!r} is not a number of classes")
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise ValueError(f"options {options!r} are not constructor arguments")
        for key in ("stride_in_1x1", "caffe_pool"):
            if not isinstance(options.get(key, False), bool):
                raise ValueError(f"{key} {options[key]!r} is not true or false")

    def build(self, **options: Any) -> StagedNetwork:
        """Builds the network with randomly initialized weights.

        Raises ValueError: an unknown name (suggesting the nearest one) or option.

        Args:
            **options: constructor arguments, which override the specification's own.
        """
        options = {**self.options, **options}
        try:
            return build_model(self.name, self.num_classes, **options)
        except TypeError as error:
            raise ValueError(f"model.options {options}: {error}") from error


@dataclass(frozen=True)
class Origin(JsonRecord):
    """The origin of weights."""

    format: str = ""  # the source's key names: "torchvision", "caffe2", ...
    file: str = ""  # the source's path, URL or name
    sha256: str = ""  # of the source file; empty for a sharded one
    run: str = ""  # the training run that wrote it
    reference: str = ""  # where its preprocessing is documented

    def __post_init__(self):
        if not all(isinstance(value, str) for value in vars(self).values()):
            raise ValueError("it is not an object of texts")


@dataclass(frozen=True)
class Checkpoint:
    """The complete weights of one network, as :func:`read_checkpoint` returns them.

    The tensors have this package's key names and the file's dtypes, without
    ``num_batches_tracked``. The preprocessing is the input that the network was trained on. If it
    states the stride of bottlenecks, the network's options agree.
    """

    tensors: dict[str, Tensor]
    model: ModelSpec
    preprocessing: Preprocessing
    origin: Origin = Origin()

    def __post_init__(self):
        stride = self.preprocessing.stride_in_1x1
        if stride is not None and self.has_bottlenecks:
            options = {**self.model.options, "stride_in_1x1": stride}
            object.__setattr__(self, "model", replace(self.model, options=options))

    @property
    def has_bottlenecks(self) -> bool:
        """Whether the network has bottleneck blocks, which have two places for a stride."""
        return has_bottlenecks(self.tensors)

    @property
    def has_batch_norms(self) -> bool:
        """Whether the network has batch norms that are not folded into its convolutions."""
        return any(key.endswith(".norm.running_var") for key in self.tensors)

    def restated(self, **settings: Any) -> Checkpoint:
        """Returns the same tensors with other settings of their preprocessing."""
        return replace(self, preprocessing=replace(self.preprocessing, **settings))

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of its file's header."""
        return FileMetadata(self.preprocessing, self.model, self.origin).texts()


def has_bottlenecks(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether tensors with this package's key names have bottleneck blocks."""
    return any(key.endswith("conv3.weight") for key in tensors)


class FileMetadata(NamedTuple):
    """A file's metadata; None for parts that were not written."""

    preprocessing: Preprocessing | None
    model: ModelSpec | None = None
    origin: Origin | None = None
    has_mean_image: bool = False  # whether it has a per-pixel mean beside the channel means

    def texts(self) -> dict[str, str]:
        """Returns the header's texts, without parts that are None."""
        parts = zip(PARTS, self[:3], strict=True)
        texts = {key: part.to_json() for key, part in parts if part is not None}
        return {SCHEMA_KEY: str(SCHEMA), **texts}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> FileMetadata:
        """Parses a header; ``where`` names the file in messages.

        Raises WeightsError: unreadable, or written by a later version of this package.
        """
        schema = texts.get(SCHEMA_KEY, "0")
        if not schema.isdecimal() or len(schema) > 9:
            raise WeightsError(
                f"{where}: unreadable {SCHEMA_KEY} in its metadata ({schema[:80]!r})"
            )
        if int(schema) > SCHEMA:
            raise WeightsError(
                f"{where} has format {schema}, but this version of resnet_backbone reads "
                f"up to {SCHEMA}: install a newer one"
            )
        parts = []
        for key, kind in PARTS.items():
            try:
                parts.append(kind.from_json(texts[key]) if key in texts else None)
            except (TypeError, ValueError, RecursionError) as error:
                raise WeightsError(
                    f"{where}: unreadable {key} in its metadata ({one_line(error)})"
                ) from error
        return cls(*parts)

    @classmethod
    def read(cls, path: Path) -> FileMetadata:
        """Reads the metadata of a local safetensors file, without its weights.

        Raises WeightsError: the file is missing, damaged or of a later version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                texts, keys = file.metadata() or {}, file.keys()
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a complete safetensors file ({error})") from error
        return cls.from_texts(texts, str(path))._replace(has_mean_image=MEAN_IMAGE_KEY in keys)


PARTS = {METADATA_KEY: Preprocessing, MODEL_KEY: ModelSpec, ORIGIN_KEY: Origin}


def write_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike) -> None:
    """Writes a checkpoint to a safetensors file of this package, atomically.

    Raises:
        WeightsError: a suffix other than ``.safetensors``.
    """
    write_tensors(checkpoint.tensors, checkpoint.preprocessing, checkpoint.metadata(), path)


def write_tensors(
    state: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    texts: dict[str, str],
    path: str | os.PathLike,
) -> None:
    """Writes tensors, the preprocessing's mean image and a header as a safetensors file."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written to .safetensors files")
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    if preprocessing.mean_image is not None:
        tensors[MEAN_IMAGE_KEY] = preprocessing.mean_image.detach().cpu().contiguous()
    with whole_file(path) as temporary:  # save_file would make it readable by its owner only
        temporary.write_bytes(save(tensors, texts))
