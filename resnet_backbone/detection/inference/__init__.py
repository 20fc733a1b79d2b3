"""The paper's improvements of detection (appendix B), each a switch of the config."""

from resnet_backbone.detection.inference.detector import ImprovedDetector, improve
from resnet_backbone.detection.inference.ensemble import check_ensemble, keep_members
from resnet_backbone.detection.inference.member import Member
from resnet_backbone.detection.inference.switches import Switches, read_switches
from resnet_backbone.detection.inference.voting import select_detections, soft_nms, vote_boxes
from resnet_backbone.detection.modeling.context import (
    ContextRes5ROIHeads,
    ContextROIHeads,
    with_global_context,
)

__all__ = [
    "ContextROIHeads",
    "ContextRes5ROIHeads",
    "ImprovedDetector",
    "Member",
    "Switches",
    "check_ensemble",
    "improve",
    "keep_members",
    "read_switches",
    "select_detections",
    "soft_nms",
    "vote_boxes",
    "with_global_context",
]
