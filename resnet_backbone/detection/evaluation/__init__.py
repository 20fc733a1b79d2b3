"""Evaluation: VOC (area and 11-point AP), COCO (boxes and masks), ImageNet, semantic, panoptic."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
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
    "evaluation_folder",
    "evaluate_voc",
    "format_table",
]


def read_labels(path: str, dtype=int) -> np.ndarray:
    """Reads a label picture (H, W) as a new array; Detectron2's own reader fails with NumPy 2."""
    with Image.open(path) as picture:
        return np.array(picture, dtype=dtype)


def build_semantic_evaluator(dataset_name: str, output_dir: str | None = None) -> SemSegEvaluator:
    """Builds an evaluator of mean IoU and pixel accuracy that ignores ``ignore_label``.

    It returns {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", ...}} in percent.
    """
    return SemSegEvaluator(dataset_name, output_dir=output_dir, sem_seg_loading_fn=read_labels)


def build_panoptic_evaluators(name: str, output_dir: str | None = None) -> DatasetEvaluators:
    """Builds evaluators of box and mask AP, mean IoU of the labels, and panoptic quality."""
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
"""``RESNET_BACKBONE.TEST.METRIC`` -> evaluator used instead of :data:`EVALUATORS`."""


def build_evaluator(
    dataset_name: str,
    output_dir: str | None = None,
    metric: str = "",
    guesses: str = "",
    sigmas: Sequence[float] = (),
) -> DatasetEvaluator:
    """Builds the evaluator of a registered data set or of a metric.

    Args:
        output_dir: the folder for result files; None writes none.
        metric: one of :data:`METRICS`, or empty for the data set's evaluator_type.
        guesses: for localization; see :func:`.imagenet.read_guesses`.
        sigmas: of keypoints, for COCO's object keypoint similarity; empty for COCO's 17.

    Raises:
        ValueError: the data set has no known evaluator_type.
        UsageError: the metric is unknown, or the file of guesses is wrong.
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
    options = {"sigmas": sigmas} if kind == "coco" else {}
    return EVALUATORS[kind](dataset_name, output_dir, **options)


def evaluation_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Returns the folder for the files of a run's evaluation on a data set."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name.replace("/", "_"))


def data_digest(dataset_name: str) -> str:
    """Returns the SHA-256 of a registered data set's records."""
    records = json.dumps(DatasetCatalog.get(dataset_name), sort_keys=True, default=str)
    return hashlib.sha256(records.encode()).hexdigest()
