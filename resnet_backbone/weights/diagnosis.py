"""What may be stated wrongly about a checkpoint: the known mistakes, as hypotheses to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.preprocessing import PREPROCESSINGS, Preprocessing

KNOWN_EPS = (1e-5, 1e-3)  # PyTorch and Caffe; TensorFlow


@dataclass(frozen=True)
class Hypothesis:
    """One fact of a checkpoint that may be stated wrongly.

    Attributes:
        fact: "stride", "pooling", "channel order", "value range", "mean", "std", "BN eps"; two of
            one fact exclude each other.
        text: the fact as it would have to be, in place of what it is.
        apply: the checkpoint with that fact; tensors are shared.
    """

    fact: str
    text: str
    apply: Callable[[Checkpoint], Checkpoint]


def single_hypotheses(reference: Checkpoint, other: Checkpoint) -> list[Hypothesis]:
    """Everything that may be wrong about ``other``, the reference's own facts first."""
    return [
        *_architecture(reference, other),
        *_channel_order(other.preprocessing),
        *_value_range(other.preprocessing),
        *_mean_image(reference.preprocessing, other.preprocessing),
        *_levels("mean", reference.preprocessing, other.preprocessing),
        *_levels("std", reference.preprocessing, other.preprocessing),
    ]


def double_hypotheses(singles: Sequence[Hypothesis]) -> Iterator[tuple[Hypothesis, Hypothesis]]:
    """Every two of them that are about different facts; in the order in which they apply."""
    return (pair for pair in combinations(singles, 2) if pair[0].fact != pair[1].fact)


def whole_conventions(reference: Checkpoint, other: Checkpoint) -> Iterator[Hypothesis]:
    """The reference's preprocessing or a published one in place of all of the other's."""
    own, right = other.preprocessing, reference.preprocessing
    turned = replace(
        right,
        channel_order=right.channel_order[::-1],
        mean=right.mean[::-1],
        std=right.std[::-1],
        mean_image=None,
    )
    known = {
        "A's preprocessing": right,
        "A's preprocessing in the other channel order": turned,
        **{f"the preprocessing {name}": known for name, known in PREPROCESSINGS.items()},
    }
    for name, convention in known.items():
        if convention.stride_in_1x1 is None:
            convention = replace(convention, stride_in_1x1=own.stride_in_1x1)
        text = f"{name} ({_describe(convention)}) in place of its own"
        yield Hypothesis(
            "preprocessing",
            f"{text} ({_describe(own)})",
            lambda c, convention=convention: replace(c, preprocessing=convention),
        )


def _describe(preprocessing: Preprocessing) -> str:
    mean, std = (
        " ".join(f"{value:.6g}" for value in values)
        for values in (preprocessing.pixel_mean_255(), preprocessing.pixel_std_255())
    )
    return (
        f"{preprocessing.channel_order}, mean {mean}, std {std} of 0..255, "
        f"stride_in_1x1 {preprocessing.stride_in_1x1}, BN eps {preprocessing.bn_eps}"
    )


def _architecture(reference: Checkpoint, other: Checkpoint) -> Iterator[Hypothesis]:
    own = other.preprocessing
    if other.has_bottlenecks and own.stride_in_1x1 is not None:
        right = not own.stride_in_1x1
        yield Hypothesis(
            "stride",
            f"stride_in_1x1 {right} in place of {own.stride_in_1x1}",
            lambda c: _with(c, stride_in_1x1=right),
        )
    if "stem.conv1.weight" in other.tensors:
        pool = not other.model.options.get("caffe_pool", False)
        yield Hypothesis(
            "pooling",
            f"caffe_pool {pool} in place of {not pool}",
            lambda c: replace(
                c, model=replace(c.model, options={**c.model.options, "caffe_pool": pool})
            ),
        )
    if any(key.endswith(".norm.running_var") for key in other.tensors):
        for eps in dict.fromkeys((reference.preprocessing.bn_eps, *KNOWN_EPS)):
            if eps != own.bn_eps:
                yield Hypothesis(
                    "BN eps",
                    f"BN eps {eps} in place of {own.bn_eps}",
                    lambda c, eps=eps: _with(c, bn_eps=eps),
                )


def _with(checkpoint: Checkpoint, **facts) -> Checkpoint:
    return replace(checkpoint, preprocessing=replace(checkpoint.preprocessing, **facts))


def _channel_order(own: Preprocessing) -> Iterator[Hypothesis]:
    other = own.channel_order[::-1]
    text = f"channel order {other} in place of {own.channel_order}"
    yield Hypothesis("channel order", text, lambda c: _with(c, channel_order=other))
    if own.mean != own.mean[::-1] or own.std != own.std[::-1]:
        yield Hypothesis(
            "channel order",
            f"{text}, mean and std turned round with it",
            lambda c: _with(
                c,
                channel_order=other,
                mean=c.preprocessing.mean[::-1],
                std=c.preprocessing.std[::-1],
            ),
        )


def _value_range(own: Preprocessing) -> Iterator[Hypothesis]:
    other = 1.0 if own.value_range == 255.0 else 255.0
    yield Hypothesis(
        "value range",
        f"pixels of 0..{other:g} in place of 0..{own.value_range:g}, mean and std as they are",
        lambda c: _with(c, value_range=other),
    )


Levels = tuple[float, float, float]  # R, G, B in 0..255


def _rgb(values: Sequence[float], order: str) -> Levels:
    return tuple(values) if order == "RGB" else tuple(values)[::-1]


def _levels_of(fact: str, preprocessing: Preprocessing) -> Levels:
    values = getattr(preprocessing, f"pixel_{fact}_255")()
    return _rgb(values, preprocessing.channel_order)


def _known_levels(fact: str) -> dict[str, Levels]:
    """Where a mean or std is used -> its value."""
    gray = {"mean": (0.0,) * 3, "std": (1.0,) * 3}[fact]
    known = {f"no {fact}": gray, "half the range": (127.5,) * 3}
    if fact == "std":
        known["no std in 0..1"] = (255.0,) * 3
    return {**known, **{name: _levels_of(fact, p) for name, p in PREPROCESSINGS.items()}}


def _levels(fact: str, reference: Preprocessing, own: Preprocessing) -> Iterator[Hypothesis]:
    """The reference's mean or std, and published ones that are none of the two."""
    have, expected = _levels_of(fact, own), _levels_of(fact, reference)
    if not _close(have, expected, 1e-6):
        yield _level(fact, "A's", have, expected)
    tried = [have, expected]
    for name, levels in _known_levels(fact).items():
        if not any(_close(levels, earlier, 0.01) for earlier in tried):
            tried.append(levels)
            yield _level(fact, name, have, levels)


def _close(first: Levels, second: Levels, relative: float) -> bool:
    pairs = zip(first, second, strict=True)
    return all(math.isclose(a, b, rel_tol=relative, abs_tol=1e-9) for a, b in pairs)


def _level(fact: str, name: str, have: Levels, right: Levels) -> Hypothesis:
    numbers = "{:.6g} {:.6g} {:.6g}"
    text = f"{fact} {numbers.format(*right)} ({name}) in place of {numbers.format(*have)}"
    text += " (R, G, B of 0..255)"
    return Hypothesis(fact, text, lambda c: _with_levels(c, fact, right))


def _with_levels(checkpoint: Checkpoint, fact: str, levels: Levels) -> Checkpoint:
    own = checkpoint.preprocessing
    scaled = tuple(value * own.value_range / 255.0 for value in _rgb(levels, own.channel_order))
    facts = {"mean_image": None} if fact == "mean" else {}
    return _with(checkpoint, **facts, **{fact: scaled})


def _mean_image(reference: Preprocessing, own: Preprocessing) -> Iterator[Hypothesis]:
    """The reference's per-pixel mean, in the order and range that the other one has by then."""
    if reference.mean_image is None or own.mean_image is not None:
        return

    def apply(checkpoint: Checkpoint) -> Checkpoint:
        now, image = checkpoint.preprocessing, reference.mean_image
        if now.channel_order != reference.channel_order:
            image = image.flip(0)
        return _with(checkpoint, mean_image=image * (now.value_range / reference.value_range))

    yield Hypothesis("mean", "A's mean image in place of channel means", apply)
