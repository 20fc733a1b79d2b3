"""What a measurement of whole detectors needs: given regions, steps, how detections differ."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import Tensor, nn

from resnet_backbone.cli.benchmark.reference import detector_config
from resnet_backbone.detection.engine.trainer import TolerantMapper


class GivenProposals(nn.Module):
    """A proposal network that does all of its work and then returns given boxes.

    Those of random weights are alike and few, and ours would differ from the reference's in their
    last bits and so in their order.
    """

    def __init__(self, network: nn.Module, boxes: Tensor):
        super().__init__()
        self.network = network
        self.boxes = boxes

    def forward(self, images, features, targets=None):
        _, losses = self.network(images, features, targets)
        return [self._proposals(size) for size in images.image_sizes], losses

    def _proposals(self, size: tuple[int, int]) -> Instances:
        scores = torch.linspace(5, -5, len(self.boxes))
        return Instances(size, proposal_boxes=Boxes(self.boxes), objectness_logits=scores)


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, 4) boxes within the image; sides are log-uniform in 1/50 to 1 of the image's."""
    size = torch.tensor([width, height])
    sides = size * 50 ** (torch.rand(count, 2, generator=generator) - 1)
    corners = torch.rand(count, 2, generator=generator) * (size - sides)
    return torch.cat([corners, corners + sides], 1)


def build_inputs(size: tuple[int, int], batch: int, count: int) -> tuple[list[dict], Tensor]:
    """Images of (height, width) with seven objects each, and ``count`` boxes to propose.

    The boxes are random, every fourth is near an object.
    """
    generator = torch.Generator().manual_seed(0)
    objects = random_boxes(7, *size, generator)
    inputs = []
    for _ in range(batch):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        classes = torch.arange(7) * 11
        instances = Instances(size, gt_boxes=Boxes(objects), gt_classes=classes)
        inputs.append({"image": image, "instances": instances, "height": size[0], "width": size[1]})
    boxes = random_boxes(count, *size, generator)
    near = objects.repeat(len(boxes) // len(objects) + 1, 1)[: len(boxes) : 4]
    boxes[::4] = near * (0.95 + 0.1 * torch.rand(near.shape, generator=generator))
    boxes = torch.cat([boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])], 1)
    boxes[:, 0::2].clamp_(0, size[1])
    boxes[:, 1::2].clamp_(0, size[0])
    return inputs, boxes


@torch.no_grad()
def spread_scores(model: nn.Module, inputs: list[dict], boxes: Tensor) -> None:
    """Scales the last layer's weights: logits with a standard deviation of 2, deltas of 0.1."""
    model.eval()
    found = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda *call: found.append(call[2]))
    network = model.proposal_generator
    model.proposal_generator = GivenProposals(network, boxes)
    model(inputs)
    model.proposal_generator = network
    hook.remove()
    scores, deltas = found[0]
    predictor = model.roi_heads.box_predictor
    predictor.cls_score.weight.mul_(2 / scores.std(0).mean())
    predictor.bbox_pred.weight.mul_(0.1 / deltas.std(0).mean())


def train_step(
    model: nn.Module, optimizer, inputs: list[dict], bf16: bool = False
) -> dict[str, float]:
    """One step with the same sampling of anchors and regions each time; returns the losses."""
    model.train()
    torch.manual_seed(0)
    with EventStorage():
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            losses = model(inputs)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def detections_differ(found: list[Instances], expected: list[Instances]) -> dict[str, float]:
    """How detections differ from the reference's.

    Returns:
        detections: of the reference. unmatched: share of these for which there is none of the
        same class with an IoU of 0.9 or more. score: the largest difference of a matched score.
    """
    count = matched = 0
    score = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        count += len(theirs)
        if not len(ours) or not len(theirs):
            continue
        overlap = pairwise_iou(theirs.pred_boxes, ours.pred_boxes)
        overlap[theirs.pred_classes[:, None] != ours.pred_classes] = 0
        best, index = overlap.max(1)
        is_match = best >= 0.9
        matched += int(is_match.sum())
        differences = (theirs.scores - ours.scores[index]).abs()[is_match]
        score = max(score, float(differences.max()) if len(differences) else 0.0)
    return {"detections": count, "unmatched": 1 - matched / max(1, count), "score": score}


def mapper_seconds(folder: Path, calls: int = 10) -> float:
    """Median time of reading and augmenting one training image of 500x375, in one process."""
    path = folder / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375), Image.BICUBIC).save(path, quality=90)
    annotation = {"bbox": [10.0, 20.0, 300.0, 200.0], "bbox_mode": 0, "category_id": 1}
    record = {"file_name": str(path), "height": 375, "width": 500, "image_id": 0}
    record["annotations"] = [{**annotation, "iscrowd": 0}] * 5
    mapper = TolerantMapper(detector_config("fpn", True), True)
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        mapper(record)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
