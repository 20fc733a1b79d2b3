"""Files made to harm: each is refused by name of the cause, nothing runs, memory stays small."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from resnet_backbone.weights import WeightsError, pickles
from resnet_backbone.weights.readers import read_tensors

FUZZ = Path(__file__).with_name("fuzz_readers.py")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def command(canary) -> str:
    return f"touch {canary}"


def hostile_pickles(canary) -> dict[str, tuple[bytes, str]]:
    """Name -> (pickle, what the refusal names)."""
    touch = text(command(canary))
    system = Call(os.system, command(canary))
    opening = Call(eval, f"open({str(canary)!r}, 'w')")
    reduce = b"\x80\x02c%b\n" % b"posix\nsystem" + touch + b"\x85R."
    build = b"\x80\x02cnumpy\nndarray\n}" + text("x") + b"K\x01sb."
    names, objects = text("os") + text("system"), np.array([system, None], dtype=object)
    return {
        "system": (pickle.dumps(system, 2), "posix.system"),
        "system, protocol 0": (pickle.dumps(system, 0), "posix.system"),
        "eval": (pickle.dumps({"conv1.weight": opening}, 2), "eval"),
        "eval of Python 2": (pickle.dumps(opening, 2), "eval"),
        "nested": (pickle.dumps({"model": {"a": [(1, {"b": system})]}}, 2), "posix.system"),
        "as a key": (pickle.dumps([(system, 1)], 2), "posix.system"),
        "numpy.load": (pickle.dumps(Call(np.load, str(canary)), 2), "load"),
        "loads": (pickle.dumps(Call(pickle.loads, b"N."), 2), "pickle.loads"),
        "torch": (pickle.dumps(Call(torch.load, str(canary)), 2), "torch.serialization.load"),
        "reduce": (reduce, "posix.system"),
        "inst": (b"(S'%b'\niposix\nsystem\n." % command(canary).encode(), "posix.system"),
        "obj": (b"\x80\x02(cposix\nsystem\n" + touch + b"o.", "posix.system"),
        "newobj": (b"\x80\x02cnumpy\nndarray\n)\x81.", "content is of type Array"),
        "ext": (b"\x80\x02\x82\x01.", "unregistered extension code"),
        "persistent id": (b"\x80\x02" + text("storage") + b"Q.", "persistent(_load| id)|storage"),
        "persistent id, protocol 0": (b"Pstorage\n.", "persistent id"),
        "stack global": (b"\x80\x04" + names + b"\x93" + touch + b"\x85R.", "os.system"),
        "global that is no text": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL requires str"),
        "dotted": (b"\x80\x04" + text("collections") + text("abc.os") + b"\x93.", "abc.os"),
        "call of a container": (b"\x80\x02]" + b")R.", "not callable|unrecognized function"),
        "build": (build, "__setstate__|Can only build"),
        "buffer": (b"\x80\x05\x97.", "out-of-band"),
        "objects": (pickle.dumps({"a": objects}, 2), "dtype 'O8'|posix.system"),
        "records": (pickle.dumps({"a": np.zeros(2, "f4,i4")}, 2), "dtype 'V8'"),
        "memory map": (pickle.dumps(Call(np.memmap, str(canary)), 2), "memmap"),
    }


PICKLE_NAMES = list(hostile_pickles(Path("x")))


def as_zip(data: bytes, compression=zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(f"archive/data/{name.removeprefix('s')}", content)
    return stream.getvalue()


def as_plain(data: bytes) -> bytes:
    """The older form of torch.save."""
    before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in before) + data + pickle.dumps([], 2)


FORMS = {"x.pkl": lambda data: data, "zip.pth": as_zip, "plain.pt": as_plain}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PICKLE_NAMES)
def test_nothing_is_executed(tmp_path, form, name):
    canary, path = tmp_path / "canary", tmp_path / form
    data, cause = hostile_pickles(canary)[name]
    path.write_bytes(FORMS[form](data))
    if form != "x.pkl":
        cause += "|Unsupported operand"  # torch knows fewer
    with pytest.raises(WeightsError, match=cause) as error:
        read_tensors(path)
    assert not canary.exists()
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["system", "eval", "reduce", "stack global"])
def test_the_same_files_run_elsewhere(tmp_path, name):
    pickle.loads(hostile_pickles(tmp_path / "canary")[name][0])
    assert (tmp_path / "canary").exists()


def array_pickle(shape: bytes) -> bytes:
    """An array of one number that claims another shape: operations that push a tuple."""
    return pickle.dumps({"b": np.zeros(1, "f4")}, 2).replace(b"K\x01\x85", shape)


def tensor_pickle(count: int, size: tuple, stride: tuple, keys: int = 1) -> bytes:
    """torch.save's pickle of a dict with one float32 storage, "0", under several keys."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    start = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu"
    shape = numbers(size) + numbers(stride)
    tensor = start + number(count) + b"tQK\x00" + shape + b"\x89NtR"
    items = b"".join(text(f"k{index}") + tensor + b"s" for index in range(keys))
    return b"\x80\x02}" + items + b"."


def zip_of(**options) -> bytes:
    return as_zip(tensor_pickle(**options), s0=struct.pack("<4f", *range(4)))


def bombs() -> dict[str, tuple[str, bytes, str]]:
    """Name -> (file name, content, what the refusal names)."""
    header = b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,%b]}}'
    deep = b"[" * 100_000

    def safetensors(head: bytes, data: bytes = b"", length: int | None = None) -> bytes:
        return struct.pack("<Q", len(head) if length is None else length) + head + data

    encode = b"c_codecs\nencode\nh\x00U\x06latin1\x86R" * 10_000
    encode = b"\x80\x02" + text("a" * 10**6) + b"q\x00" + encode
    whole, of_four = "not a complete", dict(count=4, stride=(1,))
    tall = header % (b"4294967296,4294967296", b"4")
    long = header % (b"1099511627776", b"4398046511104")
    deflated = dict(compression=zipfile.ZIP_DEFLATED)
    zeros = tensor_pickle(10**7, (10**7,), (1,))
    many = tensor_pickle(10**5, (10**5,), (1,), keys=500)
    pickled = {
        "memo": (b"\x80\x02Nr\xff\xff\xff\xff.", "operations"),
        "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", whole),
        "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", whole),
        "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", whole),
        "long": (b"\x80\x02\x8b\xff\xff\xff\x7fx.", whole),
        "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", whole),
        "lists": (b"\x80\x02" + b"]" * 200_000, "operations"),
        "dicts": (b"\x80\x02" + b"}" * 200_000, "operations"),
        "encodings": (encode + b".", "of type str"),
        "shape": (
            array_pickle(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
            "cannot reshape",
        ),
        "dimensions": (array_pickle(b"(" + b"K\x01" * 70 + b"t"), "dimension"),
        "negative": (array_pickle(b"J\xff\xff\xff\xff\x85"), "impossible"),
    }
    zipped = {
        "deflated": (as_zip(b"N" * 10**7 + b".", **deflated), "compressed"),
        "deflated storage": (as_zip(zeros, **deflated, s0=bytes(4 * 10**7)), "compressed"),
        "storage": (zip_of(count=2**60, size=(2**60,), stride=(1,)), whole),
        "window": (zip_of(size=(2**40,), **of_four), whole),
        "expanded": (zip_of(count=4, size=(2**40,), stride=(0,)), "twice its own size"),
        "negative stride": (zip_of(count=4, size=(2, 2), stride=(-1, 1)), whole),
        "shared": (as_zip(many, s0=bytes(4 * 10**5)), "twice its own size"),
    }
    headers = {
        "header": (safetensors(b"{}", length=2**63), whole),
        "big header": (safetensors(b"{}", length=2**33), whole),
        "sizes": (safetensors(tall, bytes(4)), whole),
        "offsets": (safetensors(long, bytes(4)), whole),
        "deep": (safetensors(deep), whole),
    }
    files = {"a.pkl": pickled, "a.pth": zipped, "a.safetensors": headers}
    files["model.safetensors.index.json"] = {"deep index": (deep, whole)}
    return {
        name: (file, *bomb) for file, contents in files.items() for name, bomb in contents.items()
    }


def cycle(length: int) -> dict:
    """Wrappings of which the last holds the first."""
    first = inner = {}
    for _ in range(length - 1):
        inner["model"] = {}
        inner = inner["model"]
    inner["model"] = first
    return first


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_cyclic_wrappings_end(tmp_path, suffix, length):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(cycle(length), 2))
    else:
        torch.save(cycle(length), path)
    with pytest.raises(WeightsError, match="contains itself"):
        read_tensors(path)


@pytest.mark.parametrize("name", list(bombs()))
def test_bombs_do_not_go_off(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 100_000)  # the true bound takes seconds to reach
    file, content, cause = bombs()[name]
    path = tmp_path / file
    path.write_bytes(content)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(WeightsError, match=cause):
        read_tensors(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 200e6 + 6 * len(content) and time.monotonic() - started < 20


def test_overlapping_entries(tmp_path):
    """Many names for one stored entry: small on the disk, large when read."""
    data = as_zip(tensor_pickle(4, (4,), (1,)), s0=bytes(10**6))
    end = data.rindex(b"PK\x05\x06")
    directory = data.index(b"PK\x01\x02")
    entry = data[data.rindex(b"PK\x01\x02") : end]
    copies = [entry.replace(b"data/0", b"data/%d" % n) for n in range(1, 10)]
    count, size = 2 + len(copies), end - directory + sum(map(len, copies))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, size, directory, 0)
    path = tmp_path / "a.pth"
    path.write_bytes(data[:end] + b"".join(copies) + tail)
    with pytest.raises(WeightsError, match="larger than the file|Overlapped"):
        read_tensors(path)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """Opening a FIFO would wait for ever."""
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="not a regular file"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "x\\..\\y.safetensors",
             "", "x.pkl", "C:x.safetensors", 3, None, ["x.safetensors"]]
)  # fmt: skip
def test_an_index_leads_nowhere_else(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="not a .safetensors file beside it|unhashable"):
        read_tensors(folder)


def fuzz(count: int, seed: int, folder: Path) -> str:
    place = dict(env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=FUZZ.parents[2])
    command = [sys.executable, "-W", "ignore", FUZZ, str(count), str(seed), folder]
    done = subprocess.run(command, capture_output=True, text=True, **place)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_thousand_mutated_files(tmp_path):
    assert '"refused"' in fuzz(1000, 0, tmp_path)


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path):
    assert '"refused"' in fuzz(10_000, 1, tmp_path)
