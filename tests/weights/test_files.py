"""Weights files: what is refused, round trips, and the proof on real images."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from resnet_backbone.models import build_model
from resnet_backbone.weights import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    load_weights,
    read_weights,
    save_weights,
)
from resnet_backbone.weights.preprocessing import same_mean, same_std

MSRA = PREPROCESSINGS["msra"]
# The ten classes of imagenet_val500, in the order of all thousand
IMAGENET_INDEX = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


def backbone(depth=18, **options):
    return build_model(f"resnet{depth}", out_features=["res5"], **options)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_states(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.fixture
def file(tmp_path):
    """A ResNet-18 classifier's file that carries MSRA's preprocessing, and its network."""
    torch.manual_seed(1)
    model = build_model("resnet18", num_classes=5)
    model.stem.conv1.norm.running_mean.normal_()
    path = tmp_path / "resnet18.safetensors"
    save_weights(model, path, MSRA)
    return path, model


def test_round_trip(file):
    path, model = file
    other = build_model("resnet18", num_classes=5)
    assert load_weights(other, path) == MSRA
    assert_same_states(state_of(other), state_of(model))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_file_is_readable_by_others(file, tmp_path):
    """The temporary file that it was renamed from must not leave its narrow permissions."""
    (tmp_path / "plain").write_text("")
    assert file[0].stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_backbone_leaves_out_head_and_deeper_stages(file):
    path, model = file
    shallow = build_model("resnet18", out_features=["res3"], norm="FrozenBN")
    load_weights(shallow, path)
    expected = model.state_dict()
    assert not any(key.startswith(("res4", "linear")) for key in shallow.state_dict())
    assert_same_states(state_of(shallow), {key: expected[key] for key in shallow.state_dict()})


def test_our_keys_without_metadata(file, tmp_path):
    path, model = file
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    with pytest.raises(WeightsError, match="name it, msra, caffe_vgg or torchvision"):
        read_weights(bare)
    other = build_model("resnet18", num_classes=5)
    assert load_weights(other, bare, "msra") == MSRA
    assert_same_states(state_of(other), state_of(model))


def test_half_precision_becomes_single(file, tmp_path):
    path, _ = file
    half = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, half)
    tensors, _ = read_weights(half, "msra")
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["cifar_resnet20", "vgg11"])
def test_round_trip_of_other_networks(name, tmp_path):
    model = build_model(name, out_features=["res4" if "cifar" in name else "conv5"])
    other = build_model(name, out_features=model.out_features)
    save_weights(model, tmp_path / "x.safetensors", MSRA)
    load_weights(other, tmp_path / "x.safetensors")
    assert_same_states(state_of(other), state_of(model))


def damage(path, how):
    """Writes a changed copy of a weights file and returns its path."""
    tensors, changed = load_file(path), path.with_name("changed.safetensors")
    if how == "truncated":
        changed.write_bytes(path.read_bytes()[:-1000])
        return changed
    if how == "empty":
        changed.write_bytes(b"")
        return changed
    if how == "nan":
        tensors["res4.1.conv2.weight"][3, 2, 1, 0] = float("nan")
    if how == "missing":
        del tensors["res5.1.conv2.norm.running_var"]
    if how == "shape":
        tensors["res3.0.shortcut.weight"] = tensors["res3.0.shortcut.weight"][:, :-1].clone()
    if how == "unknown":
        tensors["res3.0.conv4.weight"] = torch.zeros(1)
    save_file(tensors, changed)
    return changed


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "changed.safetensors: not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("nan", "res4.1.conv2.weight has NaN"),
        ("missing", "lacks 1 tensors of this network, the first is res5.1.conv2.norm.running_var"),
        ("shape", r"res3.0.shortcut.weight has shape \(128, 63, 1, 1\).*needs \(128, 64, 1, 1\)"),
        ("unknown", "this network has no res3.0.conv4.weight"),
    ],
)
def test_damage_is_refused(file, how, message):
    path, _ = file
    model = backbone()
    before = state_of(model)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, damage(path, how), "msra")
    assert_same_states(state_of(model), before)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: backbone(34), "lacks .* the first is res2.2.conv1.weight; is it another depth"),
        (lambda: backbone(50), "lacks .* the first is res2.0.shortcut.weight"),
        (lambda: backbone(norm="GN"), "this network has no .*running_mean"),
        (lambda: backbone(norm=lambda n: torch.nn.BatchNorm2d(n, eps=1e-3)), "eps 1e-05"),
        (lambda: build_model("resnet18"), r"linear.weight has shape \(5, 512\)"),
    ],
)
def test_other_network_is_refused(file, model, message):
    path, _ = file
    model = model()
    before = state_of(model)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, path)
    assert_same_states(state_of(model), before)


def test_deeper_file_is_refused_by_a_shallower_network(tmp_path):
    save_weights(backbone(34), tmp_path / "34.safetensors", MSRA)
    with pytest.raises(WeightsError, match="this network has no res2.2.conv1.*another depth"):
        load_weights(backbone(18), tmp_path / "34.safetensors")


def test_contradicting_name_and_other_paths(file, tmp_path):
    path, model = file
    with pytest.raises(WeightsError, match="carries its own preprocessing, which is not 'torch"):
        read_weights(path, "torchvision")
    assert read_weights(path, "msra")[1] == MSRA
    with pytest.raises(WeightsError, match="only .safetensors files"):
        read_weights(tmp_path / "x.pth", "msra")
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "x.safetensors", "msra")
    with pytest.raises(WeightsError, match="written to .safetensors"):
        save_weights(model, tmp_path / "x.pth", MSRA)


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_stride_of_a_bottleneck_network(tmp_path, stride_in_1x1):
    options = dict(depth=50, stride_in_1x1=stride_in_1x1)
    network = build_model("resnet50", out_features=["res2"], stride_in_1x1=stride_in_1x1)
    name = "msra" if stride_in_1x1 else "torchvision"
    path = tmp_path / "resnet50.safetensors"
    save_weights(network, path, get_preprocessing(name))
    wrong = build_model("resnet50", out_features=["res2"], stride_in_1x1=not stride_in_1x1)
    with pytest.raises(
        WeightsError, match=f"build it with stride_in_1x1={options['stride_in_1x1']}"
    ):
        load_weights(wrong, path)
    assert load_weights(network, path) == PREPROCESSINGS[name]


def test_preprocessing_survives_json():
    for preprocessing in PREPROCESSINGS.values():
        assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    for text in ("", "[]", "{}", '{"channel_order": "RGB", "colour": 1}'):
        with pytest.raises(WeightsError, match="unreadable preprocessing"):
            Preprocessing.from_json(text)
    with pytest.raises(WeightsError, match="channel_order is RGB or BGR, not 'rgb'"):
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


def imagenet_top1(model, root):
    """Percent of imagenet_val500 in MSRA's input format: BGR in 0..255 less the mean."""
    mean = torch.tensor(MSRA.mean).view(3, 1, 1)
    right = total = 0
    for wnid, index in IMAGENET_INDEX.items():
        pixels = [np.asarray(Image.open(x).convert("RGB")) for x in sorted((root / wnid).iterdir())]
        batch = torch.from_numpy(np.stack(pixels)[..., ::-1].copy()).permute(0, 3, 1, 2)
        with torch.no_grad():
            scores = torch.cat([model(part) for part in (batch.float() - mean).split(10)])
        right += int((scores.argmax(1) == index).sum())
        total += len(pixels)
    assert total == 500
    return 100 * right / total


@pytest.mark.data
@pytest.mark.slow
def test_the_papers_weights_classify_real_images(data_root):
    """The reference is 72.2 %; with the stride on the 3x3 it would be 62.8 %."""
    model = build_model("resnet50", stride_in_1x1=True).eval()
    path = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    assert load_weights(model, path, "msra") == MSRA
    assert abs(imagenet_top1(model, data_root / "imagenet_val500") - 72.2) <= 0.4
