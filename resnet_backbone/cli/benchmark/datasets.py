"""Random data sets: the start of a training, and evaluation, beside the reference libraries."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from resnet_backbone.cli.benchmark import turns
from resnet_backbone.cli.benchmark.pyramid import config
from resnet_backbone.detection import references
from resnet_backbone.detection.config import CfgNode, with_keys
from resnet_backbone.detection.data.coco import register_coco
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.evaluation.coco import run_hotcoco, run_pycocotools, score_coco
from resnet_backbone.detection.evaluation.voc import VOCEvaluator

WIDTH, HEIGHT = 640, 480  # of the images
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
    references.register_coco_instances(NAME, {}, json_file, images)
    return next(iter(references.build_detection_train_loader(cfg)))


def start_ours(cfg: CfgNode, json_file: str, images: str) -> list[dict]:
    register_coco(NAME, json_file, images)
    return next(iter(Trainer.build_train_loader(cfg)))


# Evaluation


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    coco = coco_runs(random_set(args.coco_images, 80, args.coco_detections))
    result = {"coco": measure_evaluators(coco, args.coco_images, args.repeats)}
    found = random_set(args.voc_images, 20, args.voc_detections)
    with TemporaryDirectory() as folder, voc_runs(Path(folder), found) as runs:
        result["voc"] = measure_evaluators(runs, args.voc_images, args.repeats)
    return result


def measure_evaluators(runs: dict[str, Callable], images: int, repeats: int) -> dict[str, Any]:
    """Measures evaluations in turns, without their output, and compares their numbers."""
    numbers: dict[str, dict[str, float]] = {}

    def run(name: str) -> None:
        logging.disable(logging.INFO)
        with contextlib.redirect_stdout(io.StringIO()):
            numbers[name] = runs[name]()
        logging.disable(logging.NOTSET)

    rows = turns.measure({name: partial(run, name) for name in runs}, images, repeats)
    expected, ours = (numbers[name] for name in runs)
    difference = max(abs(ours[key] - expected[key]) for key in expected)
    print(f"{[*runs][1]}: numbers differ by {difference:.1e} at most")
    return {"rows": rows, "numbers": numbers}


def random_set(images: int, classes: int, count: int) -> list[tuple[np.ndarray, ...]]:
    """Returns (boxes, classes, detected boxes, classes, scores) per image; most near an object."""
    rng, found = np.random.default_rng(0), []
    for _ in range(images):
        real = rng.integers(1, 12)
        corners = rng.integers(1, (WIDTH // 2, HEIGHT // 2), (real, 2))
        sizes = rng.integers(8, (WIDTH // 2, HEIGHT // 2), (real, 2))
        boxes, kinds = np.hstack([corners, sizes]).astype(float), rng.integers(0, classes, real)
        near = rng.integers(0, real, count)
        guesses = boxes[near] * np.exp(rng.normal(0, 0.15, (count, 4)))
        right = rng.random(count) < 0.7
        labels = np.where(right, kinds[near], rng.integers(0, classes, count))
        found.append((boxes, kinds, guesses.round(1), labels, rng.random(count).round(4)))
    return found


def coco_truth(images: list[tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """Returns an instances file's content, given each image's boxes and classes."""
    truth: list[dict[str, Any]] = []
    for image, (boxes, kinds) in enumerate(images, start=1):
        for box, kind in zip(boxes.tolist(), kinds.tolist(), strict=True):
            same = dict(id=len(truth) + 1, image_id=image, category_id=kind + 1, iscrowd=0)
            truth.append(same | dict(bbox=box, area=box[2] * box[3]))
    size, numbers = dict(width=WIDTH, height=HEIGHT), range(1, len(images) + 1)
    return {
        "images": [dict(id=i, file_name=f"{i:012d}.jpg", **size) for i in numbers],
        "categories": [dict(id=c, name=str(c)) for c in range(1, 81)],
        "annotations": truth,
    }


def coco_runs(images: list[tuple[np.ndarray, ...]]) -> dict[str, Callable]:
    dataset = coco_truth([image[:2] for image in images])
    results: list[dict[str, Any]] = []
    for image, (_, _, *found) in enumerate(images, start=1):
        for box, label, score in zip(*(values.tolist() for values in found), strict=True):
            results.append(dict(image_id=image, category_id=label + 1, bbox=box, score=score))

    return {
        "pycocotools": lambda: score_coco(dataset, results, engine=run_pycocotools)[0],
        "ours (hotcoco)": lambda: score_coco(dataset, results, engine=run_hotcoco)[0],
    }


@contextlib.contextmanager
def voc_runs(folder: Path, images: list[tuple[np.ndarray, ...]]) -> Iterator[dict[str, Callable]]:
    """Yields evaluations of a random set in VOC layout, with Detectron2's, the reference, first."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "image.jpg")
    outputs = []
    for number, (boxes, kinds, found, labels, scores) in enumerate(tqdm(images, "VOC files")):
        name = f"{number:06d}"
        (folder / "JPEGImages" / f"{name}.jpg").symlink_to(folder / "image.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(voc_xml(boxes, kinds))
        corners = torch.tensor(np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])).float()
        scores = torch.tensor(scores.round(3), dtype=torch.float32)
        fields = dict(scores=scores, pred_classes=torch.tensor(labels))
        boxes = references.Boxes(corners)
        instances = references.Instances((HEIGHT, WIDTH), pred_boxes=boxes, **fields)
        outputs.append(({"image_id": name}, {"instances": instances}))
    lines = "".join(f"{given['image_id']}\n" for given, _ in outputs)
    (folder / "ImageSets" / "Main" / "test.txt").write_text(lines)

    def run(evaluator) -> dict[str, float]:
        evaluator.reset()
        for given, output in outputs:
            evaluator.process([given], [output])
        found = evaluator.evaluate()["bbox"]
        return {key: found[key] for key in ("AP", "AP50", "AP75")}

    with references.voc_metadata(
        str(folder), "test", [f"class{number}" for number in range(20)]
    ) as name:
        yield {
            "Detectron2's evaluator": lambda: run(references.PascalVOCDetectionEvaluator(name)),
            "ours": lambda: run(VOCEvaluator(name)),
        }


OBJECT = (
    "<object><name>class{}</name><pose>-</pose><truncated>0</truncated><difficult>0</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc_xml(boxes: np.ndarray, kinds: np.ndarray) -> str:
    text = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    for (x, y, width, height), kind in zip(boxes.astype(int), kinds, strict=True):
        text += OBJECT.format(kind, x, y, x + width - 1, y + height - 1)
    return f"<annotation>{text}</annotation>"
