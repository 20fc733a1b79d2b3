"""Runs of different versions of this package, made to compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import yaml

from resnet_backbone.detection.config import backbone_node
from resnet_backbone.detection.engine.command_line import load_config
from resnet_backbone.report.detector_runs import DetectorRun
from resnet_backbone.report.runs import flatten


def with_defaults(runs: Iterable[DetectorRun]) -> list[DetectorRun]:
    """Runs with the default of each key of ours that their version did not have yet."""
    node = backbone_node(load_config("", []))
    defaults = dict(flatten(yaml.safe_load(node.dump()), "RESNET_BACKBONE."))
    return [replace(run, config={**defaults, **run.config}) for run in runs]
