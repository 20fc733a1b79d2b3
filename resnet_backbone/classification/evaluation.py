"""Evaluation of classifiers with exact counts, of one network or an ensemble, in any processes.

    result = evaluate([(model, normalizer)], Center(256, 224), loader)
    result.top1_error, result.top5_error, result.cross_entropy

Processes exchange the records of all images, not sums. These are sorted in the order of the data
set before anything is computed, so the result is bit-identical for any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resnet_backbone.classification.data.evaluation import (
    BadSample,
    EvaluationBatch,
    EvaluationFiles,
    EvaluationLoader,
)
from resnet_backbone.classification.protocols import Images, Member, Protocol
from resnet_backbone.fast import optimize_for_inference
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.evaluation import evaluation_mode
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights.preprocessing import InputNormalizer

TOP = 5  # classes recorded for each image
RECORDED = ("num_images", "num_classes", "top1_error", "top5_error", "cross_entropy")
RECORDED += ("protocol", "num_models", "seconds", "data_seconds")


@dataclass(frozen=True)
class Predictions:
    """The records of images, one row each; ``k`` is 5, or the number of classes if that is less.

    Equal scores are ordered by class.
    """

    indices: Tensor  # int64 (N,), places in the data set
    labels: Tensor  # int64 (N,)
    classes: Tensor  # int64 (N, k), the classes with the highest scores, best first
    scores: Tensor  # float32 (N, k), their probabilities
    log_likelihoods: Tensor  # float64 (N,), log of the probability of the label

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def from_probabilities(
        cls, probabilities: Tensor, labels: Tensor, indices: Tensor
    ) -> Predictions:
        """Records a batch, on the CPU, from (N, num_classes) on any device and int64 (N,)."""
        ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
        of_label = probabilities.gather(1, labels.to(probabilities.device)[:, None])[:, 0]
        tiny = torch.finfo(torch.float64).tiny  # a probability may underflow; its log must not
        return cls(
            indices.cpu(),
            labels.cpu(),
            order[:, :TOP].cpu(),
            ranked[:, :TOP].float().cpu(),
            of_label.double().clamp_min(tiny).log().cpu(),
        )

    @classmethod
    def merge(cls, parts: Sequence[Predictions]) -> Predictions:
        """Joins records in the order of the data set."""
        names = tuple(cls.__dataclass_fields__)
        columns = [torch.cat([getattr(part, name) for part in parts]) for name in names]
        order = columns[0].argsort()
        return cls(*(column[order] for column in columns))


@dataclass(frozen=True)
class EvaluationResult:
    predictions: Predictions  # of the readable images, in the order of the data set
    bad: tuple[BadSample, ...]  # the others, which count as wrong
    num_classes: int  # outputs of the networks
    protocol: dict  # its name and settings
    num_models: int  # networks whose scores were averaged
    seconds: float
    data_seconds: float  # part of them that this process waited for images

    @property
    def num_images(self) -> int:
        return len(self.predictions) + len(self.bad)

    @property
    def top1_error(self) -> float:
        """Top-1 error in percent of all images; bad ones count as wrong."""
        return self.top_k_error(1)

    @property
    def top5_error(self) -> float | None:
        """Like :attr:`top1_error`; ``None`` if there are fewer than five classes."""
        return self.top_k_error(TOP) if self.num_classes >= TOP else None

    def top_k_error(self, k: int) -> float:
        """Returns the percentage of images whose label is not among the ``k`` (1 to 5) best."""
        found = self.predictions
        right = (found.classes[:, :k] == found.labels[:, None]).any(1).sum().item()
        return 100.0 * (self.num_images - right) / self.num_images

    @property
    def cross_entropy(self) -> float:
        """Mean of -log(probability of the label) over the readable images, in nats."""
        return -self.predictions.log_likelihoods.mean().item()

    @property
    def confusion(self) -> Tensor:
        """Counts of readable images, int64 (label, predicted class)."""
        cells = self.predictions.labels * self.num_classes + self.predictions.classes[:, 0]
        return cells.bincount(minlength=self.num_classes**2).view(self.num_classes, -1)

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class, also of bad ones."""
        bad = torch.tensor([sample.label for sample in self.bad], dtype=torch.int64)
        labels = torch.cat([self.predictions.labels, bad])
        return labels.bincount(minlength=self.num_classes).tolist()

    @property
    def per_class_error(self) -> list[float | None]:
        """Top-1 error of each class in percent; ``None`` for a class without images."""
        labels, best = self.predictions.labels, self.predictions.classes[:, 0]
        right = labels[labels == best].bincount(minlength=self.num_classes)
        pairs = zip(self.class_counts, right.tolist(), strict=True)
        return [100.0 * (total - right) / total if total else None for total, right in pairs]

    def to_dict(self) -> dict:
        """Returns JSON types for all but the confusion matrix and the predictions.

        ``per_class_error`` maps each class that has images to its error.
        """
        values = {name: getattr(self, name) for name in RECORDED}
        errors = enumerate(self.per_class_error)
        values["per_class_error"] = {c: error for c, error in errors if error is not None}
        values["bad"] = [sample._asdict() for sample in self.bad]
        values["images_per_second"] = self.num_images / self.seconds
        return values

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
    loader: EvaluationLoader,
    *,
    world: World | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = True,
    max_bad_images: int = 0,
) -> EvaluationResult:
    """Evaluates a network, or the averaged probabilities of several; restores their modes.

    Args:
        models: (network, normalizer) of each member of the ensemble.
        loader: this process's part of the images, at each of the protocol's short sides.
        world: the processes that share the data set; all of them call this function and get the
            whole result. ``None`` for this process alone.
        autocast, channels_last: see :class:`Member`.
        max_bad_images: largest number of unreadable images, over all processes, that count as
            wrong instead of raising an error.

    Raises:
        UsageError: on all processes: too many unreadable images, non-finite scores (naming the
            image), labels beyond the networks' classes, networks with different numbers of classes,
            an image seen twice or not at all.
    """
    members = [Member(m, n, autocast, channels_last) for m, n in models]
    if not members:
        raise UsageError("evaluation needs at least one network")
    run = _Run(members, protocol, loader, world or World(), max_bad_images)
    start = time.perf_counter()
    hidden = None if run.world.is_main else True
    bar = tqdm(loader, "evaluation", unit="batch", leave=False, disable=hidden)
    with torch.inference_mode(), evaluation_mode(*(member.model for member in members)):
        run.all_batches(bar)
    return run.result(start)


def on_engine(
    models: Sequence[tuple[nn.Module, InputNormalizer]],
    protocol: Protocol,
    files: Sequence[Path],
    **options: Any,
) -> list[tuple[nn.Module, InputNormalizer]]:
    """Returns the networks optimized for inference, in int8 calibrated on image files.

    The networks see the files as in the protocol. For `options`, see ``optimize_for_inference``.
    """
    if getattr(protocol, "pooling", "") == "sliding":
        raise UsageError("a sliding window runs in PyTorch alone: give --pooling global_pool")
    images = EvaluationFiles((), *protocol.loading)

    def calibration(normalizer: InputNormalizer) -> Iterator[Tensor]:
        for file in tqdm(files, "calibration", unit="image", leave=False):
            yield from (normalizer(image[None]) for image in images.read(file))

    return [
        (optimize_for_inference(model, **options, calibration=calibration(normalizer)), normalizer)
        for model, normalizer in models
    ]


@dataclass
class _Run:
    """One process's pass over its images, and the result of all processes."""

    members: Sequence[Member]
    protocol: Protocol
    loader: EvaluationLoader
    world: World
    max_bad_images: int
    parts: list[Predictions] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    num_classes: int = 0
    data_seconds: float = 0.0
    failure: Exception | None = None

    def all_batches(self, batches: Iterable[EvaluationBatch]) -> None:
        """Evaluates all batches; after a failure, reads the rest, since others learn of it last."""
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

    def one_batch(self, batch: EvaluationBatch) -> None:
        self.bad.extend(batch.bad)
        check_bad(self.bad, self.max_bad_images)
        if not len(batch.labels):
            return
        total = 0
        for number, member in enumerate(self.members):
            images = [_to(scaled, member.normalizer.device) for scaled in batch.images]
            scores = self.protocol.score(member, images)
            self.check_scores(scores, batch, number)
            total = total + scores.to(self.members[0].normalizer.device)
        mean = total / len(self.members)
        self.parts.append(Predictions.from_probabilities(mean, batch.labels, batch.indices))

    def check_scores(self, scores: Tensor, batch: EvaluationBatch, number: int) -> None:
        if scores.shape[1] != (self.num_classes or scores.shape[1]):
            raise UsageError(
                f"network {number + 1} has {scores.shape[1]} classes, the first {self.num_classes}"
            )
        self.num_classes = scores.shape[1]
        finite = scores.isfinite().all(1)
        if not finite.all():
            raise UsageError(
                f"{self.name_of(batch, ~finite)}: the scores of network {number + 1} are NaN or "
                "infinite; are its weights or its preprocessing damaged, or fp16 too narrow?"
            )
        wrong = (batch.labels < 0) | (batch.labels >= self.num_classes)
        if wrong.any():
            raise UsageError(
                f"{self.name_of(batch, wrong)}: label {batch.labels[wrong][0]}, but the network "
                f"has classes 0 to {self.num_classes - 1}"
            )

    def name_of(self, batch: EvaluationBatch, images: Tensor) -> str:
        """Names the first of the selected images of a batch."""
        index = int(batch.indices[images.cpu()][0])
        return f"{self.loader.name_of(index)} (index {index})"

    def result(self, start: float) -> EvaluationResult:
        failed = self.failure and (str(self.failure) or type(self.failure).__name__)
        shares = self.world.gather((self.parts, self.num_classes, self.bad, failed))
        if self.failure is not None:
            raise self.failure
        for rank, (*_, failure) in enumerate(shares):
            if failure:
                raise UsageError(f"process {rank}: {failure}")
        parts, classes, bad, _ = zip(*shares, strict=True)
        parts, bad = list(chain(*parts)), tuple(sorted(chain(*bad)))
        check_bad(bad, self.max_bad_images)
        if not parts:
            raise UsageError("there is no readable image to evaluate on")
        predictions = Predictions.merge(parts)
        _check_complete(predictions, bad, self.loader.num_images)
        seconds = time.perf_counter() - start
        settings, count = self.protocol.settings(), len(self.members)
        return EvaluationResult(
            predictions, bad, max(classes), settings, count, seconds, self.data_seconds
        )


def check_bad(bad: Sequence[BadSample], most: int) -> None:
    if len(bad) > most:
        first = min(bad)
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UsageError(
            f"{first.name}: {first.reason}{more}; repair the file, or let up to N such images "
            "count as wrong: --max-bad-images N, in train-classifier evaluation.max_bad_images=N"
        )


def _check_complete(predictions: Predictions, bad: Sequence[BadSample], expected: int) -> None:
    seen = [*predictions.indices.tolist(), *(sample.index for sample in bad)]
    if len(seen) != expected or len(set(seen)) != expected:
        raise UsageError(
            f"{len(seen)} of {expected} images were evaluated, {len(set(seen))} of them different: "
            "give the loader each process's rank, and the number of processes as its world"
        )


def _to(images: Images, device: torch.device) -> Images:
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]
