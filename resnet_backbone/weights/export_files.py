"""Bytes of weights files, and writing them whole or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from resnet_backbone.weights.preprocessing import WeightsError
from resnet_backbone.weights.readers import INDEX_SUFFIX

# What the writers of folders leave in them.
FOLDER_PATTERNS = ("config.json", "preprocessor_config.json", "model*.safetensors*")


def torch_bytes(content: Mapping[str, Any]) -> bytes:
    """A file of ``torch.save``, which ``torch.load(weights_only=True)`` reads."""
    stream = io.BytesIO()
    torch.save(_contiguous(content), stream)
    return stream.getvalue()


def _contiguous(content: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            value = value.detach().clone(memory_format=torch.contiguous_format)
        elif isinstance(value, Mapping):
            value = _contiguous(value)
        found[key] = value
    return found


def pickle_bytes(tensors: Mapping[str, Tensor], wrap: Callable[[dict], dict]) -> bytes:
    """A pickle of numpy arrays, as Detectron2 and Detectron1 read it.

    Args:
        wrap: name -> array, to the content of the file.

    Raises:
        WeightsError: bf16, which numpy does not have.
    """
    arrays = {}
    for key, value in tensors.items():
        if value.dtype == torch.bfloat16:
            raise WeightsError(f"{key} is bf16, which numpy does not have: convert to fp16 or fp32")
        arrays[key] = value.detach().contiguous().numpy()
    return pickle.dumps(wrap(arrays), protocol=2)  # Detectron1 is Python 2


def safetensors_files(
    tensors: Mapping[str, Tensor], notes: dict[str, str], shard_size: int | None = None
) -> dict[str, bytes]:
    """``model.safetensors``, or its shards with their index.

    Args:
        notes: metadata of each file.
        shard_size: bytes of tensors in one shard, unless a single tensor has more.
    """
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    shards = _split(tensors, shard_size)
    if len(shards) == 1:
        return {"model.safetensors": save_safetensors(tensors, notes)}
    files, places = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = save_safetensors(shard, notes)
        places |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return {**files, f"model{INDEX_SUFFIX}": json_bytes(index)}


def _split(tensors: dict[str, Tensor], shard_size: int | None) -> list[dict[str, Tensor]]:
    if shard_size is None:
        return [tensors]
    if shard_size <= 0:
        raise WeightsError(f"a shard size is positive, not {shard_size} bytes")
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, value in tensors.items():
        if shards[-1] and filled + value.nbytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][key] = value
        filled += value.nbytes
    return shards


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_file(data: bytes, path: Path) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(files: Mapping[str, bytes], path: Path) -> None:
    """Writes a folder whole or not at all, in place of an earlier one of these writers.

    Raises:
        WeightsError: the folder that is there has something else in it.
    """
    if path.exists():
        _check_replaceable(path)
    new, old = (path.with_name(f"{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        for left in (new, old):
            if left.exists():
                shutil.rmtree(left)


def _check_replaceable(path: Path) -> None:
    if not path.is_dir():
        raise WeightsError(f"{path} is a file, a folder is written here")
    for entry in path.iterdir():
        if not any(entry.match(pattern) for pattern in FOLDER_PATTERNS):
            raise WeightsError(f"{path} has {entry.name} in it: give a folder of its own")
