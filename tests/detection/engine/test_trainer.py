"""The trainer's contract with hooks is Detectron2's; a drawn seed; expected results."""

from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import verify_results
from detectron2.projects import deeplab
from runs import Linear, NumberTrainer, OfNumbers, number_loader
from torch import nn

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine.results import check_expectations, check_results
from resnet_backbone.detection.engine.trainer import Trainer, watching
from resnet_backbone.detection.inference import predictor
from resnet_backbone.runtime.errors import UnexpectedResults

SCORES = [1.0, 5.0, 3.0, 9.0, 2.0, 4.0]


class Recorder(HookBase):
    """Notes what a hook sees."""

    def __init__(self, events):
        self.events = events

    def before_train(self):
        self.events.append(("before_train", self.trainer.iter, self.trainer.max_iter))

    def _note(self, name):
        self.events.append((name, self.trainer.iter, self.trainer.storage.iter))

    before_step = partialmethod(_note, "before_step")
    after_step = partialmethod(_note, "after_step")
    after_train = partialmethod(_note, "after_train")


class Small(OfNumbers):
    """A trainer of a few numbers with Detectron2's own hooks beside those it has."""

    fails_at = -1

    @classmethod
    def test(cls, cfg, model):
        return {"bbox": {"AP50": 42.0}}

    def build_writers(self):
        return []

    def build_hooks(self):
        self.events, self.saved, scores = [], [], iter(SCORES)
        keeper = DetectionCheckpointer(self.model, f"{self.cfg.OUTPUT_DIR}/theirs")
        periodic = hooks.PeriodicCheckpointer(keeper, 2, max_to_keep=1, file_prefix="theirs")
        best = SimpleNamespace(save=lambda name, iteration: self.saved.append((name, iteration)))

        def evaluate():
            self.events.append(("evaluate", self.iter, None))
            return {"probe": {"score": next(scores)}}

        theirs = [hooks.EvalHook(2, evaluate), hooks.BestCheckpointer(2, best, "probe/score")]
        return [*super().build_hooks(), periodic, *theirs, Recorder(self.events)]

    def run_step(self):
        if self.iter == self.fails_at:
            raise ValueError("a broken image")
        super().run_step()


class Theirs(Small, DefaultTrainer):
    """The reference."""


class Ours(Small, NumberTrainer):
    """The trainer that is tested."""


@pytest.fixture
def cfg(make_cfg, tmp_path):
    keys = dict(SOLVER__IMS_PER_BATCH=2, SOLVER__MAX_ITER=5, SOLVER__CHECKPOINT_PERIOD=2)
    keys |= dict(SOLVER__STEPS=(), SOLVER__AMP__ENABLED=False, TEST__EVAL_PERIOD=2, SEED=1)
    return make_cfg("quickstart/faster_rcnn_R_18_FPN.yaml", OUTPUT_DIR=str(tmp_path), **keys)


def make(kind, cfg, folder, resume=False, **keys):
    """A trainer, ready to train."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    (folder / "theirs").mkdir(parents=True, exist_ok=True)
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def run_all(kind, cfg, folder):
    """What hooks saw and saved: in three iterations, five more, and some of which one fails."""
    seen = []
    for resume, length, fails_at in ((False, 3, -1), (True, 8, -1), (True, 12, 10)):
        trainer = make(kind, cfg, folder, resume, SOLVER__MAX_ITER=length)
        trainer.fails_at = fails_at
        if fails_at < 0:
            trainer.train()
        else:
            with pytest.raises(ValueError, match="a broken image"):
                trainer.train()
        files = sorted(path.name for path in (folder / "theirs").iterdir())
        seen.append((trainer.start_iter, trainer.iter, trainer.events, trainer.saved, files))
    return seen


def test_hooks_see_what_they_see_in_detectron2(cfg, tmp_path):
    """Iterations before, in and after a training; after a resumption; after an error."""
    ours, theirs = (run_all(kind, cfg, tmp_path / kind.__name__) for kind in (Ours, Theirs))
    assert [run[:2] for run in theirs] == [(0, 3), (3, 8), (8, 10)]
    assert "theirs_final.pth" in theirs[0][-1] and theirs[1][3]  # its hooks did something
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine == reference


class Broken(HookBase):
    def before_train(self):
        raise ValueError("no room on the disk")


def test_hooks_see_the_end_of_a_training_that_did_not_start(cfg, tmp_path):
    seen = []
    for kind in (Ours, Theirs):
        trainer = make(kind, cfg, tmp_path / kind.__name__)
        trainer.register_hooks([Broken()])
        with pytest.raises(ValueError, match="no room"):
            trainer.train()
        seen.append(trainer.events)
    assert seen[0] == seen[1] == [("before_train", 0, 5), ("after_train", 0, 0)]


def test_an_evaluation_of_another_trainer_is_not_watched(cfg, tmp_path):
    """What a training watches for, and how fast it was, is its own."""
    seen = []

    class Nested(Ours):
        @classmethod
        def test(cls, cfg, model):
            with watching() as watch:  # an evaluation inside of the training's
                seen.append(watch.stop)
            return super().test(cfg, model)

    trainer = make(Nested, cfg, tmp_path / "run")
    trainer.train()
    assert seen == [None] * 3 and not hasattr(Trainer, "watching") and not hasattr(Trainer, "speed")


def test_after_an_early_stop_hooks_see_the_iterations_that_are_done(cfg, tmp_path):
    keys = dict(RESNET_BACKBONE__BEST_METRIC="bbox/AP50", RESNET_BACKBONE__EARLY_STOP=1)
    trainer = make(Ours, cfg, tmp_path / "run", SOLVER__MAX_ITER=20, **keys)
    trainer.train()
    assert trainer.events[-1] == ("after_train", 4, 4) and trainer.iter == 4
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 3


def test_precise_statistics_of_a_model_without_batch_norm(cfg, tmp_path):
    make(Ours, cfg, tmp_path / "run", TEST__PRECISE_BN__ENABLED=True).train()


def test_deeplabs_schedule_follows_a_changed_length(cfg, tmp_path):
    deeplab.add_deeplab_config(cfg)
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    make(Ours, cfg, tmp_path / "run", SOLVER__MAX_ITER=4).train()
    resumed = make(Ours, cfg, tmp_path / "run", True, SOLVER__MAX_ITER=8)
    resumed.train()
    whole = make(Ours, cfg, tmp_path / "whole", SOLVER__MAX_ITER=8)
    whole.train()
    rates = [trainer.storage.history("lr").values()[-3:] for trainer in (resumed, whole)]
    assert rates[0] == rates[1]


class Normed(Linear):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, images):
        numbers = torch.stack(images)
        return {"loss": (self.norm(numbers) * self.weight + numbers * self.weight).sum()}


class Shuffled(Ours):
    """With images in the order that the seed says, and batch norms."""

    @classmethod
    def build_model(cls, cfg):
        return Normed()

    @classmethod
    def build_train_loader(cls, cfg):
        return number_loader(9, cfg.SEED)


def test_a_drawn_seed_is_taken_up_again(cfg, tmp_path):
    """For the images and for precise batch norm."""
    keys = dict(TEST__PRECISE_BN__ENABLED=True, TEST__PRECISE_BN__NUM_ITER=2)
    drawn = make(Shuffled, cfg, tmp_path / "run", SEED=-1, **keys)
    seed = drawn.cfg.SEED
    assert seed >= 0 and cfg.SEED == 1
    drawn.fails_at = 3
    with pytest.raises(ValueError, match="broken"):
        drawn.train()
    again = make(Shuffled, cfg, tmp_path / "run", True, SEED=-1, **keys)
    assert (again.start_iter, again.cfg.SEED) == (2, seed)
    again.train()
    whole = make(Shuffled, cfg, tmp_path / "whole", SEED=seed, **keys)
    whole.train()
    files = (tmp_path / name / "model_final.pth" for name in ("run", "whole"))
    ended, wanted = (torch.load(file)["model"] for file in files)
    torch.testing.assert_close(ended, wanted, rtol=0, atol=0)
    other = make(Shuffled, cfg, tmp_path / "run", True, SEED=seed + 1, **keys)
    assert other.cfg.SEED == other._trainer.seed == seed + 1  # who gives a seed has it


def test_where_averaged_weights_start_and_go(cfg, tmp_path):
    """From loaded weights; through a stop; to none, which goes on from the raw weights."""

    def raw_and_averaged(trainer):
        return tuple(m.weight.tolist() for m in (trainer._trainer.network, trainer.evaluated[-1]))

    class Noting(Ours):
        evaluated = []

        @classmethod
        def test(cls, cfg, model):
            cls.evaluated.append(model)
            return super().test(cfg, model)

    file, first = tmp_path / "weights.pth", torch.tensor([5.0, 7.0])
    torch.save({"model": {"weight": first}}, file)
    keys = dict(MODEL__WEIGHTS=str(file), SOLVER__CHECKPOINT_PERIOD=1, SOLVER__MAX_ITER=4)
    on = dict(RESNET_BACKBONE__EMA_DECAY=0.5)
    trainer = make(Noting, cfg, tmp_path / "run", **keys, **on)
    assert torch.equal(trainer._trainer.network.weight, first)
    trainer.fails_at = 3
    with pytest.raises(ValueError, match="broken"):
        trainer.train()
    make(Noting, cfg, tmp_path / "run", True, **keys, **on).train()
    found = torch.load(tmp_path / "run" / "model_final.pth")
    whole = make(Noting, cfg, tmp_path / "whole", **keys, **on)
    whole.train()
    raw, averaged = raw_and_averaged(whole)
    assert raw != averaged
    assert found["model"]["weight"].tolist() == averaged
    assert found["trainer"]["_trainer"]["raw_weights"]["weight"].tolist() == raw
    off = make(Noting, cfg, tmp_path / "run", True, **keys)
    assert off._trainer.network.weight.tolist() == raw
    none = make(Noting, cfg, tmp_path / "none", **keys)
    none.train()
    assert raw_and_averaged(none) == (raw, raw)
    again = make(Noting, cfg, tmp_path / "none", True, **keys, **on)  # switched on in the middle
    assert again._trainer.network.weight.tolist() == raw


def test_members_of_an_ensemble_are_read_once_in_a_training(cfg, tmp_path, monkeypatch):
    reads = []

    def read_run(run, cfg):
        reads.append(run)
        return cfg, nn.Linear(1, 1)

    class Ensemble(Ours):
        @classmethod
        def test(cls, cfg, model):
            on_meta = cfg.clone()
            on_meta.defrost()
            on_meta.MODEL.DEVICE = "meta"  # stands for a GPU
            (_, here), (_, there) = predictor.load_run("a", cfg), predictor.load_run("a", on_meta)
            assert (here.weight.device.type, there.weight.device.type) == ("cpu", "meta")
            return {"bbox": {"AP50": 42.0}}

    monkeypatch.setattr(predictor, "read_run", read_run)
    make(Ensemble, cfg, tmp_path / "run").train()
    assert reads == ["a"]
    predictor.load_run("a", cfg)
    assert reads == ["a", "a"]  # a training of its own may find other weights there


RESULTS = {"bbox": {"AP": 31.0, "AP50": float("nan")}, "segm": {"AP": 20.0}}


@pytest.mark.parametrize(
    "expected, message",
    [
        ([["bbox", "AP", 31.4, 0.5], ["segm", "AP", 20.0, 0]], ""),
        ([["bbox", "AP", 31.5, 0.4]], "bbox/AP is 31, expected 31.5 +- 0.4"),
        ([["bbox", "AP50", 40.0, 100]], "bbox/AP50 is nan, expected 40 +- 100"),
        ([["bbox", "AP75", 1, 100]], "bbox/AP75 is not measured, expected 1 +- 100"),
    ],
)
def test_expected_results_pass_where_they_do_in_detectron2(cfg, expected, message):
    cfg.TEST.EXPECTED_RESULTS = expected
    check_expectations(cfg)
    if not message:
        assert verify_results(cfg, RESULTS)
        check_results(cfg, RESULTS)
        return
    with pytest.raises(SystemExit):
        verify_results(cfg, RESULTS)
    with pytest.raises(UnexpectedResults) as caught:
        check_results(cfg, RESULTS)
    assert str(caught.value) == f"TEST.EXPECTED_RESULTS: {message}"


def test_expectations_that_cannot_be_compared(cfg, tmp_path):
    cfg.TEST.EXPECTED_RESULTS = [["keypoints", "AP", 1, 1]]  # a task that was not evaluated
    with pytest.raises(UnexpectedResults, match="keypoints/AP is not measured"):
        check_results(cfg, RESULTS)
    for entry in (["bbox", "AP", 1], ["bbox", "AP", "38", 1], "bbox/AP"):
        with pytest.raises(UsageError, match=r"write \[task, metric, expected, tolerance\]"):
            make(Ours, cfg, tmp_path / "run", TEST__EXPECTED_RESULTS=[entry])


def test_expected_results_of_several_test_sets(cfg):
    cfg.DATASETS.TEST, results = ("a", "b:val"), {"a": RESULTS, "b:val": {"bbox": {"AP": 5.0}}}
    cfg.TEST.EXPECTED_RESULTS = [["a/bbox", "AP", 31, 1], ["b:val/bbox", "AP", 5, 0.1]]
    check_expectations(cfg)
    check_results(cfg, results)
    results["b:val"]["bbox"]["AP"] = 6.0
    with pytest.raises(UnexpectedResults, match="b:val/bbox/AP is 6, expected 5"):
        check_results(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 5, 0.1]]
    with pytest.raises(UsageError, match="with the test sets a, b:val write SET/bbox"):
        check_expectations(cfg)


def test_runs_of_an_ensemble_are_looked_for_before_training(cfg):
    cfg.RESNET_BACKBONE.TEST.ENSEMBLE = ["nowhere"]
    with pytest.raises(UsageError, match="nowhere has no config.yaml"):
        Trainer(cfg)
