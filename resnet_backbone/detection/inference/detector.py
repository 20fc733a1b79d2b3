"""Faster R-CNN with the paper's improvements at test time, and the switches that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.detection.inference.member import (
    ImageViews,
    Member,
    Predictions,
    Size,
    change_frame,
    mean_predictions,
)
from resnet_backbone.detection.inference.voting import select_detections

NMS_KINDS = ("hard", "linear", "gaussian")
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KEY = "RESNET_BACKBONE.TEST"
REFINEMENT_NMS = 0.3


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
        UsageError: an invalid value, switches that contradict each other, or switches
            for a detector without regions.
    """
    node = backbone_node(cfg).TEST
    read_precision(cfg)
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


def read_precision(cfg: CfgNode) -> str:
    """``RESNET_BACKBONE.TEST.PRECISION``, a key of :data:`PRECISIONS`.

    Raises:
        UsageError: another value, or a precision that the region heads do not have.
    """
    name = backbone_node(cfg).TEST.PRECISION
    if name not in PRECISIONS:
        raise UsageError(f"{KEY}.PRECISION {name!r} is not one of {', '.join(PRECISIONS)}")
    pooler = cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
    if name != "float32" and pooler == "ROIPool" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise UsageError(
            f"{KEY}.PRECISION {name}: MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIPool has float32 alone on "
            "CPUs"
        )
    return name


def check_scales(cfg: CfgNode, scales: Sequence[int]) -> None:
    """Raises UsageError for invalid scales, and for a detector without a test scale."""
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


class ImprovedDetector(nn.Module):
    """Faster R-CNN whose proposals, regions and boxes pass through the improvements, in order.

    1. Proposals: the union over all members, each at its own test scale.
    2. Every member scores and regresses all of them, on its scales and mirror images
       (:class:`Member`). Scores and boxes are averaged over the members.
    3. Box refinement: each proposal's box of its best class (the background aside), clipped to
       the image, becomes a region itself, for which step 2 is repeated. These predictions join
       the first ones, and box voting follows NMS. (The paper speaks of "300 new predictions" of
       300 proposals and does not say which class's box is pooled; with a regressor per class
       there are K.)
    4. NMS or soft-NMS; with refinement at .3 in place of ``MODEL.ROI_HEADS.NMS_THRESH_TEST``.
       With soft-NMS, voters count with the scores that they had before it.

    With all switches off, it gives what ``GeneralizedRCNN.inference`` gives, bit for bit. Masks
    and keypoints are the first member's, at its test scale.

    Args:
        members: the first one's threshold, NMS and number of detections are used, and boxes are
            in pixels of its images.
        switches: None: all off.
    """

    def __init__(self, members: Sequence[Member], switches: Switches | None = None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.switches = switches or Switches()

    @torch.no_grad()
    def forward(self, inputs: list[dict]) -> list[dict]:
        """Detections of a batch, in the format of ``GeneralizedRCNN.forward``.

        Args:
            inputs: as ``DatasetMapper`` gives them. Other scales and the images of other members
                are made from "original", (H, W, C) of the original size in the first member's
                channel order, or where that is not given from the file "file_name", or where
                neither is given from "image" itself.
        """
        if self.training:
            raise RuntimeError("the improvements are for inference: call eval() first")
        views = self._view_images(inputs)
        sizes = views[0].reference.sizes
        found = self._predict(views, self._propose(views))
        if self.switches.refinement:
            regions = [best_boxes(*image, size) for image, size in zip(found, sizes, strict=True)]
            passes = zip(found, self._predict(views, regions), strict=True)
            found = [tuple(map(torch.cat, zip(*image, strict=True))) for image in passes]
        results = [self._select(*image, size) for image, size in zip(found, sizes, strict=True)]
        heads = self.members[0].model.roi_heads
        results = heads.forward_with_given_boxes(views[0].reference.maps, results)
        return GeneralizedRCNN._postprocess(results, inputs, sizes)

    def _view_images(self, inputs: list[dict]) -> list[ImageViews]:
        first, sources = self.members[0], []
        if len(self.members) > 1 or first.scales != [first.short]:
            sources = [original_image(entry, first.format) for entry in inputs]
        views = [first.view_images([entry["image"] for entry in inputs], sources)]
        for member in self.members[1:]:
            turned = [in_format(source, first.format, member.format) for source in sources]
            resized = [member.resize(image, member.short) for image in turned]
            views.append(member.view_images(resized, turned))
        return views

    def _propose(self, views: list[ImageViews]) -> list[Tensor]:
        """The union of the members' proposals, of each image."""
        sizes = views[0].reference.sizes
        united = []
        for member, view in zip(self.members, views, strict=True):
            boxes = member.propose(view)
            united.append(change_frame(boxes, view.reference.sizes, sizes))
        return [torch.cat(of_image) for of_image in zip(*united, strict=True)]

    def _predict(self, views: list[ImageViews], boxes: list[Tensor]) -> Predictions:
        """The members' mean predictions for the same regions."""
        sizes = views[0].reference.sizes
        found = []
        for member, view in zip(self.members, views, strict=True):
            own = view.reference.sizes
            scores, regressed = zip(
                *member.predict(view, change_frame(boxes, sizes, own)), strict=True
            )
            found.append(zip(scores, change_frame(regressed, own, sizes), strict=True))
        return [mean_predictions(of_image) for of_image in zip(*found, strict=True)]

    def _select(self, scores: Tensor, boxes: Tensor, size: Size):
        predictor, refined = self.members[0].model.roi_heads.box_predictor, self.switches.refinement
        return select_detections(
            boxes,
            scores,
            size,
            score_threshold=predictor.test_score_thresh,
            nms_threshold=REFINEMENT_NMS if refined else predictor.test_nms_thresh,
            most=predictor.test_topk_per_image,
            nms=self.switches.nms,
            vote=refined,
        )


def best_boxes(scores: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """The regions that box refinement pools again, (R', 4).

    Args:
        scores: (R, K + 1), the background last.
        boxes: (R, K, 4).
        size: (height, width) of the image, to which they are clipped.

    Returns:
        Of each region the box of its best class; those without an area are left out.
    """
    best = scores[:, :-1].argmax(dim=1)
    chosen = boxes[torch.arange(len(boxes), device=boxes.device), best]
    chosen = chosen[chosen.isfinite().all(dim=1)]
    height, width = size
    chosen = torch.minimum(chosen.clamp(min=0), chosen.new_tensor([width, height] * 2))
    return chosen[(chosen[:, 2:] > chosen[:, :2]).all(dim=1)]


def original_image(entry: dict, image_format: str) -> np.ndarray:
    """The image of an input at its original size, (H, W, C); see :class:`ImprovedDetector`.

    Raises:
        ValueError: the file holds an image of another size than the input says.
    """
    if "original" in entry:
        return entry["original"]
    if "file_name" not in entry:
        return entry["image"].permute(1, 2, 0).cpu().numpy()
    image = read_image(entry["file_name"], image_format)
    expected = (entry.get("height", image.shape[0]), entry.get("width", image.shape[1]))
    if image.shape[:2] != expected:
        raise ValueError(
            f"{entry['file_name']} is {image.shape[1]} x {image.shape[0]}, its input says "
            f"{expected[1]} x {expected[0]}: other scales cannot be made from it"
        )
    return image


def in_format(image: np.ndarray, have: str, wanted: str) -> np.ndarray:
    """An image (H, W, C) with its channels in the other order, where the two differ."""
    return image if have == wanted else np.ascontiguousarray(image[:, :, ::-1])
