"""Do two checkpoints compute the same on the same pictures, and if not, what was mixed up?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights.architecture import deepest_stage
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.diagnosis import (
    Hypothesis,
    double_hypotheses,
    single_hypotheses,
    whole_conventions,
)
from resnet_backbone.weights.load import build_network, network_on_meta
from resnet_backbone.weights.preprocessing import InputNormalizer, WeightsError

TOLERANCE = 1e-4  # of the largest output; fp32 rounding stays below 1e-5
BATCH = 8
EXACT = 1e-6  # relative: nothing will explain it better
PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "chelsea")  # in color
SEARCH_SIZE = 96  # pixels of a side; a mistake shows on any part of an image


@dataclass(frozen=True)
class Difference:
    """How far outputs are from the reference's.

    Attributes:
        largest: largest absolute difference.
        scale: largest absolute output of the reference.
        same_top1: images whose largest logit is the same class; None without head.
        num_images: how many were compared.
        output: what was compared, "logits" or the name of a stage.
    """

    largest: float
    scale: float
    same_top1: int | None
    num_images: int
    output: str

    @property
    def relative(self) -> float:
        """``largest`` in units of ``scale``."""
        return self.largest / self.scale if self.scale else float(self.largest > 0)

    def __str__(self) -> str:
        text = f"{self.output}: largest difference {self.largest:.3g}, scale {self.scale:.3g}, "
        text += f"relative {self.relative:.2g}"
        if self.same_top1 is None:
            return text
        return text + f"; same top-1 class on {self.same_top1} of {self.num_images} images"


@torch.inference_mode()
def outputs_of(
    network: StagedNetwork, normalize: InputNormalizer, images: Tensor, stage: str = ""
) -> Tensor:
    """Logits (N, num_classes), or with ``stage`` its feature map; fp32.

    Args:
        images: uint8 (N, 3, H, W), RGB.
    """
    parts = []
    for batch in images.split(BATCH):
        x = normalize(batch)
        parts.append(network.forward_features(x, [stage])[stage] if stage else network(x))
    return torch.cat(parts)


def check_comparable(a: Checkpoint, b: Checkpoint) -> str:
    """What to compare: "" for logits, or the deepest stage that both have.

    Raises:
        WeightsError: another network or number of classes.
    """
    first, second = a.model, b.model
    if first.name.removesuffix("_bn") != second.name.removesuffix("_bn"):
        raise WeightsError(f"A is {first.name} and B is {second.name}: nothing to compare")
    if first.num_classes is None or second.num_classes is None:
        stages = sorted({deepest_stage(a.tensors), deepest_stage(b.tensors)})
        return stages[0]  # names are numbered from the image on
    if first.num_classes != second.num_classes:
        raise WeightsError(f"A has {first.num_classes} classes and B {second.num_classes}")
    return ""


def difference(expected: Tensor, found: Tensor, stage: str) -> Difference:
    """Compares outputs of the same images; the first are the reference."""
    if expected.shape != found.shape:
        raise WeightsError(f"outputs are {tuple(expected.shape)} and {tuple(found.shape)}")
    same = None if stage else int((expected.argmax(1) == found.argmax(1)).sum())
    distance = (expected - found).abs().nan_to_num(nan=math.inf)  # no comparison holds for NaN
    largest = distance.max().item()
    return Difference(largest, expected.abs().max().item(), same, len(expected), stage or "logits")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        difference: over all images.
        tolerance: largest relative difference that counts as equal.
        explanation: the facts of B that, stated otherwise, make both agree; empty where they
            agree already or no known mistake explains the difference.
        explained: the difference that is left then.
        num_tried: explanations that were tried.
    """

    difference: Difference
    tolerance: float
    explanation: tuple[str, ...] = ()
    explained: Difference | None = None
    num_tried: int = 0

    @property
    def equal(self) -> bool:
        return self.difference.relative <= self.tolerance


class _Runner:
    """Runs a checkpoint and variants of it, which share its tensors."""

    def __init__(self, stage: str):
        self.stage = stage
        self.networks: dict[tuple, StagedNetwork] = {}

    def __call__(self, checkpoint: Checkpoint, images: Tensor, where: str = "B") -> Tensor:
        preprocessing, options = checkpoint.preprocessing, checkpoint.model.options
        key = (preprocessing.stride_in_1x1, preprocessing.bn_eps, options.get("caffe_pool"))
        if not self.networks:
            self.networks[key] = build_network(checkpoint, where)
        elif key not in self.networks:
            network = network_on_meta(checkpoint)
            weights = next(iter(self.networks.values())).state_dict()
            network.load_state_dict(weights, assign=True)
            self.networks[key] = network
        return outputs_of(self.networks[key], InputNormalizer(preprocessing), images, self.stage)


def compare(
    a: Checkpoint, b: Checkpoint, images: Tensor, tolerance: float = TOLERANCE
) -> Comparison:
    """Runs both, each with its own preprocessing, and looks for the mistake where they differ.

    Args:
        a: the reference.
        b: what is in doubt.
        images: uint8 (N, 3, H, W), RGB.
        tolerance: of the largest difference, in units of the reference's largest output.

    Raises:
        WeightsError: networks that cannot be compared, tensors that do not fit their network.
    """
    stage = check_comparable(a, b)
    expected = _Runner(stage)(a, images, "A")
    run = _Runner(stage)
    found = Comparison(difference(expected, run(b, images), stage), tolerance)
    return found if found.equal else _explain(found, a, b, run, images, expected)


def _explain(
    found: Comparison, a: Checkpoint, b: Checkpoint, run: _Runner, images: Tensor, expected: Tensor
) -> Comparison:
    """Tries single mistakes, pairs, and everything at once; on a part of one image each time.

    What explains that part best is then tried on all images.
    """
    part = _center(images[:1], SEARCH_SIZE)
    target = _Runner(run.stage)(a, part, "A")
    singles = single_hypotheses(a, b)
    whole = [(hypothesis,) for hypothesis in whole_conventions(a, b)]
    num_tried = 0
    for candidates in ([(single,) for single in singles], double_hypotheses(singles), whole):
        errors = {}
        for candidate in candidates:
            outputs = run(_applied(b, candidate), part)
            errors[candidate] = difference(target, outputs, run.stage).relative
            if errors[candidate] < EXACT:
                break
        num_tried += len(errors)
        best = min(errors, key=errors.__getitem__, default=None)
        if best is None or errors[best] > found.tolerance:
            continue
        left = difference(expected, run(_applied(b, best), images), run.stage)
        if left.relative <= found.tolerance:
            texts = tuple(hypothesis.text for hypothesis in best)
            return replace(found, explanation=texts, explained=left, num_tried=num_tried)
    return replace(found, num_tried=num_tried)


def _center(images: Tensor, size: int) -> Tensor:
    top, left = (max(extent - size, 0) // 2 for extent in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def _applied(checkpoint: Checkpoint, hypotheses: Sequence[Hypothesis]) -> Checkpoint:
    for hypothesis in hypotheses:
        checkpoint = hypothesis.apply(checkpoint)
    return checkpoint


# Pictures to run two networks on by default


class Samples(NamedTuple):
    """Images and what they are.

    Attributes:
        images: uint8 (N, 3, size, size), RGB.
        text: for a person: "4 photographs of scikit-image".
    """

    images: Tensor
    text: str


def sample_images(size: int) -> Samples:
    """Photographs that lie inside scikit-image, or noise where it is not installed.

    Args:
        size: side in pixels.
    """
    try:
        from resnet_backbone.runtime.builtin import load_photograph

        squares = [np.array(_square(load_photograph(name), size)) for name in PHOTOGRAPHS]
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        shape = (len(PHOTOGRAPHS), 3, size, size)
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return Samples(
            noise, f"{len(noise)} images of noise, which is no picture: give --images DIR"
        )
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
    return Samples(images, f"{len(images)} photographs of scikit-image")


def _square(photograph, size: int):
    """The center of a photograph, as PIL image."""
    side = min(photograph.size)
    left, top = ((extent - side) // 2 for extent in photograph.size)
    return photograph.resize((size, size), box=(left, top, left + side, top + side))
