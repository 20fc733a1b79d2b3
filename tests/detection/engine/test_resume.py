"""Trainings that are killed, signalled and resumed end as those that nobody interrupted."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from signal import SIGINT, SIGUSR1

import pytest
import torch
import yaml
from runs import Forked, arguments, assert_same_run, reached, read_results, rows

import resnet_backbone.detection.engine.trainer  # noqa: F401  so that forked processes have it
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine.setup import has_ended
from resnet_backbone.runtime.errors import EXIT_STOPPED

# With all that has state: a warm-up, steps, momentum, parts, evaluations, the best and the averaged
# weights.
RUN = dict(SOLVER__MAX_ITER=10, SOLVER__STEPS="(5, 8)", SOLVER__CHECKPOINT_PERIOD=2)
RUN |= dict(TEST__EVAL_PERIOD=4, RESNET_BACKBONE__BEST_METRIC="bbox/AP50")
RUN |= dict(RESNET_BACKBONE__ACCUMULATE=2, RESNET_BACKBONE__EMA_DECAY=0.5)
RUN |= dict(RESNET_BACKBONE__GRADIENT_CHECKPOINTING=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_voc):
    splits = {"train": range(9), "test": range(3)}
    return write_voc(tmp_path_factory.mktemp("pictures") / "VOC2007", splits, upright=3)


def finish(words, log):
    """Runs to the end; the text of the log."""
    process = Forked(words, log)
    assert process.wait() == 0, log.read_text()[-3000:]
    return log.read_text()


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(arguments(data, folder, **RUN), folder.parent / "log")
    return folder


def test_an_uninterrupted_run(uninterrupted):
    assert [row["iteration"] for row in rows(uninterrupted)] == [3, 7, 9]
    assert all({"total_loss", "lr", "bbox/AP50"} <= row.keys() for row in rows(uninterrupted))
    results = read_results(uninterrupted)
    assert results["best"]["iterations"] in (4, 8, 10) and not results["ended_early"]
    saved = torch.load(uninterrupted / "model_final.pth")
    pairs = [(saved["model"][k], v) for k, v in saved["trainer"]["_trainer"]["raw_weights"].items()]
    moved = [not torch.equal(averaged, raw) for averaged, raw in pairs]
    assert sum(moved) > 40 and len(moved) == len(saved["model"])


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_at_random_moments(data, uninterrupted, tmp_path, workers):
    """kill -9 twice, between and while checkpoints, evaluations and rows are written."""
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    folder = tmp_path / f"killed-{seed}"  # the seed is in every message
    keys = RUN | dict(DATALOADER__NUM_WORKERS=workers)
    words = arguments(data, folder, "--resume", **keys)
    for first, last in ((0, 3), (4, 7)):
        process = Forked(words, tmp_path / "log")
        wanted = rng.randint(first, last)
        process.wait_until(lambda wanted=wanted: reached(folder) >= wanted)
        time.sleep(rng.uniform(0, 1))
        assert process.poll() is None, process.log.read_text()[-3000:]
        process.send(signal.SIGKILL)
        process.wait()
    assert finish(words, tmp_path / "log").count("Starting training from iteration") == 3
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".*.pth.*.tmp"))


def test_a_killed_worker_ends_the_run_in_a_line(data, tmp_path):
    """As the kernel does where memory runs out."""
    keys = RUN | dict(DATALOADER__NUM_WORKERS=1, SOLVER__MAX_ITER=999)
    process = Forked(arguments(data, tmp_path / "run", **keys), tmp_path / "log")
    process.wait_until(lambda: reached(tmp_path / "run") >= 0)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert process.wait() == 2
    text = process.log.read_text()
    assert (
        "a worker of the loader was killed" in text.splitlines()[-1] and "Traceback" not in text
    ), text


def test_a_folder_is_used_by_one_training_at_a_time(data, tmp_path):
    words = arguments(data, tmp_path / "run", "--resume", **RUN | dict(SOLVER__MAX_ITER=999))
    first, second = Forked(words, tmp_path / "first"), None
    try:
        first.wait_until(lambda: reached(tmp_path / "run") >= 0)
        second = Forked(words, tmp_path / "second")
        assert second.wait() == 2
        assert "run: wait for it, or choose another folder" in second.log.read_text()
    finally:
        first.send(signal.SIGKILL)
        first.wait()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (SIGUSR1, SIGINT))],
)
def test_signals(data, uninterrupted, tmp_path, number):
    """To the whole process group, loader workers included."""
    folder = tmp_path / "run"
    keys = RUN | dict(SOLVER__CHECKPOINT_PERIOD=10**6, DATALOADER__NUM_WORKERS=1)
    process = Forked(arguments(data, folder, **keys), tmp_path / "log")
    process.wait_until(lambda: (folder / "metrics.json").exists())
    time.sleep(0.3)
    process.send(number, group=True)
    assert process.wait() == EXIT_STOPPED, process.log.read_text()[-3000:]
    last = process.log.read_text().splitlines()[-1]
    assert last == f"stopped by {number.name}; run the same command again, a training with --resume"
    assert 0 <= reached(folder) < 9
    finish(arguments(data, folder, "--resume", **RUN), tmp_path / "log")
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_ends_it(data, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = Forked(arguments(data, folder, **RUN), tmp_path / "log")
    process.wait_until(lambda: (folder / "log.txt").exists())
    process.wait_until(lambda: "Start inference" in (folder / "log.txt").read_text())
    process.send(signal.SIGTERM)
    assert process.wait() == EXIT_STOPPED, process.log.read_text()[-3000:]
    assert reached(folder) in (3, 4)  # 4 if the evaluation was over already
    finish(arguments(data, folder, "--resume", **RUN), tmp_path / "log")
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_an_interrupted_evaluation_alone_ends_in_a_line(uninterrupted, write_voc, tmp_path):
    """Ctrl-C reaches the process group, with the loader's workers; they say nothing."""
    images = write_voc(tmp_path / "VOC2007", {"train": [0], "test": range(100)})
    weights = str(uninterrupted / "model_final.pth")
    keys = dict(MODEL__WEIGHTS=weights, DATALOADER__NUM_WORKERS=2)
    process = Forked(arguments(images, tmp_path, "--eval-only", **keys), tmp_path / "log")
    process.wait_until(lambda: process.log.exists())
    process.wait_until(lambda: "Inference done" in process.log.read_text())
    process.send(SIGINT, group=True)
    assert process.wait() == EXIT_STOPPED, process.log.read_text()[-3000:]
    log = process.log.read_text()
    assert log.splitlines()[-1].startswith("stopped by SIGINT; ") and "Traceback" not in log


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(data, tmp_path):
    folder = tmp_path / "run"
    keys = RUN | dict(SOLVER__MAX_ITER=999, TEST__EVAL_PERIOD=999)
    process = Forked(arguments(data, folder, **keys), tmp_path / "log")
    process.wait_until(lambda: reached(folder) >= 2)
    for _ in range(200):
        if process.poll() is not None:
            break
        process.send(signal.SIGINT)
        time.sleep(0.01)
    assert process.wait(20) not in (0, EXIT_STOPPED)
    assert "Traceback" not in process.log.read_text()


@pytest.mark.slow
def test_an_ended_run_stays_and_others_are_not_overwritten(data, uninterrupted, tmp_path):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir() if path.is_file()}
    words = arguments(data, uninterrupted, "--resume", **RUN)
    assert "the run has ended" in finish(words, tmp_path / "log")
    other = arguments(data, uninterrupted, "--resume", **(RUN | dict(SOLVER__BASE_LR=0.5)))
    refused = {
        "holds a run: continue it with --resume": arguments(data, uninterrupted, **RUN),
        "was started with another SOLVER.BASE_LR: continue with the same": other,
    }
    for message, words in refused.items():
        process = Forked(words, tmp_path / "log")
        assert process.wait() == 2 and message in process.log.read_text().splitlines()[-1]
    after = {path.name: path.read_bytes() for path in uninterrupted.iterdir() if path.is_file()}
    before.pop("log.txt"), after.pop("log.txt")
    assert before == after


@pytest.mark.parametrize(
    "key, value", [("WEIGHT_DECAY_NORM", 0.1), ("BIAS_LR_FACTOR", 2.0), ("NESTEROV", True)]
)
def test_keys_that_the_optimizers_state_holds(make_cfg, tmp_path, key, value):
    """The parameter groups come from the checkpoint: another value would do nothing."""
    cfg = make_cfg(None, OUTPUT_DIR=str(tmp_path))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert not has_ended(cfg, "model_0000001.pth")
    cfg.SOLVER[key] = value
    with pytest.raises(UsageError, match=f"was started with another SOLVER.{key}: continue with"):
        has_ended(cfg, "model_0000001.pth")


@pytest.mark.parametrize("text", ["", "MODEL:\n  BACKBONE: {FREEZE"])
def test_a_config_that_a_power_cut_damaged(make_cfg, tmp_path, text):
    cfg = make_cfg(None, OUTPUT_DIR=str(tmp_path))
    (tmp_path / "config.yaml").write_text(text)
    assert not has_ended(cfg, "")
    with pytest.raises(UsageError, match="config.yaml is damaged: delete it, and resume"):
        has_ended(cfg, "model_0000001.pth")


@pytest.mark.slow
def test_other_keys_may_change_and_are_named(data, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    keys = RUN | dict(SOLVER__MAX_ITER=12, SEED=4)
    log = finish(arguments(data, folder, "--resume", **keys), tmp_path / "log")
    assert "resumed with another SEED: 3 -> 4" in log
    assert [row["iteration"] for row in rows(folder) if "total_loss" in row] == [3, 7, 9, 11]


@pytest.mark.slow
def test_a_drawn_seed_is_kept(data, tmp_path):
    folder = tmp_path / "run"
    keys = dict(SOLVER__MAX_ITER=999, SOLVER__CHECKPOINT_PERIOD=1, SEED=-1)
    process = Forked(arguments(data, folder, **keys), tmp_path / "log")
    process.wait_until(lambda: reached(folder) >= 0)
    process.send(signal.SIGTERM)
    assert process.wait() == EXIT_STOPPED
    seeds = [yaml.safe_load((folder / "config.yaml").read_text())["SEED"]]
    keys = keys | dict(SOLVER__MAX_ITER=reached(folder) + 2)
    finish(arguments(data, folder, "--resume", **keys), tmp_path / "log")
    seeds.append(yaml.safe_load((folder / "config.yaml").read_text())["SEED"])
    assert seeds[0] == seeds[1] == read_results(folder)["seed"] >= 0
