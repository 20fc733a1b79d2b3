"""Which improvements a config asks for, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from resnet_backbone.detection.config import UsageError, backbone_node

NMS_KINDS = ("hard", "linear", "gaussian")
KEY = "RESNET_BACKBONE.TEST"


@dataclass(frozen=True)
class Switches:
    """``RESNET_BACKBONE.TEST.*``.

    Attributes:
        refinement: box refinement.
        scales: short sides in pixels, ascending; empty: the config's own test scale alone.
        flip: the mirrored image too.
        nms: hard, linear or gaussian.
        ensemble: run folders of further detectors.
    """

    refinement: bool = False
    scales: tuple[int, ...] = ()
    flip: bool = False
    nms: str = "hard"
    ensemble: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return self != Switches()


def read_switches(cfg: CfgNode) -> Switches:
    """The switches of a config.

    Raises:
        UsageError: a value that cannot be meant, switches that contradict each other, or switches
            for a detector without regions.
    """
    node = backbone_node(cfg).TEST
    switches = Switches(
        refinement=node.BOX_REFINEMENT,
        scales=tuple(sorted(node.SCALES)),
        flip=node.FLIP,
        nms=node.NMS,
        ensemble=tuple(node.ENSEMBLE),
    )
    if switches.nms not in NMS_KINDS:
        raise UsageError(f"{KEY}.NMS {switches.nms!r} is not one of {', '.join(NMS_KINDS)}")
    check_scales(cfg, switches.scales)
    if cfg.TEST.AUG.ENABLED and switches.any:
        raise UsageError(
            f"TEST.AUG.ENABLED is Detectron2's union of detections, {KEY}.* are the paper's "
            "improvements: turn one of the two off"
        )
    wanted = switches.any or cfg.TEST.AUG.ENABLED
    if wanted and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UsageError(
            f"{KEY}.* and TEST.AUG are for GeneralizedRCNN and its regions, "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: turn them off"
        )
    return switches


def check_scales(cfg: CfgNode, scales: Sequence[int]) -> None:
    """Raises UsageError for scales that are none, or that a detector cannot be tested at."""
    whole = all(isinstance(scale, int) and scale > 0 for scale in scales)
    if not whole or len(set(scales)) < len(scales):
        raise UsageError(
            f"{KEY}.SCALES {list(scales)}: short sides in whole pixels, each once, such as "
            "[200, 400, 600, 800, 1000]"
        )
    if scales and cfg.INPUT.MIN_SIZE_TEST <= 0:
        raise UsageError(
            f"{KEY}.SCALES needs INPUT.MIN_SIZE_TEST, the scale of the proposals, above 0"
        )
