"""Checkpoints of whole detectors: read as data, and what of them must fit."""

import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file
from states import assert_holds, refused, state_of

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.checkpoint.classes import carry_over_classes
from resnet_backbone.detection.checkpoint.files import open_weights
from resnet_backbone.detection.inference.predictor import trained_detector
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import WeightsError

R18, RETINANET = "voc/faster_rcnn_R_18_FPN.yaml", "coco/retinanet_R_18_FPN.yaml"
CASCADE = "coco/cascade_rcnn_R_18_FPN.yaml"
MASKS = "../segmentation/coco/mask_rcnn_R_18_FPN.yaml"
PANOPTIC = "../segmentation/coco/panoptic_R_50_FPN.yaml"
SEMANTIC = "../segmentation/coco/semantic_R_50_FPN.yaml"
PREFIX = "backbone.bottom_up."


# Reading


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("name", ["x.pth", "x.pkl"])
def test_nothing_in_a_file_is_executed(detector, tmp_path, capsys, name):
    model, content = detector(), {"model": {"backbone.x": np.zeros(1)}, "trainer": Evil()}
    with open(tmp_path / name, "wb") as file:
        torch.save(content, file) if name == "x.pth" else pickle.dump(content, file)
    with refused(model, rf"{name}: refused: it contains .*print"):
        Checkpointer(model).load(str(tmp_path / name))
    assert "executed" not in capsys.readouterr().out


def test_a_backbone_is_read_once(detector, tmp_path, monkeypatch):
    path, reads, read_bytes = tmp_path / "x.pth", [], Path.read_bytes
    torch.save(build_network("resnet18").state_dict(), path)
    monkeypatch.setattr(Path, "read_bytes", lambda p: reads.append(p.name) or read_bytes(p))
    Checkpointer(detector(), preprocessing="msra").load(str(path), [])
    assert reads == ["x.pth"]


def test_read_as_torch_reads_it(detector, tmp_path):
    """The state of a training too: what Detectron2's trainer saves is plain data."""
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = {"base_lrs": [0.1], "last_epoch": 7, "nested": (1, None, {"a": True})}
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model", schedule=schedule)
    path = tmp_path / "model.pth"
    expected, found = torch.load(path, weights_only=True), open_weights(str(path)).content()
    assert found.keys() == expected.keys() and found["schedule"] == schedule
    torch.testing.assert_close(found["model"], dict(expected["model"]), rtol=0, atol=0)
    states = (content["optimizer"]["state"] for content in (found, expected))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    again = torch.optim.SGD(detector().parameters(), 0.1, momentum=0.9)
    again.load_state_dict(found["optimizer"])


def test_detectors_of_every_container(detector, make_cfg, small, tmp_path):
    """.pth with and without wrapping, .pkl of the zoo, safetensors; module. is taken off."""
    model = detector()
    state = model.state_dict()
    arrays = {key: value.numpy() for key, value in state.items()}
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "module.pth")
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    for name in ("bare.pth", "module.pth", "zoo.pkl", "x.safetensors"):
        other = trained_detector(make_cfg(R18, **small, MODEL__WEIGHTS=str(tmp_path / name)))
        assert_holds(other, state)


# What must fit


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(MODEL__RESNETS__DEPTH=34), r"lacks \d+ of this detector's tensors, such as .*res2.2"),
        (dict(MODEL__FPN__OUT_CHANNELS=8), "have another shape, such as backbone.fpn_lat"),
        (
            dict(MODEL__ROI_BOX_HEAD__FC_DIM=8),
            r"as roi_heads.box_head.fc1.weight: \(16, 784\), but t",
        ),
        (dict(RESNET_BACKBONE__SHORTCUT="A"), "this detector has no .*res3.0.shortcut"),
        ({}, r"resnet34, this network is a resnet18: .* no backbone.bottom_up.res2.2.conv1.weight"),
    ],
)
@pytest.mark.parametrize("starts", [True, False])
def test_other_detectors_are_refused(detector, tmp_path, keys, message, starts):
    """A deeper one (the last) has every tensor of a shallow one: only the rest tells."""
    saved = detector() if keys else detector(MODEL__RESNETS__DEPTH=34)
    Checkpointer(saved, str(tmp_path)).save("model")
    model = detector(**keys)
    with refused(model, message):
        Checkpointer(model).load(str(tmp_path / "model.pth"), [] if starts else None)


def test_nothing_matches(detector, tmp_path):
    torch.save({"model": {"backbone.body.conv1.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    model = detector()
    with refused(model, r"lacks \d+ of this detector's tensors, such as backbone"):
        Checkpointer(model).load(str(tmp_path / "x.pth"), [])
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with refused(model, "x.pth: the keys belong to no ResNet"):
        Checkpointer(model, preprocessing="msra").load(str(tmp_path / "x.pth"), [])


def test_a_detector_with_detectron2s_backbone(detector, tmp_path):
    """Our trainer runs these too: their checkpoints must be whole, their input is not known."""
    keys = dict(MODEL__RESNETS__RES2_OUT_CHANNELS=64, MODEL__RESNETS__NORM="BN")
    keys |= dict(MODEL__BACKBONE__NAME="build_resnet_fpn_backbone")
    model, other = detector(**keys), detector(**keys)
    Checkpointer(model, str(tmp_path)).save("model")
    Checkpointer(other).load(str(tmp_path / "model.pth"))
    assert_holds(other, model.state_dict())
    state = model.state_dict()
    del state[f"{PREFIX}res4.1.conv2.weight"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with refused(other, "lacks 1 of .*res4.1.conv2.weight"):
        Checkpointer(other).load(str(tmp_path / "part.pth"), [])


@pytest.mark.parametrize("missing", ["res4.1.conv2.weight", "stem.conv1.norm.running_var"])
def test_a_backbone_in_part_is_refused(detector, tmp_path, missing):
    state = detector().state_dict()
    del state[PREFIX + missing]
    torch.save({"model": state}, tmp_path / "x.pth")
    model = detector()
    with refused(model, f"lacks 1 of this detector's tensors, such as .*{missing}"):
        Checkpointer(model).load(str(tmp_path / "x.pth"), [])


def test_fine_tuning_on_other_classes(detector, tmp_path, caplog):
    """Only the layers that depend on the classes start at random, and a line says so."""
    source = detector(MODEL__ROI_HEADS__NUM_CLASSES=5)
    Checkpointer(source, str(tmp_path)).save("model")
    model = detector(MODEL__ROI_HEADS__NUM_CLASSES=3)
    with refused(model, r"box_predictor.cls_score.weight: \(6, 16\), .* \(4, 16\);"):
        Checkpointer(model).load(str(tmp_path / "model.pth"))
    before = state_of(model)
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        Checkpointer(model).load(str(tmp_path / "model.pth"), checkpointables=[])
    assert "start at random: roi_heads.box_predictor (4 tensors)" in caplog.text
    theirs, head = source.state_dict(), "roi_heads.box_predictor."
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith(head) else theirs)[key]), key


@pytest.mark.parametrize("kind", ["FPN", "C4", "cascade"])
def test_classes_are_carried_over_by_name(detector, tmp_path, caplog, kind):
    """By hand: VOC's names and COCO's, another order, another number, a class of each alone."""
    file = CASCADE if kind == "cascade" else f"voc/faster_rcnn_R_18_{kind}.yaml"
    theirs, ours = ["person", "tv", "airplane"], ["aeroplane", "boat", "person", "tvmonitor"]
    source = detector(file, MODEL__ROI_HEADS__NUM_CLASSES=3)
    for parameter in source.roi_heads.box_predictor.parameters():
        parameter.data.normal_()
    Checkpointer(source, str(tmp_path), class_names=theirs).save("coco")
    model = detector(file, MODEL__ROI_HEADS__NUM_CLASSES=4)
    before, given = state_of(model), source.state_dict()
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        Checkpointer(model, class_names=ours).load(str(tmp_path / "coco.pth"), checkpointables=[])
    names = "aeroplane from airplane, person, tvmonitor from tv; at random: boat"
    assert f"3 of 4 classes are carried over by name: {names}\n" in caplog.text
    assert "start at random" not in caplog.text
    found, checked = state_of(model), 0
    for key in (key for key in found if "box_predictor" in key):
        rows = {"cls_score": 1, "bbox_pred": 4}[key.split(".")[-2]]
        if len(found[key]) == 4 and rows == 4:  # a cascade's boxes are those of all classes
            assert torch.equal(found[key], given[key])
            continue
        blocks = [values[key].split(rows) for values in (found, given, before)]
        for place, (origin, index) in enumerate([(1, 2), (2, 1), (1, 0), (1, 1)]):
            assert torch.equal(blocks[0][place], blocks[origin][index]), (key, place)
        assert rows == 4 or torch.equal(blocks[0][4], blocks[1][3]), "background"
        checked += 1
    assert checked == (6 if kind == "cascade" else 4)


@pytest.mark.parametrize(
    "file, key, order",
    [
        (R18, "roi_heads.box_predictor.cls_score.weight", [1, 0, 2]),
        (R18, "roi_heads.box_predictor.bbox_pred.bias", [4, 5, 6, 7, 0, 1, 2, 3]),
        (MASKS, "roi_heads.mask_head.predictor.weight", [1, 0]),
        (RETINANET, "head.cls_score.weight", [number ^ 1 for number in range(18)]),
        (PANOPTIC, "roi_heads.box_predictor.cls_score.weight", [1, 0, 2]),
        (PANOPTIC, "sem_seg_head.predictor.weight", [0, 2, 1]),
        (SEMANTIC, "sem_seg_head.predictor.weight", [0, 2, 1]),
    ],
)
def test_as_many_classes_in_another_order(detector, tmp_path, file, key, order):
    things, stuff = ["cat", "dog"], ["things", "sky", "sea"]
    keys = {f"MODEL__{kind}__NUM_CLASSES": 2 for kind in ("RETINANET", "ROI_HEADS")}
    keys["MODEL__SEM_SEG_HEAD__NUM_CLASSES"] = 3
    names = [things[::step] + stuff[:1] + stuff[1:][::step] for step in (1, -1)]
    kept = {PANOPTIC: slice(5), SEMANTIC: slice(2, 5)}.get(file, slice(2))
    theirs, ours = (one[kept] for one in names)
    source, model = detector(file, **keys), detector(file, **keys)
    source.state_dict()[key].normal_()
    Checkpointer(source, str(tmp_path), class_names=theirs).save("model")
    path = str(tmp_path / "model.pth")
    Checkpointer(model, class_names=ours).load(path, checkpointables=[])
    assert torch.equal(model.state_dict()[key], source.state_dict()[key][order])


@pytest.mark.parametrize("file", [CASCADE, MASKS])
def test_a_single_class_of_another_name(detector, tmp_path, file):
    """Its boxes and masks, perhaps class-agnostic, are kept."""
    source, model = (detector(file, MODEL__ROI_HEADS__NUM_CLASSES=1) for _ in range(2))
    Checkpointer(source, str(tmp_path), class_names=["cat"]).save("model")
    path = str(tmp_path / "model.pth")
    Checkpointer(model, class_names=["dog"]).load(path, checkpointables=[])
    before, after = source.state_dict(), model.state_dict()
    kept = [key for key in after if "bbox_pred" in key or "mask_head.predictor" in key]
    assert kept and all(torch.equal(after[key], before[key]) for key in kept)


def test_pointrends_layers_start_at_random_if_the_classes_differ():
    tensors = {f"roi_heads.mask_head.{key}": torch.ones(2) for key in ("point_head.fc1.bias", "x")}
    names = ["cat", "dog"]
    assert carry_over_classes({}, tensors, names, names, "") == tensors
    kept = carry_over_classes({}, tensors, names, names[::-1], "")
    assert [*kept] == ["roi_heads.mask_head.x"]


def test_a_detector_without_heads_may_start_a_training(detector, tmp_path, caplog):
    state = {k: v for k, v in detector().state_dict().items() if not k.startswith("roi_heads.")}
    torch.save({"model": state}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        Checkpointer(detector()).load(str(tmp_path / "x.pth"), [])
    assert "roi_heads.box_head (4 tensors), roi_heads.box_predictor (4 tensors)" in caplog.text
    with pytest.raises(WeightsError, match="lacks 8 of this detector's tensors"):
        Checkpointer(detector()).load(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((18, 34), "the file is a resnet18, this network is a resnet34: .*res2"),
        ((34, 18), "the file is a resnet34, this network is a resnet18: .*res2"),
        ((18, 50), ".*res2.* depth"),  # it leaves out what tells them apart
    ],
)
def test_detectron2s_checkpointer_refuses_another_depth(detector, tmp_path, depths, message):
    """By itself it warns, leaves tensors of another shape out and loads the rest."""
    saved, model = (detector(MODEL__RESNETS__DEPTH=depth) for depth in depths)
    state = saved.state_dict()
    for _ in range(2):  # also where the file does not say its input
        torch.save({"model": state}, tmp_path / "model.pth")
        with refused(model, f"the checkpoint belongs to another backbone: {message}"):
            DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
        state.pop(f"{PREFIX}input_settings", None)


def test_names_matched_by_their_ends(detector, tmp_path):
    """Detectron2's query; for a backbone alone names are mapped anyway."""
    model, path = detector(), tmp_path / "x.pth"
    torch.save({k.removeprefix("backbone."): v for k, v in model.state_dict().items()}, path)
    other = detector()
    Checkpointer(other).load(f"{path}?matching_heuristics=True")
    assert_holds(other, model.state_dict())
    torch.save(model.backbone.bottom_up.state_dict(), path)
    with pytest.raises(WeightsError, match="x.pth does not state which input it was trained on"):
        Checkpointer(detector()).load(f"{path}?matching_heuristics=True", [])
    other = detector()
    Checkpointer(other, preprocessing="msra").load(f"{path}?matching_heuristics=True", [])
    assert_holds(other.backbone.bottom_up, model.state_dict() | torch.load(path))


def test_it_can_be_used_after_an_error(detector, tmp_path):
    for name, keys in (("model", {}), ("other", dict(MODEL__FPN__OUT_CHANNELS=8))):
        Checkpointer(detector(**keys), str(tmp_path)).save(name)
    checkpointer = Checkpointer(detector())
    with pytest.raises(WeightsError):
        checkpointer.load(str(tmp_path / "other.pth"))
    checkpointer.load(str(tmp_path / "model.pth"))


def test_other_classes_are_refused_unless_weights_only_start_a_training(detector, tmp_path):
    model, path = detector(), str(tmp_path / "model.pth")
    Checkpointer(model, str(tmp_path), class_names=["cat", "dog"]).save("model")
    Checkpointer(model, class_names=["cat", "dog"]).load(path)
    Checkpointer(model, class_names=["cat", "cow"]).load(path, checkpointables=[])
    with refused(model, "trained on the classes .*'dog'"):
        Checkpointer(model, class_names=["cat", "cow"]).load(path)


# Files of Detectron1


RENAMED = {".norm.weight": "_bn_s", ".norm.bias": "_bn_b", ".weight": "_w", ".bias": "_b"}
RENAMED |= {".conv1": "_branch2a", ".conv2": "_branch2b", ".shortcut": "_branch1", ".": "_"}


def detectron1(model):
    """Blobs of a detector under Caffe2's names, statistics folded into the norms."""
    blobs = {}
    for key, value in model.backbone.state_dict().items():
        if key.endswith(("running_mean", "running_var", "settings", "tracked")):
            continue
        name = key.removeprefix("bottom_up.").removeprefix("stem.")
        name = re.sub(r"fpn_lateral(\d)", r"fpn_inner_res\1_1_sum_lateral", name)
        name = re.sub(r"fpn_output(\d)", r"fpn_res\1_1_sum", name)
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        blobs[name.replace("conv1_bn", "res_conv1_bn")] = value.numpy()
    return blobs


def test_folded_statistics_need_frozen_norms(detector, tmp_path):
    source = detector()
    for module in source.modules():
        if hasattr(module, "running_var"):
            module.weight.uniform_(0.5, 1.5)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"blobs": detectron1(source)}))
    model = detector()
    Checkpointer(model).load(str(tmp_path / "x.pkl"), [])
    for key, value in source.backbone.state_dict().items():
        found = model.backbone.state_dict()[key]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6, msg=key)
    model = detector(MODEL__RESNETS__NORM="BN")
    with refused(model, "folded batch norms.*set MODEL.RESNETS.NORM FrozenBN"):
        Checkpointer(model).load(str(tmp_path / "x.pkl"), [])


def test_detectron2_loads_the_same(detector, tmp_path):
    """Its own checkpointer finds the same places in our Caffe2 and Detectron2 files."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"blobs": detectron1(detector())}))
    ours, theirs = detector(), detector()
    theirs.load_state_dict(ours.state_dict())
    Checkpointer(ours).load(str(tmp_path / "x.pkl"), [])
    DetectionCheckpointer(theirs).load(str(tmp_path / "x.pkl"))
    assert_holds(ours, theirs.state_dict())
