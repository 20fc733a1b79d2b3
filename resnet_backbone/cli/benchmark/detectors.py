"""Faster R-CNN beside Detectron2's: whole passes and steps."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from resnet_backbone.cli.benchmark import turns
from resnet_backbone.cli.benchmark.pyramid import BF16, Pass, candidates, config
from resnet_backbone.detection import references
from resnet_backbone.detection.checkpoint.input_check import networks
from resnet_backbone.detection.data.mapper import TolerantMapper
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.fast.engines import relative_difference

CALIBRATION = 16  # regions


class Setting(NamedTuple):
    arch: str  # fpn or c4
    proposals: int  # per image, in inference
    regions: int  # per image, in training
    height: int
    width: int
    batch: int
    depth: int = 50


def run_detect(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    forms = turns.forms_of(args)
    for arch in args.arch:
        size = args.regions, args.height, args.width, args.batch, args.depth
        settings = [Setting(arch, number, *size) for number in args.proposals]
        pair, names = build_detectors(max(settings, key=lambda one: one.proposals)), []
        titles = {f"{arch}, inference, {s.proposals} proposals": ("inference", s) for s in settings}
        titles[f"{arch}, training step, {args.regions} regions"] = ("training", settings[0])
        for title, (kind, setting) in titles.items():
            if kind not in args.kind:
                continue
            found = detector_candidates((setting, forms), kind, pair)
            timed = [(kind, name) for name in found if not name.endswith("compile")]
            names += [name for name in timed if name not in names]
            if args.no_speed:
                continue
            passes = {name: make() for name, make in found.items()}
            count = (args.batch, args.repeats)
            result[title] = turns.compare_and_measure(title, passes, DIFFERENCE[kind], *count)
            if kind == "training":
                seconds, rows = mapper_seconds(), result[title]["rows"]
                share = seconds * max(row["images_per_s"]["median"] for row in rows)
                print(f"data: {1000 * seconds:.0f} ms an image, {share:.1%} of the fastest step")
                result[title]["data_seconds"] = seconds
        if not args.no_memory:
            found = turns.measure_memory(detector_candidates, (settings[0], forms), names)
            result[f"{arch}, memory_mb"] = found
    return result


def build_detectors(setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Builds Detectron2's detector and ours, with the same random weights and realistic scores."""
    cfg, pair = config(setting.arch, setting.regions, depth=setting.depth), []
    for make in (references.build_reference, Trainer.build_model):
        torch.manual_seed(0)
        pair.append(make(cfg))
    theirs, ours = pair
    turns.randomize_norms(theirs)
    inputs, boxes = random_inputs(setting)
    spread_scores(theirs, inputs[:1], boxes[:CALIBRATION])
    ours.load_state_dict(theirs.state_dict())
    for model in pair:
        model.proposal_generator = references.GivenProposals(model.proposal_generator, boxes)
    return theirs, ours


def prepare_detector(kind: str, setting: Setting) -> Callable[..., Pass]:
    inputs, _ = random_inputs(setting)

    def prepare(model: nn.Module, **options: bool) -> Pass:
        if kind == "inference":
            return partial(infer_detector, model, inputs, setting.proposals)
        # a rate of 0 keeps the weights for the next turn, at the same work
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
        return partial(train_step, model, optimizer, inputs, **options)

    return prepare


def detector_candidates(
    given: tuple[Setting, Sequence[tuple[str, str]]], kind: str, pair: tuple = ()
) -> dict[str, Callable[[], Pass]]:
    setting, forms = given
    inputs, _ = random_inputs(setting)
    pair = pair or build_detectors(setting)
    return candidates(*pair, kind, prepare_detector(kind, setting), forms, inputs)


@torch.no_grad()
def infer_detector(model: nn.Module, inputs: list[dict], proposals: int) -> list:
    model.eval()
    given = model.proposal_generator
    boxes, given.boxes = given.boxes, given.boxes[:proposals]
    outputs = model(inputs)
    given.boxes = boxes
    return [output["instances"] for output in outputs]


def train_step(
    model: nn.Module,
    optimizer,
    inputs: list[dict],
    bf16: bool = False,
    checkpointed: bool = False,
) -> dict[str, float]:
    """Makes a step, always with the same sampling of anchors and regions; returns the losses."""
    for network in networks(model.train()).values():
        network.set_grad_checkpointing(checkpointed)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=BF16, enabled=bf16):
        losses = references.losses_of(model, inputs)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Returns boxes (count, 4) in the image, with log-uniform sides of 1/50 to 1 of its sides."""
    size = torch.tensor([width, height])
    sides = size * 50 ** (torch.rand(count, 2, generator=generator) - 1)
    corners = torch.rand(count, 2, generator=generator) * (size - sides)
    return torch.cat([corners, corners + sides], 1)


def random_inputs(setting: Setting) -> tuple[list[dict], Tensor]:
    """Returns images with seven objects each, and random proposals, every fourth near an object."""
    generator, size = torch.Generator().manual_seed(0), (setting.height, setting.width)
    real = random_boxes(7, *size, generator)
    boxes = references.Boxes(real)
    truth = references.Instances(size, gt_boxes=boxes, gt_classes=torch.arange(7) * 11)
    inputs: list[dict] = []
    for _ in range(setting.batch):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": truth, "height": size[0], "width": size[1]})
    boxes = random_boxes(max(setting.proposals, setting.regions), *size, generator)
    near = real.repeat(len(boxes) // len(real) + 1, 1)[: len(boxes) : 4]
    boxes[::4] = near * (0.95 + 0.1 * torch.rand(near.shape, generator=generator))
    boxes = torch.cat([boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])], 1)
    return inputs, clip_boxes_to_image(boxes, size)


@torch.no_grad()
def spread_scores(model: nn.Module, inputs: list[dict], boxes: Tensor) -> None:
    """Scales the last layer's weights to standard deviations of 2 (logits) and 0.1 (deltas)."""
    model.eval()
    predictor, network, found = model.roi_heads.box_predictor, model.proposal_generator, []
    hook = predictor.register_forward_hook(lambda *call: found.append(call[2]))
    model.proposal_generator = references.GivenProposals(network, boxes)
    model(inputs)
    model.proposal_generator = network
    hook.remove()
    scores, deltas = found[0]
    predictor.cls_score.weight.mul_(2 / scores.std(0).mean())
    predictor.bbox_pred.weight.mul_(0.1 / deltas.std(0).mean())


def losses_differ(found: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    pairs = {name: (torch.tensor(found[name]), torch.tensor(expected[name])) for name in expected}
    return {name: relative_difference(*pair) for name, pair in pairs.items()}


def detections_differ(found: list, expected: list) -> dict[str, float]:
    """Compares detections with the reference's.

    Returns:
        detections: their number in the reference. unmatched: share of these without a detection of
        the same class at an IoU of at least 0.9. score: the largest difference of matched scores.
    """
    count, differences = 0, []
    for ours, theirs in zip(found, expected, strict=True):
        count += len(theirs)
        if not len(ours):
            continue
        overlap = box_iou(theirs.pred_boxes.tensor, ours.pred_boxes.tensor)
        overlap[theirs.pred_classes[:, None] != ours.pred_classes] = 0
        best, index = overlap.max(1)
        differences += (theirs.scores - ours.scores[index]).abs()[best >= 0.9].tolist()
    unmatched = 1 - len(differences) / max(1, count)
    return {"detections": count, "unmatched": unmatched, "score": max(differences, default=0.0)}


def mapper_seconds(calls: int = 10) -> float:
    """Returns the median seconds to read and augment a training image of 500x375."""
    noise = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    annotation = {"bbox": [10.0, 20.0, 300.0, 200.0], "bbox_mode": 0, "category_id": 1}
    record = {"height": 375, "width": 500, "image_id": 0}
    record["annotations"] = [{**annotation, "iscrowd": 0}] * 5
    mapper, times = TolerantMapper(config("fpn"), True), []
    with TemporaryDirectory() as folder:
        record["file_name"] = str(Path(folder, "image.jpg"))
        picture = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(record["file_name"], quality=90)
        for _ in range(calls + 1):
            start = time.perf_counter()
            mapper(record)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


DIFFERENCE = {"inference": detections_differ, "training": losses_differ}
