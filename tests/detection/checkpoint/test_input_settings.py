"""A detector's state dict says which input it was trained on, to whatever loads it."""

import copy
import pickle
import re
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from drawn_networks import random_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from states import assert_holds, refused, state_of

from resnet_backbone.detection import Checkpointer, use_weights_input
from resnet_backbone.detection.checkpoint.files import differences, origin_input
from resnet_backbone.detection.checkpoint.input_check import config_input, prepare_weights
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.inference.predictor import Predictor
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import PREPROCESSINGS, Preprocessing, WeightsError
from resnet_backbone.weights.checkpoint import ModelSpec
from resnet_backbone.weights.export import export_checkpoint
from resnet_backbone.weights.reading import read_checkpoint

R18, R50 = "voc/faster_rcnn_R_18_FPN.yaml", "voc/faster_rcnn_R_50_FPN.yaml"
KEY = "backbone.bottom_up.input_settings"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
MEAN = [123.675, 116.28, 103.53]
OTHER_INPUTS = {
    "INPUT.FORMAT": ("RGB", 'INPUT.FORMAT is RGB; set INPUT.FORMAT "BGR"'),
    "MODEL.PIXEL_MEAN": (MEAN, r'is \[123.675, .*; set MODEL.PIXEL_MEAN "\[103.53, 116.28, 123.67'),
    "MODEL.PIXEL_STD": ([58.0] * 3, r'is \[58, 58, 58\]; set MODEL.PIXEL_STD "\[1, 1, 1\]"'),
    STRIDE: (False, f"{STRIDE} is False; set {STRIDE} True"),
}


@pytest.fixture
def make(make_cfg, small):
    """Function (config file, KEY=value...) -> config of a small detector."""

    def run(file=R50, **keys):
        tests = dict(MODEL__RPN__POST_NMS_TOPK_TEST=20, TEST__DETECTIONS_PER_IMAGE=6)
        keys = small | tests | dict(MODEL__WEIGHTS="", INPUT__MIN_SIZE_TEST=96) | keys
        return make_cfg(file, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, **keys)

    return run


def save(checkpointer, cfg, folder):
    """The config, MODEL.WEIGHTS being a detector of random weights that `checkpointer` saved."""
    torch.manual_seed(0)
    checkpointer(build_model(cfg), str(folder)).save("model")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    return cfg


@pytest.mark.parametrize("writer", [DetectionCheckpointer, Checkpointer])
def test_default_predictor_finds_what_ours_finds(make, tmp_path, writer):
    cfg = save(writer, make(R18), tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ours, theirs = (kind(cfg)(image)["instances"] for kind in (Predictor, DefaultPredictor))
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=1e-2)


# upstream's checkpointer writes no notes beside the state dict
CROSSED = [(Checkpointer, DefaultPredictor), (DetectionCheckpointer, Predictor)]


@pytest.mark.parametrize("key", OTHER_INPUTS)
@pytest.mark.parametrize("writer, predictor", CROSSED)
def test_predictors_refuse_other_input(make, tmp_path, writer, predictor, key):
    cfg = save(writer, make(R50 if key == STRIDE else R18), tmp_path)
    value, message = OTHER_INPUTS[key]
    cfg.merge_from_list([key, value])
    with pytest.raises(WeightsError, match=message) as caught:
        predictor(cfg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["R_18_FPN", "R_18_C4", "VGG_16_FPN"])
def test_nothing_is_loaded_before_the_error(make, name):
    file = f"voc/faster_rcnn_{name}.yaml"
    state = build_model(make(file)).state_dict()
    model = build_model(make(file, INPUT__FORMAT="RGB"))
    with refused(model, "INPUT.FORMAT is RGB"):
        model.load_state_dict(state)


def test_stride_counts_where_there_are_bottlenecks_and_means_of_one_convention_are_one(make):
    state = build_model(make(R18)).state_dict()
    keys = dict(MODEL__RESNETS__STRIDE_IN_1X1=False, MODEL__PIXEL_MEAN=[103.939, 116.779, 123.68])
    build_model(make(R18, **keys)).load_state_dict(state)
    assert state[KEY][-1] == -1


def test_foreign_states_load_strictly(make):
    """Those of Detectron2, of older checkpoints, of a backbone alone."""
    model = build_model(make(R18))
    state = model.state_dict()
    del state[KEY]
    assert not any(model.load_state_dict(state, strict=True))
    network = model.backbone.bottom_up
    assert not any("input_settings" in key for key in network.state_dict())
    assert not any(network.load_state_dict(network.state_dict(), strict=True))


def test_a_detector_of_unknown_input_takes_every_state(make):
    model = build_model(make(R18))
    model.backbone.bottom_up.input_settings = None
    model.load_state_dict(build_model(make(R18, INPUT__FORMAT="RGB")).state_dict(), strict=True)
    assert KEY not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_it_survives_other_precisions(make, dtype):
    state = {k: v.to(dtype) for k, v in build_model(make(R18)).state_dict().items()}
    build_model(make(R18)).load_state_dict(state)
    with pytest.raises(WeightsError, match="INPUT.FORMAT"):
        build_model(make(R18, INPUT__FORMAT="RGB")).load_state_dict(state)
    assert build_model(make(R18)).to(dtype).state_dict()[KEY].dtype == torch.float32


def test_it_survives_copies_and_averages(make):
    model = copy.deepcopy(build_model(make(R18)))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.state_dict()[KEY], model.state_dict()[KEY])


@pytest.mark.parametrize("values", [[1.0], [2.0, *[1.0] * 7], [1.0] * 6 + [float("nan"), 1.0]])
def test_damaged_settings(make, values):
    state = build_model(make(R18)).state_dict()
    state[KEY] = torch.tensor(values)
    with pytest.raises(WeightsError, match="input_settings is not what this package writes"):
        build_model(make(R18)).load_state_dict(state)


def test_a_detectors_backbone_is_read_without_naming_its_input(make, tmp_path):
    model, path = build_model(make(R18)), tmp_path / "detector.pth"
    torch.save({"model": model.state_dict()}, path)
    found = read_checkpoint(path, model=ModelSpec("resnet18"))
    assert found.preprocessing.same_input(model.backbone.bottom_up.input_settings)
    assert set(found.tensors) <= set(model.backbone.bottom_up.state_dict())
    with pytest.raises(WeightsError, match="its content states another .* than 'torchvision'"):
        read_checkpoint(path, "torchvision")


colours = st.tuples(*[st.floats(0.5, 255, width=32)] * 3)


@given(st.sampled_from(["RGB", "BGR"]), colours, colours, st.sampled_from([True, False, None]))
def test_round_trip(order, mean, std, stride):
    stated = Preprocessing(order, 255.0, mean, std, stride_in_1x1=stride)
    again = Preprocessing.from_tensor(stated.to_tensor())
    assert (again.channel_order, again.mean, again.std) == (order, mean, std)
    assert again.stride_in_1x1 is stride


# What Detectron2 alone would load in part, with a warning


@pytest.mark.parametrize("predictor", [DefaultPredictor, Predictor])
def test_weights_of_other_names_are_refused(make, tmp_path, predictor):
    state = {f"conv{n}.weight": torch.zeros(3) for n in range(4)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="nothing for the backbone|holds only a backbone or"):
        predictor(make(R18, MODEL__WEIGHTS=str(tmp_path / "x.pth")))


def test_folded_statistics_and_a_classifier_may_be_out_or_in(make):
    model = build_model(make(R18))
    state = {k: v + 1 for k, v in state_of(model).items() if "running" not in k and k != KEY}
    state["backbone.bottom_up.linear.weight"] = torch.zeros(10, 512)
    DetectionCheckpointer(model)._load_model({"model": dict(state)})
    key = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(model.state_dict()[key], state[key])


# Weights whose name says their input, with Detectron2's own trainer


def zoo():
    """(config, address) of each detector in the installed Detectron2's zoo, read as text."""
    root = Path(detectron2.__file__).parent / "model_zoo"
    text = (root / "model_zoo.py").read_text()
    table = re.findall(r'"([\w./-]+)": "(\d+/[\w.]+\.pkl)"', text)
    configs = root / "configs"
    return [(configs / f"{name}.yaml", f"detectron2://{name}/{end}") for name, end in table]


def test_detectors_of_the_zoo_are_known_as_their_configs_say():
    known = 0
    for config, address in zoo():
        if not config.exists():  # LazyConfigs
            assert origin_input(address) is None
            continue
        cfg = get_cfg()
        cfg.merge_from_file(str(config), allow_unsafe=True)
        found, stated = origin_input(address), config_input(cfg)
        if found is None:
            assert re.search("X_1|gn|syncbn|dconv", config.name), config
        else:
            assert not differences(stated, found) and stated.stride_in_1x1, config
            known += 1
    assert known > 30


@pytest.mark.parametrize("folder, named", [("ImageNetPretrained/MSRA", ""), ("elsewhere", "msra")])
def test_detectors_of_known_origin_are_checked(make, tmp_path, folder, named):
    path = tmp_path / folder / "R-18.pth"
    path.parent.mkdir(parents=True)
    state = build_network("resnet18", out_features=["res5"]).state_dict()
    torch.save({"model": {f"backbone.bottom_up.{k}": v for k, v in state.items()}}, path)
    right, wrong = build_model(make(R18)), build_model(make(R18, INPUT__FORMAT="RGB"))
    Checkpointer(right, preprocessing=named).load(str(path), checkpointables=[])
    with refused(wrong, 'INPUT.FORMAT "BGR"'):
        Checkpointer(wrong, preprocessing=named).load(str(path), checkpointables=[])


ZOO = "COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"


@pytest.mark.parametrize("keys", [{"INPUT__FORMAT": "RGB"}, {"MODEL__PIXEL_STD": [58.0] * 3}])
def test_a_detector_of_the_zoo_is_checked_by_its_name(make, tmp_path, keys):
    path = tmp_path / "detectron2" / ZOO
    path.parent.mkdir(parents=True)
    state = build_model(make(R50)).state_dict()
    arrays = {key: value.numpy() for key, value in state.items() if key != KEY}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    cfg = make(R50, MODEL__WEIGHTS=str(path))
    assert prepare_weights(cfg) == []
    DefaultPredictor(cfg)
    wrong = make(R50, MODEL__WEIGHTS=str(path), **keys)
    for load in (prepare_weights, DefaultPredictor, Predictor):
        with pytest.raises(WeightsError, match="model_final_280758.pkl was trained on other input"):
            load(wrong.clone())


MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize("source", [MSRA, "catalog://ImageNetPretrained/MSRA/R-50"])
def test_names_of_the_zoo_speak_for_states_that_do_not(make, source):
    foreign = build_model(make(R18)).state_dict()
    del foreign[KEY]
    build_model(make(R18, MODEL__WEIGHTS=source)).load_state_dict(foreign)
    model = build_model(make(R18, MODEL__WEIGHTS=source, INPUT__FORMAT="RGB"))
    with refused(model, f'{source} was trained on .* set INPUT.FORMAT "BGR"'):
        model.load_state_dict(foreign)
    own = build_model(make(R18, INPUT__FORMAT="RGB")).state_dict()
    model.load_state_dict(own)  # a run that goes on from its own checkpoint


def test_upstreams_checkpointer_refuses_the_zoos_weights(make, tmp_path, monkeypatch):
    """As Detectron2's DefaultTrainer would start; the file is made here."""
    cfg = make(R18, MODEL__WEIGHTS="detectron2://ImageNetPretrained/torchvision/R-50.pkl")
    model, path = build_model(cfg), tmp_path / "R-50.pth"
    torch.save(model.backbone.bottom_up.state_dict(), path)
    checkpointer = DetectionCheckpointer(model)
    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", lambda *a, **k: str(path))
    with refused(model, r'torchvision/R-50.pkl was .* "\[123.675, 116.28, 103.5'):
        checkpointer.load(f"{cfg.MODEL.WEIGHTS}?matching_heuristics=True")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_exported_backbones_are_checked_by_upstreams_loader(make, tmp_path, suffix):
    weights, path = random_checkpoint("resnet50", "msra"), tmp_path / f"r50{suffix}"
    export_checkpoint(weights, path, "detectron2")
    right = make(R50, MODEL__WEIGHTS=str(path))
    model = DefaultPredictor(right).model
    assert_holds(model.backbone.bottom_up.stem.conv1, weights.tensors, "stem.conv1.")
    for key, value in ((STRIDE, False), ("INPUT.FORMAT", "RGB")):
        wrong = right.clone()
        wrong.merge_from_list([key, value])
        with pytest.raises(WeightsError, match=f"{key} is {value}"):
            DefaultPredictor(wrong)
    assert read_checkpoint(path).preprocessing.same_input(PREPROCESSINGS["msra"])


def test_the_configs_name_of_an_input_counts_in_scripts_too(make, tmp_path):
    """README: use_weights_input, build_model, Checkpointer(model).load."""
    network, path = build_network("resnet18", 3), tmp_path / "r18.pth"
    torch.save(network.state_dict(), path)
    cfg = make(R18, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="torchvision")
    use_weights_input(cfg, str(path))
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, network.stem.conv1.weight)


def test_set_needs_someone_to_set(make):
    cfg = make(RESNET_BACKBONE__WEIGHTS_INPUT="set")
    build_model(cfg)  # there is nothing to follow
    cfg.MODEL.WEIGHTS = MSRA
    with pytest.raises(UsageError, match=r"call resnet_backbone.detection.use_weights_input\(cfg"):
        build_model(cfg)
