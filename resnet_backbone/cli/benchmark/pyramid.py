"""R-50-FPN: Detectron2's own backbone beside ours, in inference and in training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_backbone.cli.benchmark import turns
from resnet_backbone.detection.checkpoint.input_check import networks
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.references import build_reference
from resnet_backbone.fast.engines import relative_difference

BF16 = torch.bfloat16
REFERENCE = "Detectron2, fp32"
KINDS = ("inference", "training")
Pass = Callable[[], Any]


def candidates(
    theirs: nn.Module,
    ours: nn.Module,
    kind: str,
    prepare: Callable[..., Pass],
    forms: Sequence[tuple[str, str]],
    inputs: Any,
) -> dict[str, Callable[[], Pass]]:
    """Returns functions by name that prepare passes of a kind, the reference first.

    For `forms` of our inference and the model's `inputs`, see ``fast_forms``.
    """
    found: dict[str, Callable[[], Pass]] = {REFERENCE: partial(prepare, theirs)}
    found["ours, fp32, as built"] = partial(prepare, ours)
    if kind == "training":
        found["ours, bf16 autocast, as built"] = partial(prepare, ours, bf16=True)
        found["ours, fp32, checkpointed"] = partial(prepare, ours, checkpointed=True)
        return found
    for name, make in turns.fast_forms(ours, forms, inputs).items():
        found[name] = lambda make=make: prepare(make())
    return found


def config(arch: str, regions: int = 512, head: int = 1024, depth: int = 50):
    """Returns a Faster R-CNN config, "fpn" or "c4": 80 classes, sampled regions, FC channels."""
    words = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(800,)"]
    words += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(regions)]
    words += ["MODEL.ROI_BOX_HEAD.FC_DIM", str(head)]
    return load_config(f"coco/faster_rcnn_R_{depth}_{arch.upper()}", words)


def run_fpn(args: argparse.Namespace) -> dict[str, Any]:
    device, shape = torch.device(args.device), (1, 3, args.height, args.width)
    images = torch.randn(shape, device=device)
    forms = turns.forms_of(args)
    pair = tuple(network.to(device) for network in build_pyramids())
    differences = {"float32": compare_pyramids(*pair, images)}
    result: dict[str, Any] = {"differences": differences}
    names = []
    for kind in KINDS:
        found = candidates(*pair, kind, prepare_pyramid(kind, images), forms, images)
        names += [(kind, name) for name in found if not name.endswith("compile")]
        runs = {
            f"{kind}: {name}": turns.repeated(prepare(), args.steps)
            for name, prepare in found.items()
        }
        result[kind] = turns.measure(runs, args.steps, args.repeats, device)
    corner = images[:, :, :256, :320].double()
    differences["float64"] = compare_pyramids(*(network.double() for network in pair), corner)
    for precision, values in differences.items():
        text = ", ".join(f"{name} {value:.1e}" for name, value in values.items())
        print(f"ours differs from Detectron2's, relatively, in {precision}: {text}")
    if device.type == "cpu" and not args.no_memory:
        found = turns.measure_memory(pyramid_candidates, (shape, forms), names)
        result["memory_mb"] = found
    return result


def build_pyramids() -> tuple[nn.Module, nn.Module]:
    """Builds Detectron2's ResNet-FPN and ours, with the same random weights, not optimized."""
    torch.manual_seed(0)
    cfg = config("fpn", head=1)  # the backbone alone is used
    theirs, ours = build_reference(cfg).backbone, Trainer.build_model(cfg).backbone
    turns.randomize_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def prepare_pyramid(kind: str, images: Tensor) -> Callable[..., Pass]:
    run = train_pyramid if kind == "training" else torch.no_grad()(nn.Module.__call__)
    return lambda model, **options: partial(run, model, images, **options)


def pyramid_candidates(setting: tuple, kind: str) -> dict[str, Callable[[], Pass]]:
    shape, forms = setting
    images = torch.randn(shape)
    return candidates(*build_pyramids(), kind, prepare_pyramid(kind, images), forms, images)


def train_pyramid(
    model: nn.Module, images: Tensor, bf16: bool = False, checkpointed: bool = False
) -> dict[str, Tensor]:
    """Runs forward and backward passes with a fixed loss in place of heads; returns the maps.

    The loss divides a sum: the gradient of ``mean`` would be row-major for every map, but a head's
    convolution returns gradients in the map's memory format.
    """
    model.zero_grad(set_to_none=True)
    for network in networks(model).values():
        network.set_grad_checkpointing(checkpointed)
    with torch.autocast(images.device.type, dtype=BF16, enabled=bf16):
        maps = model(images)
    sum(value.float().square().sum() / value.numel() for value in maps.values()).backward()
    return maps


def compare_pyramids(theirs: nn.Module, ours: nn.Module, images: Tensor) -> dict[str, float]:
    """Returns relative differences of ours from the reference in one training pass.

    Returns:
        outputs: the largest of any pyramid level, relative to the level's largest value.
        gradient: norm of the whole gradient's difference, relative to the gradient's norm.
        gradient_worst: the largest of any parameter, relative to its largest gradient. In single
            precision it jumps if a ReLU's input is a rounding error away from zero.
    """
    maps = [train_pyramid(model, images) for model in (theirs, ours)]
    expected, found = (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (theirs, ours)
    )
    if expected.keys() != found.keys():
        raise ValueError("the two networks train different parameters")
    whole = torch.cat([value.flatten() for value in expected.values()])
    error = torch.cat([(found[name] - value).flatten() for name, value in expected.items()])
    return {
        "outputs": max(relative_difference(maps[1][name], maps[0][name]) for name in maps[0]),
        "gradient": float(error.norm() / whole.norm()),
        "gradient_worst": max(relative_difference(found[name], expected[name]) for name in found),
    }
