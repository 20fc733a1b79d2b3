"""Where the time of a detector's training step goes, part by part."""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from resnet_backbone.cli.benchmark.detectors import Setting, prepare_detector, random_inputs
from resnet_backbone.cli.benchmark.pyramid import Pass
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.references import THEIRS, GivenProposals, build_reference

MARK = "part: "
BACKWARD = "autograd::engine::evaluate_function"
REST = "optimizer, rest"


def run_profile(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no warnings of a missing GPU
    runs: dict[str, Pass] = {}
    for name in args.config_file:
        words = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", "80"]
        cfg = load_config(name, words)
        detector, heads = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME
        more = cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or heads == "CascadeROIHeads"
        if detector != "GeneralizedRCNN" or more:
            raise ValueError(f"--config-file {name}: only Faster R-CNN can be profiled")
        regions = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        setting = Setting("", 0, regions, args.height, args.width, args.batch)
        prepare, (_, boxes) = prepare_detector("training", setting), random_inputs(setting)
        if cfg.MODEL.BACKBONE.NAME in THEIRS:
            runs[f"Detectron2, fp32: {name}"] = prepare(marked(build_reference(cfg), boxes))
        for dtype in args.dtype:
            model = marked(Trainer.build_model(cfg), boxes)
            runs[f"ours, {dtype}: {name}"] = prepare(model, bf16=dtype == "bf16")
    found: dict[str, list[Counter]] = {name: [] for name in runs}
    with tqdm(total=(args.repeats + 1) * len(runs), desc="profiling", unit="step") as bar:
        for repeat in range(args.repeats + 1):
            for name, run in runs.items():
                with profile(activities=[ProfilerActivity.CPU]) as profiler:
                    with record_function(MARK + REST):
                        run()
                if repeat:
                    found[name].append(parts_of(profiler.events()))
                bar.update()
    return {"steps": [describe(name, times) for name, times in found.items()]}


def describe(name: str, times: list[Counter]) -> dict[str, Any]:
    """Prints a model's table, and returns its rows: medians in ms."""
    keys = dict.fromkeys(key for one in times for key in one)
    medians = {key: statistics.median(one[key] for one in times) / 1000 for key in keys}
    whole = statistics.median(one.total() for one in times) / 1000
    print(f"{name}: {whole:.0f} ms\n{'':28}{'forward':>9}{'backward':>9}{'share':>8}")
    rows = []
    for part in dict.fromkeys(part for part, _ in medians):
        forward, backward = (medians.get((part, way), 0.0) for way in ("forward", "backward"))
        share = (forward + backward) / whole
        print(f"{part:28}{forward:9.0f}{backward:9.0f}{share:8.1%}")
        rows.append({"part": part, "forward_ms": forward, "backward_ms": backward, "share": share})
    return {"name": name, "step_ms": whole, "parts": rows}


def marked(model: nn.Module, boxes: Tensor) -> nn.Module:
    """Makes a model propose the given boxes, and marks each part's forward pass."""
    model.proposal_generator = GivenProposals(model.proposal_generator, boxes)
    for name, module in named_parts(model):
        ranges: list[record_function] = []

        def enter(*_: Any, name: str = name, ranges: list = ranges) -> None:
            ranges.append(record_function(MARK + name))
            ranges[-1].__enter__()

        def leave(*_: Any, ranges: list = ranges) -> None:
            ranges.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    return model


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, module); a part's time excludes the parts inside it."""
    for name, child in model.backbone.named_children():
        for kind in ("lateral", "output"):
            if name.startswith(f"fpn_{kind}"):
                yield f"pyramid, {'3x3' if kind == 'output' else '1x1'}", child
    body = getattr(model.backbone, "bottom_up", model.backbone)
    yield from ((f"backbone, {name}", stage) for name, stage in body.named_children())
    yield "pyramid, sums", model.backbone
    network, heads = model.proposal_generator.network, model.roi_heads
    yield "RPN, head", network.rpn_head
    yield "RPN, anchors, losses, NMS", network
    for name in ("box_pooler", "pooler", "res5", "box_head", "box_predictor"):
        if hasattr(heads, name):
            yield f"regions, {name.replace('box_pooler', 'pooler')}", getattr(heads, name)
    yield "regions, sampling", heads


def parts_of(events: list[FunctionEvent]) -> Counter:
    """Returns microseconds by (part, "forward" or "backward").

    A backward function belongs to the part whose forward pass has its sequence number.
    """
    parts: dict[int, str] = {}
    for event in events:
        part, way = owner(event, parts)
        if way == "forward" and event.sequence_nr >= 0:
            parts[event.sequence_nr] = part
    times: Counter = Counter()
    for event in events:
        times[owner(event, parts)] += event.self_cpu_time_total
    return times


def owner(event: FunctionEvent | None, parts: dict[int, str]) -> tuple[str, str]:
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK), "forward"
        if event.name.startswith(BACKWARD):
            return parts.get(event.sequence_nr, REST), "backward"
        event = event.cpu_parent
    return REST, "forward"
