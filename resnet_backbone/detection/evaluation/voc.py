"""Evaluators of boxes: their base class, and VOC's with results per class."""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from matplotlib import colormaps
from matplotlib.figure import Figure
from tabulate import tabulate

from resnet_backbone.detection.data.scans import registered_scan
from resnet_backbone.detection.data.voc import scan_voc
from resnet_backbone.detection.evaluation.coco import warn_if_empty
from resnet_backbone.detection.evaluation.voc_ap import (
    COCO_IOU_THRESHOLDS,
    KINDS,
    check_classes,
    count_errors,
    read_boxes,
    score_boxes,
)
from resnet_backbone.runtime.files import write_json, write_text

logger = logging.getLogger(__name__)

COLORS = ("#2e7d32", "#f9a825", "#ef6c00", "#616161", "#1565c0")  # one per kind in KINDS
TO_VOC = np.array([1.0, 1.0, 0.0, 0.0])
"""Added to Detectron2's continuous (x0, y0, x1, y1) to get VOC's 1-based inclusive pixels."""

DETECTIONS = "detections.json"

Found = Mapping[Any, tuple[np.ndarray, ...]]
"""Image id -> detected boxes (N, 4), scores (N,) and classes (N,)."""


class BoxEvaluator(DatasetEvaluator):
    """Base class: collects detections of all processes, and reads the objects of a data set."""

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        self.name, self.output_dir = dataset_name, output_dir
        self.class_names = MetadataCatalog.get(dataset_name).thing_classes
        self.reset()

    def reset(self) -> None:
        self.found: Found = {}

    def process(self, inputs, outputs) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            self.found[image["image_id"]] = (
                instances.pred_boxes.tensor.double().numpy(),
                instances.scores.double().numpy(),
                instances.pred_classes.numpy(),
            )

    def evaluate(self) -> OrderedDict | None:
        """Returns the numbers on the main process, else None; all processes must call it."""
        gathered = comm.gather(self.found, dst=0)
        if not comm.is_main_process():
            return None
        found = {image: boxes for of_process in gathered for image, boxes in of_process.items()}
        return self.score(found)

    def score(self, found: Found) -> OrderedDict:
        raise NotImplementedError

    def objects(self) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        """Yields record, boxes (M, 4) and classes (M,) of each image in the data set."""
        for record in DatasetCatalog.get(self.name):
            objects = [one for one in record["annotations"] if not one.get("iscrowd")]
            yield record, boxes_of(objects), np.array([one["category_id"] for one in objects], int)

    def write(self, name: str, content: Any, indent: int | None = 1) -> None:
        if self.output_dir:
            os.makedirs(self.output_dir, exist_ok=True)
            write_json(os.path.join(self.output_dir, name), content, indent=indent)

    def write_detections(self, found: Found) -> None:
        """Writes `detections.json` in COCO's result format: bbox is [x, y, width, height].

        ValueError: a detection has a class that the data set lacks.
        """
        entries = []
        for _, _, classes in found.values():
            check_classes(classes, len(self.class_names), "detections")
        for image, columns in found.items():
            for (x0, y0, x1, y1), score, index in zip(*(c.tolist() for c in columns), strict=True):
                box = [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]
                name = self.class_names[index]
                entry = {"image_id": str(image), "category_id": index, "category": name}
                entries.append({**entry, "bbox": box, "score": round(score, 6)})
        self.write(DETECTIONS, entries, indent=None)


def boxes_of(objects: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Returns the boxes (M, 4) of Detectron2's annotations."""
    boxes = [BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS) for one in objects]
    return np.array(boxes, float).reshape(-1, 4)


def voc_objects(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Converts a loader's records to the ground truth of :func:`.voc_ap.evaluate_voc`.

    Crowds are difficult objects.
    """
    truth = []
    for record in records:
        objects = record.get("annotations", ())
        difficult = [one.get("iscrowd") or one.get("difficult") or False for one in objects]
        image = {"image_id": record["image_id"], "boxes": boxes_of(objects) + TO_VOC}
        image["classes"] = [one["category_id"] for one in objects]
        truth.append({**image, "difficult": difficult})
    return truth


def voc_detections(found: Found) -> list[dict[str, Any]]:
    """Converts detections to those of :func:`.voc_ap.evaluate_voc`."""
    return [
        {"image_id": image, "boxes": boxes + TO_VOC, "scores": scores, "classes": classes}
        for image, (boxes, scores, classes) in found.items()
    ]


class VOCEvaluator(BoxEvaluator):
    """Average precision of a data set in VOC layout.

    On equal input the numbers agree with Detectron2's `PascalVOCDetectionEvaluator`. Unlike there,
    scores and boxes are not rounded, AP is always the area under the curve (VOC 2010 and later)
    plus the 11-point AP of VOC 2007, any class names and years work, and classes without ground
    truth are not in the mean. The ground truth is the loader's.

    Args:
        dataset_name: from `register_voc` or Detectron2's own ("voc_2007_test"); its metadata must
            have thing_classes, dirname and split.
        output_dir: folder for `voc_results.json`, its picture `voc_results.png` (precision-recall
            curves, errors by kind), `detections.json`, and the devkit's files
            `results/VOC<year>/Main/comp4_det_<split>_<class>.txt`; None writes nothing.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        metadata = MetadataCatalog.get(dataset_name)
        missing = [k for k in ("thing_classes", "dirname", "split") if metadata.get(k) is None]
        if missing:
            raise ValueError(
                f"data set {dataset_name!r} has no {', '.join(missing)} in its metadata;"
                " register it with register_voc"
            )
        super().__init__(dataset_name, output_dir)
        self._metadata = metadata

    def score(self, found: Found) -> OrderedDict:
        """Returns AP from the detections of all processes.

        This is {"bbox": {...}} in percent: AP (mean over IoU .5:.95), AP50, AP75, AP50-11pt (VOC
        2007's 11-point AP), and "AP50-<class>", which is nan without ground truth. Splits without
        annotations, such as VOC 2012's test set, whose server scores the files, give an empty dict.
        """
        output, folder = self.output_dir, "no folder: there is no output_dir"
        self.write_detections(found)  # before anything else can fail
        if output:
            folder = write_devkit(found, self._metadata, output)
        ground_truth, annotated = self._load_ground_truth()
        names = self.class_names
        tables = read_boxes(voc_detections(found), ground_truth, names)
        numbers = score_boxes(*tables, names)
        if not annotated:
            text = "%s has no annotations to score with; its detections are written to %s"
            logger.warning(text, self.name, folder)
            return OrderedDict()
        self._warn(found, ground_truth)
        errors = count_errors(*tables, names)
        details = {**summarize(self.name, numbers), "errors": errors}
        logger.info("VOC results of %s (%%):\n%s", self.name, format_table(details))
        self.write("voc_results.json", details)
        if output:
            draw_voc(numbers, errors, os.path.join(output, "voc_results.png"))
        bbox = details["summary"] | {f"AP50-{c['class']}": c["AP50"] for c in details["classes"]}
        return OrderedDict(bbox={k: math.nan if v is None else v for k, v in bbox.items()})

    def _load_ground_truth(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns the boxes of each image, and whether the split has annotations."""
        meta, dataset = self._metadata, registered_scan(self.name)
        if dataset is None:  # Detectron2 or other code registered it
            records, report = scan_voc(meta.dirname, meta.split, meta.thing_classes)
        else:
            records, report = dataset.scan()
        if report.problems:
            counts = len(report.bad_boxes), len(report.bad_files)
            text = "%s: evaluated without %d bad boxes and %d bad files; scan_voc names them"
            logger.warning(text, self.name, *counts)
        return voc_objects(records), report.annotated

    def _warn(self, found: Found, ground_truth: Sequence[Mapping[str, Any]]) -> None:
        missed = {t["image_id"] for t in ground_truth} - {str(image) for image in found}
        if missed:
            text = "%s: not run on %d of %d images (such as %s); their objects count as missed"
            counts = len(missed), len(ground_truth)
            logger.warning(text, self.name, *counts, min(missed))
        detected = any(len(scores) for _, scores, _ in found.values())
        annotated = any(len(t["classes"]) for t in ground_truth)
        warn_if_empty(logger, self.name, detected, annotated)


def write_devkit(found: Found, metadata: Any, folder: str) -> str:
    """Writes a file of detections per class, for the VOC devkit and its server.

    Lines are image, score, xmin, ymin, xmax, ymax, in 1-based inclusive pixels. Scores have nine
    digits, enough to tell all float32 scores apart (Detectron2's three make ties). Returns the
    folder of the files.
    """
    path = os.path.join(folder, "results", f"VOC{metadata.get('year', 2012)}", "Main")
    os.makedirs(path, exist_ok=True)
    lines: list[list[str]] = [[] for _ in metadata.thing_classes]
    for image, columns in found.items():
        for (x0, y0, x1, y1), score, index in zip(*(c.tolist() for c in columns), strict=True):
            corners = f"{x0 + 1:.2f} {y0 + 1:.2f} {x1:.2f} {y1:.2f}"
            lines[index].append(f"{image} {score:.9g} {corners}\n")
    for name, rows in zip(metadata.thing_classes, lines, strict=True):
        file = f"comp4_det_{metadata.split}_{name.replace('/', '_')}.txt"
        write_text(os.path.join(path, file), "".join(rows))
    return path


def summarize(dataset_name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Converts :func:`evaluate_voc`'s arrays at .5:.95 to the content of `voc_results.json`.

    Returns {"dataset", "summary": {AP, AP50, AP75, AP50-11pt}, "classes": [{class, AP, AP50, AP75,
    AP50-11pt, ground_truth, difficult, detections}, ...]}; AP is in percent, and None for a class
    (or set) without ground truth.
    """
    area, eleven = numbers["ap_area"] * 100, numbers["ap_11point"] * 100
    at50, at75 = (COCO_IOU_THRESHOLDS.index(t) for t in (0.5, 0.75))
    columns = {
        "AP": area.mean(axis=1),
        "AP50": area[:, at50],
        "AP75": area[:, at75],
        "AP50-11pt": eleven[:, at50],
    }
    counts = {k: numbers[f"num_{k}"] for k in ("ground_truth", "difficult", "detections")}
    return {
        "dataset": dataset_name,
        "summary": {k: _number(np.mean(v[~np.isnan(v)])) for k, v in columns.items()},
        "classes": [
            {"class": name}
            | {k: _number(v[i]) for k, v in columns.items()}
            | {k: int(v[i]) for k, v in counts.items()}
            for i, name in enumerate(numbers["class_names"])
        ],
    }


def _number(value: float) -> float | None:
    """Converts nan to None for JSON."""
    return None if np.isnan(value) else float(value)


def format_table(results: Mapping[str, Any]) -> str:
    """Formats the result of :func:`summarize` as a table per class, with the mean last."""
    headers = list(results["classes"][0])
    rows = [[c[h] for h in headers] for c in results["classes"]]
    counts = [sum(row[headers.index(k)] for row in rows) for k in headers[5:]]
    rows.append(["mean (counts: sum)", *results["summary"].values(), *counts])
    table = tabulate(rows, headers=headers, floatfmt=".2f", missingval="nan")
    empty = [c["class"] for c in results["classes"] if c["AP50"] is None]
    if not empty:
        return table
    return f"{table}\nnot in the mean, without ground truth: {', '.join(empty)}"


def draw_voc(
    numbers: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
    """Writes the curves of ``evaluate_voc`` and the errors of ``count_errors`` as an image file."""
    shown = [row for row in errors if row["objects"]]
    figure = Figure(figsize=(12, max(4.0, 1.5 + 0.25 * len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = colormaps["tab20"](np.linspace(0, 1, 20))
    for number, name in enumerate(numbers["class_names"]):
        recall, precision = numbers["recall"][number], numbers["precision"][number]
        if len(recall) and not np.isnan(recall).any():
            left.plot(recall, precision, color=colors[number % 20], linewidth=1, label=name)
    left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision, IoU 0.5")
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=7, ncols=2)
    names = [f"{row['class']} ({row['objects']})" for row in shown]
    start = np.zeros(len(shown))
    for kind, color in zip(KINDS, COLORS, strict=True):
        share = np.array([row[kind] / row["objects"] for row in shown])
        right.barh(names, share, left=start, color=color, label=kind)
        start = start + share
    right.set(xlim=(0, 1), xlabel="of as many best-scored detections as there are objects")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.legend(fontsize=7, ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)
