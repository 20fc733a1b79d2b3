"""RESNET_BACKBONE.WEIGHTS_INPUT, check or set, in the tools and for users of the library."""

import shlex

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model as build_detector

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.checkpoint.input_check import prepare_weights, use_weights_input
from resnet_backbone.detection.inference.predictor import Predictor
from resnet_backbone.models import build_model
from resnet_backbone.weights import Preprocessing, WeightsError, save_weights

R18, QUICKSTART = "voc/faster_rcnn_R_18_FPN.yaml", "quickstart/faster_rcnn_R_18_FPN.yaml"
OURS = Preprocessing("RGB", 255.0, (130.0, 121.5, 110.0), (60.0, 61.0, 62.5), source="our digits")
MODE = "RESNET_BACKBONE.WEIGHTS_INPUT"


@pytest.fixture
def where(make_voc):
    """Options for a VOC folder whose one image is missing, which shows when data are read."""
    root = make_voc({"missing": []}, "VOC2007")
    (root / "JPEGImages" / "missing.jpg").unlink()
    return ["--voc-root", root, "--train-set", "train", "--test-set", "train"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "trained on other input: INPUT.FORMAT is BGR, MODEL.PIXEL_MEAN is [120, 120, 120]"),
        (["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[130,121,110]"], "PIXEL_STD is [60, 60, 60]"),
        ([MODE, "set", "INPUT.FORMAT", "BGR"], "INPUT.FORMAT BGR contradicts"),
        (
            [MODE, "sometimes"],
            "RESNET_BACKBONE.WEIGHTS_INPUT must be check or set, not 'sometimes'",
        ),
        (["MODEL.RESNETS.DEPTH", "34"], "DEPTH is 34; set MODEL.RESNETS.DEPTH 18"),
    ],
)
def test_model_weights_are_checked_before_data_are_read(
    train_net, write, where, tmp_path, arguments, message
):
    expected = Preprocessing("RGB", 255.0, (130.0, 121.5, 110.0), (30.0, 30.0, 30.0))
    weights = ["MODEL.WEIGHTS", write(expected=expected), "--output-dir", tmp_path / "run"]
    lines = train_net(QUICKSTART, *where, *weights, *arguments, code=2)
    assert message in lines[-1] and lines[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_the_line_to_write_is_right(train_net, write, where, tmp_path):
    """What the error says, pasted into a shell, is accepted."""
    weights = ["MODEL.WEIGHTS", write(), "--output-dir", tmp_path / "run"]
    lines = train_net(QUICKSTART, *where, *weights, code=2)
    mend = shlex.split(lines[-1].partition("; set ")[2])
    assert mend[::2] == ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]
    lines = train_net(QUICKSTART, *where, *weights, *mend, code=2)
    assert "VOC2007" in lines[-1] and "set " not in lines[-1]


def test_set_by_the_config(make_cfg, write):
    cfg, path = make_cfg(R18, RESNET_BACKBONE__WEIGHTS_INPUT="set"), write()
    assert prepare_weights(cfg) == []  # no weights, nothing to follow
    cfg = make_cfg(R18, RESNET_BACKBONE__WEIGHTS_INPUT="set", MODEL__WEIGHTS=path)
    assert "INPUT.FORMAT BGR -> RGB" in prepare_weights(cfg)
    assert (cfg.INPUT.FORMAT, cfg.RESNET_BACKBONE.WEIGHTS_INPUT) == ("RGB", "check")
    assert prepare_weights(cfg) == []  # and now they agree


def test_a_library_user_needs_one_call(write):
    """use_weights_input works on a config without our node as well."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_paper_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    use_weights_input(cfg, write())
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("RGB", [130.0, 121.5, 110.0])


def test_detectors_say_their_input_too(make_cfg, small, tmp_path):
    """Saved by our checkpointer, or by Detectron2's; an unknown one passes unless it is to set."""
    made = make_cfg(R18, **small, INPUT__FORMAT="RGB", MODEL__PIXEL_STD=[58.0, 57.0, 57.0])
    model = build_detector(made)
    state = model.state_dict()
    torch.save({"model": state}, tmp_path / "upstreams.pth")
    Checkpointer(model, str(tmp_path)).save("ours")
    mend = r'set INPUT.FORMAT "RGB" MODEL.PIXEL_STD "\[58, 57, '
    for name in ("ours.pth", "upstreams.pth"):
        cfg = make_cfg(R18, **small, MODEL__WEIGHTS=str(tmp_path / name))
        with pytest.raises(WeightsError, match=mend):
            prepare_weights(cfg)
        lines = use_weights_input(cfg, str(tmp_path / name))
        assert "INPUT.FORMAT BGR -> RGB" in lines and cfg.MODEL.PIXEL_STD == [58.0, 57.0, 57.0]
    state.pop("backbone.bottom_up.input_settings")
    torch.save({"model": state}, tmp_path / "unknown.pth")
    cfg = make_cfg(R18, **small, MODEL__WEIGHTS=str(tmp_path / "unknown.pth"))
    (line,) = prepare_weights(cfg)
    assert line.endswith("does not state which input it was trained on: taken to be the config's")
    with pytest.raises(WeightsError, match=r"does not state which input .*\.WEIGHTS_INPUT check"):
        use_weights_input(cfg, str(tmp_path / "unknown.pth"))
    cfg.RESNET_BACKBONE.WEIGHTS_PREPROCESSING = "torchvision"
    use_weights_input(cfg, str(tmp_path / "unknown.pth"))
    assert cfg.INPUT.FORMAT == "RGB"


def test_a_name_that_contradicts_a_detector(make_cfg, small, tmp_path):
    Checkpointer(build_detector(make_cfg(R18, **small)), str(tmp_path)).save("x")
    keys = dict(MODEL__WEIGHTS=str(tmp_path / "x.pth"))
    prepare_weights(make_cfg(R18, **keys, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="msra"))
    with pytest.raises(WeightsError, match="its own preprocessing, which is not 'torchvision'"):
        prepare_weights(make_cfg(R18, **keys, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="torchvision"))


def test_our_trainer_and_predictor_follow_set(make_cfg, small, tmp_path):
    model = build_detector(make_cfg(R18, **small, INPUT__FORMAT="RGB"))
    Checkpointer(model, str(tmp_path)).save("x")
    keys = dict(MODEL__WEIGHTS=str(tmp_path / "x.pth"), RESNET_BACKBONE__WEIGHTS_INPUT="set")
    cfg = make_cfg(R18, **small, **keys)
    cfg.freeze()
    assert Predictor(cfg).cfg.INPUT.FORMAT == "RGB"
    assert cfg.INPUT.FORMAT == "BGR"


def test_resume_needs_its_own_checkpoint_alone(train, train_net, tiny_voc, tiny_training, tmp_path):
    """The weights that a run started from may be gone; other input than the run's is refused."""
    path, run = tmp_path / "final.safetensors", tmp_path / "run"
    save_weights(build_model("resnet18", 10), path, OURS)
    train(run, path, "SOLVER.MAX_ITER", "1")
    before = (run / "config.yaml").read_text()
    assert yaml.safe_load(before)["RESNET_BACKBONE"]["WEIGHTS_INPUT"] == "check"
    path.unlink()
    lines = train(run, path, "--resume", "INPUT.FORMAT", "BGR", code=2)
    assert "INPUT.FORMAT BGR contradicts" in lines[-1]
    where = ["--voc-root", tiny_voc, "--train-set", "train", "--test-set", "test"]
    again = [*where, "--output-dir", run, "--resume", *tiny_training, "SOLVER.MAX_ITER", "2"]
    lines = train_net(QUICKSTART, *again, code=2)
    assert 'set INPUT.FORMAT "RGB" MODEL.PIXEL_MEAN "[130, 121.5, 110]"' in lines[-1]
    assert (run / "config.yaml").read_text() == before
    train(run, path, "--resume", "SOLVER.MAX_ITER", "2")
    assert "Starting training from iteration 1" in (run / "log.txt").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["MODEL"]["WEIGHTS"] == str(path)
    trained = ["--eval-only", "--weights", run / "model_final.pth"]
    train_net(QUICKSTART, *trained, *again[:8], *tiny_training)  # the input is the run's
    assert f"those of the command line are those of {run}" in (run / "eval/log.txt").read_text()
