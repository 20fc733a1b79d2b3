"""``MODEL.WEIGHTS`` and ``--weights`` from every kind of source, into detectors."""

import logging
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from drawn_networks import random_checkpoint
from iopath.common.file_io import PathHandler
from states import assert_holds

from resnet_backbone.detection import Checkpointer, use_weights_input
from resnet_backbone.detection.checkpoint.checkpointer import find_network
from resnet_backbone.detection.checkpoint.input_check import prepare_weights
from resnet_backbone.detection.config import UsageError
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import WeightsError, sources, write_checkpoint
from resnet_backbone.weights.export import export_checkpoint

R18 = "voc/faster_rcnn_R_18_FPN.yaml"


@pytest.fixture
def r18():
    return random_checkpoint("resnet18", "torchvision")


@pytest.fixture
def msra():
    return random_checkpoint("resnet18", "msra")


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


def test_one_of_several_networks_in_a_file(make_cfg, small, r18, tmp_path):
    other = {key: value + 1 for key, value in r18.tensors.items()}
    torch.save({"state_dict": other, "state_dict_ema": dict(r18.tensors)}, tmp_path / "x.pth")
    cfg = make_cfg(R18, **small, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="torchvision")
    model = into_detector(cfg, f"{tmp_path / 'x.pth'}#state_dict_ema")
    assert_holds(find_network(model), r18.tensors)


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


ZOOS = "detectron2://ImageNetPretrained/MSRA/R-18.pkl"


def test_the_zoos_backbone_by_name(make_cfg, small, msra, served):
    """It speaks for itself: no name of a preprocessing is needed, and the input is checked."""
    folder, fetched = served
    caffe2_blobs(msra, folder / "R-18.pkl")
    cfg = make_cfg(R18, **small, MODEL__WEIGHTS=ZOOS)
    assert prepare_weights(cfg) == []
    model = build_model(cfg)
    Checkpointer(model).load(ZOOS, checkpointables=[])
    assert_holds(find_network(model), msra.tensors)
    assert len(fetched) == 1  # then from the cache
    wrong = make_cfg(R18, **small, MODEL__WEIGHTS=ZOOS, INPUT__FORMAT="RGB")
    with pytest.raises(WeightsError, match='INPUT.FORMAT is RGB; set INPUT.FORMAT "BGR"'):
        prepare_weights(wrong)
    use_weights_input(wrong, ZOOS)
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


def test_a_backbone_from_a_store_of_the_path_manager(make_cfg, small, msra, tmp_path):
    write_checkpoint(msra, tmp_path / "r18.safetensors")
    PathManager.register_handler(Mine(tmp_path), allow_override=True)
    cfg = make_cfg(R18, **small, MODEL__WEIGHTS="mine://r18.safetensors")
    assert prepare_weights(cfg) == []
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    assert_holds(find_network(model), msra.tensors)


def test_detectron2s_cache_is_used(make_cfg, small, msra, served, tmp_path):
    path = tmp_path / "iopath" / "detectron2/ImageNetPretrained/MSRA/R-18.pkl"
    path.parent.mkdir(parents=True)
    export_checkpoint(msra, path, "caffe2")
    model = into_detector(make_cfg(R18, **small), ZOOS)
    assert_holds(find_network(model), msra.tensors)
    assert not served[1]


def test_c4_from_the_zoo(make_cfg, msra, served):
    caffe2_blobs(msra, served[0] / "R-18.pkl")
    model = into_detector(make_cfg("voc/faster_rcnn_R_18_C4.yaml"), ZOOS)
    assert_holds(model.roi_heads.res5, msra.tensors, "res5.")
    assert "res5" not in find_network(model).stage_names


@pytest.mark.parametrize("source", ["torchvision://resnet19", "gopher://x", "detectron2://no.pth"])
def test_unknown_names_are_one_line(make_cfg, served, source):
    with pytest.raises((WeightsError, UsageError)) as caught:
        prepare_weights(make_cfg(R18), weights=source)
    assert "\n" not in str(caught.value)
