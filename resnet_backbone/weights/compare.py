"""Compares the outputs of two checkpoints on the same images, and explains differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from operator import methodcaller
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from resnet_backbone.models import StagedNetwork
from resnet_backbone.runtime.builtin import load_photograph
from resnet_backbone.weights import PREPROCESSINGS, Checkpoint, Preprocessing, WeightsError
from resnet_backbone.weights.architecture import deepest_stage
from resnet_backbone.weights.load import build_network, network_on_meta
from resnet_backbone.weights.preprocessing import InputNormalizer

TOLERANCE = 1e-4  # of the largest output; fp32 rounding stays below 1e-5
BATCH = 8
EXACT = 1e-6  # relative; ends the search, since no explanation will do better
PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "chelsea")  # in color
SEARCH_SIZE = 96  # side in pixels; a mistake shows in any part of an image


@dataclass(frozen=True)
class Difference:
    """The distance of outputs from the reference's."""

    largest: float  # absolute
    scale: float  # largest absolute output of the reference
    same_top1: int | None  # images with the same top-1 class; None without a head
    num_images: int
    output: str  # "logits" or the name of a stage

    @property
    def relative(self) -> float:
        """``largest`` divided by ``scale``."""
        return self.largest / self.scale if self.scale else float(self.largest > 0)

    def __str__(self) -> str:
        text = f"{self.output}: largest difference {self.largest:.3g}, scale {self.scale:.3g}, "
        text += f"relative {self.relative:.2g}"
        if self.same_top1 is not None:
            text += f"; same top-1 class on {self.same_top1} of {self.num_images} images"
        return text


@torch.inference_mode()
def outputs_of(
    network: StagedNetwork, normalize: InputNormalizer, images: Tensor, stage: str = ""
) -> Tensor:
    """uint8 RGB images (N, 3, H, W) -> logits (N, num_classes), or the map of ``stage``."""
    parts = []
    for batch in images.split(BATCH):
        x = normalize(batch)
        parts.append(network.forward_features(x, [stage])[stage] if stage else network(x))
    return torch.cat(parts)


def check_comparable(a: Checkpoint, b: Checkpoint) -> str:
    """Returns what to compare: "" for logits, or the deepest stage that both have.

    Raises WeightsError: different networks or numbers of classes.
    """
    first, second = a.model, b.model
    if first.name.removesuffix("_bn") != second.name.removesuffix("_bn"):
        raise WeightsError(f"A is {first.name} and B is {second.name}: nothing to compare")
    if None in (first.num_classes, second.num_classes):
        stages = deepest_stage(a.tensors), deepest_stage(b.tensors)
        return min(stages, key=lambda name: (name != "stem", name))  # numbered from the image on
    if first.num_classes != second.num_classes:
        raise WeightsError(f"A has {first.num_classes} classes and B {second.num_classes}")
    return ""


def difference(expected: Tensor, found: Tensor, stage: str) -> Difference:
    """Compares outputs for the same images; ``expected`` is the reference."""
    if expected.shape != found.shape:
        raise WeightsError(f"outputs are {tuple(expected.shape)} and {tuple(found.shape)}")
    same = None if stage else int((expected.argmax(1) == found.argmax(1)).sum())
    distance = (expected - found).abs().nan_to_num(nan=math.inf)  # comparisons with NaN are false
    largest = distance.max().item()
    return Difference(largest, expected.abs().max().item(), same, len(expected), stage or "logits")


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    If A and B differ, ``explanation`` has the corrections of B's settings that make them agree. It
    is empty if no known mistake explains the difference.
    """

    difference: Difference  # over all images
    tolerance: float  # largest relative difference that counts as equal
    explanation: tuple[str, ...] = ()
    explained: Difference | None = None  # the difference after these corrections
    num_tried: int = 0  # explanations

    @property
    def equal(self) -> bool:
        return self.difference.relative <= self.tolerance


class _Runner:
    """Runs a checkpoint and variants of it that share its tensors."""

    def __init__(self, stage: str, name: str = "B"):
        self.stage, self.name = stage, name
        self.networks: dict[tuple, StagedNetwork] = {}

    def __call__(self, checkpoint: Checkpoint, images: Tensor) -> Tensor:
        preprocessing, options = checkpoint.preprocessing, checkpoint.model.options
        key = (preprocessing.stride_in_1x1, preprocessing.bn_eps, options.get("caffe_pool"))
        if not self.networks:
            self.networks[key] = build_network(checkpoint, self.name)
        elif key not in self.networks:
            weights = next(iter(self.networks.values())).state_dict()
            self.networks[key] = network_on_meta(checkpoint)
            self.networks[key].load_state_dict(weights, assign=True)
        return outputs_of(self.networks[key], InputNormalizer(preprocessing), images, self.stage)


def compare(
    a: Checkpoint, b: Checkpoint, images: Tensor, tolerance: float = TOLERANCE
) -> Comparison:
    """Runs two checkpoints, each with its own preprocessing, and explains their difference.

    Raises WeightsError: networks that cannot be compared, tensors that do not fit their network.

    Args:
        a, b: the reference, and the checkpoint to check.
        images: uint8 (N, 3, H, W), RGB.
        tolerance: of the largest difference, relative to the reference's largest output.
    """
    stage = check_comparable(a, b)
    expected = _Runner(stage, "A")(a, images)
    run = _Runner(stage)
    found = Comparison(difference(expected, run(b, images), stage), tolerance)
    return found if found.equal else _explain(found, a, b, run, images, expected)


def _explain(
    found: Comparison, a: Checkpoint, b: Checkpoint, run: _Runner, images: Tensor, expected: Tensor
) -> Comparison:
    """Tries single mistakes, pairs, and whole conventions, each on a crop of one image."""
    top, left = (max(extent - SEARCH_SIZE, 0) // 2 for extent in images.shape[2:])
    part = images[:1, :, top : top + SEARCH_SIZE, left : left + SEARCH_SIZE]
    target = _Runner(run.stage, "A")(a, part)
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
        best = min(errors, key=errors.__getitem__, default=())
        if best and errors[best] <= found.tolerance:  # on the crop; now check all images
            explained = difference(expected, run(_applied(b, best), images), run.stage)
            if explained.relative <= found.tolerance:
                texts = tuple(hypothesis.text for hypothesis in best)
                return replace(found, explanation=texts, explained=explained, num_tried=num_tried)
    return replace(found, num_tried=num_tried)


def _applied(checkpoint: Checkpoint, hypotheses: Sequence[Hypothesis]) -> Checkpoint:
    for hypothesis in hypotheses:
        checkpoint = hypothesis.apply(checkpoint)
    return checkpoint


# Settings that may be stated wrongly

NUMBERS = "{:.6g} {:.6g} {:.6g}"
KNOWN_EPS = (1e-5, 1e-3)  # PyTorch and Caffe; TensorFlow
RGB_BYTES = Preprocessing("RGB", 255.0, (0.0,) * 3, (1.0,) * 3)
# Where a mean or std is used -> an input with it.
KNOWN_LEVELS = {
    "none": RGB_BYTES,
    "half the range": replace(RGB_BYTES, mean=(127.5,) * 3, std=(127.5,) * 3),
    "none in 0..1": replace(RGB_BYTES, value_range=1.0),
    **PREPROCESSINGS,
}


@dataclass(frozen=True)
class Hypothesis:
    """A correction of one setting of a checkpoint that may be stated wrongly."""

    fact: str  # "stride", "mean", ...: two hypotheses about one fact exclude each other
    text: str  # the corrected value in place of the stated one
    apply: Callable[[Checkpoint], Checkpoint]  # returns the corrected checkpoint, same tensors


def single_hypotheses(reference: Checkpoint, other: Checkpoint) -> list[Hypothesis]:
    """Returns all corrections of ``other``; the reference's own values come first."""
    right, own = reference.preprocessing, other.preprocessing
    return [
        *_architecture(right, other),
        *_input(right, own),
        *_levels("mean", right, own),
        *_levels("std", right, own),
    ]


def double_hypotheses(singles: Sequence[Hypothesis]) -> Iterator[tuple[Hypothesis, Hypothesis]]:
    """Returns all pairs about different facts, in the order in which they are applied."""
    return (pair for pair in combinations(singles, 2) if pair[0].fact != pair[1].fact)


def whole_conventions(reference: Checkpoint, other: Checkpoint) -> Iterator[Hypothesis]:
    """Replaces the whole preprocessing of ``other`` by the reference's or a published one."""
    own, right = other.preprocessing, reference.preprocessing
    turned = replace(right.reversed_channels(), mean_image=None)
    known = {
        "A's preprocessing": right,
        "A's preprocessing in the other channel order": turned,
        **{f"the preprocessing {name}": known for name, known in PREPROCESSINGS.items()},
    }
    for name, convention in known.items():
        if convention.stride_in_1x1 is None:
            convention = replace(convention, stride_in_1x1=own.stride_in_1x1)
        text = f"{name} ({_describe(convention)}) in place of its own ({_describe(own)})"
        yield Hypothesis("preprocessing", text, partial(replace, preprocessing=convention))


def _describe(own: Preprocessing) -> str:
    mean, std = (NUMBERS.format(*values) for values in (own.pixel_mean_255(), own.pixel_std_255()))
    return (
        f"{own.channel_order}, mean {mean}, std {std} of 0..255, "
        f"stride_in_1x1 {own.stride_in_1x1}, BN eps {own.bn_eps}"
    )


_restated = partial(methodcaller, "restated")  # settings -> function of a checkpoint


def _architecture(right: Preprocessing, other: Checkpoint) -> Iterator[Hypothesis]:
    own = other.preprocessing
    if other.has_bottlenecks and own.stride_in_1x1 is not None:
        stride = not own.stride_in_1x1
        text = f"stride_in_1x1 {stride} in place of {own.stride_in_1x1}"
        yield Hypothesis("stride", text, _restated(stride_in_1x1=stride))
    if "stem.conv1.weight" in other.tensors:
        pool = not other.model.options.get("caffe_pool", False)
        model = replace(other.model, options={**other.model.options, "caffe_pool": pool})
        text = f"caffe_pool {pool} in place of {not pool}"
        yield Hypothesis("pooling", text, partial(replace, model=model))
    for eps in dict.fromkeys((right.bn_eps, *KNOWN_EPS)) if other.has_batch_norms else ():
        if eps != own.bn_eps:
            text = f"BN eps {eps} in place of {own.bn_eps}"
            yield Hypothesis("BN eps", text, _restated(bn_eps=eps))


def _input(right: Preprocessing, own: Preprocessing) -> Iterator[Hypothesis]:
    turned = own.reversed_channels()
    text = f"channel order {turned.channel_order} in place of {own.channel_order}"
    yield Hypothesis("channel order", text, _restated(channel_order=turned.channel_order))
    if (own.mean, own.std) != (turned.mean, turned.std):
        apply = _restated(channel_order=turned.channel_order, mean=turned.mean, std=turned.std)
        yield Hypothesis("channel order", f"{text}, mean and std reversed with it", apply)
    other = 1.0 if own.value_range == 255.0 else 255.0
    text = f"pixels of 0..{other:g} in place of 0..{own.value_range:g}, mean and std as they are"
    yield Hypothesis("value range", text, _restated(value_range=other))
    if right.mean_image is not None and own.mean_image is None:
        text = "A's mean image in place of channel means"
        yield Hypothesis("mean", text, partial(_with_fact, "mean_image", right))


def _levels(fact: str, right: Preprocessing, own: Preprocessing) -> Iterator[Hypothesis]:
    """Tries the reference's mean or std, then published ones that differ from both."""
    have = getattr(_in_form_of(own, RGB_BYTES), fact)
    tried = [have]
    for name, known in {"A's": right, **KNOWN_LEVELS}.items():
        levels = getattr(_in_form_of(known, RGB_BYTES), fact)
        tolerance = dict(rtol=1e-6 if known is right else 0.01, atol=1e-9)
        if not any(np.allclose(levels, earlier, **tolerance) for earlier in tried):
            tried.append(levels)
            text = f"{fact} {NUMBERS.format(*levels)} ({name}) in place of {NUMBERS.format(*have)}"
            apply = partial(_with_fact, fact, known)
            yield Hypothesis(fact, f"{text} (R, G, B of 0..255)", apply)


def _with_fact(fact: str, known: Preprocessing, checkpoint: Checkpoint) -> Checkpoint:
    """Sets another mean, mean image or std, in the checkpoint's current order and range."""
    facts = {fact: getattr(_in_form_of(known, checkpoint.preprocessing), fact)}
    if fact == "mean":
        facts["mean_image"] = None
    return checkpoint.restated(**facts)


def _in_form_of(known: Preprocessing, other: Preprocessing) -> Preprocessing:
    if known.channel_order != other.channel_order:
        known = known.reversed_channels()
    return known.with_range(other.value_range)


# The default images


class Samples(NamedTuple):
    """RGB images, uint8 (N, 3, size, size), and a description of them."""

    images: Tensor
    text: str


def sample_images(size: int) -> Samples:
    """Returns scikit-image's photographs, ``size`` pixels a side, or noise if it is missing."""
    try:
        photographs = [load_photograph(name) for name in PHOTOGRAPHS]
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        shape = (len(PHOTOGRAPHS), 3, size, size)
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        text = f"{len(noise)} images of noise, not photographs: give --images DIR"
        return Samples(noise, text)
    squares = [np.array(ImageOps.fit(photograph, (size, size))) for photograph in photographs]
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
    return Samples(images, f"{len(images)} photographs of scikit-image")
