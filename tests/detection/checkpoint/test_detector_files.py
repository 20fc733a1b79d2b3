"""Checkpoints of whole detectors: read as data, and what of them must fit."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.checkpoint.files import open_weights
from resnet_backbone.detection.inference.predictor import load_detector
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import PREPROCESSINGS, WeightsError, save_weights
from resnet_backbone.weights.readers import read_tensors

R18 = "voc/faster_rcnn_R_18_FPN.yaml"
PREFIX = "backbone.bottom_up."


@pytest.fixture
def detector(make_cfg, small):
    """Function (config file, KEY=value...) -> a small detector with small heads."""
    return lambda file=R18, **keys: build_model(make_cfg(file, **(small | keys)))


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_holds(model, tensors):
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


# Reading


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(detector, tmp_path, capsys):
    model = detector()
    before = state_of(model)
    for name, save in (
        ("x.pth", torch.save),
        ("x.pkl", lambda x, p: p.write_bytes(pickle.dumps(x))),
    ):
        save({"model": {"backbone.x": np.zeros(1)}, "trainer": Evil()}, tmp_path / name)
        with pytest.raises(WeightsError, match=rf"{name}: refused, it holds .*print") as caught:
            Checkpointer(model).load(str(tmp_path / name))
        assert "\n" not in str(caught.value) and "executed" not in capsys.readouterr().out
    assert_holds(model, before)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "its content is of type list, not a state dict"),
        (
            {"model": {"backbone.x": "text"}},
            "it holds backbone.x of type str, which is not a tensor",
        ),
        ({"model": {"backbone.x": torch.tensor([float("nan")])}}, "backbone.x has NaN"),
        (
            {"model": {f"backbone.{i}": torch.zeros(9000) for i in range(1)}, "x": [[]] * 9},
            "no tensor",
        ),
    ],
)
def test_files_that_hold_no_detector(detector, tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    model = detector()
    before = state_of(model)
    with pytest.raises(WeightsError, match=message):
        Checkpointer(model).load(str(tmp_path / "x.pth"))
    assert_holds(model, before)


@pytest.mark.parametrize("make", [lambda x: x[:], lambda x: x], ids=["views", "one object"])
def test_one_storage_under_many_names_is_refused(tmp_path, make):
    """By the reader of detectors as by that of networks."""
    one, path = torch.zeros(100_000), tmp_path / "x.pth"
    torch.save({"model": {f"backbone.{index}": make(one) for index in range(50)}}, path)
    for read in (lambda: open_weights(str(path)).content(), lambda: read_tensors(path)):
        with pytest.raises(WeightsError, match="more than twice its own size"):
            read()


def test_two_state_dicts_are_refused(tmp_path):
    state, path = {"backbone.x": torch.zeros(1)}, tmp_path / "x.pth"
    torch.save({"model": state, "state_dict": state}, path)
    for read in (lambda: open_weights(str(path)), lambda: read_tensors(path)):
        with pytest.raises(WeightsError, match="both state_dict and model hold weights"):
            read()


def test_a_backbone_is_read_once(detector, tmp_path, monkeypatch):
    path, reads, read_bytes = tmp_path / "x.pth", [], Path.read_bytes
    torch.save(build_network("resnet18").state_dict(), path)
    monkeypatch.setattr(Path, "read_bytes", lambda p: reads.append(p.name) or read_bytes(p))
    Checkpointer(detector(), preprocessing="msra").load(str(path), [])
    assert reads == ["x.pth"]


@pytest.mark.parametrize("end", [0, 10, 5000, -1])
def test_torn_files(detector, tmp_path, end):
    Checkpointer(detector(), str(tmp_path)).save("model")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[:end])
    with pytest.raises(WeightsError, match="torn.pth: (not a whole torch file|refused, it holds)"):
        Checkpointer(detector()).load(str(tmp_path / "torn.pth"))


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

    def assert_same(a, b):
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype
        elif isinstance(b, dict):
            assert list(a) == list(b)
            [assert_same(a[key], b[key]) for key in b]
        else:
            assert a == b

    for key in expected:
        assert_same(found[key], expected[key]) if key != "optimizer" else None
    assert_same(found["optimizer"]["state"], expected["optimizer"]["state"])
    again = torch.optim.SGD(detector().parameters(), 0.1, momentum=0.9)
    again.load_state_dict(found["optimizer"])


def test_content_decides_what_a_file_is(detector, tmp_path):
    network = build_network("resnet18")
    save_weights(network, tmp_path / "backbone.safetensors", PREPROCESSINGS["msra"])
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    Checkpointer(detector(), str(tmp_path)).save("model")
    kinds = {"backbone.safetensors": False, "backbone.pth": False, "model.pth": True}
    for name, expected in kinds.items():
        assert open_weights(str(tmp_path / name)).is_detector is expected, name


def test_detectors_of_every_container(detector, make_cfg, small, tmp_path):
    """.pth with and without wrapping, .pkl of the zoo, safetensors; module. is taken off."""
    from safetensors.torch import save_file

    model = detector()
    state = model.state_dict()
    arrays = {key: value.numpy() for key, value in state.items()}
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "module.pth")
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    for name in ("bare.pth", "module.pth", "zoo.pkl", "x.safetensors"):
        other = detector()
        load_detector(make_cfg(R18, **small, MODEL__WEIGHTS=str(tmp_path / name)), other)
        assert_holds(other, state)


# What must fit


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(MODEL__RESNETS__DEPTH=34), r"lacks \d+ of this detector's tensors, such as .*res2.2"),
        (
            dict(MODEL__FPN__OUT_CHANNELS=8),
            "tensors are of another shape, such as backbone.fpn_lat",
        ),
        (
            dict(MODEL__ROI_BOX_HEAD__FC_DIM=8),
            r"such as roi_heads.box_head.fc1.weight: \(16, 784\), t",
        ),
        (dict(RESNET_BACKBONE__SHORTCUT="A"), "backbone has no .*res3.0.shortcut"),
    ],
)
@pytest.mark.parametrize("starts", [True, False])
def test_other_detectors_are_refused(detector, tmp_path, keys, message, starts):
    Checkpointer(detector(), str(tmp_path)).save("model")
    model = detector(**keys)
    before = state_of(model)
    with pytest.raises(WeightsError, match=message) as caught:
        Checkpointer(model).load(str(tmp_path / "model.pth"), [] if starts else None)
    assert "\n" not in str(caught.value)
    assert_holds(model, before)


def test_a_deeper_network_is_refused(detector, tmp_path):
    """Every tensor of the shallow one is there: only the rest tells."""
    Checkpointer(detector(MODEL__RESNETS__DEPTH=34), str(tmp_path)).save("model")
    with pytest.raises(
        WeightsError, match=r"has no backbone.bottom_up.res2.2.conv1.weight; is it a"
    ):
        Checkpointer(detector()).load(str(tmp_path / "model.pth"), [])


def test_nothing_matches(detector, tmp_path):
    torch.save({"model": {"backbone.body.conv1.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(
        WeightsError, match="has no tensor of this detector's backbone, whose names"
    ):
        Checkpointer(detector()).load(str(tmp_path / "x.pth"), [])
    with pytest.raises(WeightsError, match="x.pth: the keys are of no ResNet"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
        Checkpointer(detector(), preprocessing="msra").load(str(tmp_path / "x.pth"), [])


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
    with pytest.raises(WeightsError, match="lacks 1 of .*res4.1.conv2.weight"):
        Checkpointer(other).load(str(tmp_path / "part.pth"), [])


@pytest.mark.parametrize("missing", ["res4.1.conv2.weight", "stem.conv1.norm.running_var"])
def test_a_backbone_in_part_is_refused(detector, tmp_path, missing):
    state = detector().state_dict()
    del state[PREFIX + missing]
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(
        WeightsError, match=f"lacks 1 of this detector's tensors, such as .*{missing}"
    ):
        Checkpointer(detector()).load(str(tmp_path / "x.pth"), [])


def test_fine_tuning_on_other_classes(detector, tmp_path, caplog):
    """Only the layers that depend on the classes start at random, and a line says so."""
    source = detector(MODEL__ROI_HEADS__NUM_CLASSES=5)
    Checkpointer(source, str(tmp_path)).save("model")
    model = detector(MODEL__ROI_HEADS__NUM_CLASSES=3)
    with pytest.raises(
        WeightsError, match=r"box_predictor.cls_score.weight: \(6, 16\), .* \(4, 16\);"
    ):
        Checkpointer(model).load(str(tmp_path / "model.pth"))
    before = state_of(model)
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        Checkpointer(model).load(str(tmp_path / "model.pth"), checkpointables=[])
    assert "start at random: roi_heads.box_predictor (4 tensors)" in caplog.text
    theirs, head = source.state_dict(), "roi_heads.box_predictor."
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith(head) else theirs)[key]), key


def test_a_detector_without_heads_may_start_a_training(detector, tmp_path, caplog):
    state = {k: v for k, v in detector().state_dict().items() if not k.startswith("roi_heads.")}
    torch.save({"model": state}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, logger="resnet_backbone"):
        Checkpointer(detector()).load(str(tmp_path / "x.pth"), [])
    assert "roi_heads.box_head (4 tensors), roi_heads.box_predictor (4 tensors)" in caplog.text
    with pytest.raises(WeightsError, match="lacks 8 of this detector's tensors"):
        Checkpointer(detector()).load(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("depths", [(18, 34), (34, 18), (18, 50)])
def test_detectron2s_checkpointer_refuses_another_depth(detector, tmp_path, depths):
    """By itself it warns, leaves tensors of another shape out and loads the rest."""
    saved, model = (detector(MODEL__RESNETS__DEPTH=depth) for depth in depths)
    Checkpointer(saved, str(tmp_path)).save("model")
    before = state_of(model)
    with pytest.raises(WeightsError, match="the checkpoint is of another backbone: .*res2.* depth"):
        DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert_holds(model, before)


def test_names_matched_by_their_ends(detector, tmp_path):
    """Detectron2's query; for a backbone alone names are mapped anyway."""
    model, path = detector(), tmp_path / "x.pth"
    torch.save({k.removeprefix("backbone."): v for k, v in model.state_dict().items()}, path)
    other = detector()
    Checkpointer(other).load(f"{path}?matching_heuristics=True")
    assert_holds(other, model.state_dict())
    torch.save(model.backbone.bottom_up.state_dict(), path)
    with pytest.raises(WeightsError, match="x.pth does not say which input it was trained on"):
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


# Files of Detectron1


def detectron1(model):
    """Blobs of a detector under Caffe2's names, statistics folded into the norms."""
    names = {
        "backbone.fpn_lateral{}": "fpn_inner_res{}_sum_lateral",
        "backbone.fpn_output{}": "fpn_res{}_sum",
    }
    blobs, state = {}, model.state_dict()
    for key, value in state.items():
        if key.startswith(PREFIX) and not key.endswith(("running_mean", "running_var", "settings")):
            name = key.removeprefix(PREFIX).removeprefix("stem.").replace(".norm.weight", "_bn_s")
            name = (
                name.replace(".norm.bias", "_bn_b").replace(".weight", "_w").replace(".bias", "_b")
            )
            for ours, theirs in (
                ("conv1", "branch2a"),
                ("conv2", "branch2b"),
                ("shortcut", "branch1"),
            ):
                name = name.replace(f".{ours}", f"_{theirs}")
            name = name.replace("conv1_bn", "res_conv1_bn") if name.startswith("conv1") else name
            blobs[name.replace(".", "_")] = value.numpy()
    for key, value in state.items():
        for ours, theirs in names.items():
            for stage in range(2, 6):
                if key.startswith(ours.format(stage) + "."):
                    depth = 1
                    end = "_w" if key.endswith("weight") else "_b"
                    blobs[theirs.format(f"{stage}_{depth}") + end] = value.numpy()
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
    with pytest.raises(
        WeightsError, match="statistics .* folded in.*set MODEL.RESNETS.NORM FrozenBN"
    ):
        Checkpointer(detector(MODEL__RESNETS__NORM="BN")).load(str(tmp_path / "x.pkl"), [])


def test_detectron2_loads_the_same(detector, tmp_path):
    """Its own checkpointer finds the same places in our Caffe2 and Detectron2 files."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"blobs": detectron1(detector())}))
    ours, theirs = detector(), detector()
    theirs.load_state_dict(ours.state_dict())
    Checkpointer(ours).load(str(tmp_path / "x.pkl"), [])
    DetectionCheckpointer(theirs).load(str(tmp_path / "x.pkl"))
    assert_holds(ours, theirs.state_dict())
