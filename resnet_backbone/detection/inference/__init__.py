"""Inference with trained detectors: the paper's improvements (appendix B), pictures, export."""

from resnet_backbone.detection.inference.detector import (
    ImprovedDetector,
    Switches,
    read_switches,
    select_detections,
    soft_nms,
    vote_boxes,
)
from resnet_backbone.detection.inference.member import Member
from resnet_backbone.detection.inference.predictor import (
    Predictor,
    check_ensemble,
    for_testing,
    improve,
    keep_members,
)

__all__ = [
    "ImprovedDetector",
    "Member",
    "Predictor",
    "Switches",
    "check_ensemble",
    "for_testing",
    "improve",
    "keep_members",
    "read_switches",
    "select_detections",
    "soft_nms",
    "vote_boxes",
]
