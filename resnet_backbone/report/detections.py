"""What runs detected beside what was there: curves, and intervals over test images.

This module, :mod:`.pictures` and :mod:`.document` are the only ones here that need Detectron2.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from resnet_backbone.detection.config import backbone_node, load_config
from resnet_backbone.detection.data.voc import scan_voc
from resnet_backbone.detection.evaluation.voc import TO_VOC
from resnet_backbone.detection.evaluation.voc_ap import (
    COCO_IOU_THRESHOLDS,
    CURVE_IOU,
    read_boxes,
    score_boxes,
)
from resnet_backbone.report.gain import DetectorGroup
from resnet_backbone.report.runs import ELEVEN_POINT, DetectorRun, flatten

DETECTIONS = "detections.json"
TOLERANCE = 0.1  # points of AP50; the file's rounded scores and boxes move less
REGISTERED = re.compile(r"voc_(2007|2012)_(\w+)")  # Detectron2's names
RECALL_LEVELS = 101
DRAWS, DRAWS_SEED = 1000, 0  # resampled test sets
DRAWS_AT_ONCE = 250  # limits memory

Table = dict[str, np.ndarray]


class NoDetections(ValueError):
    """Files that curves, intervals and pictures need are missing; the message says which."""


def with_defaults(runs: Iterable[DetectorRun]) -> list[DetectorRun]:
    """Runs with the default of each key of ours that their version did not have yet."""
    node = backbone_node(load_config("", []))
    defaults = dict(flatten(yaml.safe_load(node.dump()), "RESNET_BACKBONE."))
    return [replace(run, config={**defaults, **run.config}) for run in runs]


class Truth(NamedTuple):
    """A test set.

    Of each image: image_id, file_name, boxes (N, 4) as VOC's 1-based inclusive pixels, classes
    (N,), difficult (N,).
    """

    classes: list[str]  # in the order of the category ids
    images: list[dict[str, Any]]


def load_truth(run: DetectorRun, voc_root: str | None = None) -> Truth:
    """The annotations that a run was evaluated on, in VOC layout.

    They are below `voc_root`, by default the folder in the run's command, or Detectron2's own.
    """
    if len(run.test) != 1 or run.class_metric != "AP50":
        raise NoDetections("they need runs on a single test set in VOC layout")
    root, split = _locate(run, voc_root)
    classes = list(run.config.get("RESNET_BACKBONE.CLASS_NAMES") or run.classes)
    records, report = scan_voc(root, split, classes, decode=False, progress=True)
    if not report.annotated:
        raise NoDetections(f"the split {split} has no annotations")
    images = []
    for record in records:
        found = record["annotations"]
        image = {key: record[key] for key in ("image_id", "file_name")}
        image["boxes"] = np.array([a["bbox"] for a in found]).reshape(-1, 4) + TO_VOC
        image["classes"] = np.array([a["category_id"] for a in found], dtype=int)
        image["difficult"] = np.array([a["difficult"] for a in found], dtype=bool)
        images.append(image)
    return Truth(classes, images)


def _locate(run: DetectorRun, voc_root: str | None) -> tuple[str, str]:
    """Folder and split of the run's test set."""
    name = run.test[0]
    if registered := REGISTERED.fullmatch(name):
        default = os.environ.get("DETECTRON2_DATASETS", "datasets")
        root, split = os.path.join(default, f"VOC{registered[1]}"), registered[2]
    else:
        words = [*shlex.split(run.results.get("command") or ""), "--voc-root", ""]
        root, split = words[words.index("--voc-root") + 1], name.partition(":")[2]
    root = voc_root or root
    if not split or not os.path.isdir(root):
        if voc_root:
            raise NoDetections(f"there is no folder {voc_root}")
        raise NoDetections(f"the images of {name} are not here; give their folder with --voc-root")
    return root, split


class RunDetections(NamedTuple):
    """A run's detections, matched with the ground truth."""

    run: DetectorRun
    truth: Table  # of read_boxes; the same for all runs
    found: Table
    numbers: Mapping[str, Any]  # of score_boxes at IoU .5


def load_detections(run: DetectorRun, truth: Truth) -> RunDetections:
    """Read a run's detections.json and match it with the annotations."""
    path = run.inference / DETECTIONS
    if not path.is_file():
        raise NoDetections(f"{run.folder.name} has no {DETECTIONS}; evaluate it again")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        predictions = _by_image(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from the run") from error
    tables = read_boxes(predictions, truth.images, truth.classes)
    numbers = score_boxes(*tables, truth.classes, (CURVE_IOU,))
    ap50, stated = 100 * np.nanmean(numbers["ap_area"]), run.numbers.get("AP50")
    if stated is not None and abs(ap50 - stated) > TOLERANCE:
        raise ValueError(
            f"{path} gives AP50 {ap50:.2f} with these annotations, the run's results.json has "
            f"{stated:.2f}: give the --voc-root that the run was evaluated on"
        )
    return RunDetections(run, *tables, numbers)


def _by_image(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """COCO-style rows as the evaluator's predictions, in VOC's pixels."""
    images: dict[str, list] = {}
    for row in rows:
        x, y, width, height = row["bbox"]
        values = (x, y, x + width, y + height, row["score"], row["category_id"])
        images.setdefault(str(row["image_id"]), []).append(values)
    predictions = []
    for image_id, values in images.items():
        table = np.array(values, dtype=float)
        columns = {"boxes": table[:, :4] + TO_VOC, "scores": table[:, 4], "classes": table[:, 5]}
        predictions.append({"image_id": image_id, **columns})
    return predictions


def interpolated_precision(numbers: Mapping[str, Any], levels: int = RECALL_LEVELS) -> np.ndarray:
    """The best precision at each of R levels of recall from 0 to 1 or above it, as VOC's AP has it.

    Returns:
        (classes, R), 0..1: 0 beyond the highest recall, nan for a class without ground truth.
    """
    grid = np.linspace(0.0, 1.0, levels)
    rows = []
    for recall, precision, objects in zip(
        numbers["recall"], numbers["precision"], numbers["num_ground_truth"], strict=True
    ):
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        row = best[np.searchsorted(recall, grid, side="left")]
        rows.append(row if objects else np.full(levels, np.nan))
    return np.array(rows)


def load_all(
    groups: Sequence[DetectorGroup], voc_root: str | None = None
) -> tuple[Truth, list[list[RunDetections]]]:
    """The test set of some groups, and for each group its runs' detections."""
    truth = load_truth(groups[0].first, voc_root)
    bar = tqdm(groups, desc="detections", unit="detector")
    return truth, [[load_detections(run, truth) for run in group.runs] for group in bar]


def draw_images(images: int, draws: int = DRAWS) -> np.ndarray:
    """Test sets of as many images, drawn with replacement: (draws, images) times of each image."""
    rng = np.random.default_rng(DRAWS_SEED)
    chosen = (rng.integers(0, images, images) for _ in range(draws))
    return np.array([np.bincount(one, minlength=images) for one in chosen])


def resample(run: RunDetections, counts: np.ndarray) -> dict[str, np.ndarray]:
    """A run's metrics on resampled test sets: AP, AP50, AP75 and AP50-11pt.

    Boxes were matched within their images once. An image that was drawn k times counts k times,
    as if its k copies were different images.

    Args:
        counts: (R, images), of :func:`draw_images`.

    Returns:
        Metric -> (R,), in percent, mean over the classes with objects.
    """
    at50, at75 = (COCO_IOU_THRESHOLDS.index(iou) for iou in (0.5, 0.75))
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(counts), DRAWS_AT_ONCE):
        part = counts[start : start + DRAWS_AT_ONCE]
        by_class = [_resample_class(run, c, part) for c in range(len(run.numbers["recall"]))]
        area, eleven = map(np.array, zip(*by_class, strict=True))  # (C, T, R), (C, R)
        columns = {"AP": area.mean(axis=1), "AP50": area[:, at50], "AP75": area[:, at75]}
        for key, values in (columns | {ELEVEN_POINT: eleven}).items():
            parts.setdefault(key, []).append(100 * np.nanmean(values, axis=0))
    return {key: np.concatenate(values) for key, values in parts.items()}


def _resample_class(
    run: RunDetections, class_id: int, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Area under the envelope (T, R) and 11-point AP (R,) of a class; nan without objects."""
    truth, found = run.truth, run.found
    weights = counts.T.astype(np.float64)  # (images, R)
    mine = (truth["classes"] == class_id) & ~truth["difficult"]
    objects = weights[truth["image"][mine]].sum(axis=0)
    rows = np.flatnonzero(found["classes"] == class_id)
    rows = rows[np.argsort(-found["scores"][rows], kind="stable")]
    iou, match, hard = (found[key][rows] for key in ("iou", "match", "difficult"))
    of_image = weights[found["image"][rows]]
    so_far = of_image.cumsum(axis=0)  # detections, (rows, R)
    area, eleven = [], None
    for threshold in COCO_IOU_THRESHOLDS:
        over = iou > threshold
        counted, ignored = np.flatnonzero(over & ~hard), np.flatnonzero(over & hard)
        right = np.sort(counted[np.unique(match[counted], return_index=True)[1]])
        skipped = np.pad(of_image[ignored].cumsum(axis=0), ((1, 0), (0, 0)))
        total = so_far[right] - skipped[np.searchsorted(ignored, right)]
        reached = of_image[right].cumsum(axis=0)
        precision = reached / np.maximum(total, np.finfo(np.float64).eps)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (of_image[right] * envelope).sum(axis=0) / objects
            area.append(np.where(objects > 0, mean, np.nan))
            if threshold == CURVE_IOU:
                eleven = _eleven_points(reached / objects, envelope)
    return np.array(area), np.where(objects > 0, eleven, np.nan)


def _eleven_points(recall: np.ndarray, envelope: np.ndarray) -> np.ndarray:
    """Mean (R,) over recall 0, .1, ... 1 of the envelope from there on; both (P, R)."""
    padded = np.append(envelope, np.zeros((1, envelope.shape[1])), axis=0)
    columns = np.arange(envelope.shape[1])
    points = [padded[(recall < r).sum(axis=0), columns] for r in np.arange(0.0, 1.1, 0.1)]
    return np.sum(points, axis=0) / 11.0


def resample_groups(
    groups: Sequence[DetectorGroup], detections: Sequence[Sequence[RunDetections]], images: int
) -> None:
    """Give each group its :attr:`~.gain.DetectorGroup.draws`: the same test sets for all."""
    counts = draw_images(images)
    bar = tqdm(detections, desc="intervals", unit="detector")
    for group, runs in zip(groups, bar, strict=True):
        found = [resample(run, counts) for run in runs]
        group.draws = {key: np.mean([one[key] for one in found], axis=0) for key in found[0]}
