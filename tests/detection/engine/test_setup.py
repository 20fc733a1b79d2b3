"""What the command line refuses: one line that says what to write, and exit status 2."""

import argparse
import json

import pytest
import torch

from resnet_backbone.detection.config import load_config, take_back_overrides
from resnet_backbone.detection.engine import setup
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.weights import PREPROCESSINGS

QUICKSTART = "quickstart/faster_rcnn_R_18_FPN.yaml"
VOC = "voc/faster_rcnn_R_18_FPN.yaml"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["SOLVER.BASE_LRR", "1"], "no config key SOLVER.BASE_LRR; the nearest is SOLVER.BASE_LR"),
        (["RESNET_BACKBONE.VGG.DEPHT", "11"], "the nearest is RESNET_BACKBONE.VGG.DEPTH"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR fast is no float; give one such as 0.02"),
        (["SOLVER.BASE_LR=1"], "write 'SOLVER.BASE_LR 1', not 'SOLVER.BASE_LR=1': KEY VALUE"),
        (["SOLVER.BASE_LR"], "must be KEY VALUE pairs"),
        (["SOLVER.MAX_ITER", "MODEL.DEVICE", "cpu"], "pairs: SOLVER.MAX_ITER has no value"),
        (["RESNET_BACKBONE.TEST.NMS", "softer"], "RESNET_BACKBONE.TEST.NMS"),
        (["--quick"], "unrecognized arguments: --quick"),
        (["--num-gpus", "99"], "--num-gpus 99: this machine has "),
        ([], "no data: give --voc-root DIR --train-set NAME --test-set NAME, or --coco-json"),
        (["DATASETS.TRAIN", "('voc_2007_trainva',)"], "did you mean voc_2007_trainval?"),
        (
            ["DATASETS.TRAIN", "('voc_2007_val',)", "DATASETS.TEST", "('voc_2007_val',)"],
            "voc_2007_val is in DATASETS.TRAIN and DATASETS.TEST, and only evaluation has its diff",
        ),
        (["--voc-root", "nowhere"], "--voc-root needs --train-set NAME and --test-set NAME"),
        (["--coco-json", "a.json", "b.json"], "needs --image-root DIR, or one for each file"),
        (["--voc-root", "x", "--coco-json", "a", "b"], "either --voc-root or --coco-json"),
    ],
)
def test_one_line_that_says_what_to_write(train_net, overrides, message, tmp_path):
    lines = train_net(QUICKSTART, "--output-dir", str(tmp_path), *overrides, code=2)
    assert message in lines[-1]
    assert len([line for line in lines if "error: " in line]) == 1
    assert not any("Traceback" in line for line in lines)


def test_whole_numbers_where_the_config_has_a_float():
    words = ["RESNET_BACKBONE.EPOCHS", "12", "SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER", "7"]
    cfg = load_config("", words)
    found = cfg.RESNET_BACKBONE.EPOCHS, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER
    assert found == (12.0, 1.0, 7) and list(map(type, found)) == [float, float, int]


def test_another_number_of_classes_than_the_data_have(train_net, tiny_voc, tmp_path):
    where = ["--voc-root", tiny_voc, "--train-set", "train", "--test-set", "test"]
    options = ["--output-dir", tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.WEIGHTS", ""]
    free = ["MODEL.BACKBONE.FREEZE_AT", "0"]
    lines = train_net(QUICKSTART, *where, *options, *free, code=2)
    assert "NUM_CLASSES 3, but the data have 2 classes: omit it" in lines[-1]


def test_overrides_behind_image_folders():
    pairs = (["a", "B"], ["MODEL.WEIGHTS", "x"]), (["a"], ["SEED", "1"]), (["a"], [])
    for roots, overrides in pairs:
        args = argparse.Namespace(image_root=[*roots, *overrides], opts=["SOLVER.MAX_ITER", "1"])
        take_back_overrides(args)
        assert (args.image_root, args.opts) == (roots, ["SOLVER.MAX_ITER", "1", *overrides])


def test_unknown_config_file(train_net):
    lines = train_net("voc/nothing.yaml", code=2)
    assert "no such config file; " in lines[-1] and "configs/detection" in lines[-1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL:\n  RESNETS:\n    DEPHT: 18\n", "the nearest is MODEL.RESNETS.DEPTH"),
        ("MODEL: [\n", "x.yaml: while parsing"),
        ("SOLVER:\n  MAX_ITER: many\n", "x.yaml: SOLVER.MAX_ITER many is no int; give one such as"),
    ],
)
def test_broken_config_file(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text("VERSION: 2\n" + text)
    with pytest.raises(UsageError, match=message) as caught:
        load_config(str(tmp_path / "x.yaml"), [])
    assert "\n" not in str(caught.value)


FROZEN = "MODEL.WEIGHTS is empty but {}: random layers would never learn; give weights, or set {}"
STAGES = "the first 2 stages are frozen (MODEL.BACKBONE.FREEZE_AT)"
FREE = "MODEL.BACKBONE.FREEZE_AT 0"
NORM, BN = "MODEL.RESNETS.NORM is FrozenBN", "MODEL.RESNETS.NORM BN"


@pytest.mark.parametrize("arguments", [[], ["--resume"], FREE.split()])
def test_frozen_random_layers(train_net, tmp_path, arguments):
    """Also with --resume where there is nothing to go on from."""
    lines = train_net(VOC, "--output-dir", tmp_path, *arguments, "MODEL.WEIGHTS", "", code=2)
    both = FROZEN.format(f"{STAGES} and {NORM}", f"{FREE} {BN}")
    message = FROZEN.format(NORM, BN) if len(arguments) == 2 else both
    assert lines[-1] == f"error: {message}"


OTHERS = ["--eval-only", "--resume", "MODEL.WEIGHTS {weights}", f"{FREE} {BN}"]
OTHERS += [f"MODEL.BACKBONE.NAME build_vgg_fpn_backbone {FREE}"]


@pytest.mark.parametrize("words", OTHERS)
def test_layers_that_can_learn_or_have_weights(train_net, write, tmp_path, words):
    if words == "--resume":
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        torch.save({"model": {"backbone.x": torch.zeros(1)}}, tmp_path / "model_0000001.pth")
    arguments = words.format(weights=write(expected=PREPROCESSINGS["msra"])).split()
    lines = train_net(VOC, "--output-dir", str(tmp_path), *NOWHERE, *arguments, code=2)
    assert "nowhere" in lines[-1]  # the data is what it then lacks


NOWHERE = ["--voc-root", "nowhere", "--train-set", "a", "--test-set", "b"]


@pytest.mark.parametrize(
    "words, message",
    [
        (NOWHERE, "nowhere is not a VOC folder"),
        (["--voc-root", "{voc}", "--train-set", "train", "--test-set", "val"], "test, train"),
        (["--coco-json", "{voc}", "b.json", "--image-root", "{voc}"], "b.json does not exist"),
        (["--coco-json", "{voc}", "{voc}", "--image-root", "gone"], "gone does not exist"),
        (["--coco-json", "{voc}", "{voc}", "--image-root", "{voc}"], "is a folder; give the path"),
        (["--coco-json", "{json}", "{json}", "--image-root", "{voc}"], "none of the first 2"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER 0: give at least 1"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--eval-only"], ["--resume"]])
def test_cheap_mistakes_are_found_before_weights_are_fetched(
    train_net, tiny_voc, tmp_path, monkeypatch, words, message, mode
):
    fetched = []
    monkeypatch.setattr(setup, "prepare_weights", lambda *given, **options: fetched.append(given))
    images = {"images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(2)]}
    (tmp_path / "a.json").write_text(json.dumps(images))
    words = [word.format(voc=tiny_voc, json=tmp_path / "a.json") for word in words]
    weights = ["--weights", "detectron2://ImageNetPretrained/MSRA/R-18.pkl"]
    lines = train_net(QUICKSTART, "--output-dir", tmp_path, *mode, *weights, *words, code=2)
    if mode == ["--eval-only"] and "SOLVER.MAX_ITER" in words:
        message = "no data"  # a schedule means nothing to an evaluation
    assert message in lines[-1] and not fetched
    start = f"nothing to resume in {tmp_path}: starting from iteration 0"
    assert (start in lines) == (mode == ["--resume"])


def test_an_evaluation_without_weights_reads_no_data(train_net, tiny_voc, tmp_path):
    words = ["--voc-root", tiny_voc, "--test-set", "test", "--output-dir", tmp_path, "--eval-only"]
    lines = train_net(QUICKSTART, *words, "MODEL.WEIGHTS", "", code=2)
    assert lines[-1].startswith("error: MODEL.WEIGHTS is empty: add MODEL.WEIGHTS")
    assert not list(tmp_path.iterdir())


def test_operating_points_are_those_of_the_results(make_cfg, tmp_path):
    """Not of other test sets whose evaluations are in the folder, nor of one that failed."""
    for name in ("a_b", "other"):
        folder = tmp_path / "inference" / name
        folder.mkdir(parents=True)
        (folder / "operating_points.json").write_text(f'"{name}"')
    keys = dict(DATASETS__TEST=("a/b",), RESNET_BACKBONE__TEST__OPERATING_POINTS=True)
    cfg = make_cfg(None, OUTPUT_DIR=str(tmp_path), **keys)
    for results, points in (({"bbox": {"AP": 1.0}}, {"a_b": "a_b"}), ({}, None)):
        setup.write_results(cfg, results, None)
        content = json.loads((tmp_path / "results.json").read_text())
        assert content.get("operating_points") == points
