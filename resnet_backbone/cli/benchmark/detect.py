"""Faster R-CNN R-50-FPN and R-50-C4: Detectron2's own model beside ours, whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from resnet_backbone.cli.benchmark.detectors import (
    GivenProposals,
    build_inputs,
    spread_scores,
    train_step,
)
from resnet_backbone.cli.benchmark.interleaved import randomize_norms, relative_difference
from resnet_backbone.cli.benchmark.memory import report_peak, run_fresh
from resnet_backbone.cli.benchmark.reference import build_detector
from resnet_backbone.fast import optimize_for_inference

BF16 = torch.bfloat16
REFERENCE = "Detectron2, fp32"
# name -> arguments of optimize_for_inference; None: as built
INFERENCE: dict[str, dict | None] = {
    "ours, fp32, as built": None,
    "ours, fp32, optimized": {},
    "ours, bf16, optimized": {"dtype": BF16},
}
TRAINING = ("ours, fp32, as built", "ours, bf16 autocast, as built")
CALIBRATION = 16  # regions


class Setting(NamedTuple):
    """What a pass works on."""

    arch: str  # fpn or c4
    proposals: int  # per image, in inference
    regions: int  # per image, in training
    height: int
    width: int
    batch: int

    def inputs(self) -> tuple:
        """Images, and enough boxes for inference and training."""
        count = max(self.proposals, self.regions)
        return build_inputs((self.height, self.width), self.batch, count)


def build_pair(setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Detectron2's detector and ours with the same random weights.

    Scales of the last layer are such that some scores are high.
    """
    theirs, ours = (build_detector(setting.arch, own, setting.regions) for own in (False, True))
    randomize_norms(theirs)
    inputs, boxes = setting.inputs()
    spread_scores(theirs, inputs[:1], boxes[:CALIBRATION])
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        model.proposal_generator = GivenProposals(model.proposal_generator, boxes)
    return theirs, ours


@torch.no_grad()
def infer(model: nn.Module, inputs: list[dict], proposals: int) -> list:
    """Detections of images, of the first ``proposals`` boxes."""
    model.eval()
    given = model.proposal_generator
    boxes, given.boxes = given.boxes, given.boxes[:proposals]
    try:
        return [output["instances"] for output in model(inputs)]
    finally:
        given.boxes = boxes


def build_passes(
    setting: Setting, theirs: nn.Module | None, ours: nn.Module | None, kind: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, pass) of a kind, "inference" or "training"; the first is the reference.

    Without one of the networks, its passes are left out.
    """
    inputs, _ = setting.inputs()
    named = [(REFERENCE, theirs, None)]
    named += [(n, ours, o) for n, o in (INFERENCE if kind == "inference" else {}).items()]
    named += [(name, ours, None) for name in (TRAINING if kind == "training" else ())]
    for name, model, options in named:
        if model is None:
            continue
        if kind == "inference":
            fast = model if options is None else optimize_for_inference(model, **options)
            yield name, partial(infer, fast, inputs, setting.proposals)
        else:  # a rate of 0 keeps the weights for the next turn, at the same work
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
            yield name, partial(train_step, model, optimizer, inputs, "bf16" in name)


def losses_differ(found: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    """:func:`relative_difference` of each loss from the reference's."""
    return {
        name: relative_difference(torch.tensor(found[name]), torch.tensor(value))
        for name, value in expected.items()
    }


def measure_memory(setting: Setting, kind: str, name: str) -> dict[str, float]:
    """Peak resident memory of a fresh process that does one pass, and before it, in MB."""
    module, threads = "resnet_backbone.cli.benchmark.detect", torch.get_num_threads()
    call = f"report_memory({tuple(setting)!r}, {kind!r}, {name!r}, {threads})"
    return run_fresh(f"from {module} import report_memory; {call}", f"{kind}: {name}")


def report_memory(setting: tuple, kind: str, name: str, threads: int) -> None:
    """Runs in the fresh process of :func:`measure_memory`; prints JSON."""
    torch.set_num_threads(threads)
    theirs, ours = build_pair(Setting(*setting))
    own = (theirs, None) if name == REFERENCE else (None, ours)
    passes = build_passes(Setting(*setting), *own, kind)
    run = next(run for key, run in passes if key == name)
    del theirs, ours, own, passes
    report_peak(run)
