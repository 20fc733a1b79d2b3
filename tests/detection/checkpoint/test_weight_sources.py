"""``MODEL.WEIGHTS`` and ``--weights`` from every kind of source, into detectors."""

import logging
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from states import assert_holds

from resnet_backbone.detection import Checkpointer, use_weights_input
from resnet_backbone.detection.checkpoint.checkpointer import find_network
from resnet_backbone.detection.checkpoint.input_check import prepare_weights
from resnet_backbone.detection.config import UsageError
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import PREPROCESSINGS, WeightsError, sources, write_checkpoint
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.export import export_checkpoint

R18 = "voc/faster_rcnn_R_18_FPN.yaml"


def random_r18(preprocessing="msra"):
    """A checkpoint of random weights with batch norms that are no identity."""
    torch.manual_seed(0)
    network = build_network("resnet18", 7)
    for key, value in network.state_dict().items():
        if "norm" in key and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    tensors = {k: v for k, v in network.state_dict().items() if not k.endswith("tracked")}
    return Checkpoint(tensors, ModelSpec("resnet18", 7), PREPROCESSINGS[preprocessing])


@pytest.fixture
def r18():
    return random_r18("torchvision")


def into_detector(cfg, source):
    """The config after --weights, and a detector with these weights."""
    prepare_weights(cfg, weights=str(source))
    model, named = build_model(cfg), cfg.RESNET_BACKBONE.WEIGHTS_PREPROCESSING
    Checkpointer(model, preprocessing=named).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model


@pytest.mark.parametrize(
    "kind, file, name",
    [
        ("resnet_backbone", "x.safetensors", ""),
        ("torchvision", "x.pth", "torchvision"),
        ("torchvision", "x.safetensors", ""),  # with our notes in its header
        ("timm", "folder", ""),
        ("huggingface", "folder", ""),
        ("detectron2", "x.pkl", "torchvision"),
        ("detectron2", "x.pth", "torchvision"),
        ("caffe2", "x.pkl", "torchvision"),
    ],
)
def test_every_kind_of_file(make_cfg, small, r18, tmp_path, kind, file, name):
    export_checkpoint(r18, tmp_path / file, kind)
    cfg = make_cfg(R18, **small, RESNET_BACKBONE__WEIGHTS_PREPROCESSING=name)
    model = into_detector(cfg, tmp_path / file)
    assert_holds(find_network(model), r18.tensors)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.WEIGHTS == str(tmp_path / file)
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([123.675, 116.28, 103.53])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([58.395, 57.12, 57.375])
    assert cfg.RESNET_BACKBONE.WEIGHTS_INPUT == "check"


def test_wrapped_prefixed_and_half_precision(make_cfg, small, r18, tmp_path):
    """As training scripts save them: beside an optimizer, behind ``module.``"""
    states = {f"module.{key}": value.half() for key, value in r18.tensors.items()}
    torch.save({"state_dict": states, "epoch": 3}, tmp_path / "x.pth")
    cfg = make_cfg(R18, **small, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="torchvision")
    model = into_detector(cfg, tmp_path / "x.pth")
    assert_holds(find_network(model), {k: v.half() for k, v in r18.tensors.items()})


@pytest.mark.parametrize("kept, error", [((), ""), (("fc6.weight", "fc6.bias"), "lacks fc7")])
def test_a_vggs_classifier_is_there_or_not(make_cfg, tmp_path, caplog, kept, error):
    """Convolutions alone start a VGG detector, and a line says what is random; half is damage."""
    tensors = build_network("vgg11", out_features=["conv5"]).state_dict()
    head = {"fc6.weight": torch.zeros(8, 512 * 49), "fc6.bias": torch.zeros(8)}
    tensors |= {key: head[key] for key in kept}
    torch.save(tensors, tmp_path / "vgg.pth")
    keys = dict(MODEL__ROI_BOX_HEAD__FC_DIM=8, RESNET_BACKBONE__VGG__DEPTH=11)
    cfg = make_cfg("voc/faster_rcnn_VGG_16.yaml", **keys)
    cfg.RESNET_BACKBONE.WEIGHTS_PREPROCESSING = "caffe_vgg"
    if error:
        with pytest.raises(WeightsError, match=error):
            into_detector(cfg, tmp_path / "vgg.pth")
        return
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        into_detector(cfg, tmp_path / "vgg.pth")
    assert "start at random: roi_heads.box_head (4 tensors)" in caplog.text


# Names and addresses


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Downloads come from the folder ``served``; the caches are empty."""
    folder = tmp_path / "served"
    folder.mkdir()
    fetched = []

    def fetch(url, target, *_, **__):
        fetched.append(url)
        shutil.copy(folder / Path(target).name, target)

    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "iopath"))
    return folder, fetched


def caffe2_blobs(checkpoint, path):
    """The zoo's R-50.pkl: no wrapping, norms under the names bn_gamma ..., a classifier fc1000."""
    export_checkpoint(checkpoint, path, "caffe2")
    spelling = {"_bn_s$": "_bn_gamma", "_bn_b$": "_bn_beta", "_bn_rm$": "_bn_running_mean"}
    spelling |= {"_bn_riv$": "_bn_running_var", "pred_": "fc1000_"}
    renamed = {}
    for key, value in np.load(path, allow_pickle=True)["blobs"].items():
        for ours, theirs in spelling.items():
            key = re.sub(ours, theirs, key)
        renamed[key] = value
    path.write_bytes(pickle.dumps(renamed, protocol=2))


def test_the_zoos_backbone_by_name(make_cfg, small, served):
    """It speaks for itself: no name of a preprocessing is needed, and the input is checked."""
    folder, fetched = served
    weights, source = random_r18(), "detectron2://ImageNetPretrained/MSRA/R-18.pkl"
    caffe2_blobs(weights, folder / "R-18.pkl")
    cfg = make_cfg(R18, **small, MODEL__WEIGHTS=source)
    assert prepare_weights(cfg) == []
    model = build_model(cfg)
    Checkpointer(model).load(source, checkpointables=[])
    assert_holds(find_network(model), weights.tensors)
    assert len(fetched) == 1  # then from the cache
    wrong = make_cfg(R18, **small, MODEL__WEIGHTS=source, INPUT__FORMAT="RGB")
    with pytest.raises(WeightsError, match='INPUT.FORMAT is RGB; set INPUT.FORMAT "BGR"'):
        prepare_weights(wrong)
    use_weights_input(wrong, source)
    assert wrong.INPUT.FORMAT == "BGR"


class Mine(PathHandler):
    """A store of somebody's, as registered with Detectron2's PathManager."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["mine://"]

    def _get_local_path(self, path, force=False, **kwargs):
        return str(self.folder / path.removeprefix("mine://"))


def test_a_backbone_from_a_store_of_the_path_manager(make_cfg, small, tmp_path):
    weights = random_r18()
    write_checkpoint(weights, tmp_path / "r18.safetensors")
    PathManager.register_handler(Mine(tmp_path), allow_override=True)
    cfg = make_cfg(R18, **small, MODEL__WEIGHTS="mine://r18.safetensors")
    assert prepare_weights(cfg) == []
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    assert_holds(find_network(model), weights.tensors)


def test_detectron2s_cache_is_used(make_cfg, small, served, tmp_path):
    path = tmp_path / "iopath" / "detectron2/ImageNetPretrained/MSRA/R-18.pkl"
    path.parent.mkdir(parents=True)
    weights = random_r18()
    export_checkpoint(weights, path, "caffe2")
    model = into_detector(make_cfg(R18, **small), "detectron2://ImageNetPretrained/MSRA/R-18.pkl")
    assert_holds(find_network(model), weights.tensors)
    assert not served[1]


def test_c4_from_the_zoo(make_cfg, served):
    folder, _ = served
    weights = random_r18()
    caffe2_blobs(weights, folder / "R-18.pkl")
    cfg = make_cfg("voc/faster_rcnn_R_18_C4.yaml")
    model = into_detector(cfg, "detectron2://ImageNetPretrained/MSRA/R-18.pkl")
    assert_holds(model.roi_heads.res5, weights.tensors, "res5.")
    assert "res5" not in find_network(model).stage_names


def test_torchvision_by_name(make_cfg, small, r18, served):
    folder, fetched = served
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    export_checkpoint(r18, folder / entry.url.rpartition("/")[2], "torchvision")
    cfg = make_cfg(R18, **small)
    with pytest.raises(WeightsError, match="its sha256 begins with"):
        into_detector(cfg, "torchvision://resnet18/IMAGENET1K_V1")
    assert fetched == [entry.url]


@pytest.mark.parametrize("source", ["torchvision://resnet19", "gopher://x", "detectron2://no.pth"])
def test_unknown_names_are_one_line(make_cfg, served, source):
    with pytest.raises((WeightsError, UsageError)) as caught:
        prepare_weights(make_cfg(R18), weights=source)
    assert "\n" not in str(caught.value)
