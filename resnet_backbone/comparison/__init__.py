"""Detectors beside each other: where the evaluation of `detection` meets the tables of `report`."""

from .document import write_detection_report

__all__ = ["write_detection_report"]
