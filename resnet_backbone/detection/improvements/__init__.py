"""The paper's improvements of detection (appendix B), each a switch of the config."""

from .context import ContextRes5ROIHeads, ContextROIHeads, with_global_context
from .detector import ImprovedDetector, improve
from .ensemble import check_ensemble, keep_members
from .member import Member
from .switches import Switches, read_switches
from .voting import select_detections, soft_nms, vote_boxes

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
