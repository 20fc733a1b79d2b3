"""Warnings that every evaluator of detections gives."""

from __future__ import annotations

import logging


def warn_if_empty(logger: logging.Logger, name: str, detected: bool, annotated: bool) -> None:
    """Says why AP is 0 or nan, where that has a simple reason.

    Args:
        name: of the data set.
        detected: whether the model found anything.
        annotated: whether there is anything to find.
    """
    if not detected:
        logger.warning(
            "%s: the model detected nothing at all, so AP is 0; is it trained, and does"
            " MODEL.ROI_HEADS.SCORE_THRESH_TEST let anything through?",
            name,
        )
    if not annotated:
        logger.warning("%s has no ground truth boxes: AP is nan", name)
