"""Best weights, early stop, metrics and checkpoints, without a network to train."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer
from resnet_backbone.detection.checkpoint.files import find_last_checkpoint
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine import hooks
from resnet_backbone.detection.engine.hooks import Checkpoints, Evaluation, FirstIterations, Metrics
from resnet_backbone.detection.engine.writers import MetricsFile
from resnet_backbone.runtime.errors import Stopped


class Saved:
    """A checkpointer that remembers."""

    def __init__(self):
        self.model, self.names = nn.Linear(1, 1), []

    def save(self, name, **content):
        self.names.append((name, content["iteration"]))


def evaluate_all(values, patience=0, period=2, metric="bbox/AP50", state=None):
    """The hook after a run that evaluates to these values."""
    remaining, saved = list(values), Saved()

    def evaluate():
        return {"bbox": {"AP50": remaining.pop(0), "AP": 1.0}}, None

    hook = Evaluation(evaluate, period, metric, patience, saved)
    if state:
        hook.load_state_dict(state)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(max_iter=period * len(values), storage=storage)
        for iteration in range(period * len(values)):
            hook.trainer.iter = storage.iter = iteration
            hook.after_step()
            if hook.has_ended:
                break
    return hook, saved.names, hook.trainer.iter + 1


def test_best_weights():
    hook, names, _ = evaluate_all([1.0, math.nan, 3.0, 3.0, 2.0])
    assert names == [("model_best", 1), ("model_best", 5)]
    assert hook.best == {"metric": "bbox/AP50", "value": 3.0, "iterations": 6}
    assert hook.results["bbox"]["AP50"] == 2.0
    hook, names, _ = evaluate_all([1.0, 2.0], metric="")
    assert names == [] and hook.best is None


def test_the_best_is_remembered():
    first, _, _ = evaluate_all([5.0])
    state = json.loads(json.dumps(first.state_dict()))
    state["evaluated"] = 0
    hook, names, _ = evaluate_all([4.0, 6.0], state=state)
    assert names == [("model_best", 3)] and hook.best["value"] == 6.0
    other, names, _ = evaluate_all([4.0], metric="bbox/AP", state=state)
    assert other.best["metric"] == "bbox/AP" and names  # another metric starts anew


def test_early_stop():
    hook, _, done = evaluate_all([3.0, 2.0, math.nan, 9.0], patience=2)
    assert hook.has_ended and done == 6
    hook, _, done = evaluate_all([3.0, 2.0, 4.0, 1.0], patience=2)
    assert not hook.has_ended and done == 8
    state = evaluate_all([3.0, 2.0], patience=2)[0].state_dict()  # counts on after a resume
    state["evaluated"] = 0
    assert evaluate_all([1.0, 1.0], patience=2, state=state)[2] == 2


def test_unknown_metric():
    with pytest.raises(UsageError, match="bbox/AP60: the evaluation gives bbox/AP50, bbox/AP"):
        evaluate_all([1.0], metric="bbox/AP60")


def run_checkpoints(stopping="", iterations=5, period=2):
    hook = Checkpoints(Saved(), period)
    for iteration in range(iterations):
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=iterations + bool(stopping))
        hook.trainer.stopping = stopping if iteration == iterations - 1 else ""
        hook.after_step()
    return hook


def test_checkpoints():
    names = run_checkpoints().checkpointer.names
    assert names == [("model_0000001", 1), ("model_0000003", 3), ("model_final", 4)]
    with pytest.raises(Stopped, match="SIGTERM"):
        run_checkpoints("SIGTERM")


def test_weights_that_are_not_finite_are_not_saved():
    hook = Checkpoints(Saved(), 1)
    hook.trainer = SimpleNamespace(iter=0, max_iter=9, stopping="")
    for bad in (math.nan, math.inf):
        hook.checkpointer.model.bias.data.fill_(bad)
        with pytest.raises(FloatingPointError, match=r"not finite \(bias\), no checkpoint"):
            hook.after_step()
    assert hook.checkpointer.names == []


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    writer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    assert find_last_checkpoint(str(tmp_path)) == ""
    writer.save("a", iteration=1)

    def fail(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("enforce fail at inline_container.cc\nunexpected pos")

    (tmp_path / ".a.pth.7.tmp").touch()  # what a killed process leaves
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        for name in ("a", "b"):
            with pytest.raises(OSError, match=f"{name}.pth cannot be written .enforce fail at in"):
                writer.save(name, iteration=2)
    assert torch.load(tmp_path / "a.pth")["iteration"] == 1 and not (tmp_path / "b.pth").exists()
    writer.marks_last = False
    writer.save("best", iteration=3)
    assert not list(tmp_path.glob(".*.tmp"))
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "a.pth")


def test_a_checkpoint_is_there_before_it_is_named(tmp_path, monkeypatch):
    """A power cut leaves last_checkpoint with a whole checkpoint; whole_file has its own tests."""
    replace, named = os.replace, []
    note = lambda old, new: named.append(os.path.basename(new)) or replace(old, new)  # noqa: E731
    monkeypatch.setattr(os, "replace", note)
    Checkpointer(nn.Linear(1, 1), str(tmp_path)).save("a", iteration=1)
    assert named == ["a.pth", "last_checkpoint"]


def write_metrics(path, start, end, state=None):
    """Rows of a loss that is its iteration; the state at the end."""
    hook = Metrics()
    if state:
        hook.load_state_dict(state)
    hook.trainer = trainer = SimpleNamespace(stopping="", evaluation=SimpleNamespace(evaluated=0))
    trainer.build_writers = lambda: [MetricsFile(str(path), start)]
    with EventStorage(start) as trainer.storage:
        hook.before_train()
        for trainer.iter in range(start, end):
            trainer.storage.iter = trainer.iter
            trainer.storage.put_scalar("loss", float(trainer.iter))
            trainer.storage.put_scalar("time", 1.0)
            if trainer.iter == 24:
                trainer.storage.put_scalar("AP", 5.0, smoothing_hint=False)
            state = hook.state_dict()
            hook.after_step()
    return state


def test_metrics_of_a_run_in_two_halves(tmp_path):
    write_metrics(tmp_path / "whole.json", 0, 60)
    state = write_metrics(tmp_path / "halves.json", 0, 33)  # in the middle of a window
    with open(tmp_path / "halves.json", "a") as file:
        file.write('{"iteration": 39, "loss": 7}\n{"iteration": 40, "lo')  # killed while writing
    write_metrics(tmp_path / "halves.json", 33, 60, json.loads(json.dumps(state)))
    text = (tmp_path / "whole.json").read_text()
    assert (tmp_path / "halves.json").read_text() == text
    assert [json.loads(line)["iteration"] for line in text.splitlines()] == [19, 24, 39, 59]


def test_other_processes_write_no_metrics(tmp_path, monkeypatch):
    """Also where a subclass's build_writers gives writers to each process, as Detectron2's may."""
    monkeypatch.setattr(hooks.comm, "is_main_process", lambda: False)
    write_metrics(tmp_path / "metrics.json", 0, 20)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("seconds", "told", "is_long"),
    [(0.9, "0.90 s per iteration: about 2 min", False), (30, "about 34.7 days", True)],
)
def test_the_first_iterations_say_how_long_all_take(caplog, seconds, told, is_long):
    hook, stop = FirstIterations(), SimpleNamespace(step_seconds=99.0)  # the first one is slow
    storage = SimpleNamespace(latest=lambda: {"loss_cls": (0.5, 0), "lr": (0.1, 0)})
    hook.trainer = SimpleNamespace(stop=stop, storage=storage, model=nn.Linear(1, 1))
    hook.trainer.max_iter = 100_005 if is_long else 105
    with caplog.at_level("INFO"):
        hook.before_train()
        for hook.trainer.iter in range(8):
            hook.after_step()
            stop.step_seconds = seconds
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:5] == [f"iteration {number}: loss_cls 0.500" for number in range(5)]
    assert told in lines[5] and len(lines) == 6 + is_long
    assert ("this training will take 34.7 days on this CPU" in lines[-1]) == is_long
