"""Run folders of the classification trainer: config.yaml, metrics.jsonl, results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from resnet_backbone.report.curves import Metrics, load_metrics
from resnet_backbone.report.paper import Network, parse_network

METRICS, CONFIG, RESULTS = "metrics.jsonl", "config.yaml", "results.json"


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: of the run.
        config: its resolved config as nested dicts; empty where there is no config.yaml.
        results: content of results.json; empty where the run has not ended.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def network(self) -> Network:
        model = self.config.get("model", {})
        name = self.results.get("model") or model.get("name") or self.folder.name
        return parse_network(name, self.results.get("options") or model.get("options"))

    @property
    def data_format(self) -> str:
        """ "cifar10", "imagenet", ...; without a config as the network's name suggests."""
        found = self.config.get("data", {}).get("format", "")
        return found or ("cifar10" if self.network.cifar else "imagenet")

    @property
    def iterations(self) -> int | None:
        """Iterations that it trains for."""
        planned = self.config.get("schedule", {}).get("iterations")
        return self.results.get("iterations", planned)

    @property
    def seed(self) -> int | None:
        return self.results.get("seed", self.config.get("train", {}).get("seed"))

    def metrics(self) -> Metrics:
        """Series by name, see :func:`~resnet_backbone.report.curves.load_metrics`."""
        return load_metrics(self.folder / METRICS)


def load_run(folder: str | os.PathLike) -> Run:
    """Reads a run's config and results, where it has them.

    Raises:
        FileNotFoundError: no such folder, or none of the files that a run leaves.
        ValueError: a damaged file.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (METRICS, RESULTS)):
        raise FileNotFoundError(
            f"{folder} holds no run: give a run folder of tools/train_classifier.py, "
            f"with {METRICS} or {RESULTS}"
        )
    return Run(
        folder.resolve(),
        read_table(folder / CONFIG) if (folder / CONFIG).is_file() else {},
        read_table(folder / RESULTS) if (folder / RESULTS).is_file() else {},
    )


def read_table(path: Path) -> dict[str, Any]:
    """Content of a JSON or YAML file that is a table of keys.

    Raises:
        ValueError: a damaged file.
    """
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged ({reason}): copy it again from the run") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no table of keys: copy it again from the run")
    return content


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("data.format", "cifar10") ... of a nested config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
