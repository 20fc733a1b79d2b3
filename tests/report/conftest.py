"""Run folders of the trainers, as small as they can be."""

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import yaml

from resnet_backbone.classification.config import load_config, to_yaml

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tool():
    """The module tools/report.py."""
    module = importlib.import_module("resnet_backbone.cli.report")
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


DETECTOR = {
    "SEED": 1,
    "OUTPUT_DIR": "out",
    "DATASETS": {"TRAIN": ["train:train"], "TEST": ["test:test"]},
    "INPUT": {"FORMAT": "BGR", "MIN_SIZE_TEST": 320, "MIN_SIZE_TRAIN": [320]},
    "MODEL": {
        "DEVICE": "cpu",
        "WEIGHTS": "/data/weights.pth",
        "BACKBONE": {"NAME": "build_paper_resnet_fpn_backbone", "FREEZE_AT": 2},
        "FPN": {"IN_FEATURES": ["res2", "res3"], "NORM": "GN"},
        "RESNETS": {"DEPTH": 50},
        "ROI_HEADS": {"IN_FEATURES": ["p2", "p3"]},
    },
    "RESNET_BACKBONE": {"SHORTCUT": "B", "VGG": {"DEPTH": 16}},
    "SOLVER": {"IMS_PER_BATCH": 2, "BASE_LR": 0.005},
}
VGG = {
    "MODEL.BACKBONE.NAME": "build_vgg_fpn_backbone",
    "MODEL.WEIGHTS": "/data/vgg.pth",
    "MODEL.FPN.IN_FEATURES": ["conv3", "conv4"],
}


@pytest.fixture
def make_detector(tmp_path):
    """Function that writes a run folder of tools/train_net.py and returns its path.

    Args: its name, the seed, AP50 per class, whether it is a VGG, config keys, results' keys,
    content of voc_results.json.
    """

    def make(name, seed, classes, vgg=False, config=(), results=(), details=None):
        content = copy.deepcopy(DETECTOR)
        for key, value in {"SEED": seed, **(VGG if vgg else {}), **dict(config)}.items():
            *path, last = key.split(".")
            node = content
            for part in path:
                node = node[part]
            node[last] = value
        mean = sum(classes.values()) / len(classes)
        bbox = {"AP": mean / 2, "AP50": mean, "AP75": mean / 4, "AP50-11pt": mean + 1}
        bbox |= {f"AP50-{key}": value for key, value in classes.items()}
        outcome = {
            "command": f"python /home/me/tools/train_net.py --voc-root /home/me/VOC SEED {seed}",
            "test": content["DATASETS"]["TEST"],
            "weights": content["MODEL"]["WEIGHTS"],
            "iterations": 600,
            "images_per_batch": 2,
            "seed": seed,
            "results": {"bbox": bbox},
            **dict(results),
        }
        folder = tmp_path / name
        inference = folder / "inference" / "test:test"
        inference.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        (folder / "results.json").write_text(json.dumps(outcome))
        if details is not None:
            (inference / "voc_results.json").write_text(json.dumps(details))
        return folder

    return make
