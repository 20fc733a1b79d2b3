"""Weights files: what is refused, and round trips."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchvision
from libraries import assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import BatchNorm2d, Sequential

from resnet_backbone.models import build_model
from resnet_backbone.weights import Checkpoint, ModelSpec, Origin, write_checkpoint
from resnet_backbone.weights.checkpoint import MODEL_KEY, ORIGIN_KEY, SCHEMA_KEY, FileMetadata
from resnet_backbone.weights.keymaps.table import without_counters
from resnet_backbone.weights.load import load_weights, save_weights
from resnet_backbone.weights.preprocessing import PREPROCESSINGS, Preprocessing, WeightsError
from resnet_backbone.weights.reading import describe_weights, read_checkpoint, read_header

MSRA = PREPROCESSINGS["msra"]


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.fixture
def file(path):
    """A ResNet-18 classifier's file that carries MSRA's preprocessing, and its network."""
    torch.manual_seed(1)
    model = build_model("resnet18", num_classes=5)
    model.stem.conv1.norm.running_mean.normal_()
    save_weights(model, path, MSRA)
    return path, model


@pytest.fixture
def small(path):
    """A CIFAR network's file with projections, and its network: where size is not the point."""
    torch.manual_seed(1)
    model = build_model("cifar_resnet8", num_classes=5, shortcut="B")
    save_weights(model, path, MSRA)
    return path, model


def test_round_trip(file):
    path, model = file
    other = build_model("resnet18", num_classes=5)
    assert load_weights(other, path) == MSRA
    assert_same(state_of(other), state_of(model))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    (path.parent / "plain").write_text("")  # others can read both
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_backbone_leaves_out_head_and_deeper_stages(file):
    path, model = file
    shallow = build_model("resnet18", out_features=["res3"], norm="FrozenBN")
    load_weights(shallow, path)
    expected = model.state_dict()
    assert_same(state_of(shallow), {key: expected[key] for key in shallow.state_dict()})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["res4.1.conv2.weight"][3, 2, 1].fill_(torch.nan), "res4.1.conv2.* has NaN"),
        (lambda t: t.pop("res5.1.conv2.norm.running_var"),
         "1 tensors of this network are missing, the first is res5.1.conv2.norm.running_var"),
        (lambda t: t["res3.0.shortcut.weight"].resize_(128, 63, 1, 1),
         r"res3.0.shortcut.weight has shape \(128, 63, 1, 1\), but \(128, 64, 1, 1\) in"),
        (lambda t: t.update({"res3.0.conv4.weight": torch.zeros(1)}),
         "this network has no res3.0.conv4.weight"),
    ],
)  # fmt: skip
def test_damage_is_refused(file, change, message):
    path, model = file[0], build_model("resnet18", out_features=["res5"])
    before, tensors = state_of(model), load_file(path)
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, path, "msra")
    assert_same(state_of(model), before)


OTHER_EPS = partial(BatchNorm2d, eps=1e-3)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet34", {}, "a resnet18, this network is a resnet34: .* missing, .* res2.2.conv1"),
        ("resnet50", {}, "tensors of this network are missing, the first is res2.0.shortcut.weig"),
        ("resnet50", {"num_classes": 5}, "the file is a resnet18, this network is a resnet50"),
        ("resnet18", {"norm": "GN"}, "a resnet18 with norm='GN': .* has no .*running_mean"),
        ("resnet18", {"norm": ""}, "this network is a resnet18 with norm=''"),
        ("resnet18", {"norm": OTHER_EPS}, "eps 1e-05"),
        ("resnet18", {"shortcut": "A"}, "this network is a resnet18 with shortcut='A'"),
        ("resnet18", {"num_classes": 1000}, r"linear.weight has shape \(5, 512\).* model.new_head"),
        ("plain18", {}, "the file is a resnet18, this network is a plain18"),
        ("vgg11", {"out_features": ["conv1"]}, "the file is a resnet18, this network is a vgg"),
    ],
)
def test_other_network_is_refused(file, name, options, message):
    model = build_model(name, **{"num_classes": 5, "out_features": [], **options})
    before = state_of(model)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, file[0])
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    "name, last, options",
    [
        ("resnet18", "res2", {}),
        ("resnet50", "res3", {"stride_in_1x1": True}),
        ("resnet50", "res2", {"stride_in_1x1": False}),
        ("resnet101", "res3", {"stride_in_1x1": True}),  # the tensors are a ResNet-50's, too
        ("resnet34", "stem", {}),
        ("resnet34", "res3", {"shortcut": "A"}),
        ("resnet34", "res3", {"shortcut": "C", "norm": "GN"}),
        ("plain18", "res2", {}),
        ("resnet18", "res2", {"norm": "", "activation": "prelu"}),
        ("resnet18", "res2", {"caffe_pool": True}),
        ("resnet18", "res2", {"in_channels": 4}),
        ("cifar_resnet8", "", {}),
        ("cifar_plain8", "", {}),
        ("cifar_resnet8", "", {"shortcut": "B"}),
        ("vgg11", "conv2", {}),
        ("vgg11_bn", "conv2", {}),
    ],
)
def test_files_say_which_network_they_are_of(path, name, last, options):
    """The first stages as well as a whole classifier of three classes."""
    stages, classes = ([last], None) if last else (None, 3)
    model = build_model(name, classes, out_features=stages, **options)
    preprocessing = replace(MSRA, stride_in_1x1=options.get("stride_in_1x1"))
    save_weights(model, path, preprocessing, run="a run")
    found = read_checkpoint(path)
    assert found.model == ModelSpec(name, classes, options)
    assert found.origin.run == "a run" and found.origin.reference == MSRA.source
    again = found.model.build(out_features=stages)
    load_weights(again, path)
    assert_same(without_counters(again.state_dict()), without_counters(model.state_dict()))


def test_a_frozen_norm_is_stated_as_batch_norm(path):
    save_weights(build_model("resnet18", out_features=["res2"], norm="FrozenBN"), path, MSRA)
    assert read_checkpoint(path).model == ModelSpec("resnet18")


def test_networks_without_a_name_are_written_too(path):
    own = build_model("resnet18", out_features=["res2"], norm=lambda n: Sequential(BatchNorm2d(n)))
    save_weights(own, path, MSRA)
    assert read_header(path).model is None
    load_weights(own, path)


def test_a_checkpoint_comes_back_as_it_was(path):
    """With its types, its mean image and its origin; its metadata are what the guide says."""
    tensors = without_counters(build_model("cifar_resnet8", num_classes=3).half().state_dict())
    image = torch.rand(3, 8, 8)
    spec, own = ModelSpec("cifar_resnet8", 3), replace(MSRA, mean_image=image)
    origin = Origin("caffe2", "R-18.pkl", "0" * 64, "", "somewhere")
    first = Checkpoint(tensors, spec, own, origin)
    write_checkpoint(first, path)
    second = read_checkpoint(path)
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert torch.equal(second.preprocessing.mean_image, image)
    assert_same(second.tensors, tensors)
    with safe_open(path, "pt") as file:
        names = sorted(key.removeprefix("resnet_backbone.") for key in file.metadata())
    assert names == ["model", "origin", "preprocessing", "schema"]
    with pytest.raises(WeightsError, match="written to .safetensors"):
        write_checkpoint(first, path.with_suffix(".pth"))


def test_a_file_is_asked_once(path, tmp_path):
    """Torchvision's names and no metadata: after one conversion nobody asks again."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(num_classes=3).eval()
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="does not state which input"):
        read_checkpoint(tmp_path / "x.pth")
    first = read_checkpoint(tmp_path / "x.pth", "torchvision")
    assert first.origin.format == "torchvision" and len(first.origin.sha256) == 64
    write_checkpoint(first, path)
    model = build_model("resnet18", num_classes=3).eval()
    assert load_weights(model, path) == PREPROCESSINGS["torchvision"]
    assert read_checkpoint(path).origin == first.origin
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)


SMALL = {"name": "cifar_resnet8", "options": {"shortcut": "B"}}  # without its classes


def rewrite(path, **metadata):
    """Changes a file's metadata; a value of None removes the entry."""
    with safe_open(path, "pt") as file:
        notes = {**file.metadata(), **metadata}
    notes = {key: value for key, value in notes.items() if value is not None}
    save_file(load_file(path), path, notes)


def test_files_of_before_the_schema_stay_readable(small):
    path, model = small
    network = ModelSpec("cifar_resnet8", 5, {"shortcut": "B"})
    rewrite(path, **{SCHEMA_KEY: None, ORIGIN_KEY: None, MODEL_KEY: json.dumps(SMALL)})
    found = read_checkpoint(path)
    assert (found.model, found.preprocessing) == (network, MSRA)
    rewrite(path, **{MODEL_KEY: None})
    assert read_checkpoint(path).model == network
    old = {"channel_order": "BGR", "value_range": 255.0, "mean": MSRA.mean, "std": MSRA.std}
    rewrite(path, **{"resnet_backbone.preprocessing": json.dumps(old)})
    assert read_checkpoint(path).preprocessing == Preprocessing(**old)


@pytest.mark.parametrize(
    "key, value, message",
    [
        (SCHEMA_KEY, "2", "has format 2, but this version .* reads up to 1: install a newer"),
        (SCHEMA_KEY, "x", "unreadable resnet_backbone.schema"),
        (SCHEMA_KEY, "9" * 5000, "schema|form"),
        (MODEL_KEY, "[1]", "unreadable resnet_backbone.model"),
        (MODEL_KEY, '{"name": 1}', "unreadable resnet_backbone.model"),
        (MODEL_KEY, '{"name": "resnet18", "options": [1]}', "unreadable resnet_backbone.model"),
        *((MODEL_KEY, json.dumps({"name": "resnet50", "options": {key: value}}),
           f"unreadable resnet_backbone.model .*{key} .* is not true or false")
          for key in ("stride_in_1x1", "caffe_pool") for value in ([], "False", 0, None)),
        (ORIGIN_KEY, '{"from": "x"}', "unreadable resnet_backbone.origin"),
        (ORIGIN_KEY, '{"file": 1}', "unreadable resnet_backbone.origin"),
        ("resnet_backbone.preprocessing", "[" * 10**5, "unreadable resnet_backbone.preproc"),
        *(("resnet_backbone.preprocessing", json.dumps({**json.loads(MSRA.to_json()), key: value}),
           "unreadable resnet_backbone.preprocessing .*too large")
          for key, value in (("mean", [10**400, 0, 0]), ("value_range", 10**400))),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(small, key, value, message):
    rewrite(small[0], **{key: value})
    for read in (read_checkpoint, describe_weights, lambda path: load_weights(small[1], path)):
        with pytest.raises(WeightsError, match=message):
            read(small[0])


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "cifar_resnet14"}, "say cifar_resnet14 .* its tensors are cifar_resnet8 with s"),
        ({"name": "cifar_plain8"}, "say cifar_plain8"),
        ({"name": "vgg16"}, "say vgg16"),
        ({"name": "cifar_resnet60000002"}, "say cifar_resnet60000002"),
        ({"name": "nonsense"}, "say nonsense"),
        ({"name": "timm/resnet34"}, "say timm/resnet34"),
        (SMALL | {"num_classes": 6}, "with 6 classes, but its tensors .* with 5 classes"),
        (SMALL | {"options": {"shortcut": "A"}}, "shortcut='A'.* has no res3.0.shortcut"),
        (SMALL | {"options": {"shortcut": "C"}}, "shortcut='C'"),
        (SMALL | {"options": {"shortcut": "B", "norm": ""}}, "norm=''"),
        (SMALL | {"options": {"nrom": "GN"}}, "nrom"),
        (SMALL | {"options": {"norm": [1]}}, "say cifar_resnet8 with norm="),
        (SMALL | {"options": {"in_channels": -1}}, "say cifar_resnet8"),
        (SMALL | {"options": {"in_channels": 10**30}}, "say cifar_resnet8"),
    ],
)
def test_metadata_that_contradict_the_tensors(small, spec, message):
    path, model = small
    before = state_of(model)
    rewrite(path, **{MODEL_KEY: json.dumps(spec)})
    for read in (read_checkpoint, lambda path: load_weights(model, path)):
        with pytest.raises(WeightsError, match=message) as error:
            read(path)
        assert len(str(error.value).splitlines()) == 1
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    "left_out, added, message",
    [
        ("linear", {}, "with 5 classes, .* linear.weight is missing"),
        ("none", {"preprocessing.mean_image": torch.ones(4)}, r"has shape \(4,\), not \(3, H, W\)"),
    ],
)
def test_what_is_announced_is_there(small, left_out, added, message):
    tensors = {key: value for key, value in load_file(small[0]).items() if left_out not in key}
    notes = FileMetadata(MSRA, ModelSpec("cifar_resnet8", 5, {"shortcut": "B"})).texts()
    save_file({**tensors, **added}, small[0], notes)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(small[0])


def test_two_strides_in_one_file(path):
    model = build_model("resnet50", out_features=["res2"])
    with pytest.raises(WeightsError, match="stride_in_1x1=False, but this network has True"):
        save_weights(model, path, PREPROCESSINGS["torchvision"])
    assert not path.exists()
    spec = ModelSpec("resnet50", None, {"stride_in_1x1": True})
    notes = FileMetadata(PREPROCESSINGS["torchvision"], spec).texts()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, notes)
    other = build_model("resnet50", out_features=["res2"], stride_in_1x1=False)
    for read in (read_checkpoint, describe_weights, partial(load_weights, other)):
        with pytest.raises(WeightsError, match="network has stride_in_1x1=True, its prepro.*False"):
            read(path)
    save_file(load_file(path), path)
    assert read_checkpoint(path, "torchvision").model.options == {"stride_in_1x1": False}
    for read in (read_checkpoint, partial(load_weights, other)):
        with pytest.raises(WeightsError, match="the stride of its bottlenecks is unknown"):
            read(path, "caffe_vgg")


@pytest.mark.parametrize("stride", [True, False])
def test_a_file_says_the_stride_of_its_network(path, stride):
    """Also where its preprocessing alone does not, as Caffe's for VGG."""
    model, other = (
        build_model("resnet50", out_features=["res2", "res3"], stride_in_1x1=value)
        for value in (stride, not stride)
    )
    save_weights(model, path, PREPROCESSINGS["caffe_vgg"])
    assert describe_weights(path).preprocessing.stride_in_1x1 is stride
    assert load_weights(model, path).stride_in_1x1 is stride
    with pytest.raises(WeightsError, match=f"build it with stride_in_1x1={stride}"):
        load_weights(other, path)
    wrapped = torch.nn.ModuleDict({"module": model})
    with pytest.raises(WeightsError, match="give the network itself"):
        load_weights(wrapped, path)
    with pytest.raises(WeightsError, match=f"but this network has {stride}"):
        save_weights(wrapped, path, replace(MSRA, stride_in_1x1=not stride))
    with pytest.raises(WeightsError, match="eps 1e-05"):
        save_weights(build_model("resnet18", num_classes=2, norm=OTHER_EPS), path, MSRA)
    save_weights(torchvision.models.mobilenet_v3_small(), path, MSRA)  # whose eps is 1e-3


def test_networks_that_no_tensor_tells_apart(path):
    """Identity shortcuts and none have no tensors: loading one as the other is refused."""
    plain, residual = build_model("cifar_plain8"), build_model("cifar_resnet8")
    assert plain.state_dict().keys() == residual.state_dict().keys()
    for own, other in ((plain, residual), (residual, plain)):
        save_weights(own, path, MSRA)
        load_weights(own, path)
        with pytest.raises(WeightsError, match="trained with shortcut=.*: build it with shortcut="):
            load_weights(other, path)
    save_file(load_file(path), path)
    with pytest.raises(WeightsError, match="fit cifar_resnet8 and cifar_plain8: say which net"):
        read_checkpoint(path, "msra")
    given = ModelSpec("cifar_plain8", 10)
    assert read_checkpoint(path, "msra", given).model == given
    save_weights(residual, path, MSRA)
    with pytest.raises(WeightsError, match="it is a cifar_resnet8, not a cifar_plain8"):
        read_checkpoint(path, "msra", given)


def test_the_stems_pooling_is_compared(path):
    stem = dict(out_features=["stem"])
    save_weights(build_model("resnet18", **stem), path, MSRA)
    pooled = build_model("resnet18", caffe_pool=True, **stem)
    with pytest.raises(WeightsError, match="caffe_pool=False, but this network has True"):
        load_weights(pooled, path)
    save_file(load_file(path), path)  # does not say it: both are used with the released weights
    load_weights(pooled, path, "msra")
    with pytest.raises(WeightsError, match="caffe_pool=False, but this network has True"):
        load_weights(pooled, path, "torchvision")


def test_descriptions(small, tmp_path, monkeypatch):
    path, model = small
    found = describe_weights(path)
    assert found.preprocessing == MSRA and found.model.name == "cifar_resnet8"
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert describe_weights(tmp_path / "x.pth", "msra").model is None
    with monkeypatch.context() as patch:  # of our own files, the header alone
        patch.setattr("resnet_backbone.weights.reading.read_tensors", None)
        assert describe_weights(path) == found
    for read in (describe_weights, read_checkpoint):
        with pytest.raises(WeightsError, match="metadata states another .*than 'torchvision'"):
            read(path, "torchvision")
    save_weights(build_model("cifar_resnet50"), path, replace(MSRA, stride_in_1x1=None))
    assert describe_weights(path).preprocessing.stride_in_1x1 is None  # no bottlenecks
    other = replace(MSRA, resize_size=None, crop_size=None, source="elsewhere")
    save_weights(model, path, other)
    assert describe_weights(path, "msra").preprocessing == other
