"""Reading and writing weights. Only safetensors files are read: nothing in them is executable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from resnet_backbone.models import BottleneckBlock, FrozenBatchNorm2d, StagedNetwork
from resnet_backbone.weights.keymaps import from_torchvision
from resnet_backbone.weights.preprocessing import (
    Preprocessing,
    WeightsError,
    get_preprocessing,
)

METADATA_KEY = "resnet_backbone.preprocessing"
MODEL_KEY = "resnet_backbone.model"  # the network's name, number of classes and options
MEAN_IMAGE_KEY = "preprocessing.mean_image"
OUR_FIRST_KEYS = ("stem.conv1.weight", "stem.weight", "conv1.0.weight")  # ResNet, CIFAR, VGG


def read_weights(
    path: str | os.PathLike, preprocessing: str = ""
) -> tuple[dict[str, Tensor], Preprocessing]:
    """Reads a network's weights and what they expect of their input.

    Args:
        path: a ``.safetensors`` file with our key names or torchvision's.
        preprocessing: a name of ``PREPROCESSINGS``, needed for files that do not carry their
            own; one that contradicts the file is an error.

    Returns:
        (state dict in our key names, fp32; preprocessing)

    Raises:
        WeightsError: missing or damaged file, unknown keys, non-finite values, no preprocessing.
    """
    tensors, found = read_own_tensors(path, preprocessing)
    if not any(key in tensors for key in OUR_FIRST_KEYS):
        try:
            tensors = from_torchvision(tensors)
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error
    tensors = {k: v.float() for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    return tensors, found


def read_own_tensors(
    path: str | os.PathLike, preprocessing: str = ""
) -> tuple[dict[str, Tensor], Preprocessing]:
    """As :func:`read_weights`, with the tensors as they are in the file."""
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {key} has NaN or infinite values")
    found = _preprocessing_of(path, metadata, preprocessing)
    mean_image = tensors.pop(MEAN_IMAGE_KEY, None)
    if mean_image is not None:
        found = replace(found, mean_image=mean_image.float())
    return tensors, found


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


def describe_weights(path: str | os.PathLike, preprocessing: str = "") -> Description:
    """Reads what a file says of itself, not its tensors; arguments as for :func:`read_weights`.

    Raises:
        WeightsError: missing or damaged file, no preprocessing.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata, keys = file.metadata() or {}, set(file.keys())
    return Description(
        _preprocessing_of(path, metadata, preprocessing),
        _model_of(path, metadata),
        MEAN_IMAGE_KEY in keys,
    )


def _model_of(path: Path, metadata: Mapping[str, str]) -> dict:
    if MODEL_KEY not in metadata:
        return {}
    try:
        found = json.loads(metadata[MODEL_KEY])
        return {"name": found["name"], "options": {}, **found}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: unreadable {MODEL_KEY} in its metadata ({error})") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: only .safetensors files are read here")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; check MODEL.WEIGHTS or the path")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from error


def _preprocessing_of(path: Path, metadata: Mapping[str, str], name: str) -> Preprocessing:
    if METADATA_KEY in metadata:
        found = Preprocessing.from_json(metadata[METADATA_KEY])
        if name and replace(get_preprocessing(name), source="") != replace(found, source=""):
            raise WeightsError(f"{path} carries its own preprocessing, which is not {name!r}")
        return found
    if not name:
        raise WeightsError(
            f"{path} does not say which input it was trained on: name it, msra, caffe_vgg or "
            "torchvision (RESNET_BACKBONE.WEIGHTS_PREPROCESSING in a config)"
        )
    return get_preprocessing(name)


def save_weights(
    model: nn.Module,
    path: str | os.PathLike,
    preprocessing: Preprocessing,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a network's weights with their preprocessing as metadata, atomically.

    Args:
        metadata: further facts to write beside the preprocessing, such as the model's name.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written to .safetensors files")
    tensors = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    if preprocessing.mean_image is not None:
        tensors[MEAN_IMAGE_KEY] = preprocessing.mean_image.detach().cpu().contiguous()
    notes = {**(metadata or {}), METADATA_KEY: preprocessing.to_json()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # not save_file, whose files only their owner can read
        temporary.write_bytes(save(tensors, notes))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(
    model: StagedNetwork, path: str | os.PathLike, preprocessing: str = ""
) -> Preprocessing:
    """Loads a file into a network and returns the preprocessing that its input now needs.

    A backbone leaves out the file's head and deeper stages; everything it has must be in the
    file with the same shape.

    Raises:
        WeightsError: see :func:`read_weights`; also another ``stride_in_1x1`` than the weights
            were trained with, and missing, unknown or wrongly shaped tensors. The network is
            unchanged then.
    """
    tensors, found = read_weights(path, preprocessing)
    check_architecture(model, found, str(path))
    load_tensors(model, tensors, str(path))
    return found


def check_architecture(model: StagedNetwork, preprocessing: Preprocessing, where: str) -> None:
    """Refuses weights whose stride position or BN epsilon differs from the network's."""
    expected = preprocessing.stride_in_1x1
    actual = getattr(model, "stride_in_1x1", None)
    bottlenecks = any(isinstance(module, BottleneckBlock) for module in model.modules())
    if bottlenecks and expected is not None and actual is not None and expected != actual:
        raise WeightsError(
            f"{where} was trained with stride_in_1x1={expected}, this network has {actual}: "
            f"build it with stride_in_1x1={expected} (MODEL.RESNETS.STRIDE_IN_1X1 {expected})"
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)):
            if module.eps != preprocessing.bn_eps:
                raise WeightsError(
                    f"{where} was trained with BN eps {preprocessing.bn_eps}, {name} has "
                    f"{module.eps}"
                )


def load_tensors(model: StagedNetwork, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors into a network: all or nothing."""
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in tensors]
    if missing:
        raise WeightsError(
            f"{where} lacks {len(missing)} tensors of this network, the first is {missing[0]}; "
            "is it another depth or norm? (a backbone without head has out_features)"
        )
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            raise WeightsError(
                f"{where}: {key} has shape {tuple(tensors[key].shape)}, "
                f"this network needs {tuple(value.shape)}"
            )
    left_out = tuple(f"{name}." for name in model.left_out)
    for key in tensors:
        if key not in own and not key.startswith(left_out):
            raise WeightsError(f"{where}: this network has no {key}; is it another depth?")
    model.load_state_dict({key: tensors[key] for key in own}, strict=False)
