"""Processes of a run: what is planned, what they say, how they end."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from resnet_backbone.runtime import launch
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.launch import Launch, add_launch_arguments, plan_launch


def plan(*words, device="cpu"):
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    return plan_launch(parser.parse_args(words), device, "MODEL.DEVICE cpu")


def test_plans():
    assert plan().world == 1 and not plan().uses_gpus
    two = plan("--num-processes", "2")
    assert (two.world, two.url[:16]) == (2, "tcp://127.0.0.1:")
    words = ["--num-machines", "2", "--machine-rank", "1", "--dist-url", "tcp://a:1"]
    assert plan("--num-processes", "3", *words) == Launch(3, 2, 1, "tcp://a:1", False)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num-gpus", "0"], "--num-gpus 0: give at least 1"),
        (["--num-gpus", "99"], "this machine has [0-9]+; for CPUs give --num-processes"),
        (["--num-gpus", "1", "--num-processes", "2"], "give either --num-gpus or"),
        (["--machine-rank", "1"], "--machine-rank 1: give 0 to 0"),
        (["--num-machines", "2"], "needs --dist-url tcp://HOST:PORT of machine 0"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UsageError, match=message):
        plan(*words)


def test_torchrun_and_own_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun has started the processes"):
        plan("--num-processes", "2")
    for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(key, "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE is set but not MASTER_PORT: start with torch"):
        plan()
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert plan().world == 1


def test_more_processes_of_torchrun_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match="process 1 of this machine has no GPU: start only 1"):
        launch._join("env://", uses_gpus=True)


def stubborn(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(30)


def test_a_second_interrupt_ends_processes_that_no_terminal_reaches(monkeypatch):
    monkeypatch.setattr(launch, "INTERRUPTED", 0.1)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=stubborn, args=(ready,))
    process.start()
    alive, former = [], signal.getsignal(signal.SIGINT)

    def interrupt():
        ready.wait()
        while signal.getsignal(signal.SIGINT) is former:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)
        alive.append(process.is_alive())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch._watch([process]) == 128 + signal.SIGKILL
    thread.join()
    assert alive == [True]


@pytest.mark.parametrize("end, status", [((0, 3, 5), 3), ((0, -9, 5), 137), ((0, 0, 0), 0)])
def test_status_of_processes_that_ended_before_they_were_looked_at(end, status):
    ended = [SimpleNamespace(exitcode=code, is_alive=lambda: False) for code in end]
    assert launch._watch(ended) == status


LONG = """
import os, signal, sys, time
from multiprocessing import util
from pathlib import Path
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.launch import Launch, _free_port, run_processes

def run(how):
    if how == "long":
        raise UsageError("x" * 10**6)
    if how == "aborts":  # as a library's threads may, after the message
        util.Finalize(None, os.abort, exitpriority=0)
        raise UsageError("what the first process says")
    met = Path(__file__).with_name("met")  # else the kill may come while the first still joins
    if os.environ["LOCAL_RANK"] == "1":
        while not met.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    met.touch()
    raise UsageError("what the first process says")

if __name__ == "__main__":
    run_processes(Launch(2, url=f"tcp://127.0.0.1:{_free_port()}"), run, sys.argv[1])
"""


@pytest.mark.parametrize("how", ["long", "killed", "aborts"])
def test_what_processes_say_reaches_the_user(tmp_path, how):
    """A message larger than a pipe, said once; a process that was killed keeps nobody waiting."""
    (tmp_path / "tool.py").write_text(LONG)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "tool.py"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    if how == "long":
        assert (done.returncode, done.stderr.count("x" * 10**6)) == (2, 1)
    else:
        assert done.returncode == 2 and "what the first process says" in done.stderr
