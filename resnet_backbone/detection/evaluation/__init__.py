"""Evaluation: VOC (area and 11-point AP), COCO (boxes and masks), semantic, panoptic."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, SemSegEvaluator
from PIL import Image

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.evaluation.coco import PanopticEvaluator
from resnet_backbone.detection.evaluation.coco import PerClassCOCOEvaluator as build_coco_evaluator
from resnet_backbone.detection.evaluation.imagenet import DETEvaluator, LOCEvaluator, read_guesses
from resnet_backbone.detection.evaluation.voc import VOCEvaluator, format_table
from resnet_backbone.detection.evaluation.voc_ap import evaluate_voc

__all__ = [
    "PanopticEvaluator",
    "VOCEvaluator",
    "build_coco_evaluator",
    "build_evaluator",
    "evaluate_voc",
    "format_table",
]


def read_labels(path: str, dtype=int) -> np.ndarray:
    """A label picture as a new array (H, W); Detectron2's own reader fails with NumPy 2."""
    with Image.open(path) as picture:
        return np.array(picture, dtype=dtype)


def build_semantic_evaluator(dataset_name: str, output_dir: str | None = None) -> SemSegEvaluator:
    """Mean IoU and pixel accuracy over the classes that occur, with ``ignore_label`` left out.

    It gives {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", ...}} in percent.
    """
    return SemSegEvaluator(dataset_name, output_dir=output_dir, sem_seg_loading_fn=read_labels)


def build_panoptic_evaluators(name: str, output_dir: str | None = None) -> DatasetEvaluators:
    """COCO AP of boxes and masks, mean IoU of the labels, and panoptic quality."""
    parts = [build(name, output_dir) for build in (build_coco_evaluator, build_semantic_evaluator)]
    return DatasetEvaluators([*parts, PanopticEvaluator(name)])


EVALUATORS = {
    "voc": VOCEvaluator,
    "pascal_voc": VOCEvaluator,
    "coco": build_coco_evaluator,
    "sem_seg": build_semantic_evaluator,
    "cityscapes_sem_seg": build_semantic_evaluator,
    "coco_panoptic_seg": build_panoptic_evaluators,
}
"""MetadataCatalog's evaluator_type -> callable(dataset_name, output_dir)."""


METRICS = {"imagenet_det": DETEvaluator, "localization": LOCEvaluator}
"""``RESNET_BACKBONE.TEST.METRIC`` -> what is used in place of :data:`EVALUATORS`."""


def build_evaluator(
    dataset_name: str, output_dir: str | None = None, metric: str = "", guesses: str = ""
) -> DatasetEvaluator:
    """The evaluator that suits a registered data set, or that of a metric.

    Args:
        output_dir: the folder for the result files; None writes none.
        metric: one of :data:`METRICS`; empty: the evaluator_type of the data set says it.
        guesses: of localization, see :func:`.imagenet.read_guesses`.

    Raises:
        ValueError: the data set has no known evaluator_type.
        UsageError: there is no such metric, or a wrong file of guesses.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metric == "localization":
        return LOCEvaluator(dataset_name, output_dir, read_guesses(guesses, metadata.thing_classes))
    if metric in METRICS:
        return METRICS[metric](dataset_name, output_dir)
    if metric:
        known = ", ".join(METRICS)
        raise UsageError(f"RESNET_BACKBONE.TEST.METRIC {metric!r} is not one of {known}, or empty")
    kind = metadata.get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"data set {dataset_name!r} has evaluator_type {kind!r}, not one of"
            f" {', '.join(EVALUATORS)}; register it with register_voc or register_coco"
        )
    return EVALUATORS[kind](dataset_name, output_dir)


def data_digest(dataset_name: str) -> str:
    """SHA-256 of what a registered data set says of its images and annotations."""
    records = json.dumps(DatasetCatalog.get(dataset_name), sort_keys=True, default=str)
    return hashlib.sha256(records.encode()).hexdigest()
