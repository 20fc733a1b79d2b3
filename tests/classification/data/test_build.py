"""The input that is computed from a training set: of that set alone, by all processes together."""

import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from resnet_backbone.classification.config import load_config
from resnet_backbone.classification.data import build
from resnet_backbone.classification.data.build import build_data
from resnet_backbone.classification.data.statistics import INPUT_FILE
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.processes import World

OPTIONS = ["data.crop=16", "data.short_side=[18,20]", "data.mean=pixel", "data.workers=0"]
OPTIONS += ["train.batch_size=4", "evaluation.crop=16", "evaluation.short_side=18"]


@pytest.fixture
def make_set(tmp_path):
    """Function: name, brightness -> a data set of two classes with four images each."""

    def make(name, bright):
        rng = np.random.default_rng(bright)
        for split in ("train", "val"):
            for label in ("a", "b"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for number in range(4):
                    pixels = rng.integers(bright, bright + 60, (24, 30, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return tmp_path / name

    return make


def mean_of(root, run, world=None):
    run.mkdir(exist_ok=True)
    found = build_data(load_config([], [f"data.root={root}", *OPTIONS]), run, world)
    return found.preprocessing


def test_the_mean_is_kept_with_the_run(make_set, tmp_path, monkeypatch):
    root, run = make_set("set", 20), tmp_path / "run"
    first = mean_of(root, run)
    assert (run / INPUT_FILE).is_file() and [p.name for p in run.iterdir()] == [INPUT_FILE]
    monkeypatch.setattr(build, "compute_mean", None)  # not called again
    again = mean_of(root, run)
    assert torch.equal(again.mean_image, first.mean_image) and again.to_json() == first.to_json()


def test_the_kept_mean_is_not_of_another_data_set(make_set, tmp_path):
    """Of the same size, in the folder of a run that died before its first checkpoint."""
    dark, light, run = make_set("dark", 20), make_set("light", 180), tmp_path / "run"
    mean_of(dark, run)
    found = mean_of(light, run)
    assert torch.equal(found.mean_image, mean_of(light, tmp_path / "fresh").mean_image)
    assert found.mean_image.min() > 180


def test_a_damaged_mean_is_named(make_set, tmp_path):
    root, run = make_set("set", 20), tmp_path / "run"
    mean_of(root, run)
    (run / INPUT_FILE).write_bytes(b"nothing")
    with pytest.raises(DataError, match=f"{INPUT_FILE} cannot be read .*; remove it"):
        mean_of(root, run)


def _process(rank, size, root, run, rendezvous, queue):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    control = dist.new_group(backend="gloo")
    found = mean_of(root, run, World(rank, size, torch.device("cpu"), control))
    queue.put((found.to_json(), found.mean_image.numpy().tobytes()))
    dist.destroy_process_group()


def test_processes_share_the_work_and_get_the_mean_of_one(make_set, tmp_path):
    root, context = make_set("set", 20), multiprocessing.get_context("fork")
    queue, arguments = context.Queue(), (root, tmp_path / "run", tmp_path / "rendezvous")
    (tmp_path / "run").mkdir()
    children = [
        context.Process(target=_process, args=(rank, 2, *arguments, queue)) for rank in (0, 1)
    ]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    alone = mean_of(root, tmp_path / "alone")
    assert found == [(alone.to_json(), alone.mean_image.numpy().tobytes())] * 2
