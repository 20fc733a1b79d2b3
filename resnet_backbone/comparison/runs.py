"""Runs of different versions of this package, made to compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import yaml
from detectron2.config import get_cfg

from resnet_backbone.detection.config import add_resnet_backbone_config, backbone_node
from resnet_backbone.report.detector_runs import DetectorRun
from resnet_backbone.report.runs import flatten


def with_defaults(runs: Iterable[DetectorRun]) -> list[DetectorRun]:
    """Runs with the default of each key of ours that their version did not have yet."""
    node = backbone_node(add_resnet_backbone_config(get_cfg()))
    defaults = dict(flatten(yaml.safe_load(node.dump()), "RESNET_BACKBONE."))
    return [replace(run, config={**defaults, **run.config}) for run in runs]
