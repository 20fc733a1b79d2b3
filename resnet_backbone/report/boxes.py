"""The annotated boxes of a test set, in VOC layout or COCO's format, and runs' detections."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_backbone.detection.config import take_back_overrides
from resnet_backbone.detection.data.arguments import MetadataCatalog, add_data_arguments
from resnet_backbone.detection.data.coco import scan_coco
from resnet_backbone.detection.data.formats.coco import clean_coco, number_from_one
from resnet_backbone.detection.data.voc import scan_voc
from resnet_backbone.detection.evaluation import voc_ap
from resnet_backbone.detection.evaluation.coco import RESULT_FILE, score_coco
from resnet_backbone.detection.evaluation.imagenet import score_det
from resnet_backbone.detection.evaluation.voc import DETECTIONS, TO_VOC, voc_objects
from resnet_backbone.report.detector_runs import DetectorRun

TOLERANCE = 0.1  # points of AP50; the rounding of scores and boxes in the file changes less
REGISTERED = re.compile(r"voc_(2007|2012)_(\w+)")  # Detectron2's names

Table = dict[str, np.ndarray]


class NoDetections(ValueError):
    """Files for curves, intervals and pictures are missing; the message says which."""


class Truth(NamedTuple):
    """A test set; boxes (N, 4) are in VOC's 1-based inclusive pixels."""

    classes: list[str]  # in the order of the category ids
    category_ids: list[Any]  # of the classes, in the files of detections
    images: list[dict[str, Any]]  # Detectron2's records with boxes, classes (N,), difficult (N,)


def load_truth(run: DetectorRun, given: Mapping[str, str | None] | None = None) -> Truth:
    """Reads the annotations that a run was evaluated on, in VOC layout or in COCO's format.

    Args:
        given: "voc_root", or "coco_json" and "image_root" of the test set; by default from the
            run's command or Detectron2's registration.
    """
    if len(run.test) != 1:
        raise NoDetections("they need runs on a single test set")
    paths = own_paths(run) | _known(given or {})
    if run.protocol == "coco" or "coco_json" in paths:
        file, root = (_existing(run, paths, key) for key in ("coco_json", "image_root"))
        records, report = scan_coco(file, root, decode=True, progress=True)
    else:
        records, report = _scan_voc(run, _existing(run, paths, "voc_root"))
    if not report.annotated:
        raise NoDetections(f"{report.name} has no annotations")
    pairs = zip(records, voc_objects(records), strict=True)
    images = [{**record, **objects} for record, objects in pairs]
    classes = list(report.boxes)
    return Truth(classes, report.category_ids or list(range(len(classes))), images)


def own_paths(run: DetectorRun) -> dict[str, str]:
    """Returns the test set's paths in the run's command, or Detectron2's registered ones."""
    parser = argparse.ArgumentParser(add_help=False)
    add_data_arguments(parser)
    args, _ = parser.parse_known_args(shlex.split(run.results.get("command") or ""))
    args.opts = []
    take_back_overrides(args)
    paths = {"voc_root": args.voc_root}
    paths |= {key: (getattr(args, key) or [None])[-1] for key in ("coco_json", "image_root")}
    if registered := REGISTERED.fullmatch(run.test[0]):
        default = os.environ.get("DETECTRON2_DATASETS", "datasets")
        paths["voc_root"] = os.path.join(default, f"VOC{registered[1]}")
    elif run.test[0] in MetadataCatalog.list():
        known = MetadataCatalog.get(run.test[0])
        paths |= {"coco_json": known.get("json_file"), "image_root": known.get("image_root")}
        paths["voc_root"] = known.get("dirname")
    return _known(paths)


def _known(paths: Mapping[str, str | None]) -> dict[str, str]:
    return {key: path for key, path in paths.items() if path}


def _scan_voc(run: DetectorRun, root: str) -> tuple[list[dict], Any]:
    name = run.test[0]
    registered = REGISTERED.fullmatch(name)
    split = registered[2] if registered else name.partition(":")[2]
    if not split:
        raise NoDetections(f"{name} is not a split of a VOC folder")
    classes = list(run.config.get("RESNET_BACKBONE.CLASS_NAMES") or run.classes)
    return scan_voc(root, split, classes, decode=True, progress=True)


def _existing(run: DetectorRun, paths: Mapping[str, str], key: str) -> str:
    path, option = paths.get(key, ""), f"--{key.replace('_', '-')}"
    if not os.path.exists(path):
        absent = f"there is no {path}" if path else f"the command of {run.folder.name} has no path"
        raise NoDetections(f"{absent}; give the test set with {option}")
    return path


class RunDetections(NamedTuple):
    """A run's detections, matched with the ground truth."""

    run: DetectorRun
    truth: Table  # from voc_ap.read_boxes; the same for all runs
    found: Table
    numbers: Mapping[str, Any]  # from voc_ap.score_boxes at IoU .5
    label: str = ""  # of its group

    @property
    def ap50(self) -> float:
        """AP50 in percent, as the area under the curve."""
        return 100 * float(np.nanmean(self.numbers["ap_area"]))


def load_detections(run: DetectorRun, truth: Truth) -> RunDetections:
    """Reads a run's detections, and completes its details if it was not evaluated as VOC.

    Raises:
        NoDetections: the run has no file of detections.
        ValueError: the file is damaged, or it gives another AP50 than the run's results.
    """
    is_coco = run.protocol == "coco"
    path = run.inference / (RESULT_FILE if is_coco else DETECTIONS)
    if not path.is_file():
        raise NoDetections(f"{run.folder.name} has no {path.name}; evaluate it again")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        ids = truth.category_ids if is_coco else range(len(truth.classes))
        predictions = _by_image(rows, ids)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from the run") from error
    tables = voc_ap.read_boxes(predictions, truth.images, truth.classes)
    numbers = voc_ap.score_boxes(*tables, truth.classes, (voc_ap.CURVE_IOU,))
    found = RunDetections(run, *tables, numbers)
    ap50, stated = found.ap50, run.numbers.get("AP50")
    if run.protocol != "voc":
        ap50 = _coco_ap50(rows, truth) if is_coco else _det_ap50(predictions, truth)
    if stated is not None and abs(ap50 - stated) > TOLERANCE:
        option = "--voc-root" if run.protocol == "voc" else "--coco-json"
        raise ValueError(
            f"{path} gives AP50 {ap50:.2f} with these annotations, the run's results.json has "
            f"{stated:.2f}: give the {option} that the run was evaluated on"
        )
    counts = (numbers[f"num_{key}"].tolist() for key in ("ground_truth", "difficult"))
    rows = zip(truth.classes, *counts, strict=True)
    keys = "class", "ground_truth", "difficult"
    run.details.setdefault("classes", [dict(zip(keys, row, strict=True)) for row in rows])
    run.details.setdefault("errors", voc_ap.count_errors(*tables, truth.classes))
    return found


def _coco_ap50(rows: Sequence[Mapping[str, Any]], truth: Truth) -> float:
    """Returns COCO's AP50 in percent, the value in results.json, as its evaluator does."""
    images = {image["image_id"]: image for image in truth.images}
    annotations = {number: image["annotations"] for number, image in images.items()}
    dataset = clean_coco(dict(enumerate(truth.classes)), images, annotations)
    image_ids, class_ids = number_from_one(images), number_from_one(truth.category_ids)
    results = [
        row | {"image_id": image_ids[row["image_id"]], "category_id": class_ids[row["category_id"]]}
        for row in rows
    ]
    return 100 * score_coco(dataset, results)[0]["AP50"]


def _det_ap50(predictions: Sequence[Mapping[str, Any]], truth: Truth) -> float:
    """Returns the average precision of ImageNet detection in percent."""
    found = {image["image_id"]: image for image in predictions}
    nothing = {"boxes": np.zeros((0, 4)), "scores": [], "classes": []}
    images = []
    for image in truth.images:
        one = found.get(str(image["image_id"]), nothing)
        boxes, scores, classes = (np.array(one[key]) for key in ("boxes", "scores", "classes"))
        counts = np.array([not entry.get("iscrowd") for entry in image["annotations"]], bool)
        objects = image["boxes"][counts] - TO_VOC, np.array(image["classes"], int)[counts]
        images.append(((boxes - TO_VOC, scores, classes), objects))
    return 100 * float(np.nanmean(score_det(images, len(truth.classes))))


def _by_image(rows: Sequence[Mapping[str, Any]], category_ids: Sequence) -> list[dict[str, Any]]:
    """Converts COCO-style rows to the evaluator's predictions, in VOC's pixels."""
    images: dict[str, dict[str, list]] = {}
    places = {category_id: place for place, category_id in enumerate(category_ids)}
    for row in rows:
        x, y, width, height = row["bbox"]
        empty = {"boxes": [], "scores": [], "classes": []}
        found = images.setdefault(str(row["image_id"]), empty)
        found["boxes"].append([x, y, x + width, y + height] + TO_VOC)
        found["scores"].append(float(row["score"]))
        found["classes"].append(places[row["category_id"]])
    return [{"image_id": image_id, **found} for image_id, found in images.items()]
