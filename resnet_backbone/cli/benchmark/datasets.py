"""The start of a training by the size of its COCO data set, beside Detectron2's."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from tqdm import tqdm

from resnet_backbone.cli.benchmark import turns
from resnet_backbone.cli.benchmark.detectors import HEIGHT, WIDTH, coco_truth, random_set
from resnet_backbone.cli.benchmark.pyramid import config
from resnet_backbone.detection.config import CfgNode, with_keys
from resnet_backbone.detection.data.coco import register_coco, register_coco_instances
from resnet_backbone.detection.data.sampling import build_detection_train_loader
from resnet_backbone.detection.engine.trainer import Trainer

NAME = "benchmark"
STARTS = ("Detectron2", "ours, first start", "ours, later start")


def run_data(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for count in args.set_images:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
        with TemporaryDirectory() as folder:
            write_set(Path(folder), count)
            for _ in tqdm(range(args.repeats), desc="measuring", unit="turn"):
                shutil.rmtree(Path(folder, "cache"), ignore_errors=True)
                for name, values in found.items():
                    values.append(turns.in_own_process(starts, folder, "start", name))
        print(f"{count} images:\n{'':20}{'seconds':>9}  {'range':17}{'MB more':>9}")
        rows = []
        for name, values in found.items():
            seconds = turns.spread([one["seconds"] for one in values])
            memory = turns.spread([one["peak"] - one["before"] for one in values])
            ends = f"{seconds['low']:.2f} ... {seconds['high']:.2f}"
            print(f"{name:20}{seconds['median']:9.2f}  {ends:17}{memory['median']:9.0f}")
            rows.append({"name": name, "seconds": seconds, "memory_mb": memory})
        result[f"images_{count}"] = {"rows": rows}
    return result


def write_set(folder: Path, count: int) -> None:
    """Writes a random instances file; all its images are links to one JPEG file."""
    content = coco_truth([image[:2] for image in random_set(count, 80, 1)])
    (folder / "instances.json").write_text(json.dumps(content))
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "image.jpg")
    (folder / "images").mkdir()
    for image in content["images"]:
        (folder / "images" / image["file_name"]).symlink_to(folder / "image.jpg")


def starts(folder: str, kind: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Returns functions by name that prepare a start: from the files to the first batch."""
    os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
    small = "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0
    cfg = with_keys(config("fpn"), "DATASETS.TRAIN", (NAME,), *small)
    files = str(Path(folder, "instances.json")), str(Path(folder, "images"))
    theirs, *ours = STARTS
    found = {theirs: lambda: partial(start_theirs, cfg, *files)}
    return found | {name: lambda: partial(start_ours, cfg, *files) for name in ours}


def start_theirs(cfg: CfgNode, json_file: str, images: str) -> list[dict]:
    register_coco_instances(NAME, {}, json_file, images)
    return next(iter(build_detection_train_loader(cfg)))


def start_ours(cfg: CfgNode, json_file: str, images: str) -> list[dict]:
    register_coco(NAME, json_file, images)
    return next(iter(Trainer.build_train_loader(cfg)))
