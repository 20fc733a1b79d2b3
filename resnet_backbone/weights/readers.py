"""Reads weight files of all common formats as numbers only: nothing in them is executed.

A file that is incomplete, of another format than its name says, or more than data raises
:class:`WeightsError`. A malicious file can still take much time or memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.pickles import Array, Refused, load_torch, unpickle
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS, WeightsError, one_line

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".safetensors.index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".pkl")
TORCH_STARTS = (b"P", b"\x80")  # PK, an archive; before PyTorch 1.6 a pickle
CONTAINERS = {".safetensors": "safetensors", ".pkl": "pickle", ".json": "safetensors index"}
# The first of these in a folder is read. transformers and timm write these names.
FOLDER_FILES = ("model.safetensors", f"model{INDEX_SUFFIX}", "pytorch_model.bin")
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)
MAX_JSON = 10_000_000  # bytes of an index; the largest networks need a tenth
MAX_GROWTH = 2  # limit of all tensors' size over the file's size; more means shared storages
# Keys under which trainers write weights, in order of preference.
WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "blobs"),
    *("weights", "params", "teacher", "student", "ema_state_dict", "state_dict_ema", "model_ema"),
)
# First bytes of files that are not weights -> description.
OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<!doctype html": "a web page, not a file of weights: download the file itself",
    b"<html": "a web page, not a file of weights: download the file itself",
}
MAX_WRAPPERS = 8  # nested; real files have two
PREPROCESSING_KEY = "preprocessing"  # beside the weights: Preprocessing.to_json()
STATED = ("__author__", PREPROCESSING_KEY)  # texts beside the weights that are kept
VARIANCES = ("running_var", "_riv")  # key suffixes; Caffe2's "riv" is a variance, too
# sha256 of torchvision's VGG16_Weights.IMAGENET1K_FEATURES, which is documented to have NaN in
# classifier.*
FEATURES_ONLY = "88682ab5"
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class RawFile:
    """The content of a weight file; tensors are contiguous, finite and on the CPU."""

    tensors: dict[str, Tensor]  # under the file's names without prefixes and momenta
    metadata: dict[str, str]  # safetensors' own, or the texts ``STATED`` beside the weights
    sha256: str  # empty for a sharded file
    container: str  # "safetensors", "sharded safetensors", "torch" or "pickle"
    path: Path
    rest: dict[str, Any] = field(default_factory=dict)  # other content, such as training state
    wrapper: str = ""  # the top-level key of the weights; "" if there is none

    def part(self, key: str) -> dict[str, Tensor]:
        """Returns other weights of the file, under a top-level key or a prefix of key names.

        Raises WeightsError: there are none, or :func:`read_tensors` would refuse them.
        """
        if isinstance(self.rest.get(key), dict):
            with named_errors(self.path):
                found = _to_tensors(_unwrap(self.rest[key])[0], self.path.stat().st_size)
                check_numbers(found, self.path)
                _check_kinds(found)
            return found
        start = f"{key.removesuffix('.')}."
        found = {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
        if not found:
            wrappings = [name for name, value in self.rest.items() if isinstance(value, dict)]
            words = sorted({name.partition(".")[0] for name in self.tensors})
            known = ", ".join([*wrappings, *words][:12])
            raise WeightsError(f"{self.path} has no weights under {key!r}; its keys are {known}")
        return found


def read_tensors(path: str | os.PathLike, file: RawFile | None = None) -> RawFile:
    """Reads the weights of a network, without wrappers, optimizer, prefixes and momenta.

    Raises WeightsError: a missing, damaged or hostile file; values that are not tensors of finite
    numbers.

    Args:
        path: ``.safetensors``; ``.safetensors.index.json`` or a folder with it; torch's ``.pth``,
            ``.pt``, ``.bin``, ``.ckpt``, ``.tar``; ``.pkl`` of numpy arrays.
        file: the same file, if it is open already.
    """
    file = file or open_file(find_file(path))
    with named_errors(file.path):
        _check_kinds(file.tensors)
    return file


def find_file(path: str | os.PathLike) -> Path:
    """Returns the file to read for a path, which may be a folder.

    Raises WeightsError: there is none, or it has an unsupported format.
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
            f"{path}: only {', '.join(SUFFIXES)} files, *{INDEX_SUFFIX} and folders can be read"
        )
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    return path


def open_file(path: Path) -> RawFile:
    """Opens a safetensors file, a pickle of numpy arrays, or a ``torch.save`` file of any name.

    Raises WeightsError: a file that is missing, damaged or more than data; NaN or infinite
    numbers, negative variances.
    """
    with named_errors(path):
        is_index = path.name.endswith(INDEX_SUFFIX)
        file = _read_sharded(path) if is_index else _read_whole(path)
        check_numbers(file.tensors, path)
        return file


def _read_whole(path: Path) -> RawFile:
    data, container = path.read_bytes(), CONTAINERS.get(path.suffix, "torch")
    if not data:
        raise ValueError("it is empty")
    start = data[:200].lstrip().lower()
    other = next((what for begin, what in OTHER_FILES.items() if start.startswith(begin)), "")
    if other:
        raise WeightsError(f"{path} is {other}")
    if container == "torch" and not data.startswith(TORCH_STARTS):
        raise WeightsError(f"{path} is not a file of weights: it begins with {data[:16]!r}")
    digest = hashlib.sha256(data).hexdigest()
    if container == "safetensors":
        tensors = dict(sorted(load_safetensors(data).items()))
        return RawFile(tensors, _metadata(data), digest, container, path)
    loaded = unpickle(data) if container == "pickle" else load_torch(data)
    weights, wrapper = _unwrap(loaded)
    weights.pop(INPUT_SETTINGS, None)  # in files for Detectron2; also stated beside the weights
    if digest.startswith(FEATURES_ONLY):
        weights = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    tensors = _to_tensors(weights, len(data))
    metadata = {key: loaded[key] for key in STATED if isinstance(loaded.get(key), str)}
    rest = {key: value for key, value in loaded.items() if key != wrapper} if wrapper else {}
    return RawFile(tensors, metadata, digest, container, path, rest, wrapper)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns every parser error into a WeightsError of one line that names the file."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # a hostile file can make a parser fail in any way
        cause = one_line(error)
        if isinstance(error, Refused):
            raise WeightsError(f"{path}: refused: it contains {cause}") from error
        kind = CONTAINERS.get(path.suffix, "torch")
        raise WeightsError(f"{path}: not a complete {kind} file ({cause})") from error


def _unwrap(loaded: Any) -> tuple[dict[str, Any], str]:
    """Returns a checkpoint's state dict, without prefixes and momenta, and its outermost key.

    Raises ValueError: there is no state dict, or it is nested too deep.
    """
    outermost = ""
    for _ in range(MAX_WRAPPERS):
        wrapper = _wrapper(loaded)
        if not wrapper:
            break
        outermost = outermost or wrapper
        loaded = loaded[wrapper]
    else:
        raise ValueError("it contains itself, or its weights are nested too deep")
    if not isinstance(loaded, dict):
        raise ValueError(f"its content is of type {type(loaded).__name__}, not a state dict")
    bad = next((key for key in loaded if not isinstance(key, str)), None)
    if bad is not None:
        raise ValueError(f"a key is of type {type(bad).__name__}, not text")
    found = {key: value for key, value in loaded.items() if not key.endswith("_momentum")}
    for prefix in PREFIXES * 2:  # in either order
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found, outermost


def _wrapper(loaded: Any) -> str:
    """Returns the key of the weights in a dict; "" for a state dict itself."""
    keys = WRAPPERS if isinstance(loaded, dict) else ()
    inner = [key for key in keys if isinstance(loaded.get(key), dict)]
    if len(inner) > 1:  # settings may have such a name, too
        kinds = (Tensor, np.ndarray, Array, dict)
        full = [k for k in inner if any(isinstance(v, kinds) for v in loaded[k].values())]
        inner = full or inner
    if len(inner) > 1:
        logger.warning("weights of %r are read; the file also has %s", inner[0], inner[1:])
    return inner[0] if inner else ""


def _to_tensors(weights: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """Copies each tensor or array to a contiguous tensor.

    Args:
        size: bytes of the file; all copies together may have ``MAX_GROWTH`` times as many.
    """
    tensors, total = {}, 0
    for key, value in weights.items():
        value = value.array if isinstance(value, Array) else value
        if not isinstance(value, (Tensor, np.ndarray)):
            raise Refused(f"{key[:80]} of type {type(value).__name__}, which is not a tensor")
        total += value.nbytes
        if total > MAX_GROWTH * size:
            raise Refused(f"more than twice its own size of {size} bytes in tensors")
        if isinstance(value, np.ndarray):
            native = value.astype(value.dtype.newbyteorder("="), order="C")
            tensors[key] = torch.from_numpy(native)
        else:
            tensors[key] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def check_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Checks that numbers are finite and variances not negative.

    Raises WeightsError: names the first tensor with a bad value.
    """
    for key, value in tensors.items():
        if not value.is_floating_point():
            continue
        if not torch.isfinite(value.float()).all():  # networks run in float32
            raise WeightsError(f"{path}: {key[:80]} has NaN or infinite values in float32")
        if key.endswith(VARIANCES) and (value < 0).any():
            raise WeightsError(
                f"{path}: {key[:80]} has negative values, but it is a variance: the file is damaged"
            )


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Checks that tensors have the types of a network's."""
    if not tensors:
        raise Refused("no tensors")
    for key, value in tensors.items():
        counts = value.dim() == 0 or key.endswith((COUNTER, "queue_ptr"))  # of MoCo's queue
        if value.dtype not in DTYPES or not (value.is_floating_point() or counts):
            raise Refused(
                f"{key[:80]} as {value.dtype}; weights are floats: save the network before it "
                "was quantized"
            )


# Containers


def _metadata(data: bytes) -> dict[str, str]:
    """Returns the metadata in the header of a safetensors file that was parsed before."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _read_sharded(index: Path) -> RawFile:
    """Reads all shards of a Hugging Face index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError("it has no weight_map")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in dict.fromkeys(places.values()):
        data = _shard_path(index, name).read_bytes()
        found = load_safetensors(data)
        expected = {key for key, place in places.items() if place == name}
        wrong = sorted(expected ^ found.keys())
        if wrong:
            raise ValueError(
                f"{name} and the index differ in {len(wrong)} keys, such as {wrong[0]}"
            )
        tensors |= found
        metadata |= _metadata(data)
    return RawFile(tensors, metadata, "", "sharded safetensors", index)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ValueError, RecursionError, OSError: too large or not one."""
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON} bytes")
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _shard_path(index: Path, name: Any) -> Path:
    """Returns the path of a shard, which must be in the folder of its index."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0:"):
        raise Refused(f"a shard that is not a .safetensors file beside it: {str(name)[:80]!r}")
    if not (index.parent / name).is_file():
        raise WeightsError(f"{index}: its shard {name} is missing")
    return index.parent / name
