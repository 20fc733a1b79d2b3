"""Sets of random detections, and the evaluators that are compared on them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from tqdm import tqdm

from resnet_backbone.detection.evaluation.coco_ap import evaluate_coco, run_hotcoco, run_pycocotools
from resnet_backbone.detection.evaluation.voc import VOCEvaluator

WIDTH, HEIGHT = 640, 480
COCO_REFERENCE, VOC_REFERENCE = "pycocotools", "Detectron2's evaluator"
Run = Callable[[], dict[str, float]]  # an evaluation, and the numbers that must agree


def random_image(rng: np.random.Generator, classes: int, detections: int) -> tuple[np.ndarray, ...]:
    """Objects of one image, and detections most of which lie near one of them.

    Returns:
        boxes (n, 4) as (x, y, width, height) in whole pixels, their classes; boxes, classes and
        scores of the detections.
    """
    count = rng.integers(1, 12)
    corners = rng.integers(1, (WIDTH // 2, HEIGHT // 2), (count, 2))
    sizes = rng.integers(8, (WIDTH // 2, HEIGHT // 2), (count, 2))
    boxes, kinds = np.hstack([corners, sizes]).astype(float), rng.integers(0, classes, count)
    near = rng.integers(0, count, detections)
    found = boxes[near] * np.exp(rng.normal(0, 0.15, (detections, 4)))
    right = rng.random(detections) < 0.7
    labels = np.where(right, kinds[near], rng.integers(0, classes, detections))
    return boxes, kinds, found.round(1), labels, rng.random(detections).round(4)


def coco_runs(images: int, classes: int, detections: int, seed: int = 0) -> dict[str, Run]:
    """Evaluations of one random set; the first is the reference, pycocotools."""
    rng = np.random.default_rng(seed)
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        boxes, kinds, found, labels, scores = random_image(rng, classes, detections)
        for box, kind in zip(boxes.tolist(), kinds.tolist(), strict=True):
            same = dict(id=len(truth) + 1, image_id=image, category_id=kind + 1, iscrowd=0)
            truth.append(same | dict(bbox=box, area=box[2] * box[3]))
        for box, label, score in zip(found.tolist(), labels.tolist(), scores.tolist(), strict=True):
            results.append(dict(image_id=image, category_id=label + 1, bbox=box, score=score))
    dataset = {
        "images": [dict(id=i, width=WIDTH, height=HEIGHT) for i in range(1, images + 1)],
        "categories": [dict(id=c, name=str(c)) for c in range(1, classes + 1)],
        "annotations": truth,
    }
    engines = {COCO_REFERENCE: run_pycocotools, "ours (hotcoco)": run_hotcoco}

    def run(engine) -> dict[str, float]:
        return evaluate_coco(dataset, results, engine=engine).summary

    return {name: (lambda engine=engine: run(engine)) for name, engine in engines.items()}


@contextlib.contextmanager
def voc_runs(
    folder: Path, images: int, classes: int, detections: int, seed: int = 0
) -> Iterator[dict[str, Run]]:
    """Evaluations of one random set in VOC layout; the first is the reference, Detectron2's.

    Each takes the detections as the model gives them and reads the annotations from their files.
    """
    rng = np.random.default_rng(seed)
    names = [f"class{number}" for number in range(classes)]
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(picture, "JPEG")
    outputs = []
    for number in tqdm(range(images), desc="VOC files", unit="image"):
        boxes, kinds, found, labels, scores = random_image(rng, classes, detections)
        (folder / "JPEGImages" / f"{number:06d}.jpg").write_bytes(picture.getvalue())
        _annotation(boxes, [names[kind] for kind in kinds]).write(
            folder / "Annotations" / f"{number:06d}.xml"
        )
        corners = torch.tensor(np.hstack([found[:, :2], found[:, :2] + found[:, 2:]]))
        instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(corners.float()))
        instances.scores = torch.tensor(scores.round(3), dtype=torch.float32)
        instances.pred_classes = torch.tensor(labels)
        outputs.append(({"image_id": f"{number:06d}"}, {"instances": instances}))
    lines = "".join(f"{number:06d}\n" for number in range(images))
    (folder / "ImageSets" / "Main" / "test.txt").write_text(lines)
    name = f"timing_{folder}"
    facts = dict(dirname=str(folder), split="test", year=2012, thing_classes=names)
    MetadataCatalog.get(name).set(evaluator_type="voc", **facts)

    def run(evaluator: DatasetEvaluator) -> dict[str, float]:
        evaluator.reset()
        for given, output in outputs:
            evaluator.process([given], [output])
        found = evaluator.evaluate()["bbox"]
        return {key: found[key] for key in ("AP", "AP50", "AP75")}

    try:
        yield {
            VOC_REFERENCE: lambda: run(PascalVOCDetectionEvaluator(name)),
            "ours": lambda: run(VOCEvaluator(name)),
        }
    finally:
        MetadataCatalog.pop(name)


def _annotation(boxes: np.ndarray, names: list[str]) -> ElementTree.ElementTree:
    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", WIDTH), ("height", HEIGHT), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for (x, y, width, height), name in zip(boxes, names, strict=True):
        one = ElementTree.SubElement(root, "object")
        for key, value in dict(name=name, pose="-", truncated=0, difficult=0).items():
            ElementTree.SubElement(one, key).text = str(value)
        corners = dict(xmin=x, ymin=y, xmax=x + width - 1, ymax=y + height - 1)
        box = ElementTree.SubElement(one, "bndbox")
        for key, value in corners.items():
            ElementTree.SubElement(box, key).text = str(int(value))
    return ElementTree.ElementTree(root)


def quietly(run: Run) -> dict[str, float]:
    """Without what evaluators print and log."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return run()
    finally:
        logging.disable(logging.NOTSET)
