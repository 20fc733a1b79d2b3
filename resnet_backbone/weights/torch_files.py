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
from typing import Any

import torch
from torch import Tensor

from resnet_backbone.weights.numpy_records import NUMPY_AND_CONTAINERS, Refused, is_shape
from resnet_backbone.weights.pickles import Machine

ZIP_START = b"PK\x03\x04"
# torch/serialization.py: the first two pickles of a file in the older form
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# torch/storage.py: what a storage's class says of its dtype
STORAGE_DTYPES: dict[str, torch.dtype] = {
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


@dataclass
class Storage:
    """A named run of numbers; ``data`` is filled when it is read."""

    key: str
    dtype: torch.dtype
    count: int
    data: Tensor | None = None

    @property
    def itemsize(self) -> int:
        return torch.empty((), dtype=self.dtype).element_size()


@dataclass
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
        return math.prod(self.size) * self.storage.itemsize

    def tensor(self) -> Tensor:
        """A contiguous copy, so that what else the storage holds is freed."""
        window = self.storage.data.as_strided(self.size, self.stride, self.offset)
        return window.clone(memory_format=torch.contiguous_format)


def _rebuild_tensor(storage, offset, size, stride, *_: Any) -> TensorRecord:
    """Further arguments say whether it needs gradients, and its hooks: none for weights."""
    return TensorRecord(storage, offset, size, stride)


def _rebuild_parameter(data: Any, *_: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise Refused("a parameter that is not a tensor")
    return data


def _size(values: Any = ()) -> tuple:
    if not isinstance(values, (tuple, list)):
        raise Refused("a torch.Size that is not a list")
    return tuple(values)


NAMES = {
    **NUMPY_AND_CONTAINERS,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


class _Storages:
    """The storages that a pickle refers to, by their keys."""

    def __init__(self):
        self.found: dict[str, Storage] = {}

    def persistent(self, identity: Any) -> Storage:
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
        storage = self.found.setdefault(key, Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise Refused(f"storage {key[:80]} with two dtypes or sizes")
        return storage


def _numbers(data: bytes | memoryview, storage: Storage) -> Tensor:
    if len(data) != storage.count * storage.itemsize:
        raise Refused(f"storage {storage.key[:80]} with {len(data)} bytes for {storage.count}")
    if not data:
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype is torch.bool:  # any other byte in a bool is undefined behaviour
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


def read_torch(data: bytes) -> tuple[Any, Callable[[list[TensorRecord]], None]]:
    """The object of a ``torch.save`` file, with a record in place of each tensor.

    Returns:
        (object, function that reads the storages of the records given to it)

    Raises:
        ValueError or another error of the parsers: not such a file, damaged, or not only data.
    """
    return _read_zip(data) if data[:4] == ZIP_START else _read_legacy(data)


def _read_zip(data: bytes):
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
    storages = _Storages()
    found = Machine(NAMES, storages.persistent).run(io.BytesIO(archive.read(pickles[0])))

    def fill(records: list[TensorRecord]) -> None:
        for storage in {id(record.storage): record.storage for record in records}.values():
            storage.data = _numbers(archive.read(f"{folder}/data/{storage.key}"), storage)

    return found, fill


def _read_legacy(data: bytes):
    stream, storages = io.BytesIO(data), _Storages()
    if Machine({}).run(stream) != LEGACY_MAGIC or Machine({}).run(stream) != LEGACY_VERSION:
        raise Refused("another beginning than torch.save writes")
    system = Machine({}).run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("numbers in big-endian byte order")
    found = Machine(NAMES, storages.persistent).run(stream)
    keys = Machine({}).run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("a list of storages that is none")
    if sorted(keys) != sorted(storages.found):
        raise Refused("storages that its tensors do not refer to, or the reverse")
    payload = memoryview(data)
    places, position = {}, stream.tell()
    for key in keys:
        storage = storages.found[key]
        (count,) = struct.unpack_from("<q", data, position)
        size = storage.count * storage.itemsize
        if count != storage.count or position + 8 + size > len(data):
            raise Refused(f"storage {key[:80]} with {count} of {storage.count} numbers")
        places[key] = payload[position + 8 : position + 8 + size]
        position += 8 + size
    if position != len(data):
        raise Refused(f"{len(data) - position} bytes behind its end")

    def fill(records: list[TensorRecord]) -> None:
        for storage in {id(record.storage): record.storage for record in records}.values():
            storage.data = _numbers(places[storage.key], storage)

    return found, fill
