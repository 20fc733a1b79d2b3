"""Detectron2's ``TEST.EXPECTED_RESULTS``: results that are not as expected end a tool."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from resnet_backbone.detection.config import UsageError

logger = logging.getLogger(__name__)


class UnexpectedResults(ValueError):
    """Results that differ from ``TEST.EXPECTED_RESULTS``; the message names all that do."""


def check_expectations(cfg: CfgNode) -> None:
    """Refuses ``TEST.EXPECTED_RESULTS`` that could not be compared, before hours of training.

    Raises:
        UsageError: the entry.
    """
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

    Args:
        results: by task and metric.

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
