"""tools/train_net.py from start to end, on tiny and on real data."""

import json
import re
import shutil

import pytest
import torch
import yaml
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from runs import KEYS, arguments, read_results, rows, start

from resnet_backbone.detection.data import register_voc
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.evaluation import voc
from resnet_backbone.models.resnet import Stem

CONFIG = "quickstart/faster_rcnn_R_18_FPN.yaml"
SMALL = dict(SOLVER__IMS_PER_BATCH=2, SOLVER__MAX_ITER=3, SOLVER__CHECKPOINT_PERIOD=2)


def command(data, output, *options, **changes):
    """Arguments of a small run behind --config-file; data is a VOC folder."""
    return arguments(data, output, *options, **(SMALL | changes))[2:]


@pytest.fixture(scope="module")
def trained(tiny_voc, tmp_path_factory):
    """(folder, output) of a run of three iterations in a process of its own."""
    folder = tmp_path_factory.mktemp("run") / "output"
    keys = SMALL | dict(RESNET_BACKBONE__TEST__OPERATING_POINTS=True)
    process = start(arguments(tiny_voc, folder, **keys))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder, output


def test_writes_everything(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "results.json"} <= names
    assert {"model_0000001.pth", "model_final.pth", "last_checkpoint"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "total_loss" in rows(folder)[0]
    results = read_results(folder)
    assert (results["iterations"], results["images_per_batch"]) == (3, 2)
    assert 0 <= results["results"]["bbox"]["AP50"] <= 100
    assert {"AP", "AP50", "AP50-bar", "AP50-box"} <= results["results"]["bbox"].keys()
    assert torch.load(folder / "model_final.pth")["iteration"] == 2
    assert 0 < results["seconds_per_image"] < 60
    assert (results["images_at_a_time"], results["processes"]) == (1, 1)
    assert results["engines"] == {}  # PyTorch alone
    assert results["hardware"]["device"] == "cpu" and results["hardware"]["cpu"]
    points = results["operating_points"]["test:test"]
    assert points["labels"] == ["bar", "box", "background"]
    assert [row["class"] for row in points["classes"]] == ["bar", "box"]
    details = json.loads((folder / "inference/test:test/voc_results.json").read_text())
    objects = [row["ground_truth"] for row in details["classes"]]
    assert [sum(row) for row in points["confusion"]][:2] == objects and sum(objects) > 0


def test_config_of_the_run(trained):
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    assert config["RESNET_BACKBONE"]["CLASS_NAMES"] == ["bar", "box"]
    assert config["RESNET_BACKBONE"]["REFERENCE_BATCH"] == 0
    assert config["SOLVER"]["BASE_LR"] == pytest.approx(0.02 * 2 / 8)
    assert config["SOLVER"]["STEPS"] == [2]  # 150 and 185 of 200; 185 falls on the third and last


def test_linear_rule_is_printed(trained):
    lines = (
        "SOLVER.BASE_LR 0.02 -> 0.005 (x 2 / 8 images per batch)",
        "SOLVER.STEPS (1000, 1300) -> (2,) (SOLVER.MAX_ITER 3, planned 1400)",
        "SOLVER.IMS_PER_BATCH 2 = 1 (processes) x 1 (RESNET_BACKBONE.ACCUMULATE) x 2 (images at a",
        "3 iterations x 2 images / 6 training images = 1.00 epochs",
        "learning rate 0.005, warm-up 1 iterations, x 0.1 at 2",
    )
    for line in lines:
        assert f"schedule: {line}" in trained[1]
        assert line in (trained[0] / "log.txt").read_text()


def test_eval_only_gives_the_same_numbers(trained, train_net, tiny_voc, tmp_path):
    weights = ["MODEL.WEIGHTS", str(trained[0] / "model_final.pth")]
    train_net(CONFIG, *command(tiny_voc, tmp_path, "--eval-only"), *weights)
    assert read_results(tmp_path / "eval")["results"] == read_results(trained[0])["results"]
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]


def test_results_that_are_not_as_expected(trained, train_net, tiny_voc, tmp_path):
    """They are written, then the tool fails; when it is run again as well."""
    keys = dict(TEST__EXPECTED_RESULTS="[['bbox', 'AP50', 101.0, 0.5]]", SOLVER__MAX_ITER="1")
    keys |= dict(MODEL__WEIGHTS=str(trained[0] / "model_final.pth"))
    folder = tmp_path / "run"
    for option, place in ((), folder), (("--resume",), folder), (("--eval-only",), folder / "eval"):
        lines = train_net(CONFIG, *command(tiny_voc, folder, *option, **keys), code=1)
        assert lines[-1].startswith("error: TEST.EXPECTED_RESULTS: bbox/AP50 is ")
        assert lines[-1].endswith(", expected 101 +- 0.5")
        results = read_results(place)
        assert 0 <= results["results"]["bbox"]["AP50"] <= 100 and results["seconds_per_image"] > 0
    assert read_results(folder)["iterations"] == 1
    log = (folder / "log.txt").read_text()
    assert log.count("Starting training") == 1 and log.count("the run has ended") == 1
    # whoever started the runs of all seeds looks at them
    train_net(CONFIG, *command(tiny_voc, tmp_path, "--seed-run", "4", **keys))


def test_eval_only_that_lacks_a_run_or_data(trained, train_net, tmp_path, monkeypatch):
    lines = train_net(None, "--eval-only", "--output-dir", tmp_path, code=2)
    assert "is not a run folder: it has no config.yaml" in lines[-1]
    monkeypatch.chdir(trained[0])
    for words in (["--output-dir", trained[0]], ["--weights", "model_final.pth"]):
        lines = train_net(None, "--eval-only", *words, code=2)
        assert "give --voc-root, or --coco-json" in lines[-1]


@pytest.mark.parametrize("config", [None, "voc/faster_rcnn_R_50_C4.yaml"])
def test_eval_only_takes_all_from_the_run(trained, train_net, tiny_voc, tmp_path, config):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    data = ["--voc-root", str(tiny_voc), "--train-set", "train", "--test-set", "test"]
    where = ["--eval-only", "--output-dir", str(folder), *data]
    train_net(config, *where)
    assert read_results(folder / "eval")["results"] == read_results(folder)["results"]
    told = (folder / "eval" / "log.txt").read_text()
    assert f"all keys but those of the command line are those of {folder}/config.yaml" in told
    train_net(config, *where, "INPUT.MIN_SIZE_TEST", "48")
    told = (folder / "eval" / "log.txt").read_text()
    assert "INPUT.MIN_SIZE_TEST 48 of the command line, the run had 32" in told


def test_a_config_is_needed(train_net, tmp_path):
    lines = train_net(None, "--output-dir", tmp_path / "empty", code=2)
    assert "--config-file is missing" in lines[-1] and len(lines) == 1


def test_a_subclass_as_detectron2_teaches(make_cfg, tiny_voc, tmp_path):
    """Its own loader, hook before the last one, evaluator and writers; the batch by processes."""

    class LossHook(HookBase):
        def after_step(self):
            self.trainer.storage.put_scalar("validation_loss", 7.0, smoothing_hint=False)

    class Constant(DatasetEvaluator):
        def evaluate(self):
            return {"bbox": {"AP50": 42.0}}

    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            mapper = DatasetMapper(cfg, is_train=True, augmentations=[])
            return build_detection_train_loader(cfg, mapper=mapper)

        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return Constant()

        def build_hooks(self):
            hooks = super().build_hooks()
            hooks.insert(-1, LossHook())
            return hooks

        def build_writers(self):
            file = f"{self.cfg.OUTPUT_DIR}/metrics.json"
            return [CommonMetricPrinter(self.max_iter), JSONWriter(file)]

    register_voc("own:train", str(tiny_voc), "train", ["bar", "box"])
    register_voc("own:test", str(tiny_voc), "test", ["bar", "box"], decode=True)
    keys = {key.replace(".", "__"): value for key, value in KEYS.items()}
    keys |= dict(SOLVER__MAX_ITER=2, SOLVER__REFERENCE_WORLD_SIZE=2, OUTPUT_DIR=str(tmp_path))
    keys |= dict(DATASETS__TRAIN=("own:train",), DATASETS__TEST=("own:test",))
    keys |= dict(MODEL__ROI_HEADS__NUM_CLASSES=2)
    trainer = Own(make_cfg(CONFIG, **keys))
    trainer.resume_or_load(resume=False)
    assert trainer.train() == {"bbox": {"AP50": 42.0}}
    last = rows(tmp_path)[-1]
    assert (last["iteration"], last["validation_loss"], last["bbox/AP50"]) == (3, 7.0, 42.0)
    assert trainer.iter == 4 and trainer.cfg.SOLVER.IMS_PER_BATCH == 2


def test_mixed_precision_on_cpu(train_net, tiny_voc, tmp_path, monkeypatch):
    """Convolutions run in bf16 in training, in TEST.PRECISION in evaluations; weights stay fp32.

    Class names in an order of one's own are those of the run.
    """
    seen, forward = set(), Stem.forward

    def spy(self, x):
        maps = forward(self, x)
        seen.add((self.training, maps.dtype))
        return maps

    monkeypatch.setattr(Stem, "forward", spy)
    keys = dict(SOLVER__AMP__ENABLED="True", SOLVER__MAX_ITER="2")
    keys |= dict(RESNET_BACKBONE__CLASS_NAMES="['box', 'bar']")
    train_net(CONFIG, *command(tiny_voc, tmp_path, **keys))
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    state = torch.load(tmp_path / "model_final.pth")["model"]
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["RESNET_BACKBONE"]["CLASS_NAMES"] == ["box", "bar"]


def test_divergence(train_net, tiny_voc, tmp_path):
    keys = dict(SOLVER__BASE_LR="1e30", SOLVER__WARMUP_ITERS="0", SOLVER__MAX_ITER="9")
    lines = train_net(CONFIG, *command(tiny_voc, tmp_path, **keys), code=3)
    assert lines[-1].startswith("error: ") and "Lower SOLVER.BASE_LR" in lines[-1]


@pytest.mark.data
def test_coco_json(train_net, data_root, tmp_path):
    coco, splits = data_root / "coco_mini", ("train2017", "val2017")
    files = [coco / "annotations" / f"instances_{split}.json" for split in splits]
    roots = [coco / split for split in splits]
    data = ["--coco-json", *map(str, files), "--image-root", *map(str, roots)]
    points = dict(RESNET_BACKBONE__TEST__OPERATING_POINTS="True")
    keys = command("", tmp_path, SOLVER__MAX_ITER="2", **points)[6:]
    train_net(CONFIG, *data, *keys)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 80
    assert config["RESNET_BACKBONE"]["CLASS_NAMES"][:2] == ["person", "bicycle"]
    results = read_results(tmp_path)
    assert "AP50" in results["results"]["bbox"]
    points = results["operating_points"]["test:coco"]
    truth = json.loads(files[1].read_text())["annotations"]
    counted = sum(not one["iscrowd"] for one in truth)
    assert len(points["labels"]) == 81 and sum(map(sum, points["confusion"][:80])) == counted
    present = {one["category_id"] for one in truth if not one["iscrowd"]}
    assert len(points["classes"]) == len(present)


@pytest.mark.data
@pytest.mark.parametrize("policy", ["refuse", pytest.param("drop", marks=pytest.mark.slow)])
def test_users_voc_set_with_two_bad_boxes(train_net, data_root, tmp_path, policy):
    data = ["--voc-root", str(data_root / "BCCD"), "--train-set", "trainval", "--test-set", "test"]
    keys = command("", tmp_path, "--bad-data", policy, SOLVER__MAX_ITER="2")[6:]
    lines = train_net(CONFIG, *data, *keys, code=0 if policy == "drop" else 2)
    log = (tmp_path / "log.txt").read_text() + "\n".join(lines)
    bad = set(re.findall(r"BloodImage_\d+\.xml", log))
    assert len(bad) == 2, bad
    if policy == "drop":
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert config["RESNET_BACKBONE"]["CLASS_NAMES"] == ["Platelets", "RBC", "WBC"]


def test_a_training_is_not_lost_to_its_evaluation(train_net, tiny_voc, tmp_path, monkeypatch):
    """Neither to one in the middle, of which an image fails, nor to the last one."""

    def fail(*given):
        raise RuntimeError("no such thing")

    def fail_once(*given):
        monkeypatch.setattr(voc.BoxEvaluator, "process", process)
        raise OSError("no such image")

    process = voc.BoxEvaluator.process
    monkeypatch.setattr(voc.BoxEvaluator, "process", fail_once)
    monkeypatch.setattr(voc, "score_boxes", fail)
    keys = dict(SOLVER__MAX_ITER="2", TEST__EVAL_PERIOD="1")
    lines = train_net(CONFIG, *command(tiny_voc, tmp_path, **keys), code=1)
    assert "error: the training is complete, its evaluation failed" in lines[-1]
    assert "RuntimeError: no such thing" in lines[-1] and "--resume" in lines[-1]
    found = read_results(tmp_path)
    assert found["evaluation_error"] == "RuntimeError: no such thing" and found["results"] == {}
    assert (tmp_path / "model_final.pth").is_file()
    assert list(tmp_path.glob("inference/*/detections.json"))
    monkeypatch.undo()
    train_net(None, *command(tiny_voc, tmp_path, "--eval-only"))
    found = read_results(tmp_path / "eval")["results"]
    assert found["bbox"]["AP50"] >= 0
    train_net(CONFIG, *command(tiny_voc, tmp_path, "--resume", **keys))
    resumed = read_results(tmp_path)
    assert resumed["results"] == found and "evaluation_error" not in resumed
