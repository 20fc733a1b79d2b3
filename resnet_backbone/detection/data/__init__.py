"""Detection data: VOC layout and COCO JSON, scanned, loaded and registered."""

from resnet_backbone.detection.data.coco import (
    check_coco,
    load_coco_instances,
    register_coco,
    scan_coco,
)
from resnet_backbone.detection.data.problems import DataProblem, DataReport, apply_policy
from resnet_backbone.detection.data.voc import (
    VOC_CLASSES,
    check_voc,
    find_voc_classes,
    load_voc_instances,
    register_voc,
    scan_voc,
)

__all__ = [
    "VOC_CLASSES",
    "DataProblem",
    "DataReport",
    "apply_policy",
    "check_coco",
    "check_voc",
    "find_voc_classes",
    "load_coco_instances",
    "load_voc_instances",
    "register_coco",
    "register_voc",
    "scan_coco",
    "scan_voc",
]
