"""Run folders of the classification trainer, as small as they can be."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest

from resnet_backbone.config import load_config, to_yaml

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tool():
    """The module tools/report.py."""
    spec = importlib.util.spec_from_file_location("report_tool", PROJECT / "tools" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def config_text(config: str, overrides: tuple[str, ...]) -> str:
    file = PROJECT / "configs" / "classification" / f"{config}.yaml"
    return to_yaml(load_config([file], ["data.root=x", *overrides]))


@pytest.fixture
def make_run(tmp_path):
    """Function that writes a run folder of a config and returns its path."""

    def make(name, config="cifar10/resnet20", overrides=(), results=None, metrics=(), tail=""):
        folder = tmp_path / name
        folder.mkdir()
        if config:
            (folder / "config.yaml").write_text(config_text(config, tuple(overrides)))
        if metrics or tail:
            text = "".join(json.dumps(row) + "\n" for row in metrics)
            (folder / "metrics.jsonl").write_text(text + tail)
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make
