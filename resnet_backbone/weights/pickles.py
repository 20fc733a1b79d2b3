"""Pickles read as data: no name in them is ever imported, no object of theirs is ever called.

Python's own unpickler runs whatever a file names. ``torch.load(weights_only=True)`` does not, but
it allocates what a file asks for: 2 GB for a ``bytearray`` in a file of 100 bytes, 40 MB for a
compressed archive of 40 kB. So each name that containers, numbers, texts and arrays need has a
function of this module in its place, which checks before it allocates; other names are refused.
Arrays become records, whose numbers are copied when they are asked for.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A file can ask for 64 bytes of memory with each of its bytes: a bound on operations bounds that to
# about 100 MB. A ResNet-152 with Adam's state takes 66,000, the CIFAR ResNet-1202 510,000.
MAX_OPERATIONS = 1_000_000
BYTE_ORDERS = ("<", ">", "=", "|")
ARRAY_DTYPES = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 b1".split())


class Refused(ValueError):
    """Something in a file that data do not need."""


@dataclass(frozen=True)
class StandIn:
    """What a pickle gets in place of a function or class that it names."""

    function: Callable


Names = Mapping[tuple[str, str], "StandIn | torch.dtype"]


@dataclass(frozen=True)
class Inert:
    """An object of a class that holds a training's settings: nothing of it is read."""

    name: str


@dataclass(frozen=True)
class Latin1:
    """Bytes that a pickle holds as text. They are encoded where they are used, and once only."""

    text: str

    def __len__(self) -> int:
        return len(self.text)


class DataUnpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, less all that data do not need.

    Args:
        names: (module, name) -> what stands in for it; everything else is refused.
        persistent: turns a persistent id into a value; None: such ids are refused.
    """

    def __init__(
        self, stream: io.BytesIO, names: Names, persistent: Callable[[Any], Any] | None = None
    ):
        super().__init__(stream, encoding="latin1")
        self.names, self.persistent, self.operations = names, persistent, 0

    def count(self, operations: int) -> None:
        self.operations += operations
        if self.operations > MAX_OPERATIONS:
            raise Refused(f"more than {MAX_OPERATIONS} operations")

    def find_class(self, module: str, name: str) -> StandIn | torch.dtype:
        if (module, name) not in self.names:
            raise Refused(f"{module[:80]}.{name[:80]}, which is code and not data")
        return self.names[module, name]

    def persistent_load(self, identity: Any) -> Any:
        if self.persistent is None:
            raise Refused("a reference to something outside of the file")
        return self.persistent(identity)

    def load_reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, StandIn):
            raise Refused("a call of something that is no function")
        if not isinstance(arguments, tuple):
            raise Refused("a call whose arguments are not a tuple")
        self.count(sum(len(each) for each in arguments if isinstance(each, (dict, list, tuple))))
        self.append(called.function(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (ArrayRecord, DtypeRecord)):
            target.build(state)
        elif not isinstance(target, (dict, Inert)):  # an OrderedDict has one: torch's _metadata
            raise Refused(f"a state for a {type(target).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_set_items({}, items))

    def load_appends(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], list):
            raise Refused("something that is appended to what is not a list")
        self.stack[-1].extend(items)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))


def _counted(operation: Callable) -> Callable:
    def counted(unpickler: DataUnpickler) -> None:
        unpickler.count(1)
        operation(unpickler)

    return counted


def _refusal(name: str) -> Callable:
    def refuse(unpickler: DataUnpickler) -> None:
        raise Refused(f"the operation {name}, which data do not need")

    return refuse


def _operations() -> dict[int, Callable]:
    """Code of an operation -> method."""
    found = dict(pickle._Unpickler.dispatch)
    for name in "REDUCE BUILD SETITEM SETITEMS DICT APPENDS BYTEARRAY8".split():
        found[getattr(pickle, name)[0]] = getattr(DataUnpickler, f"load_{name.lower()}")
    found[pickle.NEWOBJ[0]] = DataUnpickler.load_reduce
    others = (
        "DUP POP POP_MARK INST OBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID EMPTY_SET ADDITEMS FROZENSET"
    )
    for name in [*others.split(), "NEXT_BUFFER", "READONLY_BUFFER"]:
        found[getattr(pickle, name)[0]] = _refusal(name)
    return {code: _counted(operation) for code, operation in found.items()}


DataUnpickler.dispatch = _operations()


def _set_items(target: Any, items: list) -> dict:
    if not isinstance(target, dict):
        raise Refused("an item that is set in something else than a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, bytes, int, float)):  # a nested tuple can take forever to hash
            raise Refused(f"a dict with a key of type {type(key).__name__}")
        target[key] = value
    return target


@dataclass
class DtypeRecord:
    """What a pickle says of a numpy dtype."""

    name: str
    byte_order: str = "="

    def build(self, state: Any) -> None:
        """``dtype.__setstate__``: (version, byte order, None, None, None, -1, -1, 0)."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in BYTE_ORDERS:
            raise Refused("a numpy dtype with an unreadable state")
        if any(part is not None for part in state[2:5]):
            raise Refused("a structured numpy dtype")
        self.byte_order = state[1]

    def dtype(self) -> np.dtype:
        order = {"|": "="}.get(self.byte_order, self.byte_order)
        return np.dtype(self.name).newbyteorder(order)


@dataclass
class ArrayRecord:
    """What a pickle says of a numpy array; nothing is allocated before it was checked."""

    shape: tuple[int, ...] = ()
    dtype: DtypeRecord | None = None
    order: str = "C"
    data: bytes | bytearray | Latin1 = b""

    def build(self, state: Any) -> None:
        """``ndarray.__setstate__``: (version, shape, dtype, is_fortran, data)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("a numpy array with an unreadable state")
        _, self.shape, self.dtype, fortran, self.data = state
        self.order = "F" if fortran else "C"
        self.check()

    def check(self) -> None:
        """Refuses sizes that do not fit together."""
        if isinstance(self.data, str):  # Python 2's bytes
            self.data = Latin1(self.data)
        if not isinstance(self.data, (bytes, bytearray, Latin1)):
            raise Refused("a numpy array of objects")
        if not isinstance(self.dtype, DtypeRecord):
            raise Refused("a numpy array without dtype")
        if not is_shape(self.shape):
            raise Refused("a numpy array with an impossible shape")
        if self.nbytes != len(self.data):
            raise Refused(
                f"a numpy array of shape {self.shape} with {len(self.data)} bytes in place of "
                f"{self.nbytes}"
            )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.dtype().itemsize

    def tensor(self) -> Tensor:
        """A contiguous copy in native byte order."""
        self.check()
        data = self.data.text.encode("latin1") if isinstance(self.data, Latin1) else self.data
        array = np.frombuffer(data, self.dtype.dtype()).reshape(self.shape, order=self.order)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def is_shape(values: Any) -> bool:
    """Whether this is a tuple of at most 8 sizes that an index can hold."""
    if not isinstance(values, tuple) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def _dtype(name: Any, *flags: Any) -> DtypeRecord:
    if not isinstance(name, str):
        raise Refused("a numpy dtype without name")
    if name[:1] in BYTE_ORDERS and name[1:] in ARRAY_DTYPES:
        return DtypeRecord(name[1:], name[0])
    if name not in ARRAY_DTYPES:
        known = ", ".join(sorted(ARRAY_DTYPES))
        raise Refused(f"a numpy dtype {name[:80]!r}; weights have {known}")
    return DtypeRecord(name)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> ArrayRecord:
    record = ArrayRecord(shape, dtype, "F" if order == "F" else "C", data)
    record.check()
    return record


def _scalar(dtype: Any, data: Any) -> ArrayRecord:
    return _array(data, dtype, (), "C")


def _ndarray(*arguments: Any) -> None:
    raise Refused("a call of numpy.ndarray")


NDARRAY = StandIn(_ndarray)


def _reconstruct(subtype: Any, shape: Any, dtype: Any) -> ArrayRecord:
    if subtype is not NDARRAY:
        raise Refused("an array that is not a plain numpy.ndarray")
    return ArrayRecord()  # its state follows


def _dict(pairs: Any = ()) -> dict:
    found: dict = {}
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise Refused("an ordered dict of things that are not pairs")
        _set_items(found, list(pair))
    return found


def _encode(text: Any, encoding: Any) -> Latin1:
    """``_codecs.encode``: how Python 3 writes bytes in protocols 0 to 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("a text that is encoded otherwise than in latin1")
    return Latin1(text)


def _bytes(*arguments: Any) -> bytes:
    if arguments:
        raise Refused("a call of bytes with arguments")
    return b""


def inert(name: str) -> StandIn:
    return StandIn(lambda *arguments: Inert(name))


# Module and name in a pickle -> what stands for it.
NAMES: dict[tuple[str, str], StandIn] = {
    ("collections", "OrderedDict"): StandIn(_dict),
    ("collections", "Counter"): StandIn(_dict),
    ("_codecs", "encode"): StandIn(_encode),
    **{(module, "bytes"): StandIn(_bytes) for module in ("builtins", "__builtin__")},
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): StandIn(_dtype),
    # settings that torchvision's, timm's and DINO's trainers write beside the weights
    ("argparse", "Namespace"): inert("argparse.Namespace"),
    ("pathlib", "PosixPath"): inert("pathlib.PosixPath"),
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    NAMES[f"{_core}.multiarray", "_reconstruct"] = StandIn(_reconstruct)
    NAMES[f"{_core}.multiarray", "scalar"] = StandIn(_scalar)
    NAMES[f"{_core}.numeric", "_frombuffer"] = StandIn(_array)
