"""From scored boxes to detections: NMS or soft-NMS, and box voting."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_iou

VOTING_IOU = 0.5
SOFT_NMS_SIGMA = 0.5  # of the Gaussian (arXiv 1704.04503, section 6.1)
SOFT_NMS_LEAST = 0.001  # decayed scores below it end a box, as in the authors' released code


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
    """Detections of one image.

    With hard NMS and without voting this is Detectron2's ``fast_rcnn_inference_single_image``,
    bit for bit. NMS is per class.

    Args:
        boxes: (R, K, 4), xyxy in pixels, one box per region and class. They are clipped here.
        scores: (R, K + 1), the background last.
        image_size: (height, width).
        score_threshold: boxes with higher scores take part in NMS.
        nms_threshold: IoU from which hard NMS removes and linear soft-NMS decays.
        most: the best so many are kept; all where it is negative.
        nms: hard, linear or gaussian, see :func:`soft_nms`.
        vote: :func:`vote_boxes` with all boxes of the class, those below the threshold included.

    Returns:
        pred_boxes, scores, pred_classes in order of descending scores.
    """
    finite = torch.isfinite(boxes).flatten(1).all(dim=1) & torch.isfinite(scores).all(dim=1)
    boxes, scores = boxes[finite], scores[finite, :-1]
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(image_size)
    boxes = clipped.tensor.view(boxes.shape)
    candidates = scores > score_threshold
    classes = candidates.nonzero()[:, 1]
    found, found_scores = boxes[candidates], scores[candidates]
    if nms == "hard":
        keep = batched_nms(found, found_scores, classes, nms_threshold)
        kept_scores = found_scores[keep]
    else:
        keep, kept_scores = batched_soft_nms(found, found_scores, classes, nms, nms_threshold)
    if most >= 0:
        keep, kept_scores = keep[:most], kept_scores[:most]
    result = Instances(image_size)
    kept, kept_classes = found[keep], classes[keep]
    result.pred_boxes = Boxes(vote_boxes(kept, kept_classes, boxes, scores) if vote else kept)
    result.scores = kept_scores
    result.pred_classes = kept_classes
    return result


def vote_boxes(kept: Tensor, classes: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
    """Box voting (Gidaris and Komodakis, arXiv 1505.01749, section 5).

    A kept box becomes the mean of the boxes of its class that overlap it with an IoU above .5,
    itself included, weighted with max(0, score). Where these weights are all zero it stays.

    Args:
        kept: (M, 4), after NMS.
        classes: (M,) of the kept boxes.
        boxes, scores: (R, K, 4) and (R, K), all that there were before NMS.

    Returns:
        (M, 4)
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
    """Soft-NMS (arXiv 1704.04503): boxes near a better one keep a part of their score.

    The best box is taken, the scores of all others are multiplied, and so on: linear with
    1 - IoU where the IoU is at least `threshold`, gaussian with exp(-IoU^2 / .5). What falls
    below .001 is left out.

    Args:
        boxes: (M, 4).
        scores: (M,).
        kind: linear or gaussian.

    Returns:
        Indices in the order in which they were taken, and their scores, descending.
    """
    overlaps, scores = box_iou(boxes, boxes), scores.clone()
    taken, taken_scores = [], []
    while len(taken) < len(boxes):
        best = scores.argmax()
        if scores[best] < SOFT_NMS_LEAST:
            break
        taken.append(best)
        taken_scores.append(scores[best].clone())
        overlap = overlaps[best].nan_to_num(0.0)
        if kind == "linear":
            decay = torch.where(overlap >= threshold, 1 - overlap, 1.0)
        else:
            decay = torch.exp(-(overlap**2) / SOFT_NMS_SIGMA)
        scores *= decay
        scores[best] = -1
    if not taken:
        return scores.new_zeros(0, dtype=torch.long), scores.new_zeros(0)
    return torch.stack(taken), torch.stack(taken_scores)


def batched_soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, kind: str, threshold: float
) -> tuple[Tensor, Tensor]:
    """:func:`soft_nms` within each class; indices into all boxes and scores, descending."""
    indices = [torch.zeros(0, dtype=torch.long, device=boxes.device)]
    decayed = [scores.new_zeros(0)]
    for label in classes.unique():
        mine = (classes == label).nonzero()[:, 0]
        taken, taken_scores = soft_nms(boxes[mine], scores[mine], kind, threshold)
        indices.append(mine[taken])
        decayed.append(taken_scores)
    kept, kept_scores = torch.cat(indices), torch.cat(decayed)
    order = kept_scores.argsort(descending=True, stable=True)
    return kept[order], kept_scores[order]
