"""The R-50-FPN backbone: Detectron2's own beside ours, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_backbone.cli.benchmark.interleaved import randomize_norms, relative_difference
from resnet_backbone.cli.benchmark.memory import report_peak, run_fresh
from resnet_backbone.fast import optimize_for_inference

Pass = Callable[[Tensor], Any]
BF16 = torch.bfloat16
REFERENCE = "Detectron2, fp32"
# name -> arguments of optimize_for_inference; None: as built
INFERENCE: dict[str, dict | None] = {
    "ours, fp32, as built": None,
    "ours, fp32, optimized": {},
    "ours, fp32, optimized, compile": {"compile": True},
    "ours, bf16, optimized": {"dtype": BF16},
    "ours, bf16, optimized, compile": {"dtype": BF16, "compile": True},
}
TRAINING = ("ours, fp32, as built", "ours, bf16 autocast, as built")


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return model(images)


def train(model: nn.Module, images: Tensor, bf16: bool = False) -> dict[str, Tensor]:
    """Forward and backward of a fixed scalar of all maps; returns the maps."""
    model.zero_grad(set_to_none=True)
    with _autocast(images.device.type, bf16):
        maps = model(images)
    scalar_loss(maps).backward()
    return maps


def _autocast(device: str, bf16: bool) -> AbstractContextManager:
    return torch.autocast(device, dtype=BF16) if bf16 else nullcontext()


def scalar_loss(maps: dict[str, Tensor]) -> Tensor:
    """A stand-in for the heads: its gradient depends on every value of every map.

    Divided last, since the gradient of ``mean`` is row-major whatever the map: the backward pass
    of a head's convolution returns the map's own memory format.
    """
    return sum(value.float().square().sum() / value.numel() for value in maps.values())


def build_pair(depth: int = 50) -> tuple[nn.Module, nn.Module]:
    """Detectron2's ResNet-FPN and ours with the same random weights, each as it comes.

    Raises:
        ValueError: Detectron2 is not installed.
    """
    try:
        from resnet_backbone.cli.benchmark.reference import build_fpn
    except ImportError as error:
        raise ValueError(str(error)) from error
    torch.manual_seed(0)
    theirs, ours = build_fpn(False, depth), build_fpn(True, depth)
    randomize_norms(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def build_passes(theirs: nn.Module | None, ours: nn.Module | None, compiled: bool):
    """Yields ("inference: NAME" or "training: NAME", pass); each kind's first is the reference.

    Without one of the networks, its passes are left out.
    """
    for kind, run in (("inference", infer), ("training", train)):
        if theirs is not None:
            yield f"{kind}: {REFERENCE}", partial(run, theirs)
        if ours is None:
            continue
        for name, options in INFERENCE.items() if kind == "inference" else ():
            if compiled or not name.endswith("compile"):
                model = ours if options is None else optimize_for_inference(ours, **options)
                yield f"{kind}: {name}", partial(infer, model)
        for name in TRAINING if kind == "training" else ():
            yield f"{kind}: {name}", partial(train, ours, bf16="bf16" in name)


def build_candidates(device: torch.device, compiled: bool) -> dict[str, Pass]:
    """All passes by name."""
    theirs, ours = (network.to(device) for network in build_pair())
    return dict(build_passes(theirs, ours, compiled))


def compare(theirs: nn.Module, ours: nn.Module, images: Tensor) -> dict[str, float]:
    """Relative differences of ours from the reference in one training pass.

    Returns:
        outputs: the largest of any pyramid level, of that level's largest value.
        gradient: norm of the difference of the whole gradient, of the gradient's norm.
        gradient_worst: the largest of any parameter, of that parameter's largest gradient. In
            single precision it jumps where a ReLU's input is a rounding error away from zero,
            between any two implementations.
    """
    maps, gradients = [], []
    for model in (theirs, ours):
        maps.append({name: value.detach() for name, value in train(model, images).items()})
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
        model.zero_grad(set_to_none=True)
    expected, found = gradients
    if expected.keys() != found.keys():
        raise ValueError("the two networks train different parameters")
    whole = torch.cat([value.flatten() for value in expected.values()])
    error = torch.cat([(found[name] - value).flatten() for name, value in expected.items()])
    return {
        "outputs": max(relative_difference(maps[1][name], maps[0][name]) for name in maps[0]),
        "gradient": float(error.norm() / whole.norm()),
        "gradient_worst": max(relative_difference(found[n], expected[n]) for n in expected),
    }


def compare_both(device: torch.device, images: Tensor) -> dict[str, dict[str, float]]:
    """:func:`compare` on the images in float32, and on a corner of them in float64."""
    theirs, ours = (network.to(device) for network in build_pair())
    single = compare(theirs, ours, images)
    corner = images[:, :, :256, :320].double()
    return {"float32": single, "float64": compare(theirs.double(), ours.double(), corner)}


def measure_memory(name: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Peak resident memory of a fresh process that does one pass, and before it, in MB."""
    call = f"report_memory({name!r}, {tuple(shape)!r}, {torch.get_num_threads()})"
    return run_fresh(f"from resnet_backbone.cli.benchmark.fpn import report_memory; {call}", name)


def report_memory(name: str, shape: tuple[int, ...], threads: int) -> None:
    """Runs in the fresh process of :func:`measure_memory`; prints JSON."""
    torch.set_num_threads(threads)
    theirs, ours = build_pair()
    passes = build_passes(theirs, None, False) if REFERENCE in name else None
    passes = passes or build_passes(None, ours, False)
    run = next(run for key, run in passes if key == name)
    del theirs, ours, passes
    images = torch.randn(shape)
    report_peak(lambda: run(images))
