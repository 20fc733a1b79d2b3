"""Weights from any source into networks, and our own files, which say what they are.

Our form is a safetensors file whose header carries the preprocessing, the network, where the
weights came from and a version (:mod:`resnet_backbone.weights.metadata`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights.checkpoint import Checkpoint, Origin
from resnet_backbone.weights.export_files import write_file
from resnet_backbone.weights.load import (
    check_architecture,
    check_settings,
    describe_model,
    fitting_tensors,
    has_bottlenecks,
    load_tensors,
)
from resnet_backbone.weights.metadata import (
    MEAN_IMAGE_KEY,
    METADATA_KEY,
    MODEL_KEY,
    Notes,
    read_notes,
    write_notes,
)
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError
from resnet_backbone.weights.readers import find_file
from resnet_backbone.weights.reading import (
    UnknownInput,
    convention,
    read_checkpoint,
    read_network,
    read_own_tensors,
    read_source,
    read_weights,
    single_precision,
    stated_input,
)
from resnet_backbone.weights.sources import resolve

__all__ = [
    "MEAN_IMAGE_KEY",
    "METADATA_KEY",
    "MODEL_KEY",
    "Description",
    "UnknownInput",
    "check_architecture",
    "describe_weights",
    "load_tensors",
    "load_weights",
    "read_checkpoint",
    "read_header",
    "read_own_tensors",
    "read_weights",
    "save_weights",
    "write_checkpoint",
]


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
    path: str | os.PathLike, preprocessing: str | Preprocessing = ""
) -> Description:
    """Reads what weights say of themselves; of our own files only the header.

    Args:
        path, preprocessing: see :func:`read_checkpoint`.

    Raises:
        WeightsError: missing or damaged file, no preprocessing.
    """
    found = resolve(path)
    file = find_file(found.path)
    if file.suffix == ".safetensors":
        notes = read_header(file)
        if notes.preprocessing is not None or found.preprocessing is not None:
            known = convention(str(path), found, notes, preprocessing)
            known = stated_input(known, notes.model, str(path))
            model = {} if notes.model is None else asdict(notes.model)
            return Description(known, model, notes.has_mean_image)
    read = read_source(path, preprocessing)
    known = stated_input(read.preprocessing, read.stated, str(path))
    model = {} if read.stated is None else asdict(read.stated)
    return Description(known, model, known.mean_image is not None)


def read_header(path: str | os.PathLike) -> Notes:
    """What a local safetensors file says of itself, without its weights.

    Raises:
        WeightsError: the file is missing, damaged or of a later version.
    """
    path = find_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata() or {}, file.keys()
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from error
    return read_notes(metadata, str(path))._replace(has_mean_image=MEAN_IMAGE_KEY in keys)


def write_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike) -> None:
    """Writes a checkpoint as one of our files, atomically.

    Args:
        path: ``.safetensors``.

    Raises:
        WeightsError: another suffix.
    """
    notes = write_notes(checkpoint.preprocessing, checkpoint.model, checkpoint.origin)
    _write(checkpoint.tensors, checkpoint.preprocessing, notes, Path(path))


def save_weights(
    model: nn.Module,
    path: str | os.PathLike,
    preprocessing: Preprocessing,
    metadata: Mapping[str, str] | None = None,
    *,
    run: str = "",
) -> None:
    """Writes a network's weights with their preprocessing as metadata, atomically.

    Networks of this package are named too, wherever they have a name.

    Args:
        metadata: further facts to write beside the preprocessing; ``MODEL_KEY`` names the
            network of another library.
        run: the training run that the weights come from.

    Raises:
        WeightsError: another suffix than ``.safetensors``; a preprocessing of another stride.
    """
    metadata = metadata or {}
    spec = None
    if has_bottlenecks(model):
        check_architecture(model, preprocessing, "what the preprocessing describes")
        preprocessing = replace(preprocessing, stride_in_1x1=model.stride_in_1x1)
    if isinstance(model, StagedNetwork) and MODEL_KEY not in metadata:
        spec = describe_model(model)
    origin = Origin(run=run, reference=preprocessing.source) if run else None
    notes = {**write_notes(preprocessing, spec, origin), **metadata}
    _write(model.state_dict(), preprocessing, notes, Path(path))


def _write(
    state: Mapping[str, Tensor], preprocessing: Preprocessing, notes: dict[str, str], path: Path
) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written to .safetensors files")
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    if preprocessing.mean_image is not None:
        tensors[MEAN_IMAGE_KEY] = preprocessing.mean_image.detach().cpu().contiguous()
    write_file(save(tensors, notes), path)  # not save_file, whose files only their owner can read


def load_weights(
    model: StagedNetwork, path: str | os.PathLike, preprocessing: str | Preprocessing = ""
) -> Preprocessing:
    """Loads weights into a network and returns the preprocessing that its input now needs.

    A backbone leaves out the file's head and deeper stages; everything it has must be in the
    file with the same shape.

    Args:
        path, preprocessing: see :func:`read_checkpoint`.

    Raises:
        WeightsError: see :func:`read_weights`; also another ``stride_in_1x1``, BN epsilon or
            shortcut than the weights were trained with, and missing, unknown or wrongly shaped
            tensors. The network is unchanged then.
    """
    read = read_network(path, preprocessing)
    check_architecture(model, read.preprocessing, str(path))
    tensors = fitting_tensors(model, single_precision(read.tensors), str(path))
    check_settings(model, read.stated, str(path))
    model.load_state_dict(tensors, strict=False)
    return read.preprocessing
