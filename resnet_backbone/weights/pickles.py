"""Reads pickles as data: nothing that they name is ever imported or called.

Python's own unpickler runs whatever a file names. Here a class of this module replaces each name
that containers, numbers, texts and numpy arrays need, and other names are refused. Tensors in
``torch.save`` files are built by torch's own restricted reader.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

ZIP_START = b"PK\x03\x04"

# Each byte of a file can allocate 64 bytes of memory: this limit on operations keeps that below
# about 100 MB. The 7,000 arrays of a CIFAR ResNet-1202 take 250,000 operations.
MAX_OPERATIONS = 1_000_000
ARRAY_DTYPES = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 b1".split())


class Refused(ValueError):
    """Content of a file that is more than data."""


class Inert:
    """A placeholder for an object with training settings, whose content is ignored."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Text(Inert):
    """``_codecs.encode``, as Python 3 writes bytes in protocols 0 to 2; the result stays text."""

    def __new__(cls, text: str, encoding: str) -> str:
        return text


class NoBytes(Inert):
    """``bytes``, as Python 3 writes b"" in protocols 0 to 2."""

    def __new__(cls) -> bytes:
        return b""


class Dtype:
    """``numpy.dtype`` for numbers only."""

    def __init__(self, name: Any, *flags: Any):
        if not isinstance(name, str) or name.lstrip("<>=|") not in ARRAY_DTYPES:
            known = ", ".join(sorted(ARRAY_DTYPES))
            raise Refused(f"a numpy dtype {str(name)[:80]!r}; weights have {known}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        """(version, byte order, None, None, None, -1, -1, 0)"""
        _, order, *structure = state[:5]
        if structure != [None] * 3:
            raise Refused("a structured numpy dtype")
        self.dtype = self.dtype.newbyteorder(order)


class Array:
    """``numpy.ndarray``, also as protocol 5 builds it: a view of the bytes in the file."""

    array = np.empty(0)

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any = "C"):
        if isinstance(data, str):  # Python 2's bytes
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, Dtype):
            raise Refused("a numpy array of objects")
        if min(shape, default=0) < 0:
            raise Refused(f"a numpy array of the impossible shape {shape}")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)

    def __setstate__(self, state: Any) -> None:
        """(version, shape, dtype, is_fortran, data)"""
        _, shape, dtype, is_fortran, data = state
        Array.__init__(self, data, dtype, shape, "F" if is_fortran else "C")


class EmptyArray(Array):
    """``_reconstruct``: an array whose state follows."""

    def __init__(self, *arguments: Any):
        pass


class Scalar(Array):
    """A numpy scalar."""

    def __init__(self, dtype: Any, data: Any):
        super().__init__(data, dtype, ())


def _inert(name: str) -> type[Inert]:
    return type(name, (Inert,), {})


# Module and name in a pickle -> the class in its place. A pickle cannot set attributes of a class
# that has a __setstate__ or is written in C.
NAMES: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): Text,
    **{(module, "bytes"): NoBytes for module in ("builtins", "__builtin__")},
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    # settings that torchvision's, timm's and DINO's trainers write beside the weights
    ("argparse", "Namespace"): _inert("argparse.Namespace"),
    ("pathlib", "PosixPath"): _inert("pathlib.PosixPath"),
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    NAMES[f"{_core}.multiarray", "_reconstruct"] = EmptyArray
    NAMES[f"{_core}.multiarray", "scalar"] = Scalar
    NAMES[f"{_core}.numeric", "_frombuffer"] = Array


class DataUnpickler(pickle.Unpickler):
    """The standard library's unpickler, restricted to the names in :data:`NAMES`."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in NAMES:
            raise Refused(_code(f"{module[:80]}.{name[:80]}"))
        return NAMES[module, name]


def unpickle(data: bytes) -> Any:
    """Returns the object of a pickle, with an :class:`Array` in place of each array.

    Raises ValueError or any parser error: damaged, too large, or more than data.
    """
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):  # reads only
        is_far = operation.name in ("PUT", "LONG_BINPUT") and argument > MAX_OPERATIONS
        if is_far or count > MAX_OPERATIONS:  # a far PUT allocates memory up to its index
            raise Refused(f"more than {MAX_OPERATIONS} operations")
    stream = io.BytesIO(data)
    found = DataUnpickler(stream, encoding="latin1").load()
    if stream.read(1):
        raise ValueError("there are bytes after its end")
    return found


def load_torch(data: bytes) -> Any:
    """Returns the object of a ``torch.save`` file: only tensors, containers and ``NAMES``."""
    stream, is_archive = io.BytesIO(data), data.startswith(ZIP_START)
    if is_archive:
        _check_archive(stream)
    names = [(stand_in, f"{module}.{name}") for (module, name), stand_in in NAMES.items()]
    try:
        with torch.serialization.safe_globals(names), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error has the same content
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # without torch's advice to trust the file
        text = str(error)
        code = re.search(r"GLOBAL (\S+)", text)
        if code:
            raise Refused(_code(code[1][:80])) from error
        raise ValueError(
            text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        ) from error
    if not is_archive and stream.read(1):
        raise ValueError("there are bytes after its end")
    return loaded


def _code(name: str) -> str:
    """Describes a name that is not data, for a message."""
    text = f"{name}, which is code and not data"
    if re.search(r"(^|\.)(models?|nn|modules?|timm|torchvision|networks?)\.", name.lower()):
        text += ": a whole model was pickled; save model.state_dict() in its place"
    return text


def _check_archive(stream: io.BytesIO) -> None:
    """Checks an archive for what torch does not check: compression, sizes, CRC."""
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Refused(
                "a compressed entry, which torch.save does not write (torch.jit.save does)"
            )
        if sum(entry.file_size for entry in entries) > len(stream.getbuffer()):
            raise Refused("an archive whose entries are together larger than the file")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"Bad CRC-32 of {damaged[:80]}")
    stream.seek(0)
