"""Trainings in several processes: by Detectron2's options, by torchrun, on two hosts; on CPUs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.utils import comm
from runs import arguments, reached, read_results, rows, start

from resnet_backbone.runtime.errors import EXIT_STOPPED
from resnet_backbone.runtime.launch import _free_port

RUN = dict(SOLVER__MAX_ITER=3, SOLVER__CHECKPOINT_PERIOD=2, SOLVER__BASE_LR=0.001)
RUN |= dict(TEST__EVAL_PERIOD=2, MODEL__RESNETS__NORM="GN", MODEL__FPN__NORM="")  # norms per image
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {"own": (["--num-processes", "2"], {}), "torchrun": ([], {"prefix": TORCHRUN})}
AVERAGED = dict(RESNET_BACKBONE__EMA_DECAY=0.5, RESNET_BACKBONE__GRADIENT_CHECKPOINTING=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_voc):
    splits = {"train": range(7), "test": range(3)}
    return write_voc(tmp_path_factory.mktemp("pictures") / "VOC2007", splits, upright=3)


DETECTIONS = "inference/test:test/detections.json"


def run(data, folder, *options, prefix=None, **keys):
    process = start(arguments(data, folder, *options, **(RUN | keys)), prefix=prefix)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process that takes the four images of a batch in two parts, and averages weights."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(data, folder, RESNET_BACKBONE__ACCUMULATE=2, **AVERAGED)
    return folder


def raw_weights(path):
    """Of a checkpoint; the same with averages and without."""
    content = torch.load(path)
    return content["trainer"]["_trainer"].get("raw_weights", content["model"])


def assert_like(folder, alone, read=raw_weights):
    """The same images, losses, weights to rounding, evaluation; each file written once."""
    ours, theirs = rows(folder), rows(alone)
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs] == [1, 2]
    for name in ("total_loss", "loss_cls", "loss_rpn_cls", "lr"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4), name
    first, second = (read(one / "model_final.pth") for one in (folder, alone))
    moved = read(alone / "model_0000001.pth")
    for name, value in second.items():
        if value.is_floating_point():
            step = (value - moved[name]).abs().max()
            assert (first[name] - value).abs().max() <= 0.02 * step + 1e-6, name
    ours, theirs = read_results(folder), read_results(alone)
    assert ours["processes"] == 2
    assert ours["results"]["bbox"] == pytest.approx(theirs["results"]["bbox"], abs=1, nan_ok=True)
    assert len(list(folder.glob("events.out.tfevents*"))) == 1
    texts = ((one / DETECTIONS).read_text() for one in (folder, alone))
    found, expected = ({row["image_id"] for row in json.loads(text)} for text in texts)
    assert found == expected and found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(data, alone, tmp_path, launcher):
    folder = tmp_path / "run"
    keys = AVERAGED if launcher == "own" else {}
    output = run(data, folder, *LAUNCHERS[launcher][0], **LAUNCHERS[launcher][1], **keys)
    assert "SOLVER.IMS_PER_BATCH 4 = 2 (processes) x 1" in output
    assert output.count("schedule: SOLVER.IMS_PER_BATCH") == 1  # said once
    assert_like(folder, alone)
    if keys:
        assert_like(folder, alone, lambda path: torch.load(path)["model"])


def test_a_single_process_of_torchrun_fetches_its_weights(train_net, data, tmp_path, monkeypatch):
    """From a port where nobody listens."""
    variables = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port(), OMP_NUM_THREADS=1)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    create = comm.create_local_process_group.__wrapped__  # without its cache
    monkeypatch.setattr(comm, "create_local_process_group", create)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    weights = f"http://127.0.0.1:{_free_port()}/r18.pth"
    words = arguments(data, tmp_path, MODEL__WEIGHTS=weights, MODEL__DEVICE="cpu")
    assert "r18.pth" in (said := train_net(None, *words, code=2)[-1]) and "fetch" in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_process_stops_both(data, tmp_path, launcher):
    folder = tmp_path / "run"
    keys = RUN | dict(SOLVER__MAX_ITER=999, TEST__EVAL_PERIOD=0, SOLVER__CHECKPOINT_PERIOD=3)
    options, extra = LAUNCHERS[launcher]
    process = start(arguments(data, folder, *options, **keys), **extra)
    deadline = time.monotonic() + 300
    while reached(folder) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    command = ["pgrep", "-f", "-P", str(process.pid), "spawn_main|train_net"]
    found = subprocess.run(command, capture_output=True, text=True)
    workers = list(map(int, found.stdout.split()))
    assert len(workers) == 2, found.stdout
    os.kill(workers[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == (EXIT_STOPPED if launcher == "own" else 1), output[-3000:]
    assert output.count("\nstopped by SIGTERM; run the same") == (1 if launcher == "own" else 2)
    last = reached(folder)
    assert torch.load(folder / f"model_{last:07d}.pth")["iteration"] == last
    run(data, folder, "--resume", *options, **extra, **(keys | dict(SOLVER__MAX_ITER=last + 2)))
    assert read_results(folder)["iterations"] == last + 2


@pytest.mark.slow
def test_errors_are_said_once(data, tmp_path):
    process = start(arguments(data, tmp_path / "run", "--num-processes", "3", **RUN))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 2
    assert output.count("SOLVER.IMS_PER_BATCH 4 cannot be divided into 3 processes x 1 parts") == 1


@pytest.fixture
def hosts():
    """Two network namespaces that see each other as 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"rb{os.getpid()}{letter}" for letter in "ab"]
    links = [f"v{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts(data, alone, tmp_path, hosts):
    folder = tmp_path / "run"
    url = ["--num-machines", "2", "--dist-url", "tcp://10.77.0.1:29501"]
    processes = []
    for rank, (name, link) in enumerate(hosts):
        prefix = ["ip", "netns", "exec", name, sys.executable, "-W", "ignore"]
        words = arguments(data, folder, *url, "--machine-rank", str(rank), **RUN)
        processes.append(start(words, prefix=prefix, env={"GLOO_SOCKET_IFNAME": link}))
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    assert_like(folder, alone)
