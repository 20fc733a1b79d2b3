"""Files of weights, of any common kind, read as numbers only: nothing in them is executed.

Every file that is not whole, not what its name says or not only data is a :class:`WeightsError`,
and nothing of it is returned. Memory stays below a small multiple of the file's size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.input_settings import INPUT_SETTINGS
from resnet_backbone.weights.numpy_records import (
    NUMPY_AND_CONTAINERS,
    ArrayRecord,
    Latin1,
    Refused,
)
from resnet_backbone.weights.pickles import Machine
from resnet_backbone.weights.preprocessing import WeightsError, one_line
from resnet_backbone.weights.torch_files import TensorRecord, read_torch

INDEX_SUFFIX = ".safetensors.index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".pkl")
# In a folder, the first of these is read: names that transformers and timm write.
FOLDER_FILES = ("model.safetensors", f"model{INDEX_SUFFIX}", "pytorch_model.bin")
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)
MAX_JSON = 10_000_000  # bytes of an index; those of the largest networks have a tenth
WRAPPERS = ("state_dict", "model", "blobs")
MAX_WRAPPERS = 8  # within one another; real files have two
PREPROCESSING_KEY = "preprocessing"  # beside the weights: Preprocessing.to_json()
STATED = ("__author__", PREPROCESSING_KEY)  # texts beside the weights that are handed on
VARIANCES = ("running_var", "_riv")  # ends of their names; Caffe2's "riv" is one too
# sha256 of torchvision's VGG16_Weights.IMAGENET1K_FEATURES, which by its documentation has no
# values in classifier.*: they are NaN.
FEATURES_ONLY = "88682ab5"
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class RawFile:
    """What a file of weights holds.

    Attributes:
        tensors: as they are in the file, contiguous, finite, on the CPU.
        metadata: of safetensors; of other files the texts ``STATED`` beside the weights.
        sha256: of the file; empty for a sharded one.
        container: "safetensors", "sharded safetensors", "torch" or "pickle".
        path: of the file, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    container: str = ""
    path: str = ""


def read_tensors(path: str | os.PathLike) -> RawFile:
    """Reads the weights of a file, whatever its kind, and drops what is not weights.

    Wrappings (``{"model": ...}``, ``{"state_dict": ...}``, ``{"blobs": ...}``) with their
    optimizers, the prefixes ``module.`` and ``_orig_mod.``, and Detectron1's momenta are removed.

    Args:
        path: ``.safetensors``; ``.safetensors.index.json`` or a folder with it; torch's ``.pth``,
            ``.pt``, ``.bin``, ``.ckpt``, ``.tar``; ``.pkl`` of numpy arrays.

    Raises:
        WeightsError: missing, damaged or hostile file; values that are not tensors of finite
            numbers.
    """
    path = find_file(path)
    try:
        if path.name.endswith(INDEX_SUFFIX):
            found = _read_sharded(path)
        else:
            data = path.read_bytes()
            tensors, metadata = _read(path.suffix, data)
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256.startswith(FEATURES_ONLY):
                tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
            found = RawFile(tensors, metadata, sha256, CONTAINERS[path.suffix])
        _check(found.tensors, path)
    except WeightsError:
        raise
    except Exception as error:  # a hostile file can make a parser fail in any way
        cause = one_line(error)
        if isinstance(error, Refused):
            raise WeightsError(f"{path}: refused, it holds {cause}") from error
        kind = CONTAINERS.get(path.suffix, "safetensors index")
        raise WeightsError(f"{path}: not a whole {kind} file ({cause})") from error
    return replace(found, path=str(path))


def find_file(path: str | os.PathLike) -> Path:
    """The file to read for a path, which may be a folder.

    Raises:
        WeightsError: there is none, or of a kind that is not read.
    """
    path = Path(path)
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"{path} is a folder with none of {', '.join(FOLDER_FILES)}")
    if not path.exists():
        raise WeightsError(f"{path}: no such file; check the path")
    if path.suffix not in SUFFIXES and not path.name.endswith(INDEX_SUFFIX):
        raise WeightsError(
            f"{path}: only {', '.join(SUFFIXES)} files, *{INDEX_SUFFIX} and folders are read here"
        )
    if not path.is_file():
        raise WeightsError(f"{path} is no regular file")
    return path


def _read(suffix: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not data:
        raise ValueError("it is empty")
    if suffix == ".safetensors":
        return dict(sorted(load_safetensors(data).items())), safetensors_metadata(data)
    if suffix == ".pkl":
        stream = io.BytesIO(data)
        loaded = Machine(NUMPY_AND_CONTAINERS).run(stream)
        if stream.tell() != len(data):
            raise ValueError(f"{len(data) - stream.tell()} bytes behind its end")
        fill = _nothing_to_fill
    else:
        loaded, fill = read_torch(data)
    beside = loaded if isinstance(loaded, dict) else {}
    metadata = {key: beside[key] for key in STATED if isinstance(beside.get(key), str)}
    tensors = _to_tensors(unwrap(loaded), fill, len(data))
    tensors.pop(INPUT_SETTINGS, None)  # of a backbone for Detectron2; PREPROCESSING_KEY says it too
    return tensors, metadata


CONTAINERS = {".safetensors": "safetensors", ".pkl": "pickle"} | dict.fromkeys(
    TORCH_SUFFIXES, "torch"
)


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file, which was parsed before."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _nothing_to_fill(records: list) -> None:
    """Arrays of a pickle have their bytes already."""


def unwrap(loaded: Any) -> dict[str, Any]:
    """The state dict within a checkpoint, without prefixes and momenta.

    Raises:
        ValueError: there is none, or more than one.
    """
    for _ in range(MAX_WRAPPERS):
        if not isinstance(loaded, dict):
            break
        inner = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if len(inner) > 1:
            raise ValueError(f"both {' and '.join(inner)} hold weights: save one of them alone")
        if not inner:
            break
        loaded = loaded[inner[0]]
    else:
        raise ValueError(f"it holds itself, or more than {MAX_WRAPPERS} wrappings of its weights")
    if not isinstance(loaded, dict):
        raise ValueError(f"its content is of type {_kind(loaded)}, not a state dict")
    bad = next((key for key in loaded if not isinstance(key, str)), None)
    if bad is not None:
        raise ValueError(f"a key is of type {type(bad).__name__}, not text")
    found = {key: value for key, value in loaded.items() if not key.endswith("_momentum")}
    while found and (prefix := _shared_prefix(found)):
        found = {key[len(prefix) :]: value for key, value in found.items()}
    return found


def _shared_prefix(keys: Mapping[str, Any]) -> str:
    return next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in keys)), "")


def _kind(value: Any) -> str:
    names = {TensorRecord: "tensor", ArrayRecord: "array", Latin1: "bytes"}
    return names.get(type(value), type(value).__name__)


def _to_tensors(
    values: Mapping[str, Any], fill: Callable[[list], None], file_size: int
) -> dict[str, Tensor]:
    for key, value in values.items():
        if not isinstance(value, (TensorRecord, ArrayRecord)):
            raise Refused(f"{key[:80]} of type {_kind(value)}, which is not a tensor")
    if sum(value.nbytes for value in values.values()) > 2 * file_size:  # one storage in many keys
        raise Refused(f"more than twice its own size of {file_size} bytes in tensors")
    fill([value for value in values.values() if isinstance(value, TensorRecord)])
    return {key: _to_tensor(value) for key, value in values.items()}


def _to_tensor(value: TensorRecord | ArrayRecord) -> Tensor:
    if isinstance(value, TensorRecord):
        return value.tensor()
    return torch.from_numpy(value.array().copy())


def _check(tensors: Mapping[str, Tensor], path: Path) -> None:
    if not tensors:
        raise Refused("no tensors")
    for key, value in tensors.items():
        if value.dtype not in DTYPES:
            raise Refused(f"{key[:80]} as {value.dtype}; weights are floats")
        if not value.is_floating_point():
            if value.dim() > 0 and not key.endswith(COUNTER):
                raise Refused(
                    f"{key[:80]} as {value.dtype}; weights are floats: save the network before it "
                    "was quantized"
                )
            continue
        if not torch.isfinite(value.float()).all():  # networks are built in that precision
            raise WeightsError(f"{path}: {key[:80]} has NaN or infinite values in float32")
        if key.endswith(VARIANCES) and (value < 0).any():
            raise WeightsError(
                f"{path}: {key[:80]} has negative values, but it is a variance: the file is damaged"
            )


def _read_sharded(index: Path) -> RawFile:
    """All shards that a Hugging Face index names, each whole."""
    if index.stat().st_size > MAX_JSON:
        raise ValueError(f"an index of more than {MAX_JSON} bytes")
    content = json.loads(index.read_bytes())
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError("it has no weight_map")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in dict.fromkeys(places.values()):
        shard = _shard_path(index, name)
        data = shard.read_bytes()
        found = load_safetensors(data)
        expected = {key for key, place in places.items() if place == name}
        wrong = sorted(expected ^ found.keys())
        if wrong:
            raise ValueError(
                f"{name} and the index differ in {len(wrong)} keys, such as {wrong[0]}"
            )
        tensors |= found
        metadata |= safetensors_metadata(data)
    return RawFile(tensors, metadata, "", "sharded safetensors")


def _shard_path(index: Path, name: Any) -> Path:
    """A shard beside its index: names that lead elsewhere are refused."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0:"):
        raise Refused(f"a shard that is no .safetensors file beside it: {str(name)[:80]!r}")
    if not (index.parent / name).is_file():
        raise WeightsError(f"{index}: its shard {name} is missing")
    return index.parent / name
