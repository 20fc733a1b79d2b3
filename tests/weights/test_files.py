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

from resnet_backbone.models import build_model
from resnet_backbone.weights import (
    PREPROCESSINGS,
    Checkpoint,
    ModelSpec,
    Origin,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    load_weights,
    read_checkpoint,
    save_weights,
    write_checkpoint,
)
from resnet_backbone.weights.checkpoint import (
    METADATA_KEY,
    MODEL_KEY,
    ORIGIN_KEY,
    SCHEMA_KEY,
    FileMetadata,
)
from resnet_backbone.weights.preprocessing import same_mean, same_std
from resnet_backbone.weights.reading import describe_weights, read_header

MSRA = PREPROCESSINGS["msra"]


def backbone():
    return build_model("resnet18", out_features=["res5"])


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def file(tmp_path):
    """A ResNet-18 classifier's file that carries MSRA's preprocessing, and its network."""
    torch.manual_seed(1)
    model = build_model("resnet18", num_classes=5)
    model.stem.conv1.norm.running_mean.normal_()
    path = tmp_path / "resnet18.safetensors"
    save_weights(model, path, MSRA)
    return path, model


@pytest.fixture
def small(tmp_path):
    """A CIFAR network's file with projections, and its network: where size is not the point."""
    torch.manual_seed(1)
    model = build_model("cifar_resnet8", num_classes=5, shortcut="B")
    path = tmp_path / "small.safetensors"
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
    assert not any(key.startswith(("res4", "linear")) for key in shallow.state_dict())
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
    path, model = file[0], backbone()
    before, tensors = state_of(model), load_file(path)
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, path, "msra")
    assert_same(state_of(model), before)


OTHER_EPS = partial(torch.nn.BatchNorm2d, eps=1e-3)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "resnet34",
            {},
            "a resnet18, this network is a resnet34: .* missing, .* res2.2.conv1.weight",
        ),
        ("resnet50", {}, "tensors of this network are missing, the first is res2.0.shortcut.weig"),
        ("resnet50", {"num_classes": 5}, "the file is a resnet18, this network is a resnet50"),
        ("resnet18", {"norm": "GN"}, "a resnet18 with norm='GN': .* has no .*running_mean"),
        ("resnet18", {"norm": ""}, "this network is a resnet18 with norm=''"),
        ("resnet18", {"norm": OTHER_EPS}, "eps 1e-05"),
        ("resnet18", {"shortcut": "A"}, "this network is a resnet18 with shortcut='A'"),
        (
            "resnet18",
            {"num_classes": 1000},
            r"linear.weight has shape \(5, 512\).* add model.new_head=true",
        ),
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
    "name, options, expected",
    [
        ("resnet18", {}, {}),
        ("resnet50", {"stride_in_1x1": True}, {"stride_in_1x1": True}),
        ("resnet50", {"stride_in_1x1": False}, {"stride_in_1x1": False}),
        ("resnet34", {"shortcut": "A"}, {"shortcut": "A"}),
        ("resnet34", {"shortcut": "C", "norm": "GN"}, {"shortcut": "C", "norm": "GN"}),
        ("plain18", {}, {}),
        ("resnet18", {"norm": "FrozenBN"}, {}),
        ("resnet18", {"norm": "", "activation": "prelu"}, {"norm": "", "activation": "prelu"}),
        ("resnet18", {"caffe_pool": True}, {"caffe_pool": True}),
        ("resnet18", {"in_channels": 4}, {"in_channels": 4}),
        ("cifar_resnet8", {}, {}),
        ("cifar_plain8", {}, {}),
        ("cifar_resnet8", {"shortcut": "B"}, {"shortcut": "B"}),
        ("vgg11", {}, {}),
        ("vgg11_bn", {}, {}),
    ],
)
def test_files_say_which_network_they_are_of(tmp_path, name, options, expected):
    path = tmp_path / "x.safetensors"
    if name.startswith("cifar"):
        model, classes = build_model(name, num_classes=3, **options), 3
    else:  # the first stages show it as well as the whole
        last = "conv2" if name.startswith("vgg") else "res3" if "34" in name else "res2"
        model, classes = build_model(name, out_features=[last], **options), None
    stride = expected.get("stride_in_1x1")
    save_weights(model, path, replace(MSRA, stride_in_1x1=stride), run="a run")
    found = read_checkpoint(path)
    assert found.model == ModelSpec(name, classes, expected)
    assert found.origin.run == "a run" and found.origin.reference == MSRA.source
    again = found.model.build(out_features=model.out_features or None)
    load_weights(again, path)
    expected = {k: v for k, v in state_of(model).items() if "num_batches" not in k}
    assert_same({key: again.state_dict()[key] for key in expected}, expected)


@pytest.mark.parametrize("depth, stage", [(50, "res3"), (101, "res3"), (34, "stem")])
def test_backbones_that_stop_early_keep_their_depth(tmp_path, depth, stage):
    model = build_model(f"resnet{depth}", out_features=[stage])
    save_weights(model, tmp_path / "x.safetensors", MSRA)
    assert read_checkpoint(tmp_path / "x.safetensors").model.name == f"resnet{depth}"


def test_networks_without_a_name_are_written_too(tmp_path):
    class OwnNorm(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x):
            return x * self.gain

    model = build_model("resnet18", out_features=["res2"], norm=OwnNorm)
    save_weights(model, tmp_path / "x.safetensors", MSRA)
    assert read_header(tmp_path / "x.safetensors").model is None
    load_weights(model, tmp_path / "x.safetensors")


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """With its types, its mean image and its origin; its metadata are what the guide says."""
    tensors = build_model("cifar_resnet8", num_classes=3).half().state_dict()
    tensors = {key: value for key, value in tensors.items() if "num_batches" not in key}
    image = torch.rand(3, 8, 8)
    first = Checkpoint(
        tensors,
        ModelSpec("cifar_resnet8", 3),
        replace(MSRA, mean_image=image),
        Origin("caffe2", "R-18.pkl", "0" * 64, "", "somewhere"),
    )
    path = tmp_path / "x.safetensors"
    write_checkpoint(first, path)
    second = read_checkpoint(path)
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert torch.equal(second.preprocessing.mean_image, image)
    assert {value.dtype for value in second.tensors.values()} == {torch.float16}
    assert_same(second.tensors, tensors)
    with safe_open(path, "pt") as file:
        names = sorted(key.removeprefix("resnet_backbone.") for key in file.metadata())
    assert names == ["model", "origin", "preprocessing", "schema"]
    with pytest.raises(WeightsError, match="written to .safetensors"):
        write_checkpoint(first, tmp_path / "x.pth")


def test_a_file_is_asked_once(tmp_path):
    """Torchvision's names and no metadata: after one conversion nobody asks again."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(num_classes=3).eval()
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="does not state which input"):
        read_checkpoint(tmp_path / "x.pth")
    first = read_checkpoint(tmp_path / "x.pth", "torchvision")
    assert first.origin.format == "torchvision" and len(first.origin.sha256) == 64
    write_checkpoint(first, tmp_path / "ours.safetensors")
    model = build_model("resnet18", num_classes=3).eval()
    assert load_weights(model, tmp_path / "ours.safetensors") == PREPROCESSINGS["torchvision"]
    assert read_checkpoint(tmp_path / "ours.safetensors").origin == first.origin
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
        (
            {"name": "cifar_resnet14"},
            "say cifar_resnet14 .* its tensors are cifar_resnet8 with shortc",
        ),
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


def test_two_strides_in_one_file(tmp_path):
    path = tmp_path / "x.safetensors"
    model = build_model("resnet50", out_features=["res2"])
    with pytest.raises(WeightsError, match="stride_in_1x1=False, but this network has True"):
        save_weights(model, path, PREPROCESSINGS["torchvision"])
    assert not path.exists()
    spec = {"name": "resnet50", "num_classes": None, "options": {"stride_in_1x1": True}}
    notes = {METADATA_KEY: PREPROCESSINGS["torchvision"].to_json(), MODEL_KEY: json.dumps(spec)}
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
def test_a_file_says_the_stride_of_its_network(tmp_path, stride):
    """Also where its preprocessing alone does not, as Caffe's for VGG."""
    path = tmp_path / "x.safetensors"
    model, other = (
        build_model("resnet50", out_features=["res2", "res3"], stride_in_1x1=value)
        for value in (stride, not stride)
    )
    save_weights(model, path, PREPROCESSINGS["caffe_vgg"])
    assert describe_weights(path).preprocessing.stride_in_1x1 is stride
    assert load_weights(model, path).stride_in_1x1 is stride
    with pytest.raises(WeightsError, match=f"build it with stride_in_1x1={stride}"):
        load_weights(other, path)


def test_networks_that_no_tensor_tells_apart(tmp_path):
    """Identity shortcuts and none have no tensors: loading one as the other is refused."""
    path = tmp_path / "x.safetensors"
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
    with pytest.raises(
        WeightsError, match="it states that it is a cifar_resnet8, not a cifar_plain8"
    ):
        read_checkpoint(path, "msra", given)


def test_the_stems_pooling_is_compared(tmp_path):
    stem = dict(out_features=["stem"])
    save_weights(build_model("resnet18", **stem), tmp_path / "x.safetensors", MSRA)
    path, pooled = tmp_path / "x.safetensors", build_model("resnet18", caffe_pool=True, **stem)
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
        with pytest.raises(
            WeightsError, match="metadata states another preproc.*than 'torchvision'"
        ):
            read(path, "torchvision")
    deep = tmp_path / "deep.safetensors"
    save_weights(build_model("cifar_resnet50"), deep, replace(MSRA, stride_in_1x1=None))
    assert describe_weights(deep).preprocessing.stride_in_1x1 is None  # no bottlenecks
    other = replace(MSRA, resize_size=None, crop_size=None, source="elsewhere")
    save_weights(model, path, other)
    assert describe_weights(path, "msra").preprocessing == other


def test_preprocessing_survives_json():
    for preprocessing in PREPROCESSINGS.values():
        assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    for text in ("", "[]", "{}", '{"channel_order": "RGB", "colour": 1}'):
        with pytest.raises(WeightsError, match="unreadable preprocessing"):
            Preprocessing.from_json(text)
    for change in (
        {"mean": [1, 2]},
        {"std": [1, 0, 1]},
        {"mean": [float("nan"), 0, 0]},
        {"value_range": 0.0},
        {"bn_eps": -1e-5},
        {"stride_in_1x1": "yes"},
        {"crop_size": 224.5},
        {"interpolation": "lanczos"},
        {"source": None},
    ):
        with pytest.raises(WeightsError, match="preprocessing: "):
            Preprocessing.from_json(json.dumps({**json.loads(MSRA.to_json()), **change}))
    with pytest.raises(WeightsError, match="channel_order must be RGB or BGR, not 'rgb'"):
        Preprocessing("rgb", 1.0, (0, 0, 0), (1, 1, 1))
    with pytest.raises(WeightsError, match="'tv': use one of msra, caffe_vgg, torchvision"):
        get_preprocessing("tv")


def test_values_in_pixels():
    torchvision = PREPROCESSINGS["torchvision"]
    assert torchvision.pixel_mean_255() == pytest.approx((123.675, 116.28, 103.53))
    assert torchvision.pixel_std_255() == pytest.approx((58.395, 57.12, 57.375))
    assert MSRA.pixel_mean_255() == MSRA.mean
    assert same_mean((103.53, 116.28, 123.675), MSRA.mean)
    assert not same_mean((123.675, 116.28, 103.53), MSRA.mean)
    assert not same_mean((103.53, 116.28), MSRA.mean)
    assert not same_std((57.375, 57.12, 58.395), MSRA.std)
