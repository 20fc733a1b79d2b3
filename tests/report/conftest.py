"""Run folders of the trainers, as small as they can be, and made-up detectors on a VOC folder."""

import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from drawn_images import coco_json
from PIL import Image

from resnet_backbone.classification.config import load_config, to_yaml
from resnet_backbone.cli import report

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(run_command):
    return partial(run_command, report.main)


@pytest.fixture
def refused(refusal):
    return partial(refusal, report.main)


@pytest.fixture
def cells():
    """Function: the cells of a Markdown text's tables, line by line."""

    def split(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return split


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


DETECTOR = """
SEED: 1
OUTPUT_DIR: out
DATASETS: {TRAIN: ["train:train"], TEST: ["test:test"]}
INPUT: {FORMAT: BGR, MIN_SIZE_TEST: 320, MIN_SIZE_TRAIN: [320]}
MODEL:
  DEVICE: cpu
  WEIGHTS: /data/weights.pth
  BACKBONE: {NAME: build_paper_resnet_fpn_backbone, FREEZE_AT: 2}
  FPN: {IN_FEATURES: [res2, res3], NORM: GN}
  RESNETS: {DEPTH: 50}
  ROI_HEADS: {IN_FEATURES: [p2, p3]}
RESNET_BACKBONE: {SHORTCUT: B, VGG: {DEPTH: 16}}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.005}
"""
VGG = {"MODEL.BACKBONE.NAME": "build_vgg_fpn_backbone", "MODEL.WEIGHTS": "/data/vgg.pth"}
VGG["MODEL.FPN.IN_FEATURES"] = ["conv3", "conv4"]


@pytest.fixture
def make_detector(tmp_path):
    """Function that writes a run folder of tools/train_net.py and returns its path.

    Args: its name, the seed, AP50 per class, whether it is a VGG, config keys, results' keys,
    content of voc_results.json, images of data sets for the log.
    """

    def make(name, seed, classes=(), vgg=False, config=(), results=(), details=None, log=()):
        content = yaml.safe_load(DETECTOR)
        for key, value in {"SEED": seed, **(VGG if vgg else {}), **dict(config)}.items():
            *path, last = key.split(".")
            node = content
            for part in path:
                node = node[part]
            node[last] = value
        classes = dict(classes)
        mean = sum(classes.values()) / max(1, len(classes))
        bbox = {"AP": mean / 2, "AP50": mean, "AP75": mean / 4, "AP50-11pt": mean + 1}
        bbox |= {f"AP50-{key}": value for key, value in classes.items()}
        outcome = {"seed": seed, "iterations": 600, "images_per_batch": 2}
        outcome |= {"test": content["DATASETS"]["TEST"], "weights": content["MODEL"]["WEIGHTS"]}
        command = f"python /home/me/tools/train_net.py --voc-root /home/me/VOC SEED {seed}"
        outcome |= {"command": command, "results": {"bbox": bbox}, **dict(results)}
        folder = tmp_path / name
        inference = folder / "inference" / "test:test"
        inference.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        (folder / "results.json").write_text(json.dumps(outcome))
        lines = [f"data set {data}: {count} images, 9 boxes\n" for data, count in dict(log).items()]
        (folder / "log.txt").write_text("".join(lines))
        if details is not None:
            (inference / "voc_results.json").write_text(json.dumps(details))
        return folder

    return make


CLASSES = ["cat", "cow", "dog"]
SIZE = 200, 150


@pytest.fixture
def voc(make_voc):
    """A VOC folder: 12 pictures with four objects each, some of them difficult."""
    rng = np.random.default_rng(0)
    images = {}
    for number in range(12):
        corners = np.array([[5, 5], [105, 5], [5, 80], [105, 80]]) + rng.integers(0, 10, (4, 2))
        far = corners + rng.integers(30, 60, (4, 2))
        boxes = [tuple(map(int, (*a, *b))) for a, b in zip(corners, far, strict=True)]
        kinds = rng.choice(CLASSES, 4)
        images[f"{number:06d}"] = [
            (str(kind), box, int(rng.random() < 0.15))
            for kind, box in zip(kinds, boxes, strict=True)
        ]
    root = make_voc(images, "VOC2007", "test", size=SIZE)
    for image_id in images:
        pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{image_id}.jpg")
    return root


@pytest.fixture
def make_voc_run(voc, make_detector, detectron2):
    """Function (network, seed, chance to find an object) -> run folder as train_net leaves it."""
    from resnet_backbone.detection.data.voc import scan_voc
    from resnet_backbone.detection.evaluation.voc import TO_VOC, summarize
    from resnet_backbone.detection.evaluation.voc_ap import count_errors, read_boxes, score_boxes

    def make(network, seed, chance=0.6, **results):
        rng = np.random.default_rng([seed, len(network), ord(network[0])])
        records, _ = scan_voc(str(voc), "test", CLASSES, decode=False)
        truth, rows, predictions = [], [], []
        for record in records:
            boxes = np.array([a["bbox"] for a in record["annotations"]], dtype=float)
            kinds = [a["category_id"] for a in record["annotations"]]
            difficult = [a["difficult"] for a in record["annotations"]]
            same = {"image_id": record["image_id"]}
            objects = {"boxes": boxes + TO_VOC, "classes": kinds, "difficult": difficult}
            truth.append(same | objects)
            found = [
                (box + rng.normal(0, 3, 4), kind if rng.random() < 0.9 else int(rng.integers(3)))
                for box, kind in zip(boxes, kinds, strict=True)
                if rng.random() < chance
            ]
            found += [(np.array([60.0, 60, 90, 90]) + rng.normal(0, 9), int(rng.integers(3)))]
            scores = rng.random(len(found)).round(6)
            corners = np.array([box for box, _ in found])
            labels = [kind for _, kind in found]
            detections = {"boxes": corners + TO_VOC, "scores": scores, "classes": labels}
            predictions.append(same | detections)
            for box, kind, score in zip(corners, labels, scores, strict=True):
                bbox = [*box[:2].round(3).tolist(), *(box[2:] - box[:2]).round(3).tolist()]
                rows.append({**same, "category_id": kind, "bbox": bbox, "score": float(score)})
        tables = read_boxes(predictions, truth, CLASSES)
        details = summarize("test:test", score_boxes(*tables, CLASSES))
        details["errors"] = count_errors(*tables, CLASSES)
        bbox = details["summary"] | {f"AP50-{c['class']}": c["AP50"] for c in details["classes"]}
        command = f"python tools/train_net.py --voc-root {voc} --test-set test SEED {seed}"
        options = dict(config={"RESNET_BACKBONE.CLASS_NAMES": CLASSES}, details=details)
        options |= dict(results={"command": command, "results": {"bbox": bbox}, **results})
        folder = make_detector(f"{network}_s{seed}", seed, vgg=network == "vgg", **options)
        metrics = [{"iteration": i, "total_loss": 2.0 - i / 20} for i in range(20)]
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        (folder / "inference" / "test:test" / "detections.json").write_text(json.dumps(rows))
        return folder

    return make


@pytest.fixture
def make_coco_run(voc, make_voc_run):
    """As `make_voc_run`, with the same boxes in COCO's format; crowds are the difficult ones."""
    from resnet_backbone.detection.data.voc import scan_voc
    from resnet_backbone.detection.evaluation.coco import score_coco

    records, _ = scan_voc(str(voc), "test", CLASSES, decode=False)
    images, boxes = {}, []
    for r in records:
        number = int(r["image_id"]) + 1
        images[number] = (Path(r["file_name"]).name, *SIZE)
        for a in r["annotations"]:
            x0, y0, x1, y1 = a["bbox"]
            more = {"iscrowd": a["difficult"], "area": (x1 - x0) * (y1 - y0)}
            boxes.append((number, 5 + 2 * a["category_id"], (x0, y0, x1 - x0, y1 - y0), more))
    categories = {5 + 2 * number: name for number, name in enumerate(CLASSES)}
    file = voc.parent / "val.json"
    dataset = coco_json(categories, images, boxes)
    file.write_text(json.dumps(dataset))

    def make(network, seed, chance=0.6):
        folder = make_voc_run(network, seed, chance)
        (folder / "inference/test:test").rename(folder / "inference/test:coco")
        for path in (folder / "inference/test:coco").iterdir():
            found = json.loads(path.read_text())
            path.unlink()
            if path.name == "detections.json":
                rows = [{**row, "image_id": int(row["image_id"]) + 1} for row in found]
                for row in rows:
                    row["category_id"] = 5 + 2 * row["category_id"]
                path.with_name("coco_instances_results.json").write_text(json.dumps(rows))
        numbers, classes = score_coco(dataset, rows)
        bbox = {key: 100 * value for key, value in numbers.items()}
        bbox |= {f"AP-{CLASSES[(key - 5) // 2]}": 100 * value for key, value in classes.items()}
        results = json.loads((folder / "results.json").read_text())
        results |= {"test": ["test:coco"], "results": {"bbox": bbox}}
        data = f"--coco-json train.json {file} --image-root {voc / 'JPEGImages'} SEED {seed}"
        results["command"] = f"resnet-backbone train-net {data}"
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


@pytest.fixture
def metrics_file(tmp_path):

    def write(*entries, name="run", tail=""):
        path = tmp_path / name / "metrics.json"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(e) + "\n" for e in entries) + tail)
        return path

    return write
