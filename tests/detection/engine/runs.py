"""Small trainings in processes of their own, for tests that stop and kill them."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn
from torch.utils._pytree import tree_flatten

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer
from resnet_backbone.detection.data.mapper import AugmentedImages
from resnet_backbone.detection.data.sampling import BatchPlan, ImageStream, TrainingLoader
from resnet_backbone.detection.engine.trainer import Trainer

PROJECT = Path(__file__).resolve().parents[3]
CONFIG = PROJECT / "configs" / "detection" / "quickstart" / "faster_rcnn_R_18_FPN.yaml"
TOOL = PROJECT / "tools" / "train_net.py"
KEYS = """INPUT.MIN_SIZE_TRAIN (32,40) INPUT.MIN_SIZE_TEST 32 MODEL.FPN.OUT_CHANNELS 16
MODEL.RPN.PRE_NMS_TOPK_TRAIN 40 MODEL.RPN.POST_NMS_TOPK_TRAIN 30 MODEL.RPN.BATCH_SIZE_PER_IMAGE 16
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.BACKBONE.FREEZE_AT 0
SOLVER.AMP.ENABLED False SOLVER.IMS_PER_BATCH 4 DATALOADER.NUM_WORKERS 0 SEED 3""".split()
KEYS = dict(zip(KEYS[::2], KEYS[1::2], strict=True)) | {"MODEL.WEIGHTS": ""}
TIMING = {"time", "data_time", "rank_data_time", "eta_seconds"}


def arguments(data: Path, output: Path, *options: str, **keys: object) -> list[str]:
    """Of a small run; dots in keys are written as two underscores."""
    changed = KEYS | {key.replace("__", "."): str(value) for key, value in keys.items()}
    pairs = [word for pair in changed.items() for word in pair]
    where = ["--voc-root", str(data), "--train-set", "train", "--test-set", "test"]
    return ["--config-file", str(CONFIG), *where, "--output-dir", str(output), *options, *pairs]


# Of a process that has imported everything and run nothing: autograd's threads survive no fork.
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["resnet_backbone.cli.train_net"])


def _work(words: list[str], log: Path) -> None:
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    torch.set_num_threads(1)
    # as in a command: loader workers are its own children, which end when it is killed
    torch.multiprocessing.set_start_method("fork", force=True)
    importlib.import_module("resnet_backbone.cli.train_net").main(words)


class Forked:
    """The tool in a forked process, which has imported everything already."""

    def __init__(self, words: list[str], log: Path):
        self.log = log
        self.process = SERVER.Process(target=_work, args=(words, log))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send(self, number: int, group: bool = False) -> None:
        os.kill(-self.pid if group else self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            os.kill(-self.pid, 9)
            raise TimeoutError(self.log.read_text())
        return self.poll()

    def wait_until(self, condition, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition() and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)


def start(words: list[str], **options) -> subprocess.Popen:
    """The tool as a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    prefix = options.pop("prefix", None) or [sys.executable, "-W", "ignore"]
    command = [*prefix, str(TOOL), *words]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, **streams, **options)


def reached(folder: Path) -> int:
    """The iteration of the newest checkpoint; -1 for none."""
    mark = folder / "last_checkpoint"
    name = mark.read_text() if mark.exists() else ""
    return int(name[6:13]) if name[6:13].isdecimal() else 10**7 if name else -1


def rows(folder: Path) -> list[dict]:
    """Of metrics.json, without timings."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def assert_same_tensors(first, second) -> None:
    """Nested containers with equal values, tensors bit for bit."""
    (values, form), (others, other_form) = tree_flatten(first), tree_flatten(second)
    assert form == other_form
    for value, other in zip(values, others, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other)
        else:
            assert value == other or (value != value and other != other)


def assert_same_run(folder: Path, other: Path) -> None:
    for name in ("model_final.pth", "model_best.pth"):
        if (folder / name).exists() or (other / name).exists():
            assert_same_tensors(torch.load(folder / name), torch.load(other / name))
    assert rows(folder) == rows(other)
    first, second = read_results(folder), read_results(other)
    for key in ("results", "best", "iterations", "ended_early"):
        assert first[key] == second[key], key


class Linear(nn.Module):
    """Loss x^T w of a part; what it draws shows how it was seeded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.drawn = []

    def forward(self, part):
        self.drawn.append(torch.rand(1).item())
        if isinstance(part[0], str):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.\nmore")
        return {"loss": (torch.stack(part).mean(0) * self.weight).sum()}


class AnyCheckpointer(Checkpointer):
    """Reads what is no detector, too."""

    load, _load_file = DetectionCheckpointer.load, DetectionCheckpointer._load_file
    _load_model = DetectionCheckpointer._load_model


class OfNumbers:
    """A trainer's model and data."""

    @classmethod
    def build_model(cls, cfg):
        return Linear()

    @classmethod
    def build_train_loader(cls, cfg):
        return itertools.repeat([torch.ones(2), torch.zeros(2)])


class NumberTrainer(OfNumbers, Trainer):
    @classmethod
    def build_checkpointer(cls, cfg, model, **options):
        return AnyCheckpointer(model, cfg.OUTPUT_DIR, **options)


def as_tensor(number: int) -> torch.Tensor:
    return torch.tensor([float(number), float(number**2)])


def number_loader(count: int, seed: int, workers: int = 0) -> TrainingLoader:
    """Of numbers as tensors, two in a batch."""
    images, stream = AugmentedImages(list(range(count)), as_tensor, seed), np.arange(count)
    return TrainingLoader(images, ImageStream(seed, stream), BatchPlan(2), None, workers)
