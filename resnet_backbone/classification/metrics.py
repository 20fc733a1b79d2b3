"""Classification errors, computed once from what is kept of every single image.

Processes exchange these records and not sums. They are put into the order of the data set before
anything is computed, so any number of processes gives the same result to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5  # classes that are kept of each image


@dataclass(frozen=True)
class Predictions:
    """What is kept of each image, one row for each.

    Attributes:
        indices: int64 (N,), places in the data set.
        labels: int64 (N,).
        classes: int64 (N, k), the classes with the highest scores, best first; k is 5, or the
            number of classes where there are fewer. Of equal scores the lower class comes first.
        scores: float32 (N, k), their probabilities.
        log_likelihoods: float64 (N,), log of the probability of the label.
    """

    indices: Tensor
    labels: Tensor
    classes: Tensor
    scores: Tensor
    log_likelihoods: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def from_probabilities(
        cls, probabilities: Tensor, labels: Tensor, indices: Tensor
    ) -> Predictions:
        """Records of a batch, on the CPU.

        Args:
            probabilities: (N, num_classes), on any device.
            labels, indices: int64 (N,).
        """
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
        """Joins records, in the order of the data set."""
        names = tuple(cls.__dataclass_fields__)
        columns = [torch.cat([getattr(part, name) for part in parts]) for name in names]
        order = columns[0].argsort()
        return cls(*(column[order] for column in columns))

    @property
    def top1(self) -> Tensor:
        """int64 (N,), the predicted class."""
        return self.classes[:, 0]


def top_k_error(predictions: Predictions, k: int, num_bad: int = 0) -> float:
    """Percent of images whose label is not among the ``k`` (1 to 5) best classes.

    Args:
        num_bad: further images that could not be read; they count as wrong.
    """
    right = (predictions.classes[:, :k] == predictions.labels[:, None]).any(1).sum().item()
    total = len(predictions) + num_bad
    return 100.0 * (total - right) / total


def confusion_matrix(predictions: Predictions, num_classes: int) -> Tensor:
    """Counts, int64 (label, predicted class)."""
    cells = predictions.labels * num_classes + predictions.top1
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def per_class_error(confusion: Tensor, bad_labels: Sequence[int] = ()) -> list[float | None]:
    """Top-1 error of each class in percent; ``None`` for a class without images.

    Args:
        confusion: of :func:`confusion_matrix`.
        bad_labels: classes of images that could not be read; they count as wrong.
    """
    bad = torch.bincount(torch.tensor(bad_labels, dtype=torch.int64), minlength=len(confusion))
    totals = (confusion.sum(1) + bad).tolist()
    right = confusion.diagonal().tolist()
    return [100.0 * (n - r) / n if n else None for n, r in zip(totals, right, strict=True)]


def cross_entropy(predictions: Predictions) -> float:
    """Mean of -log(probability of the label), in nats."""
    return -predictions.log_likelihoods.mean().item()
