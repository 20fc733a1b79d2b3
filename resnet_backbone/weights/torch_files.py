"""Files of ``torch.save``, zip archives and the older plain form, read as data.

Nothing is executed and nothing is allocated beyond the file's size, see
:mod:`resnet_backbone.weights.pickles`. Everything ends on the CPU, whatever device the file names.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resnet_backbone.weights.pickles import (
    NAMES,
    DataUnpickler,
    Refused,
    StandIn,
    inert,
    is_shape,
)

ZIP_START = b"PK\x03\x04"
# torch/serialization.py: the first two pickles of a file in the older form
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
# torch/storage.py: what a storage's class says of its dtype
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Storage:
    """A named run of numbers in a file of ``torch.save``.

    Attributes:
        read: its bytes in the file.
    """

    key: str
    dtype: torch.dtype
    count: int
    read: Callable[[Storage], bytes | memoryview]

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @cached_property
    def numbers(self) -> Tensor:
        data = self.read(self)
        if len(data) != self.nbytes:
            raise Refused(f"storage {self.key[:80]} with {len(data)} bytes for {self.count}")
        if not data:
            return torch.empty(0, dtype=self.dtype)
        if self.dtype is torch.bool:  # any other byte in a bool is undefined behavior
            return torch.frombuffer(bytearray(data), dtype=torch.uint8) != 0
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


@dataclass(frozen=True)
class TensorRecord:
    """What a pickle says of a tensor: a window on a storage, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.storage, Storage) or type(self.offset) is not int:
            raise Refused("a tensor without storage")
        if not is_shape(self.size) or not is_shape(self.stride):
            raise Refused("a tensor with an impossible shape")
        if len(self.size) != len(self.stride) or self.offset < 0:
            raise Refused("a tensor whose shape, strides and offset do not fit together")
        steps = zip(self.size, self.stride, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        count = math.prod(self.size)
        if count > self.storage.count or (count and last >= self.storage.count):
            raise Refused(
                f"a tensor of shape {self.size} in a storage of {self.storage.count} numbers"
            )

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """A contiguous copy, so that what else the storage holds is freed."""
        window = self.storage.numbers.as_strided(self.size, self.stride, self.offset)
        return window.clone(memory_format=torch.contiguous_format)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRecord:
    """Further arguments say whether it needs gradients, and its hooks: none for weights."""
    return TensorRecord(storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise Refused("a parameter that is not a tensor")
    return data


def _size(values: Any = ()) -> tuple:
    if not isinstance(values, (tuple, list)):
        raise Refused("a torch.Size that is not a list")
    return tuple(values)


TORCH_NAMES = {
    **NAMES,
    ("torch", "Size"): StandIn(_size),
    ("torch", "device"): inert("torch.device"),
    ("torch._utils", "_rebuild_tensor"): StandIn(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(_tensor),
    ("torch._utils", "_rebuild_parameter"): StandIn(_parameter),
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


def read_torch(data: bytes) -> Any:
    """The object of a ``torch.save`` file, with a record in place of each tensor.

    Raises:
        ValueError or another error of the parsers: not such a file, damaged, or not only data.
    """
    return _read_zip(data) if data[:4] == ZIP_START else _read_legacy(data)


class _Storages:
    """The storages that a pickle refers to, by their keys."""

    def __init__(self, read: Callable[[Storage], bytes | memoryview]):
        self.read, self.found = read, {}

    def __call__(self, identity: Any) -> Storage:
        """("storage", dtype, key, device, count) -> storage; the older form adds its view."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise Refused("a reference to something else than a storage")
        kind, dtype, key, _, count, *view = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Refused("a reference to something else than a storage of numbers")
        if type(count) is not int or not 0 <= count < 2**62:
            raise Refused("a storage of an impossible size")
        if view and view[0] is not None:
            raise Refused("a storage that is part of another (torch before 0.4)")
        storage = self.found.setdefault(key, Storage(key, dtype, count, self.read))
        if (storage.dtype, storage.count) != (dtype, count):
            raise Refused(f"storage {key[:80]} with two dtypes or sizes")
        return storage


def _read_zip(data: bytes) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise Refused("two entries of one name in the archive")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise Refused("a compressed entry, which torch.save does not write (torch.jit.save does)")
    if sum(info.file_size for info in entries.values()) > len(data):
        raise Refused("an archive whose entries are together larger than the file")
    pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise Refused("an archive without data.pkl: is it a TorchScript or another zip file?")
    folder = pickles[0].partition("/")[0]
    if f"{folder}/byteorder" in entries and archive.read(f"{folder}/byteorder") != b"little":
        raise Refused("numbers in big-endian byte order")
    storages = _Storages(lambda storage: archive.read(f"{folder}/data/{storage.key}"))
    return DataUnpickler(io.BytesIO(archive.read(pickles[0])), TORCH_NAMES, storages).load()


def _read_legacy(data: bytes) -> Any:
    stream, places = io.BytesIO(data), {}
    storages = _Storages(lambda storage: places[storage.key])
    magic, version, system = (DataUnpickler(stream, {}).load() for _ in range(3))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
        raise Refused("another beginning than torch.save writes")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("numbers in big-endian byte order")
    found = DataUnpickler(stream, TORCH_NAMES, storages).load()
    keys = DataUnpickler(stream, {}).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("an invalid storage list")
    if sorted(keys) != sorted(storages.found):
        raise Refused("storages that its tensors do not refer to, or the reverse")
    position = stream.tell()
    for key in keys:
        storage = storages.found[key]
        (count,) = struct.unpack_from("<q", data, position)
        end = position + 8 + storage.nbytes
        if count != storage.count or end > len(data):
            raise Refused(f"storage {key[:80]} with {count} of {storage.count} numbers")
        places[key] = memoryview(data)[position + 8 : end]
        position = end
    if position != len(data):
        raise Refused(f"{len(data) - position} bytes behind its end")
    return found
