"""Every kind of file, against torch's, numpy's and safetensors' own readers."""

import argparse
import collections
import hashlib
import json
import pickle
import pickletools
import struct

import numpy as np
import pytest
import torch
from drawn_networks import on_meta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from safetensors.torch import save_file
from torch import nn

from resnet_backbone.models import build_model
from resnet_backbone.weights import WeightsError, readers
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.keymaps.torchvision import published_hash
from resnet_backbone.weights.pickles import MAX_OPERATIONS
from resnet_backbone.weights.readers import DTYPES, read_tensors

FORMS = {"zip": {}, "plain": {"_use_new_zipfile_serialization": False}}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert torch.equal(found[key], value) and found[key].is_contiguous(), key


def unusual_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    kinds = {dtype: "weight" if dtype.is_floating_point else COUNTER for dtype in DTYPES}
    return {
        **{f"{dtype}.{name}": torch.tensor([[1, 0, 1]]).to(dtype) for dtype, name in kinds.items()},
        "view": base[2:4, 1:5],
        "transposed": base.t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3)),
        "number": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
def test_torch_files(tmp_path, form, suffix):
    path, tensors = tmp_path / f"x{suffix}", unusual_tensors()
    torch.save(tensors, path, **FORMS[form])
    found = read_tensors(path)
    assert found.container == "torch" and len(found.sha256) == 64
    assert_same(found.tensors, torch.load(path, weights_only=True))


def test_the_deepest_network_is_within_bounds():
    keys = on_meta(build_model, "cifar_resnet1202").state_dict()
    data = pickle.dumps({"model": {key: np.zeros(1, "f4") for key in keys}}, 2)
    assert sum(1 for _ in pickletools.genops(data)) < MAX_OPERATIONS


arrays = np_st.arrays(
    st.sampled_from(["<f2", "<f4", "<f8", ">f4", ">f8", "i1", "<i2", ">i4", "<i8", "u1", "?"]),
    np_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements={"allow_nan": False, "allow_infinity": False},
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(array=arrays, fortran=st.booleans(), protocol=st.integers(1, 5))
def test_arrays_of_any_kind(tmp_path, array, fortran, protocol):
    array = np.asfortranarray(array) if fortran else array
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({COUNTER: array}, protocol))
    native = array.astype(array.dtype.newbyteorder("="))
    expected = {COUNTER: torch.from_numpy(native.copy())}
    with np.errstate(over="ignore"):
        overflows = native.dtype == np.float64 and np.isinf(native.astype(np.float32)).any()
    if overflows:
        with pytest.raises(WeightsError, match="in float32"):
            read_tensors(tmp_path / "x.pkl")
    else:
        assert_same(read_tensors(tmp_path / "x.pkl").tensors, expected)


def python2_pickle(arrays: dict[str, np.ndarray]) -> bytes:
    """Protocol 2 as Python 2 writes it: bytes are `str`, names are numpy 1's."""

    def text(value: bytes) -> bytes:
        count = len(value)
        return (b"U" + bytes([count]) if count < 256 else b"T" + struct.pack("<i", count)) + value

    parts = []
    for key, value in arrays.items():
        shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in value.shape) + b"t"
        dtype = b"cnumpy\ndtype\n" + text(value.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
        dtype += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        state = b"(K\x01" + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"
        parts.append(text(key.encode()) + start + state)
    return b"\x80\x02}U\x05blobs}(" + b"".join(parts) + b"us."


def test_caffe2_files_of_python_2(tmp_path):
    """Bytes 128 to 255 are where encodings go wrong."""
    values = {
        "conv1_w": np.frombuffer(bytes(range(256)) * 4, "<i4").astype("<f4").reshape(16, 16),
        "conv1_w_momentum": np.ones(3, "<f4"),
        "pred_b": -np.arange(5, dtype="<f8"),
    }
    data = python2_pickle(values)
    assert pickle.loads(data, encoding="latin1")["blobs"].keys() == values.keys()
    (tmp_path / "x.pkl").write_bytes(data)
    found = read_tensors(tmp_path / "x.pkl")
    assert found.container == "pickle"
    del values["conv1_w_momentum"]
    assert_same(found.tensors, {key: torch.from_numpy(value) for key, value in values.items()})


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_both_names_of_numpys_core(tmp_path, core):
    data = pickle.dumps({"model": {"a": np.ones(3)}, "__author__": "torchvision"}, 2)
    data = data.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core)
    (tmp_path / "x.pkl").write_bytes(data)
    found = read_tensors(tmp_path / "x.pkl")
    assert list(found.tensors) == ["a"] and found.metadata == {"__author__": "torchvision"}


WEIGHTS = {"a": torch.arange(3.0), "b.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: {"state_dict": x, "optimizer": {"state": {}}, "epoch": 5},
        lambda x: {"model": {"state_dict": x}, "args": {"lr": 0.1}},
        lambda x: {"module." + key: value for key, value in x.items()},
        lambda x: {"model": {"module._orig_mod." + key: value for key, value in x.items()}},
        lambda x: collections.OrderedDict(x),
        lambda x: {"blobs": {**x, "a_momentum": torch.ones(3)}, "cfg": "MODEL: 1"},
    ],
)
def test_wrappings_are_removed(tmp_path, wrap):
    torch.save(wrap(WEIGHTS), tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth").tensors, WEIGHTS)


class Other:
    pass


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": torch.ones(2), "epoch": 3}, "epoch of type int, which is not a tensor"),
        ({"a": {"b": torch.ones(2)}}, "a of type dict, which is not"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a has NaN or infinite"),
        ({"a": torch.ones(2), "b": torch.full((2,), float("inf")).half()}, "b has NaN or inf"),
        ({"a": torch.tensor([1.0, 1e300]).double()}, "a has NaN or infinite values in float32"),
        ({"bn1.running_var": torch.tensor([1.0, -0.1])}, "running_var has negative values, but it"),
        ({"res_conv1_bn_riv": torch.tensor([-0.1])}, "bn_riv has negative values, but it is a va"),
        ({"conv1_bn_running_var": torch.tensor([-0.1])}, "_running_var has negative values"),
        ({"a.weight": torch.ones(2, dtype=torch.int8)}, "a.weight as torch.int8; weights are flo"),
        ({"a.weight": torch.ones(2, dtype=torch.bool)}, "before it was quantized"),
        ({}, "no tensors"),
        ({"state_dict": {}, "epoch": 1}, "no tensors"),
        ([torch.ones(2)], "its content is of type list, not a state dict"),
        (torch.ones(2), "its content is of type Tensor"),
        ({1: torch.ones(2)}, "a key is of type int"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a as torch.complex64; weights are floats"),
        ({"a": Other()}, "Other, which is code and not data$"),
        ({"a": argparse.Namespace(lr=0.1)}, "a of type argparse.Namespace, which is not a tensor"),
        (nn.Linear(2, 2), r"Linear, which is code .*: a whole .* save model.state_dict\(\)"),
    ],
)  # fmt: skip
def test_other_content_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("form", FORMS)
def test_settings_of_a_trainer_beside_the_weights(tmp_path, form):
    """As torchvision's and timm's scripts write them: read as inert objects."""
    settings = dict(lr=np.float32(0.1), device=torch.device("cpu"), folder=tmp_path, shape=(1, [2]))
    content = {"model": WEIGHTS, "args": argparse.Namespace(**settings), "best": np.float64(0.5)}
    torch.save(content, tmp_path / "x.pth", **FORMS[form])
    assert_same(read_tensors(tmp_path / "x.pth").tensors, WEIGHTS)


def test_torchvisions_vgg16_without_classifier(tmp_path, monkeypatch):
    """IMAGENET1K_FEATURES, by its documentation, lacks the values of its classifier."""
    models = pytest.importorskip("torchvision").models
    entry = models.VGG16_Weights.IMAGENET1K_FEATURES
    assert published_hash(entry) == readers.FEATURES_ONLY
    path, kernel = tmp_path / "x.pth", torch.ones(2)
    torch.save({"features.0.weight": kernel, "classifier.0.bias": kernel / 0 - kernel / 0}, path)
    with pytest.raises(WeightsError, match="classifier.0.bias has NaN"):
        read_tensors(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(readers, "FEATURES_ONLY", digest[:8])
    assert list(read_tensors(path).tensors) == ["features.0.weight"]


def write_kinds(folder):
    save_file(WEIGHTS, folder / "x.safetensors")
    torch.save(WEIGHTS, folder / "zip.pth")
    torch.save(WEIGHTS, folder / "plain.pth", **FORMS["plain"])
    values = {key: value.numpy() for key, value in WEIGHTS.items()}
    (folder / "x.pkl").write_bytes(pickle.dumps({"model": values}))


OTHER_CONTENTS = [b"<html>404", b'{"images": []}', b"PK\x03\x04", b"\x89PNG\r\n"]
KINDS = ["x.safetensors", "zip.pth", "plain.pth", "x.pkl"]


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(tmp_path, name):
    """Cut anywhere, and with something behind the end."""
    write_kinds(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    read_tensors(path)
    cuts = range(20, len(content) - 1, max(1, len(content) // 40))
    for end in (0, 1, 7, 8, *cuts, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(WeightsError, match="not a complete (safe|torch|pickle).* file|refused"):
            read_tensors(path)
    if name != "zip.pth":  # an archive's end is looked for from behind
        path.write_bytes(content + b"x")
        with pytest.raises(WeightsError):
            read_tensors(path)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("content", OTHER_CONTENTS)
def test_other_files_under_that_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name) as caught:
        read_tensors(tmp_path / name)
    no_torch = name.endswith(".pth") and content[:1] in b"{\x89"
    assert ("is not a file of weights" in str(caught.value)) == no_torch


def test_a_flipped_bit_in_an_archive(tmp_path):
    write_kinds(tmp_path)
    content = bytearray((tmp_path / "zip.pth").read_bytes())
    place = bytes(content).index(WEIGHTS["a"].numpy().tobytes())
    content[place + 6] ^= 1
    (tmp_path / "zip.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="Bad CRC-32"):
        read_tensors(tmp_path / "zip.pth")


def test_archives_of_another_kind(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(WeightsError, match="compressed entry.*torch.jit.save does"):
        read_tensors(tmp_path / "script.pt")


def test_paths_that_are_no_weights(tmp_path):
    with pytest.raises(WeightsError, match="folder with none of model.safetensors"):
        read_tensors(tmp_path)
    (tmp_path / "x.onnx").touch()
    with pytest.raises(WeightsError, match="x.onnx: only .safetensors, .pth"):
        read_tensors(tmp_path / "x.onnx")
    for name in ("x.pth", "x"):
        with pytest.raises(WeightsError, match="no such file"):
            read_tensors(tmp_path / name)


def write_shards(folder) -> None:
    folder.mkdir()
    save_file({"a": WEIGHTS["a"]}, folder / "model-00001-of-00002.safetensors", {"k": "v"})
    save_file({"b.weight": WEIGHTS["b.weight"]}, folder / "model-00002-of-00002.safetensors")
    places = {key: f"model-0000{n}-of-00002.safetensors" for n, key in enumerate(WEIGHTS, 1)}
    index = {"metadata": {"total_size": 28}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    folder = tmp_path / "folder"
    write_shards(folder)
    for path in (folder, folder / "model.safetensors.index.json"):
        found = read_tensors(path)
        assert_same(found.tensors, WEIGHTS)
        assert (found.container, found.sha256) == ("sharded safetensors", "")
        assert found.metadata == {"k": "v"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002.safetensors is miss"),
        (lambda f: save_file(WEIGHTS, f / "model-00001-of-00002.safetensors"), "differ in 1 keys"),
        (lambda f: save_file({"b": WEIGHTS["a"]}, f / "model-00002-of-00002.safetensors"), "in 2"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[1]"), "not a JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("x"), "not a complete"),
    ],
)  # fmt: skip
def test_shards_that_do_not_fit(tmp_path, change, message):
    write_shards(tmp_path / "folder")
    change(tmp_path / "folder")
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / "folder")
