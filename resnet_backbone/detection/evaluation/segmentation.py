"""Evaluation of label pictures inside Detectron2."""

from __future__ import annotations

import numpy as np
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, SemSegEvaluator
from PIL import Image

from resnet_backbone.detection.evaluation.coco import build_coco_evaluator
from resnet_backbone.detection.evaluation.panoptic import PanopticEvaluator


def read_labels(path: str, dtype=int) -> np.ndarray:
    """A label picture as a new array (H, W); Detectron2's own reader fails with NumPy 2."""
    with Image.open(path) as picture:
        return np.array(picture, dtype=dtype)


def build_semantic_evaluator(dataset_name: str, output_dir: str | None = None) -> SemSegEvaluator:
    """Mean IoU and pixel accuracy over the classes that occur, with ``ignore_label`` left out.

    Returns:
        An evaluator giving {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", ...}}
        in percent.
    """
    return SemSegEvaluator(dataset_name, output_dir=output_dir, sem_seg_loading_fn=read_labels)


def build_panoptic_evaluators(
    dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluators:
    """COCO AP of boxes and masks, mean IoU of the labels, and panoptic quality."""
    parts: list[DatasetEvaluator] = [
        build_coco_evaluator(dataset_name, output_dir),
        build_semantic_evaluator(dataset_name, output_dir),
        PanopticEvaluator(dataset_name),
    ]
    return DatasetEvaluators(parts)
