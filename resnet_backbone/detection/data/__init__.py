"""Detection data sets in VOC layout and COCO JSON: scanning, checking and registration."""

from resnet_backbone.detection.data.coco import register_coco, scan_coco
from resnet_backbone.detection.data.problems import DataProblem, DataReport, apply_policy
from resnet_backbone.detection.data.voc import VOC_CLASSES, find_voc_classes, register_voc, scan_voc

__all__ = [
    "VOC_CLASSES",
    "DataProblem",
    "DataReport",
    "apply_policy",
    "find_voc_classes",
    "register_coco",
    "register_voc",
    "scan_coco",
    "scan_voc",
]
