"""Loading weights into detectors: what arrives where, and what is refused."""

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from states import assert_holds, refused, state_of

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.checkpoint.checkpointer import describe_input, find_network
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import PREPROCESSINGS, Preprocessing, WeightsError, save_weights
from resnet_backbone.weights.reading import read_checkpoint, single_precision

RGB = dict(INPUT__FORMAT="RGB", MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53])
RGB |= dict(MODEL__PIXEL_STD=[58.395, 57.12, 57.375])
R18 = "voc/faster_rcnn_R_18_FPN.yaml"


@pytest.fixture(scope="module")
def msra(data_root):
    path = str(data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors")
    return path, single_precision(read_checkpoint(path, "msra").tensors)


@pytest.fixture
def r18_file(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_weights(build_network("resnet18"), path, PREPROCESSINGS["msra"])
    return str(path)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["FPN", "C4", "DC5"])
def test_msra_resnet50(detector, msra, kind):
    path, tensors = msra
    model = detector(f"voc/faster_rcnn_R_50_{kind}.yaml")
    Checkpointer(model, preprocessing="msra").load(path)
    network = find_network(model)
    assert_holds(network, tensors)
    assert ("res5" in network.stage_names) == (kind != "C4")
    if kind == "C4":
        assert_holds(model.roi_heads.res5, tensors, "res5.")


@pytest.mark.data
@pytest.mark.parametrize("kind", ["VGG_16", "VGG_16_FPN"])
def test_caffe_vgg16(detector, data_root, kind):
    path = str(data_root / "weights" / "vgg16_conv_bgr_fp16.safetensors")
    model = detector(f"voc/faster_rcnn_{kind}.yaml")
    Checkpointer(model, preprocessing="caffe_vgg").load(path)
    assert_holds(find_network(model), single_precision(read_checkpoint(path, "caffe_vgg").tensors))


@pytest.mark.data
@pytest.mark.parametrize(
    "preprocessing, keys, message",
    [
        ("msra", dict(MODEL__RESNETS__STRIDE_IN_1X1=False), "set MODEL.RESNETS.STRIDE_IN_1X1 True"),
        ("msra", RGB, r'set INPUT.FORMAT "BGR" MODEL.PIXEL_MEAN "\[103.939, 116.779, 123.68\]" MO'),
        ("", {}, "RESNET_BACKBONE.WEIGHTS_PREPROCESSING"),
        ("torchvision", RGB, "STRIDE_IN_1X1 is True; set MODEL.RESNETS.STRIDE_IN_1X1 False"),
        ("caffe", {}, "unknown preprocessing 'caffe': use one of msra"),
    ],
)
def test_msra_resnet50_is_refused(detector, msra, preprocessing, keys, message):
    model = detector("voc/faster_rcnn_R_50_FPN.yaml", **keys)
    with refused(model, message):
        Checkpointer(model, preprocessing=preprocessing).load(msra[0])


def test_cut_short_or_not_a_number(detector, r18_file, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(Path(r18_file).read_bytes()[:30_000_000])
    model = detector(R18)
    with refused(model, "cut.safetensors: not a complete safetensors file"):
        Checkpointer(model, preprocessing="msra").load(str(path))
    network = build_network("resnet18")
    network.res5[1].conv2.weight.data[0, 0, 0, 0] = float("nan")
    save_weights(network, tmp_path / "nan.safetensors", PREPROCESSINGS["msra"])
    with refused(model, "res5.1.conv2.weight has NaN"):
        Checkpointer(model).load(str(tmp_path / "nan.safetensors"))


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(MODEL__PIXEL_MEAN=[0.0, 0.0, 0.0]), r"MODEL.PIXEL_MEAN is \[0, 0, 0\]; set MODEL"),
        (dict(MODEL__PIXEL_STD=[57.0, 57.0, 57.0]), r'set MODEL.PIXEL_STD "\[1, 1, 1\]"$'),
        (dict(INPUT__FORMAT="L"), "these weights need INPUT.FORMAT RGB or BGR"),
        (dict(MODEL__RESNETS__DEPTH=34), "the first is res2.2.conv1.weight"),
        (dict(MODEL__RESNETS__NORM="GN"), "this network has no .*running_mean"),
        (dict(RESNET_BACKBONE__SHORTCUT="A"), "this network has no res3.0.shortcut"),
    ],
)
def test_other_settings_are_refused(detector, r18_file, keys, message):
    model = detector(R18, **keys)
    with refused(model, message):
        Checkpointer(model).load(r18_file)


def test_detectron2s_backbone_is_named(detector, r18_file):
    name = "build_resnet_fpn_backbone"
    model = detector("voc/faster_rcnn_R_50_FPN.yaml", MODEL__BACKBONE__NAME=name)
    with pytest.raises(WeightsError, match="set MODEL.BACKBONE.NAME"):
        Checkpointer(model).load(r18_file)


def test_our_checkpoints_carry_their_preprocessing(detector, tmp_path):
    model = detector(R18)
    Checkpointer(model, str(tmp_path)).save("model", iteration=7)
    path = str(tmp_path / "model.pth")
    described = Preprocessing.from_json(torch.load(path)["preprocessing"])
    assert described == describe_input(model)
    assert described.channel_order == "BGR" and described.stride_in_1x1 is None
    assert described.mean == pytest.approx((103.53, 116.28, 123.675))
    other = detector(R18)
    assert Checkpointer(other).load(path)["iteration"] == 7
    assert_holds(other, state_of(model))
    other = detector(R18, **RGB)
    with refused(other, "model.pth was trained on other input"):
        Checkpointer(other).load(path)


def test_detectron2s_detector_loads_and_saves(detector, tmp_path):
    """A detector that Detectron2 trained with its own backbone; it does not say its input."""
    keys = dict(MODEL__RESNETS__RES2_OUT_CHANNELS=64, MODEL__RESNETS__NORM="BN")
    theirs = detector(R18, MODEL__BACKBONE__NAME="build_resnet_fpn_backbone", **keys)
    ours = detector(R18, **keys)
    DetectionCheckpointer(theirs, str(tmp_path)).save("theirs")
    Checkpointer(ours).load(str(tmp_path / "theirs.pth"))
    assert_holds(ours, {**ours.state_dict(), **theirs.state_dict()})
    Checkpointer(theirs, str(tmp_path)).save("again")
    assert "preprocessing" not in torch.load(tmp_path / "again.pth")


def test_missing_files(detector, tmp_path):
    checkpointer = Checkpointer(detector(R18))
    for name in ("x.pth", "x.safetensors", "x.pth?matching_heuristics=True"):
        with pytest.raises(WeightsError, match=r"x.*: no such file; check MODEL.WEIGHTS"):
            checkpointer.load(str(tmp_path / name))
    assert checkpointer.load("") == {}
