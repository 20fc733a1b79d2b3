"""The input of weights: taken over by ``--weights``, checked or set by the config, or refused."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model as build_detector
from safetensors.torch import load_file, save_file

from resnet_backbone.detection import Checkpointer
from resnet_backbone.detection.checkpoint.input_check import prepare_weights, use_weights_input
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.inference.predictor import Predictor
from resnet_backbone.models import build_model
from resnet_backbone.weights import Preprocessing, WeightsError, save_weights
from resnet_backbone.weights.checkpoint import METADATA_KEY, MODEL_KEY

PROJECT = Path(__file__).resolve().parents[3]
R18, R50 = "voc/faster_rcnn_R_18_FPN.yaml", "voc/faster_rcnn_R_50_FPN.yaml"
VGG = "voc/faster_rcnn_VGG_16.yaml"
QUICKSTART = "quickstart/faster_rcnn_R_18_FPN.yaml"
OURS = Preprocessing("RGB", 255.0, (130.0, 121.5, 110.0), (60.0, 61.0, 62.5), source="our digits")
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
MODE = "RESNET_BACKBONE.WEIGHTS_INPUT"


def with_stride(value):
    return replace(OURS, stride_in_1x1=value)


def test_input_is_taken_over(make_cfg, write):
    cfg, path = make_cfg(R18), write()
    lines = use_weights_input(cfg, path)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.WEIGHTS) == ("RGB", path)
    assert cfg.MODEL.PIXEL_MEAN == [130.0, 121.5, 110.0]
    assert cfg.MODEL.PIXEL_STD == [60.0, 61.0, 62.5]
    assert lines[0] == f"{path}: a resnet18; its input is that of our digits"
    assert "INPUT.FORMAT BGR -> RGB" in lines
    assert "MODEL.PIXEL_STD [1.0, 1.0, 1.0] -> [60.0, 61.0, 62.5]" in lines
    assert len(lines) == 4
    assert len(use_weights_input(cfg, path)) == 1  # what agrees is not mentioned


@pytest.mark.parametrize(
    "file, name, stride, expected",
    [
        (R50, "resnet50", False, False),
        (R50, "resnet50", True, True),
        (R50, "torchvision/resnet50", None, False),
        (R50, "timm/resnet50", None, False),
        (R18, "resnet18", None, True),
        (R18, "torchvision/resnet18", None, True),
        (VGG, "vgg16", False, True),
    ],
)
def test_stride(make_cfg, write, file, name, stride, expected):
    """It stays as it is (True) where no block has a 1x1 that could carry it."""
    cfg = make_cfg(file)
    lines = use_weights_input(cfg, write(name, with_stride(stride)))
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is expected
    assert (f"{STRIDE} True -> False" in lines) == (not expected)


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        (R18, "INPUT.FORMAT", "BGR", "INPUT.FORMAT BGR contradicts .*file.* trained with RGB: "),
        (R18, "MODEL.PIXEL_MEAN", [110.0, 121.5, 130.0], r"trained with \[130.0, 121.5, 110.0\]"),
        (R18, "MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "MODEL.PIXEL_STD .*: leave MODEL.PIXEL_STD out"),
        (R50, STRIDE, True, "True contradicts .* trained with False: leave MODEL.RESNETS.STRIDE"),
    ],
)
def test_contradictions_of_the_user_are_refused(make_cfg, write, file, key, value, message):
    name = "resnet18" if file == R18 else "resnet50"
    path = write(name, with_stride(None if file == R18 else False))
    cfg = make_cfg(file)
    cfg.merge_from_list([key, value])
    with pytest.raises(UsageError, match=message) as caught:
        use_weights_input(cfg, path, given=["SEED", key])
    assert "\n" not in str(caught.value)
    use_weights_input(cfg, path, given=["SEED"])  # the same value in the config file is replaced


@pytest.mark.parametrize("pools", [True, False])
def test_the_pooling_is_set_by_weights_that_say_it(make_cfg, write, pools):
    path = write("resnet18", caffe_pool=pools)
    cfg = make_cfg(R18, RESNET_BACKBONE__CAFFE_POOL=not pools, MODEL__WEIGHTS=path)
    with pytest.raises(UsageError, match=f"set RESNET_BACKBONE.CAFFE_POOL {pools}$"):
        prepare_weights(cfg)
    with pytest.raises(UsageError, match="CAFFE_POOL .* contradicts"):
        use_weights_input(cfg, path, given=["RESNET_BACKBONE.CAFFE_POOL"])
    assert f"RESNET_BACKBONE.CAFFE_POOL {not pools} -> {pools}" in use_weights_input(cfg, path)
    assert cfg.RESNET_BACKBONE.CAFFE_POOL == pools


def test_what_the_user_says_rightly_stays(make_cfg, write):
    cfg = make_cfg(R18, MODEL__PIXEL_MEAN=[130.3, 121.4, 110.1], INPUT__FORMAT="RGB")
    use_weights_input(cfg, write(), given=["MODEL.PIXEL_MEAN", "INPUT.FORMAT"])
    assert cfg.MODEL.PIXEL_MEAN == [130.3, 121.4, 110.1]


@pytest.mark.parametrize(
    "file, keys, name, options, message",
    [
        (R18, {}, "resnet34", {}, "DEPTH is 18; set MODEL.RESNETS.DEPTH 34$"),
        (R18, {}, "torchvision/resnet50", {}, "DEPTH is 18; set MODEL.RESNETS.DEPTH 50$"),
        (R18, {}, "plain18", {}, "SHORTCUT is 'B'; set RESNET_BACKBONE.SHORTCUT none$"),
        (R18, {}, "resnet18", dict(shortcut="A"), "set RESNET_BACKBONE.SHORTCUT A$"),
        (R18, {}, "resnet18", dict(activation="prelu"), "set RESNET_BACKBONE.ACTIVATION prelu$"),
        (R18, {}, "resnet18", dict(norm="GN"), "NORM is 'FrozenBN'; set MODEL.RESNETS.NORM GN$"),
        (R18, {}, "vgg16", {}, "a config such as voc/faster_rcnn_VGG_16_FPN"),
        (VGG, {}, "resnet34", {}, "a config such as voc/faster_rcnn_R_34_FPN"),
        (VGG, {}, "vgg16_bn", {}, "VGG.NORM is ''; set RESNET_BACKBONE.VGG.NORM BN$"),
        (VGG, {"RESNET_BACKBONE.VGG.NORM": "BN"}, "vgg16", {}, "set RESNET_BACKBONE.VGG.NORM ''$"),
        (R18, {}, "resnet34", dict(shortcut="C"), "DEPTH 34 RESNET_BACKBONE.SHORTCUT C$"),
    ],
)
def test_other_networks_are_refused(make_cfg, write, file, keys, name, options, message):
    cfg = make_cfg(file, **keys)
    before = cfg.dump()
    with pytest.raises(UsageError, match=message) as caught:
        use_weights_input(cfg, write(name, **options))
    assert "\n" not in str(caught.value)
    assert cfg.dump() == before


@pytest.mark.parametrize("name", ["cifar_resnet20", "torchvision/googlenet", "timm/resnet26"])
def test_networks_that_no_detector_has(make_cfg, write, name):
    with pytest.raises(WeightsError, match=f"is a {name}; detectors here have ResNet-18/34/50"):
        use_weights_input(make_cfg(R18), write(name))


@pytest.mark.parametrize(
    "file, keys, name, options",
    [
        (R18, {"MODEL.RESNETS.NORM": "SyncBN"}, "resnet18", {}),
        (R18, {"RESNET_BACKBONE.SHORTCUT": "none"}, "plain18", {}),
        (R18, {"RESNET_BACKBONE.SHORTCUT": "C"}, "resnet18", dict(shortcut="C")),
        ("voc/faster_rcnn_R_50_DC5.yaml", {}, "resnet50", dict(zero_init_residual=True)),
        (VGG, {"RESNET_BACKBONE.VGG.NORM": "FrozenBN"}, "torchvision/vgg16_bn", {}),
        (R18, {"MODEL.BACKBONE.NAME": "build_somebodys_backbone"}, "resnet34", {}),
        (R18, {}, "", {}),
    ],
)
def test_networks_that_fit(make_cfg, write, file, keys, name, options):
    cfg = make_cfg(file, **keys)
    use_weights_input(cfg, write(name, **options))
    assert cfg.MODEL.WEIGHTS and cfg.INPUT.FORMAT == "RGB"


def test_a_file_without_preprocessing_needs_a_name(make_cfg, write):
    path = write("", None)
    with pytest.raises(WeightsError, match="RESNET_BACKBONE.WEIGHTS_PREPROCESSING"):
        use_weights_input(make_cfg(R50), path)
    cfg = make_cfg(R50, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="torchvision")
    use_weights_input(cfg, path)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
    cfg = make_cfg(R50, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="msra")
    with pytest.raises(WeightsError, match="metadata states another preproc.* than 'msra'"):
        use_weights_input(cfg, write())


def test_mean_image_gives_way_to_channel_means(make_cfg, write):
    cfg = make_cfg(R18)
    lines = use_weights_input(cfg, write(mean_image=True))
    assert cfg.MODEL.PIXEL_MEAN == [130.0, 121.5, 110.0]
    assert "channel means of the file's mean image" in lines[-1]


def test_weights_of_fewer_channels_than_the_detectors(make_cfg, write):
    cfg = make_cfg(R18, MODEL__PIXEL_MEAN=[100.0] * 5, MODEL__PIXEL_STD=[1.0] * 5)
    with pytest.raises(UsageError, match="PIXEL_MEAN has 5 values, one a channel, but .* has 3"):
        use_weights_input(cfg, write())
    assert len(cfg.MODEL.PIXEL_MEAN) == 5


def test_wrong_files(make_cfg, write):
    with pytest.raises(WeightsError, match="x.pth: no such file"):
        use_weights_input(make_cfg(R18), "x.pth")
    path = write()
    save_file({"x": torch.zeros(1)}, path, {METADATA_KEY: OURS.to_json(), MODEL_KEY: "[1]"})
    with pytest.raises(WeightsError, match="unreadable resnet_backbone.model"):
        use_weights_input(make_cfg(R18), path)


@pytest.mark.data
def test_the_papers_own_weights(make_cfg, data_root):
    path = str(data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors")
    keys = dict(INPUT__FORMAT="RGB", MODEL__RESNETS__STRIDE_IN_1X1=False)
    cfg = make_cfg(R50, RESNET_BACKBONE__WEIGHTS_PREPROCESSING="msra", **keys)
    use_weights_input(cfg, path)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("BGR", True)
    assert cfg.MODEL.PIXEL_MEAN == [103.939, 116.779, 123.68]


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["RESNET_BACKBONE.WEIGHTS_INPUT", "check"], "sets the input keys: leave RESNET_BACKBONE"),
        (["MODEL.WEIGHTS", "x.pth"], "error: --weights "),
    ],
)
def test_one_line_before_any_work(train, write, tmp_path, arguments, message):
    lines = train(tmp_path / "run", write(), *arguments, code=2)
    assert message in lines[-1]
    assert not (tmp_path / "run").exists()


def test_trains_from_a_classifier(train, tmp_path):
    """With a learning rate of 0 the backbone stays what the file holds, its head left out."""
    path, run = tmp_path / "final.safetensors", tmp_path / "run"
    save_weights(build_model("resnet18", 10), path, OURS)
    train(run, path, "SOLVER.MAX_ITER", "1")
    log = (run / "log.txt").read_text()
    assert "weights: INPUT.FORMAT BGR -> RGB" in log
    assert "weights: MODEL.PIXEL_MEAN [120.0, 120.0, 120.0] -> [130.0, 121.5, 110.0]" in log
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["INPUT"]["FORMAT"], config["MODEL"]["WEIGHTS"]) == ("RGB", str(path))
    saved = torch.load(run / "model_final.pth")
    assert Preprocessing.from_json(saved["preprocessing"]).channel_order == "RGB"
    prefix = "backbone.bottom_up."
    theirs = {k.removeprefix(prefix): v for k, v in saved["model"].items() if prefix in k}
    others = ("running", "num_batches", "input_settings")
    weights = [key for key in theirs if not any(word in key for word in others)]
    assert len(weights) == 60  # 20 convolutions, and weight and bias of as many norms
    file = load_file(path)
    assert all(torch.equal(theirs[key], file[key]) for key in weights)
    assert not any("linear" in key for key in theirs)


@pytest.mark.slow
def test_from_the_classification_trainer(train, tmp_path):
    """The files of the one tool go into the other, weight by weight."""
    tool = [sys.executable, str(PROJECT / "tools" / "train_classifier.py"), "--config-file"]
    config = PROJECT / "configs" / "classification" / "quickstart" / "resnet18.yaml"
    keys = """data.format=synthetic data.synthetic_size=32 data.synthetic_samples=16
    data.synthetic_classes=10 data.augmentation=none data.channel_order=BGR data.crop=32
    data.short_side=[32,32] schedule.iterations=2 schedule.warmup_iterations=0 train.batch_size=8
    train.amp=none"""
    command = [*tool, str(config), *keys.split(), f"output.dir={tmp_path / 'classifier'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, run = tmp_path / "classifier" / "final.safetensors", tmp_path / "run"
    train(run, path, "SOLVER.MAX_ITER", "1")
    saved, file = torch.load(run / "model_final.pth"), load_file(path)
    prefix = "backbone.bottom_up."
    checked = [key for key in file if key.endswith("conv1.weight") or key.endswith("norm.bias")]
    assert len(checked) > 25
    assert all(torch.equal(saved["model"][prefix + key], file[key]) for key in checked)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["MODEL"]["PIXEL_MEAN"] == [127.5] * 3
    assert config["MODEL"]["PIXEL_STD"] == [74.0] * 3


# RESNET_BACKBONE.WEIGHTS_INPUT, check or set


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
        ([MODE, "set", "INPUT.FORMAT", "BGR"], "INPUT.FORMAT BGR contradicts"),
        ([MODE, "sometimes"], "WEIGHTS_INPUT must be check or set, not 'sometimes'"),
    ],
)
def test_weights_are_checked_before_data(train_net, write, where, tmp_path, arguments, message):
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
