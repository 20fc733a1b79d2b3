"""Exports checkpoints to other libraries, which load the files strictly and get the same logits.

For libraries that only take RGB in 0..1, the channel order is folded into the first convolution,
and mean and std are converted to this range. A network that a library cannot represent is refused;
the error names the formats that can.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from resnet_backbone.runtime.files import whole_file
from resnet_backbone.weights.architecture import deepest_stage
from resnet_backbone.weights.checkpoint import Checkpoint, write_checkpoint
from resnet_backbone.weights.convert import convert_input
from resnet_backbone.weights.keymaps import LAYOUTS, check_support
from resnet_backbone.weights.keymaps.huggingface import hugging_face_model, hugging_face_processor
from resnet_backbone.weights.keymaps.torchvision import timm_config
from resnet_backbone.weights.preprocessing import INPUT_SETTINGS, WeightsError
from resnet_backbone.weights.readers import INDEX_SUFFIX, PREPROCESSING_KEY, SUFFIXES

# All that these writers put in a folder.
FOLDER_PATTERNS = ("config.json", "preprocessor_config.json", "model*.safetensors*")


@dataclass(frozen=True)
class Format:
    """The files of a library."""

    suffixes: tuple[str, ...]  # of the file; empty: a folder
    value_range: float | None = None  # of the library's input before normalization; None: any
    rgb: bool = False  # whether its input is always RGB


BN_EPS = 1e-5  # of other libraries' batch norms; their files do not state it
FORMATS = {
    "resnet_backbone": Format((".safetensors",)),
    "torchvision": Format((".pth", ".safetensors"), 1.0, rgb=True),
    "timm": Format((), 1.0, rgb=True),
    "huggingface": Format((), 1.0, rgb=True),
    "detectron2": Format((".pkl", ".pth"), 255.0),
    "caffe2": Format((".pkl",), 255.0),
}


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path  # a file or folder
    checkpoint: Checkpoint  # converted to the library's input
    usage: str  # lines of code or configuration that load it, with the transform to use


def export_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike,
    format: str,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
) -> Exported:
    """Writes a checkpoint for a library, atomically.

    Args:
        path: a file with a suffix of the format, or a folder for "timm" and "huggingface".
        format: a name of ``FORMATS``.
        overwrite: replace an existing file or folder.
        shard_size: largest size of a "huggingface" shard in bytes, unless one tensor is larger;
            None for a single file.

    Raises:
        WeightsError: a network or preprocessing that the library does not have, a wrong suffix,
            an existing target.
    """
    path = Path(path)
    check_target(path, format, overwrite)
    if shard_size is not None and format != "huggingface":
        raise WeightsError(f"only huggingface files are sharded, not {format}")
    written = for_format(checkpoint, format)
    if format == "resnet_backbone":
        write_checkpoint(written, path)
        return Exported(path, written, _usage(written, format, path))
    tensors = LAYOUTS[format].from_ours(written.tensors, written.model)
    whole = torch.contiguous_format  # copies: views would bring all of their storage
    tensors = {key: value.detach().clone(memory_format=whole) for key, value in tensors.items()}
    if FORMATS[format].suffixes:
        with whole_file(path) as file:
            file.write_bytes(_file_bytes(tensors, written, format, path.suffix))
    else:
        files = _safetensors_files(tensors, written, shard_size)
        if format == "timm":
            files["config.json"] = _json_bytes(timm_config(written))
        else:
            files["config.json"] = _json_bytes(hugging_face_model(written))
            processor = hugging_face_processor(written.preprocessing)
            files["preprocessor_config.json"] = _json_bytes(processor)
        _write_folder(files, path)
    return Exported(path, written, _usage(written, format, path))


def check_target(path: Path, format: str, overwrite: bool) -> None:
    """Checks that an export may be written to a path.

    Raises:
        WeightsError: an unknown format, another suffix, an existing target, a missing folder.
    """
    if format not in FORMATS:
        raise WeightsError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    suffixes = FORMATS[format].suffixes
    if suffixes and path.suffix not in suffixes:
        raise WeightsError(f"{path}: {format} is written to {' or '.join(suffixes)} files")
    if not suffixes and path.suffix in SUFFIXES:
        raise WeightsError(f"{path}: {format} writes a folder; give a name without suffix")
    if path.is_dir() and suffixes:
        raise WeightsError(f"{path} is a folder, but {format} writes one file")
    if path.exists() and not overwrite:
        raise WeightsError(
            f"{path} already exists: choose another name, or overwrite it (--overwrite)"
        )
    if not path.parent.is_dir():
        raise WeightsError(f"{path}: the folder {path.parent} does not exist")


def for_format(checkpoint: Checkpoint, format: str) -> Checkpoint:
    """Converts a checkpoint exactly to the input that a library gives its networks.

    Raises:
        WeightsError: the library has no such network, and no exact conversion exists.
    """
    rules, preprocessing = FORMATS[format], checkpoint.preprocessing
    if format == "resnet_backbone":
        return checkpoint
    _check_network(checkpoint, format)
    order = "RGB" if rules.rgb else preprocessing.channel_order
    checkpoint = convert_input(checkpoint, channel_order=order, value_range=rules.value_range)
    stride = checkpoint.preprocessing.stride_in_1x1
    if not checkpoint.has_bottlenecks and rules.rgb:
        stride = False  # the libraries' configs state it even without bottlenecks
    elif checkpoint.has_bottlenecks and stride is None:
        raise WeightsError("the stride of these bottlenecks is unknown: state it")
    return checkpoint.restated(stride_in_1x1=stride)


def refuse_other_inputs(checkpoint: Checkpoint, format: str) -> None:
    """Raises WeightsError for a mean image or a BN epsilon that a library's networks lack."""
    eps = checkpoint.preprocessing.bn_eps
    if checkpoint.preprocessing.mean_image is not None:
        raise WeightsError(
            f"these weights subtract a per-pixel mean image, which {format} cannot hold: "
            "add --to resnet_backbone, or --accept-channel-means to use its channel means, which "
            "is not exact"
        )
    if checkpoint.has_batch_norms and eps != BN_EPS:
        raise WeightsError(
            f"these weights have BN eps {eps}, but {format} builds batch norms with {BN_EPS}: "
            f"convert with --bn-eps-to {BN_EPS}"
        )


def _check_network(checkpoint: Checkpoint, format: str) -> None:
    check_support(format, checkpoint.model)
    refuse_other_inputs(checkpoint, format)
    name, deepest = checkpoint.model.name, deepest_stage(checkpoint.tensors)
    if format in ("torchvision", "timm") and deepest not in ("res5", "conv5"):
        raise WeightsError(f"these weights end at {deepest}, but {format}'s {name} has all stages")
    if format == "timm" and name.startswith("vgg") and "fc7.weight" not in checkpoint.tensors:
        raise WeightsError(
            f"timm's {name} has fc6 and fc7 even without a head, but these weights lack them: use "
            "--to torchvision, detectron2, or resnet_backbone"
        )


def _file_bytes(
    tensors: dict[str, Tensor], checkpoint: Checkpoint, format: str, suffix: str
) -> bytes:
    if suffix == ".safetensors":
        return _safetensors_files(tensors, checkpoint)["model.safetensors"]
    if format == "torchvision":
        return _torch_bytes(tensors)
    stated = {PREPROCESSING_KEY: checkpoint.preprocessing.to_json()}
    if format == "caffe2":
        return _pickle_bytes("blobs", tensors, stated)
    # with the key of our detectors, whose loader checks it
    tensors = {**tensors, INPUT_SETTINGS: checkpoint.preprocessing.to_tensor()}
    beside = {"__author__": "resnet_backbone", "matching_heuristics": True, **stated}
    if suffix == ".pkl":
        return _pickle_bytes("model", tensors, beside)
    return _torch_bytes({"model": tensors, **beside})


def _torch_bytes(content: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _pickle_bytes(key: str, tensors: Mapping[str, Tensor], beside: Mapping[str, Any]) -> bytes:
    for name, value in tensors.items():
        if value.dtype == torch.bfloat16:
            raise WeightsError(
                f"{name} is bf16, which numpy does not have: convert to fp16 or fp32"
            )
    arrays = {name: value.numpy() for name, value in tensors.items()}
    return pickle.dumps({key: arrays, **beside}, protocol=2)  # Detectron1 is Python 2


def _safetensors_files(
    tensors: Mapping[str, Tensor], checkpoint: Checkpoint, shard_size: int | None = None
) -> dict[str, bytes]:
    """Returns ``model.safetensors``, or shards with their index; each has the metadata."""
    texts = {"format": "pt", **checkpoint.metadata()}  # transformers requires "format"
    shards = _split(tensors, shard_size)
    if len(shards) == 1:
        return {"model.safetensors": save_safetensors(tensors, texts)}
    files, places = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = save_safetensors(shard, texts)
        places |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return {**files, f"model{INDEX_SUFFIX}": _json_bytes(index)}


def _split(tensors: dict[str, Tensor], shard_size: int | None) -> list[dict[str, Tensor]]:
    if shard_size is None:
        return [tensors]
    if shard_size <= 0:
        raise WeightsError(f"the shard size must be positive, not {shard_size} bytes")
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, value in tensors.items():
        if shards[-1] and filled + value.nbytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][key] = value
        filled += value.nbytes
    return shards


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write_folder(files: Mapping[str, bytes], path: Path) -> None:
    """Writes a folder atomically; it may replace one that was written here before.

    Raises:
        WeightsError: the existing folder has other files in it.
    """
    if path.exists() and not path.is_dir():
        raise WeightsError(f"{path} is a file, but a folder is to be written")
    for entry in path.iterdir() if path.exists() else ():
        if not any(entry.match(pattern) for pattern in FOLDER_PATTERNS):
            raise WeightsError(f"{path} contains {entry.name}: choose another folder")
    old = path.with_name(f"{path.name}.{os.getpid()}.old")
    try:
        with whole_file(path) as new:
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
            if path.exists():
                os.replace(path, old)
    finally:
        if old.exists() and path.exists():
            shutil.rmtree(old)
        elif old.exists():
            os.replace(old, path)


def _usage(checkpoint: Checkpoint, format: str, path: Path) -> str:
    """Returns lines of Python or YAML that load a file, with its input transform."""
    lines, preprocessing = LAYOUTS[format].usage(checkpoint, path), checkpoint.preprocessing
    has_test = format in ("torchvision", "timm", "huggingface")
    if has_test and None in (preprocessing.resize_size, preprocessing.crop_size):
        lines.append("# sizes of the test are the usual ones: the weights do not say theirs")
    if format == "torchvision" and checkpoint.model.num_classes is None:
        lines.append("# the weights have no head: torchvision's stays as it is initialized")
    return "\n".join(lines)
