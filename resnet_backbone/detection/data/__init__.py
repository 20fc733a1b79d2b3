"""Detection data: VOC layout and COCO JSON, loading, registering and checking."""

from .check import check_coco, check_voc
from .coco import drop_bad, load_coco_instances, register_coco
from .problems import DataError, DataProblem, DataReport, apply_policy
from .voc import VOC_CLASSES, find_voc_classes, load_voc_instances, register_voc

__all__ = [
    "VOC_CLASSES",
    "DataError",
    "DataProblem",
    "DataReport",
    "apply_policy",
    "check_coco",
    "check_voc",
    "drop_bad",
    "find_voc_classes",
    "load_coco_instances",
    "load_voc_instances",
    "register_coco",
    "register_voc",
]
