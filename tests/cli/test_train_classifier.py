"""tools/train_classifier.py as users run it: killed, signalled, resumed, misused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resnet_backbone.classification.networks import CLASSES_KEY, read_class_names
from resnet_backbone.cli import train_classifier
from resnet_backbone.runtime.errors import EXIT_STOPPED
from resnet_backbone.weights.reading import read_header, read_source

from trainings import assert_same_weights, command, kill, reached  # isort: skip
from trainings import refused, rows, run, start, succeed  # isort: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_cifar10) -> Path:
    """Everything that has state: averaged weights, micro-batches, warm-up, plateau, best."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
model: {{name: cifar_resnet8}}
data: {{format: cifar10, root: {tiny_cifar10}, augmentation: pad_crop, mean: pixel}}
optimizer: {{weight_decay: 0.001}}
schedule:
  {{iterations: 60, lr: 0.05, policy: plateau, plateau_patience: 1, plateau_threshold: 5,
   warmup_lr: 0.01, warmup_until_error: 80}}
train: {{batch_size: 24, micro_batch: 8, ema: 0.9, seed: 3, recompute_bn: true}}
evaluation: {{protocol: full, every: 14, batch_size: 16}}
output: {{log_every: 5, checkpoint_every: 4, tensorboard: false}}
"""
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    succeed("--config-file", config, "--output-dir", folder)
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    for name in ("final.safetensors", "best.safetensors"):
        assert_same_weights(folder / name, other / name)
    assert rows(folder) == rows(other)


def test_killed_at_random_moments_the_run_ends_bit_for_bit_the_same(
    config, uninterrupted, tmp_path
):
    """kill -9 twice, somewhere in the run, 200 images an epoch and batches of 24: mid-epoch."""
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    folder = tmp_path / f"killed-{seed}"  # the seed is in every message
    arguments = ("--config-file", config, "--output-dir", folder, "--resume")
    for first, last in ((1, 25), (26, 50)):
        wanted = rng.randint(first, last)
        process = start(*arguments, until=lambda wanted=wanted: reached(folder) >= wanted)
        time.sleep(rng.uniform(0, 0.3))  # between checkpoints, or while one is written
        assert process.poll() is None, "the process ended before it could be killed"
        kill(process)
    done = succeed(*arguments)
    assert "resuming at iteration" in done.stdout
    assert_same_run(folder, uninterrupted)


def test_a_damaged_newest_checkpoint_costs_only_its_iterations(config, uninterrupted, tmp_path):
    folder = tmp_path / "damaged"
    arguments = ("--config-file", config, "--output-dir", folder)
    kill(start(*arguments, until=lambda: reached(folder) >= 12))
    newest = folder / "checkpoints" / f"{reached(folder):08d}" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = succeed("--output-dir", folder, "--resume")
    assert "cannot be used" in done.stdout and "resuming at iteration" in done.stdout
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_write_a_checkpoint_and_exit_with_75(config, uninterrupted, tmp_path, number):
    folder = tmp_path / "signalled"
    arguments = ("--config-file", config, "--output-dir", folder, "output.checkpoint_every=1000")
    process = start(*arguments, until=(folder / "metrics.jsonl").exists)
    asked = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    assert time.monotonic() - asked < 10
    assert number.name in output and "--resume" in output
    assert 5 <= reached(folder) < 60
    # with the run's own config, and no other argument
    succeed("--output-dir", folder, "--resume")
    assert_same_run(folder, uninterrupted)


def test_results_of_a_run(uninterrupted):
    results = json.loads((uninterrupted / "results.json").read_text())
    assert results["parameters"] == 97216 - 21926 and results["iterations"] == 60
    assert results["bn_statistics"] == "training set"
    evaluations = [row for row in rows(uninterrupted) if "val_top1_error" in row]
    assert [row["iteration"] for row in evaluations] == [14, 28, 42, 56, 60]
    assert results["with_moving_averages"]["val_top1_error"] == evaluations[-1]["val_top1_error"]
    assert results["best_val_top1_error"] == min(row["val_top1_error"] for row in evaluations)
    assert results["best_val_top1_error"] < 60  # chance is 90: it learns
    starts = json.loads((uninterrupted / "environment.json").read_text())["starts"]
    assert len(starts) == 1 and "train_classifier.py" in starts[0]["command"]
    for name in ("best.safetensors", "final.safetensors"):
        assert read_header(uninterrupted / name).origin.run == uninterrupted.name


def test_a_finished_run_is_not_overwritten(uninterrupted, config):
    before = (uninterrupted / "final.safetensors").read_bytes()
    arguments = ("--config-file", config, "--output-dir", uninterrupted)
    assert "--resume" in refused(*arguments)
    assert "train.seed" in refused(*arguments, "--resume", "train.seed=9")
    assert (uninterrupted / "final.safetensors").read_bytes() == before


def test_eval_only_gives_the_runs_own_number(uninterrupted):
    """Also in processes that the training could not have."""
    results = json.loads((uninterrupted / "results.json").read_text())
    before = sorted(path.name for path in uninterrupted.iterdir())
    two = ("--num-processes", 2, "train.batch_size=25", "train.device=cpu")
    done = succeed("--output-dir", uninterrupted, "--eval-only", *two)
    assert f"top-1 error {results['val_top1_error']:.2f} %" in done.stdout
    assert sorted(path.name for path in uninterrupted.iterdir()) == before


def test_the_log_alone_has_the_whole_config(config, tmp_path, capsys):
    """The screen says where it is."""
    arguments = ["--config-file", str(config), "--output-dir", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit):
        train_classifier.main([*arguments, "model.num_classes=5"])
    shown, said = capsys.readouterr()
    assert said.startswith(f"nothing to resume in {tmp_path}: starting from iteration 0\n")
    assert "config.yaml" in shown and "num_classes" not in shown
    assert "num_classes: 5" in (tmp_path / "log.txt").read_text()


def test_an_ended_run_stays_as_it_is(uninterrupted):
    before = (uninterrupted / "results.json").read_bytes()
    done = succeed("--output-dir", uninterrupted, "--resume")
    assert "the run has ended" in done.stdout
    assert (uninterrupted / "results.json").read_bytes() == before


def test_weights_bring_their_own_input(uninterrupted, config, tmp_path):
    """A network trained on RGB minus the mean image, evaluated and tuned by a BGR config."""
    results = json.loads((uninterrupted / "results.json").read_text())
    weights = f"model.weights={uninterrupted / 'final.safetensors'}"
    other = (*("--config-file", config), "data.channel_order=BGR", "data.std=channel", weights)
    done = run(*other, "--output-dir", tmp_path / "x", "--eval-only")
    assert f"top-1 error {results['val_top1_error']:.2f} %" in done.stdout, done.stderr
    assert not (tmp_path / "x").exists()
    tuned = ("schedule.iterations=3", "schedule.lr=1e-6", "schedule.warmup_lr=1e-6", "train.ema=0")
    succeed(*other, *tuned, "train.recompute_bn=false", "--output-dir", tmp_path / "tuned")
    found = read_source(tmp_path / "tuned" / "final.safetensors").preprocessing
    assert found.channel_order == "RGB" and found.std == (1, 1, 1)
    assert found.mean_image.shape == (3, 32, 32)
    # --eval-only of this run takes what it trained, not what it started from
    done = run("--output-dir", tmp_path / "tuned", "--eval-only")
    assert "tuned/final.safetensors: top-1" in done.stdout, done.stderr


def test_a_changed_data_set_is_no_resumption(config, tiny_cifar10, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_cifar10, data)
    arguments = ("--config-file", config, f"data.root={data}", "--output-dir", tmp_path / "run")
    kill(start(*arguments, until=lambda: reached(tmp_path / "run")))
    (data / "data_batch_5.bin").write_bytes((data / "data_batch_5.bin").read_bytes()[: 3073 * 9])
    error = refused("--output-dir", tmp_path / "run", "--resume")
    assert "200 training images, but now has 169" in error


def test_other_classes_are_refused(uninterrupted, config, tmp_path):
    """Renamed, so that the labels shift: by name they would be other ones."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    file = folder / "final.safetensors"
    tensors, (first, *others) = load_file(file), read_class_names(file)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert first == "airplane"
    save_file(tensors, file, facts | {CLASSES_KEY: json.dumps(["zebra", *others])})
    error = refused("--output-dir", folder, "--eval-only")
    assert "its class 0 is zebra, that of the data is airplane" in error


def test_a_folder_is_used_by_one_training_at_a_time(config, tmp_path):
    arguments = ("--config-file", config, "--output-dir", tmp_path / "run")
    first = start(*arguments, "schedule.iterations=9999", until=lambda: reached(tmp_path / "run"))
    try:
        error = refused("--output-dir", tmp_path / "run", "--resume")
        assert f"another process uses {tmp_path / 'run'}: wait for it" in error
    finally:
        kill(first)


def test_a_wrong_setting_leaves_no_checkpoint(config, tmp_path):
    """The first step fails, with statistics half updated."""
    words = ("--config-file", config, "--output-dir", tmp_path / "run")
    error = refused(*words, "model=resnet18", "train.batch_size=1", "train.micro_batch=0")
    assert "more than 1 value per channel" in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_divergence_stops_with_step_history_and_last_good_checkpoint(config, tmp_path):
    folder = tmp_path / "nan"
    done = run(
        *("--config-file", config, "--output-dir", folder, "schedule.lr=1e20"),
        *("schedule.warmup_until_error=0", "schedule.warmup_lr=0"),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    message = done.stderr.strip()
    assert "\n" not in message and "at iteration" in message and "schedule.lr" in message
    report = json.loads((folder / "diverged.json").read_text())
    assert report["losses"][-1] in ("nan", "inf") and str(report["iteration"]) in message
    assert report["last_good_checkpoint"] in message
    for path in (folder / "checkpoints").glob("*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "give --config-file"),
        (["--output-dir", "nowhere", "--resume"], "nowhere holds no run"),
        (["--config-file", "none.yaml"], "no such config file"),
        (["CONFIG", "schedule.lrr=1"], "schedule.lr"),
        (["CONFIG", "model=cifar_resnet21"], "6n+2"),
        (["CONFIG", "model=resnet500"], "did you mean"),
        (["CONFIG", "data.root=/nowhere"], "/nowhere: no CIFAR-10 here"),
        (["CONFIG", "train.device=cuda"], "no GPU"),
        (["CONFIG", "model.num_classes=5"], "model.num_classes"),
        (["CONFIG", "train.seed", "5"], "train.seed=2"),
    ],
)
def test_misuse_is_one_line(arguments, hint, config, tmp_path, monkeypatch, refusal):
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["CONFIG"]:
        arguments = ["--config-file", str(config), "--output-dir", "out", *arguments[1:]]
    assert hint in refusal(train_classifier.main, *arguments)


def test_two_processes_train_as_one(config, tmp_path):
    """Two gloo processes: the same images; without BN, the same weights."""
    plain = (
        *("model.options.norm=", "train.micro_batch=0", "schedule.iterations=4", "train.ema=0"),
        *("train.recompute_bn=false", "schedule.warmup_until_error=0", "schedule.warmup_lr=0"),
        *("schedule.lr=0.005", "train.device=cpu"),
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, processes in zip(folders, (1, 2), strict=True):
        arguments = ("--config-file", config, "--output-dir", folder, "--num-processes", processes)
        succeed(*arguments, *plain)
    one, two = (load_file(folder / "final.safetensors") for folder in folders)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4)
    first, second = (rows(folder) for folder in folders)
    assert [row["iteration"] for row in first] == [row["iteration"] for row in second]
    assert first[0]["train_loss"] == pytest.approx(second[0]["train_loss"], rel=1e-4)
    assert first[-1]["val_top1_error"] == pytest.approx(second[-1]["val_top1_error"], abs=2.6)
    starts = json.loads((folders[1] / "environment.json").read_text())["starts"]
    assert starts[0]["processes"] == 2


LAUNCHER = pytest.param("the launcher", marks=pytest.mark.slow)
TWO = ("train.micro_batch=4", "train.device=cpu", "output.checkpoint_every=1000")


def processes_of(launcher: int) -> list[int]:
    command = ["pgrep", "-P", str(launcher), "-f", "spawn_main"]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.fixture(scope="module")
def two_uninterrupted(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "whole"
    succeed("--config-file", config, "--output-dir", folder, "--num-processes", 2, *TWO)
    return folder


@pytest.mark.parametrize("whom", ["one process", LAUNCHER])
def test_all_processes_agree_to_stop(config, two_uninterrupted, tmp_path, whom):
    """SIGUSR1 to one of two processes, or to what launched them: both stop, with one status.

    The checkpoint that they write changes nothing of what they compute afterwards, although it
    holds the mean of BN statistics that each has for itself.
    """
    folder = tmp_path / "two"
    arguments = ("--config-file", config, "--output-dir", folder, "--num-processes", 2, *TWO)
    launcher = start(*arguments, until=(folder / "metrics.jsonl").exists)
    trainers = processes_of(launcher.pid)
    assert len(trainers) == 2
    os.kill(trainers[1] if whom == "one process" else launcher.pid, signal.SIGUSR1)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == EXIT_STOPPED, output
    assert output.count("--resume") == 1 and 5 <= reached(folder) < 60
    succeed("--output-dir", folder, "--resume", "--num-processes", 2)
    assert_same_run(folder, two_uninterrupted)


@pytest.mark.slow
def test_two_machines(config, tmp_path):
    """Two torchrun agents, as on two machines, give what one process gives (without BN)."""
    folder = tmp_path / "nodes"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", "--master-port=29517"]
    words = command("--config-file", config, "--output-dir", folder, *TWO)[4:]
    words = ["-m", "resnet_backbone.cli.train_classifier", *words, "schedule.iterations=6"]
    agents = [start(*torchrun, f"--node-rank={rank}", *words) for rank in (0, 1)]
    outputs = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert json.loads((folder / "results.json").read_text())["iterations"] == 6
