"""Around an evaluation: its speed, its warnings, and the results that are expected of it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from torch import nn

from resnet_backbone.runtime.errors import UnexpectedResults, UsageError

logger = logging.getLogger(__name__)


class Speed(NamedTuple):
    """Of a detector in one process."""

    seconds_per_image: float  # mean, from the input in memory to the detections
    images_at_a_time: int  # of the largest batch


class Timed(nn.Module):
    """A detector that measures its seconds per image; the first batch is a warm-up."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, model.training
        self.batches: list[tuple[float, int]] = []  # seconds, images

    def forward(self, inputs: list[dict]) -> list[dict]:
        start = self._now()
        outputs = self.model(inputs)
        self.batches.append((self._now() - start, len(inputs)))
        return outputs

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def speed(self) -> Speed | None:
        """None where it saw no image."""
        counted = self.batches[1:] or self.batches
        if not counted:
            return None
        seconds, images = map(sum, zip(*counted, strict=True))
        return Speed(seconds / images, max(count for _, count in counted))


def timed_inference(
    model: nn.Module, batches: Iterable, evaluator: DatasetEvaluator
) -> tuple[dict, Speed | None]:
    """Detectron2's ``inference_on_dataset``, and how fast the detector was in this process."""
    timed = Timed(model)
    return inference_on_dataset(timed, batches, evaluator), timed.speed


def data_digest(dataset_name: str) -> str:
    """SHA-256 of what a registered data set says of its images and annotations."""
    records = json.dumps(DatasetCatalog.get(dataset_name), sort_keys=True, default=str)
    return hashlib.sha256(records.encode()).hexdigest()


def warn_if_empty(logger: logging.Logger, name: str, detected: bool, annotated: bool) -> None:
    """Says why AP is 0 or nan, where the model found nothing or there is nothing to find."""
    if not detected:
        text = "is it trained, and does MODEL.ROI_HEADS.SCORE_THRESH_TEST let anything through?"
        logger.warning("%s: the model detected nothing at all, so AP is 0; %s", name, text)
    if not annotated:
        logger.warning("%s has no ground truth boxes: AP is nan", name)


def check_expectations(cfg: CfgNode) -> None:
    """Raises UsageError for ``TEST.EXPECTED_RESULTS`` that could not be compared."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        words = list(entry) if isinstance(entry, (list, tuple)) else []
        numbers = [isinstance(word, (int, float)) for word in words]
        if numbers != [False, False, True, True]:
            raise UsageError(
                f"TEST.EXPECTED_RESULTS {entry!r}: write [task, metric, expected, tolerance], such "
                "as ['bbox', 'AP', 38.5, 0.2]"
            )


def check_results(cfg: CfgNode, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares results with ``TEST.EXPECTED_RESULTS``, as Detectron2's ``verify_results``.

    Raises:
        UnexpectedResults: a number is missing, not finite, or beyond its tolerance.
    """
    wrong = []
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = results.get(task, {}).get(metric)
        if actual is None or not abs(actual - expected) <= tolerance:  # nan is not
            shown = "not measured" if actual is None else f"{actual:.4g}"
            wrong.append(f"{task}/{metric} is {shown}, expected {expected:g} +- {tolerance:g}")
    if wrong:
        raise UnexpectedResults(f"TEST.EXPECTED_RESULTS: {'; '.join(wrong)}")
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info("TEST.EXPECTED_RESULTS: all as expected")
