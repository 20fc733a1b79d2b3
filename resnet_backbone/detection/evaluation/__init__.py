"""Evaluation: VOC (area and 11-point AP), COCO (boxes and masks), semantic, panoptic."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from resnet_backbone.detection.evaluation.coco import build_coco_evaluator
from resnet_backbone.detection.evaluation.panoptic import (
    PanopticEvaluator,
    build_panoptic_evaluators,
    build_semantic_evaluator,
)
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

EVALUATORS = {
    "voc": VOCEvaluator,
    "pascal_voc": VOCEvaluator,
    "coco": build_coco_evaluator,
    "sem_seg": build_semantic_evaluator,
    "cityscapes_sem_seg": build_semantic_evaluator,
    "coco_panoptic_seg": build_panoptic_evaluators,
}
"""MetadataCatalog's evaluator_type -> callable(dataset_name, output_dir)."""


def build_evaluator(dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator that suits a registered data set.

    Args:
        dataset_name: its metadata's evaluator_type decides, see :data:`EVALUATORS`.
        output_dir: folder for the result files; None writes none.

    Raises:
        ValueError: no such evaluator_type.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"data set {dataset_name!r} has evaluator_type {kind!r}, not one of"
            f" {', '.join(EVALUATORS)}; register it with register_voc or register_coco"
        )
    return EVALUATORS[kind](dataset_name, output_dir)
