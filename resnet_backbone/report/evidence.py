"""What runs detected beside what was there: detections.json and the annotations of a VOC folder."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from resnet_backbone.detection.data.voc import scan_voc
from resnet_backbone.detection.evaluation.voc import TO_VOC
from resnet_backbone.detection.evaluation.voc_ap import read_boxes, score_boxes
from resnet_backbone.report.detector_runs import DetectorGroup, DetectorRun

DETECTIONS = "detections.json"
TOLERANCE = 0.1  # points of AP50; the file's rounded scores and boxes move less
REGISTERED = re.compile(r"voc_(2007|2012)_(\w+)")  # Detectron2's names
RECALL_LEVELS = 101

Table = dict[str, np.ndarray]


class NoEvidence(ValueError):
    """The files that a picture needs are not there; the message says which."""


@dataclass(frozen=True)
class Truth:
    """A test set.

    Attributes:
        classes: names in the order of the category ids.
        images: one dict each: image_id, file_name, boxes (N, 4) as VOC's 1-based inclusive
            pixels, classes (N,), difficult (N,).
    """

    classes: list[str]
    images: list[dict[str, Any]]

    @property
    def num_boxes(self) -> int:
        return sum(len(image["classes"]) for image in self.images)


def load_truth(run: DetectorRun, voc_root: str | None = None) -> Truth:
    """The annotations that a run was evaluated on.

    Args:
        run: with one test set in VOC layout: of ``--voc-root``, or one of Detectron2's names.
        voc_root: its folder; by default the one in the run's command, or Detectron2's own.

    Raises:
        NoEvidence: the folder is not known or not there.
        DataError: the folder lacks the split.
    """
    if len(run.test) != 1 or run.class_metric != "AP50":
        raise NoEvidence("they need runs on a single test set in VOC layout")
    root, split = _locate(run, voc_root)
    classes = list(run.config.get("RESNET_BACKBONE.CLASS_NAMES") or run.classes)
    records, report = scan_voc(root, split, classes, decode=False, progress=True)
    if not report.annotated:
        raise NoEvidence(f"the split {split} has no annotations")
    images = [
        {
            "image_id": record["image_id"],
            "file_name": record["file_name"],
            "boxes": np.array([a["bbox"] for a in record["annotations"]]).reshape(-1, 4) + TO_VOC,
            "classes": np.array([a["category_id"] for a in record["annotations"]], dtype=int),
            "difficult": np.array([a["difficult"] for a in record["annotations"]], dtype=bool),
        }
        for record in records
    ]
    return Truth(classes, images)


def _locate(run: DetectorRun, voc_root: str | None) -> tuple[str, str]:
    """Folder and split of the run's test set."""
    name = run.test[0]
    registered = REGISTERED.fullmatch(name)
    if registered:
        default = os.environ.get("DETECTRON2_DATASETS", "datasets")
        root = voc_root or os.path.join(default, f"VOC{registered[1]}")
        split = registered[2]
    else:
        root, split = voc_root or _option(run, "--voc-root"), name.partition(":")[2]
    if not root or not split or not os.path.isdir(root):
        if voc_root:
            raise NoEvidence(f"there is no folder {voc_root}")
        raise NoEvidence(f"the images of {name} are not here; give their folder with --voc-root")
    return root, split


def _option(run: DetectorRun, option: str) -> str:
    try:
        words = shlex.split(run.results.get("command") or "")
    except ValueError:
        return ""
    return next((b for a, b in zip(words, words[1:], strict=False) if a == option), "")


@dataclass(frozen=True)
class Evidence:
    """A run's detections, matched with the ground truth.

    Attributes:
        run: it.
        truth, found: tables of :func:`~resnet_backbone.detection.evaluation.voc_ap.read_boxes`;
            the first is the same for all runs.
        numbers: of `score_boxes` at IoU .5.
    """

    run: DetectorRun
    truth: Table
    found: Table
    numbers: Mapping[str, Any]


def load_evidence(run: DetectorRun, truth: Truth) -> Evidence:
    """Reads a run's detections.json and matches it with the annotations.

    Raises:
        NoEvidence: no such file.
        ValueError: a damaged file, or one that does not give the run's AP50.
    """
    path = run.folder / "inference" / run.test[0].replace("/", "_") / DETECTIONS
    if not path.is_file():
        raise NoEvidence(f"{run.folder.name} has no {DETECTIONS}; evaluate it again")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        predictions = _by_image(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from the run") from error
    tables = read_boxes(predictions, truth.images, truth.classes)
    numbers = score_boxes(*tables, truth.classes, (0.5,))
    ap50, stated = 100 * np.nanmean(numbers["ap_area"]), run.numbers.get("AP50")
    if stated is not None and abs(ap50 - stated) > TOLERANCE:
        raise ValueError(
            f"{path} gives AP50 {ap50:.2f} with these annotations, the run's results.json has "
            f"{stated:.2f}: give the --voc-root that the run was evaluated on"
        )
    return Evidence(run, *tables, numbers)


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
    """The best precision at each level of recall or above it, as VOC's AP has it.

    Args:
        numbers: of `score_boxes` or `evaluate_voc`.
        levels: R, evenly from 0 to 1.

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
) -> tuple[Truth, list[list[Evidence]]]:
    """The test set of some groups, and for each group its runs' detections.

    Raises:
        NoEvidence, ValueError: see :func:`load_truth` and :func:`load_evidence`.
    """
    truth = load_truth(groups[0].first, voc_root)
    with tqdm(total=sum(len(group.runs) for group in groups), desc="detections") as bar:
        found = []
        for group in groups:
            found.append([])
            for run in group.runs:
                found[-1].append(load_evidence(run, truth))
                bar.update()
    return truth, found
