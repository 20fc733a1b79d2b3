"""Detection data: VOC layout and COCO JSON, loading, registering and checking."""

from resnet_backbone.detection.data.coco import (
    check_coco,
    drop_bad,
    load_coco_instances,
    register_coco,
)
from resnet_backbone.detection.data.problems import DataProblem, DataReport, apply_policy
from resnet_backbone.detection.data.voc import (
    VOC_CLASSES,
    check_voc,
    find_voc_classes,
    load_voc_instances,
    register_voc,
)
from resnet_backbone.runtime.errors import DataError

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
