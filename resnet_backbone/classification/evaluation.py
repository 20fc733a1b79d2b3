"""Evaluation of classifiers: exact counts for one network or several, in one process or many.

    result = evaluate([(model, normalizer)], Centre(256, 224), loader)
    result.top1_error, result.top5_error, result.cross_entropy

``loader`` yields batches with ``images`` (one entry for each of the protocol's short sides),
``labels``, ``indices`` and ``bad``, and has ``num_images`` and ``name_of(index)``:
``data.evaluation.EvaluationLoader``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resnet_backbone.classification import metrics
from resnet_backbone.classification.metrics import Predictions
from resnet_backbone.classification.protocols import Member, Protocol
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights.preprocessing import InputNormalizer


class EvaluationError(UsageError):
    """An evaluation that would give a wrong number; the message says what and where."""


@dataclass(frozen=True)
class EvaluationResult:
    """Errors of a whole data set.

    Attributes:
        num_images: all of them, bad ones too.
        num_classes: outputs of the networks.
        top1_error, top5_error: percent of ``num_images``; bad images count as wrong. Top-5 is
            ``None`` where there are fewer than five classes.
        cross_entropy: mean over the images that could be read, nats.
        per_class_error: top-1, percent, one for each class; ``None`` without images.
        confusion: int64 (num_classes, num_classes), counts of (label, predicted), without bad
            images.
        predictions: one row for each image that could be read, in the order of the data set.
        bad: images that could not be read: index, label, name, reason of each.
        protocol: its name and settings.
        num_models: networks whose scores were averaged.
        seconds: duration; ``data_seconds`` of these this process waited for images.
    """

    num_images: int
    num_classes: int
    top1_error: float
    top5_error: float | None
    cross_entropy: float
    per_class_error: list[float | None]
    confusion: Tensor
    predictions: Predictions
    bad: tuple[Any, ...]
    protocol: dict
    num_models: int
    seconds: float
    data_seconds: float

    def to_dict(self) -> dict:
        """Everything but the confusion matrix and the predictions, as JSON types.

        ``per_class_error`` is a table of the classes that have images.
        """
        left_out = ("confusion", "predictions")
        values = {k: v for k, v in self.__dict__.items() if k not in left_out}
        errors = enumerate(self.per_class_error)
        values["per_class_error"] = {c: error for c, error in errors if error is not None}
        values["bad"] = [sample._asdict() for sample in self.bad]
        values["images_per_second"] = self.num_images / self.seconds
        return values

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        top5 = "not defined" if self.top5_error is None else f"{self.top5_error:.2f} %"
        bad = f", {len(self.bad)} of them unreadable and counted as wrong" if self.bad else ""
        return (
            f"top-1 error {self.top1_error:.2f} %, top-5 error {top5}, cross-entropy "
            f"{self.cross_entropy:.4f} ({self.num_images} images{bad}, {self.protocol['name']})"
        )


def evaluate(
    models: Sequence[tuple[nn.Module, InputNormalizer]],
    protocol: Protocol,
    loader: Iterable,
    *,
    world: World | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = True,
    max_bad_images: int = 0,
    progress: bool | None = None,
) -> EvaluationResult:
    """Evaluates a network, or several whose probabilities are averaged.

    The networks are put into evaluation mode and afterwards back into the mode of each of their
    modules.

    Args:
        models: (network, its preprocessing) of each member of the ensemble.
        protocol: see ``classification.protocols``.
        loader: this process's part of the images, see the module's description.
        world: the processes that share the data set; every one of them calls this function and
            gets the whole result. ``None``: this one alone.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for mixed precision.
        channels_last: memory format of the networks' input.
        max_bad_images: unreadable images, over all processes, up to which evaluation goes on and
            counts them as wrong.
        progress: a progress bar on the main process; ``None``: where there is a terminal.

    Raises:
        EvaluationError: too many unreadable images, scores that are not finite (with the image's
            name), labels that the networks do not have, networks with different numbers of
            classes, an image seen twice or not at all. With several processes, on all of them.
    """
    world = world or World()
    members = [Member(m, n, autocast, channels_last) for m, n in models]
    if not members:
        raise EvaluationError("evaluation needs at least one network")
    run = _Run(members, protocol, loader, world, max_bad_images)
    start = time.perf_counter()
    with torch.inference_mode(), _evaluation_mode(members):
        run.all_batches(_progress_bar(loader, world, progress))
    shares = world.gather(run.share())
    if run.failure is not None:
        raise run.failure
    for rank, share in enumerate(shares):
        if share.failure:
            raise EvaluationError(f"process {rank}: {share.failure}")
    return _result(run, shares, time.perf_counter() - start)


class _Share(NamedTuple):
    """What one process found."""

    predictions: Predictions | None
    num_classes: int
    bad: tuple[Any, ...]
    failure: str


class _Run:
    """The pass of one process over its images."""

    def __init__(self, members, protocol: Protocol, loader, world: World, max_bad_images: int):
        self.members, self.protocol, self.loader = members, protocol, loader
        self.world, self.max_bad_images = world, max_bad_images
        self.parts: list[Predictions] = []
        self.bad: list[Any] = []
        self.num_classes = 0
        self.data_seconds = 0.0
        self.failure: Exception | None = None

    def all_batches(self, batches: Iterable) -> None:
        """Evaluates all batches.

        After a failure the rest is read and not used: the loader may talk to the other processes,
        which learn of the failure at the end.
        """
        waiting_since = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - waiting_since
            if self.failure is None:
                try:
                    self.one_batch(batch)
                except Exception as error:
                    self.failure = error
            if self.failure is not None and self.world.size == 1:
                return
            waiting_since = time.perf_counter()

    def one_batch(self, batch) -> None:
        self.bad.extend(batch.bad)
        check_bad(self.bad, self.max_bad_images)
        if not len(batch.labels):
            return
        wanted = len(self.protocol.short_sides)
        if len(batch.images) != wanted:
            raise EvaluationError(
                f"protocol {self.protocol.name} wants each image at {wanted} sizes, the loader "
                f"gives {len(batch.images)}: make the data set with protocol.short_sides"
            )
        total = 0
        for number, member in enumerate(self.members):
            images = [_to(scaled, member.normalizer.device) for scaled in batch.images]
            scores = self.protocol.score(member, images)
            self.check_scores(scores, batch, number)
            total = total + scores.to(self.members[0].normalizer.device)
        mean = total / len(self.members)
        self.parts.append(Predictions.from_probabilities(mean, batch.labels, batch.indices))

    def check_scores(self, scores: Tensor, batch, number: int) -> None:
        if scores.shape[1] != (self.num_classes or scores.shape[1]):
            raise EvaluationError(
                f"network {number + 1} has {scores.shape[1]} classes, the first {self.num_classes}"
            )
        self.num_classes = scores.shape[1]
        finite = scores.isfinite().all(1)
        if not finite.all():
            place = int((~finite).nonzero()[0, 0])
            raise EvaluationError(
                f"{self.name_of(batch, place)}: the scores of network {number + 1} are NaN or "
                "infinite; are its weights or its preprocessing damaged, or fp16 too narrow?"
            )
        wrong = ((batch.labels < 0) | (batch.labels >= self.num_classes)).nonzero()
        if len(wrong):
            place = int(wrong[0, 0])
            raise EvaluationError(
                f"{self.name_of(batch, place)}: label {int(batch.labels[place])}, but the network "
                f"has classes 0 to {self.num_classes - 1}"
            )

    def name_of(self, batch, place: int) -> str:
        index = int(batch.indices[place])
        name = getattr(self.loader, "name_of", lambda index: "an image")(index)
        return f"{name} (index {index})"

    def share(self) -> _Share:
        failed = self.failure and (str(self.failure) or type(self.failure).__name__)
        merged = Predictions.merge(self.parts) if self.parts else None
        return _Share(merged, self.num_classes, tuple(self.bad), failed or "")


def check_bad(bad: Sequence[Any], most: int) -> None:
    """Stops an evaluation that met more unreadable images than it may."""
    if len(bad) > most:
        first = min(bad)
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise EvaluationError(
            f"{first.name}: {first.reason}{more}; repair the file, or let up to N such images "
            "count as wrong with max_bad_images (--max-bad-images N)"
        )


def _result(run: _Run, shares: Sequence[_Share], seconds: float) -> EvaluationResult:
    bad = tuple(sorted(sample for share in shares for sample in share.bad))
    check_bad(bad, run.max_bad_images)
    parts = [share.predictions for share in shares if share.predictions is not None]
    if not parts:
        raise EvaluationError("there is no readable image to evaluate on")
    predictions = Predictions.merge(parts)
    _check_complete(predictions, bad, getattr(run.loader, "num_images", None))
    num_classes = max(share.num_classes for share in shares)
    confusion = metrics.confusion_matrix(predictions, num_classes)
    top5 = None
    if num_classes >= metrics.TOP:
        top5 = metrics.top_k_error(predictions, metrics.TOP, len(bad))
    return EvaluationResult(
        num_images=len(predictions) + len(bad),
        num_classes=num_classes,
        top1_error=metrics.top_k_error(predictions, 1, len(bad)),
        top5_error=top5,
        cross_entropy=metrics.cross_entropy(predictions),
        per_class_error=metrics.per_class_error(confusion, [sample.label for sample in bad]),
        confusion=confusion,
        predictions=predictions,
        bad=bad,
        protocol=run.protocol.settings(),
        num_models=len(run.members),
        seconds=seconds,
        data_seconds=run.data_seconds,
    )


def _check_complete(predictions: Predictions, bad: Sequence[Any], expected: int | None) -> None:
    seen = sorted([*predictions.indices.tolist(), *(sample.index for sample in bad)])
    twice = [first for first, second in zip(seen, seen[1:], strict=False) if first == second]
    if twice:
        raise EvaluationError(
            f"image {twice[0]} was evaluated twice: give each process its own rank of the loader"
        )
    if expected is not None and len(seen) != expected:
        raise EvaluationError(
            f"{len(seen)} images were evaluated, the data set has {expected}: the loader's world "
            "must be the number of processes that evaluate"
        )


def _to(images: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]


def _progress_bar(loader: Iterable, world: World, progress: bool | None) -> Iterable:
    wanted = sys.stderr.isatty() if progress is None else progress
    if not wanted or not world.is_main:
        return loader
    return tqdm(loader, desc="evaluation", unit="batch", leave=False)


@contextmanager
def _evaluation_mode(members: Sequence[Member]) -> Iterator[None]:
    modes = [(part, part.training) for member in members for part in member.model.modules()]
    for member in members:
        member.model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
