"""Faster R-CNN with the paper's test-time improvements (appendix B)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import check_image_size
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import box_iou

from resnet_backbone.detection.config import DEFAULTS, UsageError, backbone_node
from resnet_backbone.detection.data.problems import read_image
from resnet_backbone.detection.evaluation import METRICS
from resnet_backbone.detection.inference.member import (
    ImageViews,
    Member,
    Predictions,
    Size,
    change_frame,
    mean_predictions,
)
from resnet_backbone.fast.engines import check_engine

REFINEMENT_NMS = 0.3
VOTING_IOU = 0.5
SOFT_NMS_SIGMA = 0.5  # of the Gaussian (arXiv 1704.04503, section 6.1)
SOFT_NMS_LEAST = 0.001  # boxes with lower decayed scores are dropped, as in the authors' code
CHOICES = {
    "METRIC": ("", *METRICS),
    "NMS": ("hard", "agnostic", "linear", "gaussian"),
    "PRECISION": ("float32", "bfloat16", "float16", "int8"),
}
KEY = "RESNET_BACKBONE.TEST"


class Switches(NamedTuple):
    """The improvements of ``RESNET_BACKBONE.TEST.*``."""

    refinement: bool = False  # box refinement
    scales: tuple[int, ...] = ()  # short sides in pixels, ascending; empty: the test scale alone
    flip: bool = False  # use the mirrored image too
    nms: str = "hard"  # one of CHOICES["NMS"]
    ensemble: tuple[str, ...] = ()  # run folders of further detectors


def read_switches(cfg: CfgNode) -> Switches:
    """Reads the switches; UsageError if they contradict each other or the kind of detector."""
    node, dtype = backbone_node(cfg).TEST, read_precision(cfg)
    try:
        check_engine(node.ENGINE, dtype, torch.device(cfg.MODEL.DEVICE))
    except ValueError as error:
        raise UsageError(f"{KEY}.ENGINE: {error}") from error
    if node.ENSEMBLE and node.ENGINE != "eager":
        raise UsageError(f"{KEY}.ENSEMBLE: all members run in PyTorch: set {KEY}.ENGINE eager")
    check_scales(cfg, node.SCALES)
    scales, runs = tuple(sorted(node.SCALES)), tuple(node.ENSEMBLE)
    switches = Switches(node.BOX_REFINEMENT, scales, node.FLIP, _choice(cfg, "NMS"), runs)
    is_improved = switches != Switches()
    if cfg.TEST.AUG.ENABLED and is_improved:
        raise UsageError(
            f"TEST.AUG.ENABLED (Detectron2's union of detections) excludes {KEY}.* (the paper's "
            "improvements): turn one of them off"
        )
    _choice(cfg, "METRIC")
    if is_improved and cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        raise UsageError(f"{KEY}.* needs heads of one stage, not CascadeROIHeads: turn it off")
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.KEYPOINT_ON:
        raise UsageError("TEST.AUG does not support keypoints in Detectron2: turn it off")
    kind = cfg.MODEL.META_ARCHITECTURE
    is_joined = kind == "LocalizationRCNN" and runs and switches == Switches(ensemble=runs)
    if (is_improved or cfg.TEST.AUG.ENABLED) and kind != "GeneralizedRCNN" and not is_joined:
        raise UsageError(
            f"{KEY}.* and TEST.AUG need GeneralizedRCNN (ENSEMBLE: or LocalizationRCNN), but "
            f"MODEL.META_ARCHITECTURE is {kind}: turn them off"
        )
    return switches


def switches_off() -> list[str]:
    """Returns ``KEY VALUE`` pairs that turn off all of a run's own ``TEST``, except its metric."""
    off = ["TEST.AUG.ENABLED", "False"]
    for key in DEFAULTS.TEST.keys() - {"METRIC"}:
        off += [f"{KEY}.{key}", str(DEFAULTS.TEST[key])]
    return off


def read_precision(cfg: CfgNode) -> torch.dtype:
    """Reads ``RESNET_BACKBONE.TEST.PRECISION``; UsageError if other settings rule it out."""
    name, node = _choice(cfg, "PRECISION"), backbone_node(cfg).TEST
    if (name == "int8") != bool(node.CALIBRATION):
        hint = "int8 and CALIBRATION, a folder of images, need each other"
        raise UsageError(f"{KEY}.PRECISION {name}: {hint}")
    if node.CALIBRATION and not os.path.isdir(node.CALIBRATION):
        raise UsageError(f"{KEY}.CALIBRATION {node.CALIBRATION}: no such folder")
    return getattr(torch, name)


def _choice(cfg: CfgNode, key: str) -> str:
    value = backbone_node(cfg).TEST[key]
    if value not in CHOICES[key]:
        raise UsageError(f"{KEY}.{key} {value!r} is not one of {', '.join(CHOICES[key])}")
    return value


def check_scales(cfg: CfgNode, scales: Sequence[int]) -> None:
    """Raises UsageError for invalid scales or a detector without a test scale."""
    whole = all(isinstance(scale, int) and scale > 0 for scale in scales)
    if not whole or len(set(scales)) < len(scales):
        hint = "give short sides in whole pixels, each once, such as [200, 400, 600, 800, 1000]"
        raise UsageError(f"{KEY}.SCALES {list(scales)}: {hint}")
    if scales and cfg.INPUT.MIN_SIZE_TEST <= 0:
        raise UsageError(f"{KEY}.SCALES needs INPUT.MIN_SIZE_TEST above 0, the proposals' scale")


class ImprovedDetector(nn.Module):
    """Faster R-CNN with the improvements, in this order.

    1. Proposals: the union over all members, each at its own test scale.
    2. Every member scores and regresses all proposals, on its scales and mirrored images
       (:class:`Member`). Scores and boxes are averaged over the members.
    3. Box refinement: the box that a proposal's best class (except background) regresses to is
       clipped to the image and becomes another region, for which step 2 is repeated. Its
       predictions join the first ones, and box voting follows NMS. (The paper does not say which
       class's box is pooled.)
    4. NMS or soft-NMS; with refinement at .3 instead of ``MODEL.ROI_HEADS.NMS_THRESH_TEST``.
       With soft-NMS, votes are weighted with the scores before it.

    With all switches off, the results equal ``GeneralizedRCNN.inference`` bit for bit. Masks and
    keypoints come from the first member, at its test scale.

    Args:
        members: the first one's thresholds and number of detections apply, and boxes are in pixels
            of its images.
        switches: None turns all of them off.
    """

    def __init__(self, members: Sequence[Member], switches: Switches | None = None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.switches = switches or Switches()

    @torch.no_grad()
    def forward(self, inputs: list[dict]) -> list[dict]:
        """Returns detections of a batch, in the format of ``GeneralizedRCNN.forward``.

        Inputs are ``DatasetMapper`` outputs. Images at other scales and for other members are made
        from "original" (H, W, C), at the original size and in the first member's channel order,
        else from the file "file_name", else from "image".
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
            turned = sources
            if member.format != first.format:
                turned = [np.ascontiguousarray(source[:, :, ::-1]) for source in sources]
            resized = [member.resize(image, member.short) for image in turned]
            views.append(member.view_images(resized, turned))
        return views

    def _propose(self, views: list[ImageViews]) -> list[Tensor]:
        """Returns the union of the members' proposals for each image."""
        sizes = views[0].reference.sizes
        united = [
            change_frame(member.propose(view), view.reference.sizes, sizes)
            for member, view in zip(self.members, views, strict=True)
        ]
        return [torch.cat(of_image) for of_image in zip(*united, strict=True)]

    def _predict(self, views: list[ImageViews], boxes: list[Tensor]) -> Predictions:
        """Returns the mean of the members' predictions for the same regions."""
        sizes = views[0].reference.sizes
        found = []
        for member, view in zip(self.members, views, strict=True):
            own = view.reference.sizes
            predictions = member.predict(view, change_frame(boxes, sizes, own))
            scores, regressed = zip(*predictions, strict=True)
            found.append(zip(scores, change_frame(regressed, own, sizes), strict=True))
        return [mean_predictions(of_image) for of_image in zip(*found, strict=True)]

    def _select(self, scores: Tensor, boxes: Tensor, size: Size):
        predictor, refined = self.members[0].model.roi_heads.box_predictor, self.switches.refinement
        limits = dict(
            score_threshold=predictor.test_score_thresh,
            nms_threshold=REFINEMENT_NMS if refined else predictor.test_nms_thresh,
            most=predictor.test_topk_per_image,
        )
        return select_detections(boxes, scores, size, **limits, nms=self.switches.nms, vote=refined)


def best_boxes(scores: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Returns the regions (R', 4) of box refinement: each proposal's box of its best class.

    Scores are (R, K + 1), background last. Boxes (R, K, 4) are clipped to the image, and empty ones
    are dropped.
    """
    best = scores[:, :-1].argmax(dim=1)
    chosen = boxes[torch.arange(len(boxes), device=boxes.device), best]
    regions = Boxes(chosen[chosen.isfinite().all(dim=1)])
    regions.clip(size)
    return regions.tensor[regions.nonempty()]


def original_image(entry: dict, image_format: str) -> np.ndarray:
    """Returns an input's image at its original size, (H, W, C); see :class:`ImprovedDetector`."""
    if "original" in entry:
        return entry["original"]
    if "file_name" not in entry:
        return entry["image"].permute(1, 2, 0).cpu().numpy()
    image = read_image(entry["file_name"], image_format)
    check_image_size(dict(entry), image)
    return image


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    score_threshold: float,
    nms_threshold: float,
    most: int,
    nms: str = "hard",
    vote: bool = False,
) -> Instances:
    """Returns the detections of one image; NMS is per class unless it is agnostic.

    With hard NMS and no voting this is Detectron2's ``fast_rcnn_inference_single_image``.

    Args:
        boxes: (R, K, 4), xyxy in pixels, one box per region and class. They are clipped here.
        scores: (R, K + 1), background last.
        image_size: (height, width).
        score_threshold: boxes with higher scores take part in NMS.
        nms_threshold: IoU threshold of hard NMS and of linear soft-NMS.
        most: maximum number of detections; negative for no limit.
        nms: hard; agnostic, over all classes together; linear or gaussian, see :func:`soft_nms`.
        vote: apply :func:`vote_boxes` with all boxes of the class, even below the threshold.
    """
    finite = torch.isfinite(boxes).flatten(1).all(dim=1) & torch.isfinite(scores).all(dim=1)
    boxes, scores = boxes[finite], scores[finite, :-1]
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(image_size)
    boxes = clipped.tensor.view(boxes.shape)
    candidates = scores > score_threshold
    classes = candidates.nonzero()[:, 1]
    found, found_scores = boxes[candidates], scores[candidates]
    if nms in ("hard", "agnostic"):
        groups = classes if nms == "hard" else torch.zeros_like(classes)
        keep = batched_nms(found, found_scores, groups, nms_threshold)
        kept_scores = found_scores[keep]
    else:
        keep, kept_scores = batched_soft_nms(found, found_scores, classes, nms, nms_threshold)
    if most >= 0:
        keep, kept_scores = keep[:most], kept_scores[:most]
    kept, kept_classes = found[keep], classes[keep]
    kept = vote_boxes(kept, kept_classes, boxes, scores) if vote else kept
    fields = dict(pred_boxes=Boxes(kept), scores=kept_scores, pred_classes=kept_classes)
    return Instances(image_size, **fields)


def vote_boxes(kept: Tensor, classes: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
    """Box voting (Gidaris and Komodakis, arXiv 1505.01749, section 5).

    Each kept box (M, 4) becomes the mean, weighted with max(0, score), of the boxes (R, K, 4) of
    its class whose IoU with it is above .5, itself included. If all weights are zero, it is
    unchanged. Classes are (M,), scores (R, K).
    """
    voted = kept.clone()
    for label in classes.unique():
        mine, voters = classes == label, boxes[:, label]
        weights = (box_iou(kept[mine], voters) > VOTING_IOU) * scores[:, label].clamp(min=0)
        total = weights.sum(dim=1, keepdim=True)
        with torch.autocast(boxes.device.type, enabled=False):  # bf16 has steps of 4 pixels at 600
            mean = weights @ voters / total
        voted[mine] = torch.where(total > 0, mean, kept[mine])
    return voted


def soft_nms(boxes: Tensor, scores: Tensor, kind: str, threshold: float) -> tuple[Tensor, Tensor]:
    """Soft-NMS (arXiv 1704.04503): decays the scores of boxes (M, 4) that overlap a better one.

    Repeatedly takes the best box and multiplies the scores (M,) of all others: for `kind` linear by
    1 - IoU where the IoU is at least `threshold`, for gaussian by exp(-IoU^2 / .5). Boxes whose
    score falls below .001 are dropped.

    Returns:
        Indices of the boxes by descending decayed score, and these scores.
    """
    overlaps = box_iou(boxes, boxes).nan_to_num(0.0)
    if kind == "linear":
        decays = torch.where(overlaps >= threshold, 1 - overlaps, 1.0)
    else:
        decays = torch.exp(-(overlaps**2) / SOFT_NMS_SIGMA)
    left, decayed, taken = scores.clone(), scores.clone(), []
    while len(taken) < len(boxes):
        best = int(left.argmax())
        if left[best] < SOFT_NMS_LEAST:
            break
        taken.append(best)
        decayed[best] = left[best]
        left *= decays[best]
        left[best] = -1
    order = torch.tensor(taken, dtype=torch.long, device=scores.device)
    return order, decayed[order]


def batched_soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, kind: str, threshold: float
) -> tuple[Tensor, Tensor]:
    """:func:`soft_nms` within each class; returns indices and scores in descending order."""
    indices, decayed = [classes.new_zeros(0)], [scores.new_zeros(0)]
    for label in classes.unique():
        mine = (classes == label).nonzero()[:, 0]
        taken, taken_scores = soft_nms(boxes[mine], scores[mine], kind, threshold)
        indices.append(mine[taken])
        decayed.append(taken_scores)
    kept, kept_scores = torch.cat(indices), torch.cat(decayed)
    order = kept_scores.argsort(descending=True, stable=True)
    return kept[order], kept_scores[order]
