"""What pickles say of numpy arrays and containers, as records that are checked before use.

The functions here stand in for the names that such pickles contain, see
:mod:`resnet_backbone.weights.pickles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

BYTE_ORDERS = ("<", ">", "=", "|")
ARRAY_DTYPES = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 b1".split())


class Refused(ValueError):
    """Something in a pickle that data do not need."""


@dataclass
class Latin1:
    """Bytes that a pickle holds as text. They are encoded where they are used, and once only."""

    text: str

    def __len__(self) -> int:
        return len(self.text)


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
        _, self.shape, self.dtype, fortran, data = state
        self.order, self.data = "F" if fortran else "C", _raw(data)
        self.check()

    def check(self) -> None:
        """Refuses sizes that do not fit together."""
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

    def array(self) -> np.ndarray:
        """The array in native byte order, a view of the pickle's bytes where that is possible."""
        self.check()
        data = self.data.text.encode("latin1") if isinstance(self.data, Latin1) else self.data
        array = np.frombuffer(data, self.dtype.dtype()).reshape(self.shape, order=self.order)
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def is_shape(values: Any) -> bool:
    """Whether this is a tuple of at most 8 sizes that an index can hold."""
    if not isinstance(values, tuple) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def _raw(data: Any) -> bytes | bytearray | Latin1:
    if isinstance(data, str):  # Python 2's bytes
        return Latin1(data)
    if isinstance(data, (bytes, bytearray, Latin1)):
        return data
    raise Refused("a numpy array of objects")


def _dtype(name: Any, *flags: Any) -> DtypeRecord:
    if not isinstance(name, str):
        raise Refused("a numpy dtype without name")
    if name[:1] in BYTE_ORDERS and name[1:] in ARRAY_DTYPES:
        return DtypeRecord(name[1:], name[0])
    if name not in ARRAY_DTYPES:
        known = ", ".join(sorted(ARRAY_DTYPES))
        raise Refused(f"a numpy dtype {name[:80]!r}; weights have {known}")
    return DtypeRecord(name)


def _ndarray(*args: Any) -> None:
    raise Refused("a call of numpy.ndarray")


def _reconstruct(subtype: Any, shape: Any, dtype: Any) -> ArrayRecord:
    if subtype is not _ndarray:
        raise Refused("an array that is not a plain numpy.ndarray")
    return ArrayRecord()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> ArrayRecord:
    record = ArrayRecord(shape, dtype, "F" if order == "F" else "C", _raw(data))
    record.check()
    return record


def _scalar(dtype: Any, data: Any) -> ArrayRecord:
    record = ArrayRecord((), dtype, "C", _raw(data))
    record.check()
    return record


def _encode(text: Any, encoding: Any) -> Latin1:
    """``_codecs.encode``: how Python 3 writes bytes in protocols 0 to 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("a text that is encoded otherwise than in latin1")
    return Latin1(text)


def _bytes(*args: Any) -> bytes:
    if args:
        raise Refused("a call of bytes with arguments")
    return b""


def _dict(pairs: Any = ()) -> dict:
    found: dict = {}
    items = pairs.items() if isinstance(pairs, dict) else pairs
    for pair in items:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise Refused("an ordered dict of things that are not pairs")
        set_item(found, pair[0], pair[1])
    return found


def set_item(target: Any, key: Any, value: Any) -> None:
    if type(target) is not dict:
        raise Refused("an item that is set in something else than a dict")
    if not isinstance(key, (str, bytes, int, float)):  # a nested tuple can take forever to hash
        raise Refused(f"a dict with a key of type {type(key).__name__}")
    target[key] = value


# Module and name in a pickle -> what stands for it here.
NUMPY_AND_CONTAINERS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    NUMPY_AND_CONTAINERS[(f"{_core}.multiarray", "_reconstruct")] = _reconstruct
    NUMPY_AND_CONTAINERS[(f"{_core}.multiarray", "scalar")] = _scalar
    NUMPY_AND_CONTAINERS[(f"{_core}.numeric", "_frombuffer")] = _frombuffer
