"""What the tests of several commands share."""

import argparse
import hashlib

import pytest

from resnet_backbone.cli import prepare_data
from resnet_backbone.cli.reproduce import PLANS, build_steps, parse_arguments, read_plan


@pytest.fixture
def run(run_command):
    """Function (arguments of prepare-data) -> (exit status, what it printed, its errors)."""
    return lambda *arguments: run_command(prepare_data.main, *arguments, "--workers", 1)


@pytest.fixture
def declare(monkeypatch):
    """Function (path) that makes a file the official archive of its name, and returns its path."""
    from resnet_backbone.detection.data import archives

    monkeypatch.setattr(archives, "ARCHIVES", {})

    def declare(path):
        content = path.read_bytes()
        archives.ARCHIVES[path.name] = len(content), hashlib.sha256(content).hexdigest()
        return path

    return declare


@pytest.fixture
def steps_of(tmp_path, monkeypatch):
    """Function (scale or file, words of the command line) -> steps by name; all data are there."""
    for name in ("imagenet", "datasets/VOC2007/ImageSets", "datasets/VOC2012", "datasets/coco"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))

    def steps(scale="mini", *words, **changes):
        file = PLANS / f"{scale}.yaml" if isinstance(scale, str) else scale
        given = ["--scale", str(file), "--output", str(tmp_path / "out"), *map(str, words)]
        args = parse_arguments(["--imagenet", str(tmp_path / "imagenet"), *given])
        args = argparse.Namespace(**{**vars(args), **changes})
        return {step.name: step for step in build_steps(read_plan(file, args.seeds), args)[0]}

    return steps
