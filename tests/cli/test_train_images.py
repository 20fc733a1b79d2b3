"""tools/train_classifier.py on image files: loader workers, bad images, means, kill and resume."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from drawn_images import fill
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from resnet_backbone.weights.reading import read_source

from trainings import ROOT, assert_same_weights, kill, reached  # isort: skip
from trainings import refused, start, succeed  # isort: skip

SMALL = (
    *("model=resnet18", "data.crop=32", "data.short_side=[36,60]", "data.mean_samples=20"),
    *("evaluation.short_side=36", "evaluation.crop=32", "evaluation.batch_size=8"),
    *("schedule.iterations=12", "schedule.lr=0.01", "evaluation.every=5", "train.batch_size=8"),
    *("train.micro_batch=4", "train.recompute_bn=false", "output.log_every=2"),
    *("output.checkpoint_every=2", "output.tensorboard=false", "loss.mixup=0.2"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes of seven images of 52x44 pixels; one file is no image at all."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 7), ("val", 3)):
        fill(root / split, ("n01", "n02", "n03"), count)
    (root / "train" / "n02" / "3.JPEG").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory, images) -> Path:
    path = tmp_path_factory.mktemp("config") / "images.yaml"
    path.write_text(f"data: {{root: {images}, mean: pixel, workers: 0}}\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    succeed("--config-file", config, *SMALL, "--output-dir", folder)
    return folder


def test_killed_with_workers_it_ends_as_without_any(config, uninterrupted, tmp_path):
    """kill -9 of the whole process group, with two workers; then on with one."""
    folder = tmp_path / "killed"
    wanted = random.SystemRandom().choice([1, 3, 5, 7])
    arguments = ("--config-file", config, *SMALL, "--output-dir", folder, "data.workers=2")
    kill(start(*arguments, until=lambda: reached(folder) >= wanted))
    succeed("--output-dir", folder, "--resume", "data.workers=1")
    assert_same_weights(*(path / "final.safetensors" for path in (folder, uninterrupted)))


def test_a_killed_worker_costs_no_iteration(config, tmp_path):
    """As the kernel does where memory runs out."""
    folder = tmp_path / "run"
    words = ("--config-file", config, *SMALL, "--output-dir", folder, "data.workers=1")
    words += ("schedule.iterations=9999", "output.checkpoint_every=9999", "evaluation.every=9999")
    process = start(*words, until=(folder / "metrics.jsonl").exists)
    try:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
    finally:
        kill(process)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "a worker of the loader was killed" in output.splitlines()[-1] and reached(folder)


def test_bad_images_are_reported_and_limited(config, uninterrupted, tmp_path):
    lines = (uninterrupted / "bad_images.txt").read_text().splitlines()
    assert len(lines) == 1 and "n02/3.JPEG" in lines[0]
    folder = ("--output-dir", tmp_path / "x")
    error = refused("--config-file", config, *SMALL, *folder, "data.max_bad_images=0")
    assert "data.max_bad_images" in error and "n02/3.JPEG" in error
    assert json.loads((uninterrupted / "results.json").read_text())["bad_images"] == 1
    assert "1 images were replaced by others: see" in (uninterrupted / "log.txt").read_text()


def test_bad_images_of_the_validation_set_are_named(config, images, tmp_path):
    val = tmp_path / "val"
    shutil.copytree(images / "val", val)
    (val / "n02" / "0.JPEG").write_bytes(b"no image")
    words = ("--config-file", config, *SMALL, f"data.val_root={val}", "schedule.iterations=2")
    error = refused(*words, "--output-dir", tmp_path / "x")
    assert "n02/0.JPEG" in error and "evaluation.max_bad_images=N" in error
    succeed(*words, "--output-dir", tmp_path / "run", "evaluation.max_bad_images=1")
    assert "counts as wrong: " in (tmp_path / "run" / "log.txt").read_text()


def test_the_written_interpolation_is_that_of_the_evaluation(config, uninterrupted, tmp_path):
    """Not that of the weights that a training starts from."""
    with safe_open(uninterrupted / "final.safetensors", "pt") as file:
        facts = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    key = "resnet_backbone.preprocessing"
    assert '"interpolation": "bilinear"' in facts[key]
    facts[key] = facts[key].replace('"bilinear"', '"bicubic"')
    save_file(tensors, tmp_path / "bicubic.safetensors", facts)
    words = (*SMALL, "schedule.iterations=1", f"model.weights={tmp_path / 'bicubic.safetensors'}")
    succeed("--config-file", config, *words, "--output-dir", tmp_path / "run")
    found = read_source(tmp_path / "run" / "final.safetensors").preprocessing
    assert found.interpolation == "bilinear"


def test_data_that_fail_on_one_of_two_processes_end_both(config, tmp_path):
    """The bad image is in one process's half of a batch; both write the checkpoint."""
    words = (*SMALL, "data.max_bad_images=0", "data.mean=imagenet", "train.device=cpu")
    folder = ("--output-dir", tmp_path, "--num-processes", 2)
    error = refused("--config-file", config, *words, *folder, "output.checkpoint_every=100")
    assert "n02/3.JPEG" in error and list((tmp_path / "checkpoints").iterdir())


def test_the_mean_is_the_training_sets(images, uninterrupted):
    """Against Pillow and NumPy: center crops of the 20 readable training images."""
    paths = set((images / "train").glob("*/*")) - {images / "train/n02/3.JPEG"}
    resized = [Image.open(path).resize((42, 36), Image.BILINEAR) for path in paths]
    crops = [np.asarray(image, np.float64)[2:34, 5:37] for image in resized]
    expected = np.mean(crops, axis=0).transpose(2, 0, 1)
    found = read_source(uninterrupted / "final.safetensors").preprocessing
    assert found.channel_order == "RGB" and found.value_range == 255 and found.std == (1, 1, 1)
    # mean_samples=20 leaves one of the 21 files out, which may be a readable one
    assert np.abs(found.mean_image.numpy() - expected).mean() < 6
    np.testing.assert_allclose(found.mean, found.mean_image.mean((1, 2)), atol=1e-3)
    assert np.abs(np.array(found.mean) - expected.mean((1, 2))).max() < 3


def test_another_set_of_classes_is_refused(images, config, tmp_path):
    other = fill(tmp_path / "val", ("n01", "n02", "n09"), 1)
    folder = ("--output-dir", tmp_path / "x")
    assert "n09" in refused("--config-file", config, *SMALL, *folder, f"data.val_root={other}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/googlenet", "timm/resnet10t", "resnet18"])
def test_other_networks_and_the_modern_overlay(config, tmp_path, name):
    modern = ROOT / "configs/classification/imagenet/modern.yaml"
    succeed(
        *("--config-file", config, modern, *SMALL, "--output-dir", tmp_path / "run"),
        *(f"model={name}", "schedule.warmup_iterations=2", "schedule.iterations=4"),
        *("data.crop=64", "data.short_side=[72,80]", "train.recompute_bn=true"),
        *("evaluation.short_side=72", "evaluation.crop=64"),
    )
    found = read_source(tmp_path / "run" / "final.safetensors").preprocessing
    assert found.mean_image is None and min(found.std) > 20
