"""Faster R-CNN with the paper's improvements at test time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_backbone.detection.inference.ensemble import load_run
from resnet_backbone.detection.inference.member import (
    Member,
    Sight,
    Size,
    change_frame,
    mean_predictions,
)
from resnet_backbone.detection.inference.switches import Switches, read_switches
from resnet_backbone.detection.inference.voting import select_detections

REFINEMENT_NMS = 0.3
ALL_OFF = Switches()
Predictions = list[tuple[Tensor, Tensor]]  # of each image: scores (R, K + 1), boxes (R, K, 4)


def improve(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A detector with the improvements that ``RESNET_BACKBONE.TEST`` asks for.

    ``TEST.AUG.ENABLED``, Detectron2's own test-time augmentation, is honoured as well.

    Args:
        cfg: the detector's own; ``TEST.ENSEMBLE`` names the runs of the others, which are loaded
            here.
        model: with or without ``DistributedDataParallel``.

    Returns:
        `model` itself where all switches are off.

    Raises:
        UsageError: see :func:`read_switches`, :class:`Member`; other classes in an ensemble.
        WeightsError: of a run of the ensemble.
    """
    switches = read_switches(cfg)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    if cfg.TEST.AUG.ENABLED:
        return GeneralizedRCNNWithTTA(cfg, bare).train(model.training)
    if not switches.any:
        return model
    members = [Member(cfg, bare, switches.scales, switches.flip)]
    for run in switches.ensemble:
        other, detector = load_run(run, cfg)
        members.append(Member(other, detector, switches.scales, switches.flip))
    return ImprovedDetector(members, switches).train(model.training)


class ImprovedDetector(nn.Module):
    """Faster R-CNN whose proposals, regions and boxes pass through the improvements, in order.

    1. Proposals of all members, united; each at its own test scale.
    2. Every member scores and regresses all of them, on the scales and mirror images that it is
       told to (:class:`Member`). Scores and boxes are averaged over the members.
    3. Box refinement: of every proposal the box of its best class (the background aside), clipped
       to the image, is a region itself, which step 2 is done with once more. These predictions
       join the first ones; NMS at .3 is followed by box voting. (The paper speaks of "300 new
       predictions" of 300 proposals and does not say which class's box is pooled; with a
       regressor per class there are K.)
    4. NMS or soft-NMS; with refinement at .3 in place of ``MODEL.ROI_HEADS.NMS_THRESH_TEST``, and
       with soft-NMS voters count with the scores that they had before it.

    With all switches off it gives what ``GeneralizedRCNN.inference`` gives, bit for bit. Masks
    and keypoints are the first member's, of its test scale.

    Args:
        members: the first decides the threshold, the NMS and the number of detections; boxes are
            in pixels of its images in between.
    """

    def __init__(self, members: Sequence[Member], switches: Switches = ALL_OFF):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.switches = switches

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
        sights = self._see(inputs)
        sizes = sights[0].reference.sizes
        found = self._predict(sights, self._propose(sights))
        if self.switches.refinement:
            regions = [best_boxes(*image, size) for image, size in zip(found, sizes, strict=True)]
            found = unite(found, self._predict(sights, regions))
        results = [self._select(*image, size) for image, size in zip(found, sizes, strict=True)]
        heads = self.members[0].model.roi_heads
        results = heads.forward_with_given_boxes(sights[0].reference.maps, results)
        return GeneralizedRCNN._postprocess(results, inputs, sizes)

    def _see(self, inputs: list[dict]) -> list[Sight]:
        first, sources = self.members[0], []
        if len(self.members) > 1 or first.scales != [first.short]:
            sources = [original_image(entry, first.format) for entry in inputs]
        sights = [first.see([entry["image"] for entry in inputs], sources)]
        for member in self.members[1:]:
            turned = [in_format(source, first.format, member.format) for source in sources]
            sights.append(member.see([member.resize(x, member.short) for x in turned], turned))
        return sights

    def _propose(self, sights: list[Sight]) -> list[Tensor]:
        """The union of the members' proposals, of each image."""
        sizes = sights[0].reference.sizes
        united = []
        for member, sight in zip(self.members, sights, strict=True):
            boxes = member.propose(sight)
            united.append(change_frame(boxes, sight.reference.sizes, sizes))
        return [torch.cat(of_image) for of_image in zip(*united, strict=True)]

    def _predict(self, sights: list[Sight], boxes: list[Tensor]) -> Predictions:
        """The members' mean predictions for the same regions."""
        sizes = sights[0].reference.sizes
        found = []
        for member, sight in zip(self.members, sights, strict=True):
            own = sight.reference.sizes
            scores, regressed = zip(
                *member.predict(sight, change_frame(boxes, sizes, own)), strict=True
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


def unite(first: Predictions, second: Predictions) -> Predictions:
    """All predictions of two passes over the same images."""
    pairs = zip(first, second, strict=True)
    return [(torch.cat([s, t]), torch.cat([b, c])) for (s, b), (t, c) in pairs]


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
