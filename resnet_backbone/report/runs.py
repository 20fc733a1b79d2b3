"""Run folders of the two trainers: metrics, resolved config and results."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import yaml

from resnet_backbone.report.published import Network, parse_network
from resnet_backbone.runtime.records import CONFIG, METRICS, RESULTS, flatten

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> iterations (N,), values (N,)

DETECTOR_METRICS = "metrics.json"  # Detectron2's
ELEVEN_POINT = "AP50-11pt"

logger = logging.getLogger(__name__)


def load_metrics(path: str | os.PathLike) -> Metrics:
    """Reads a metrics file of JSON lines, each with "iteration".

    If a resumed run wrote an iteration again, the later value counts. Incomplete lines, such as the
    last one of a killed run, are skipped with a warning.

    Returns:
        For each number (total_loss, lr, "bbox/AP50", ...): rising iterations (N,), values (N,).
    """
    series: dict[str, dict[int, float]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                iteration = int(entry["iteration"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s line %d is incomplete, skipped", path, number)
                continue
            for key, value in entry.items():
                if isinstance(value, (int, float)):
                    series.setdefault(key, {})[iteration] = value
    if not series:
        raise ValueError(f"{path} has no metrics; give the metrics file of a training run")
    rows = {key: sorted(values.items()) for key, values in series.items()}
    return {
        key: (np.array([i for i, _ in row]), np.array([v for _, v in row], dtype=np.float64))
        for key, row in rows.items()
    }


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Returns a centered running mean over `window` values (fewer at the ends), without nan."""
    if not len(values):
        return values
    good = np.isfinite(values)
    center = slice(window // 2, window // 2 + len(values))
    columns = np.where(good, values, 0.0), good.astype(float)
    total, count = (np.convolve(column, np.ones(window))[center] for column in columns)
    with np.errstate(invalid="ignore"):
        return total / count


def read_table(path: Path) -> dict[str, Any]:
    """Reads a mapping from a JSON or YAML file; ValueError if it is damaged."""
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold a mapping")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from the run") from error
    return content


@dataclass(frozen=True)
class AnyRun:
    """A run folder, with its resolved config and results."""

    folder: Path
    config: dict[str, Any]  # "MODEL.RESNETS.DEPTH" -> 50; empty without a config.yaml
    results: dict[str, Any]  # of results.json; empty if the run has not ended

    # Keys that do not affect the training, such as paths, devices and periods.
    not_recipe: ClassVar[re.Pattern]
    seed_key: ClassVar[str]

    @property
    def recipe(self) -> dict[str, Any]:
        return {key: v for key, v in self.config.items() if not self.not_recipe.match(key)}

    @property
    def seed(self) -> int | None:
        return self.results.get("seed", self.config.get(self.seed_key))


class Run(AnyRun):
    """A run folder of train-classifier."""

    not_recipe = re.compile(
        r"output\.|train\.(seed|device|threads|compile|channels_last)$|model\.weights$"
        r"|evaluation\.(every|batch_size)$|data\.(root|val_root|val_labels|workers|max_bad_images)$"
    )
    seed_key = "train.seed"

    @cached_property
    def network(self) -> Network:
        name = self.results.get("model") or self.config.get("model.name") or self.folder.name
        options = self.results.get("options") or self.config.get("model.options")
        return parse_network(name, options)

    @property
    def data_format(self) -> str:
        """The data's format, "cifar10", "imagenet", ...; without a config, by the network."""
        return self.config.get("data.format", "cifar10" if self.network.cifar else "imagenet")

    @property
    def has_published(self) -> bool:
        """Whether the data are CIFAR-10 or ImageNet's 1,000 classes; true if not recorded."""
        classes = {"cifar10": 10, "imagenet": 1000, "shards": 1000}.get(self.data_format)
        return bool(classes) and self.results.get("num_classes", classes) == classes

    @property
    def numbers(self) -> dict[str, Any]:
        return self.results

    @property
    def iterations(self) -> int | None:
        """Length of the training in iterations."""
        return self.results.get("iterations", self.config.get("schedule.iterations"))

    def metrics(self) -> Metrics:
        return load_metrics(self.folder / METRICS)


def load_run(folder: str | os.PathLike) -> Run:
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (METRICS, RESULTS)):
        raise FileNotFoundError(
            f"{folder} holds no run: give a run folder of train-classifier, "
            f"with {METRICS} or {RESULTS}"
        )
    files = (folder / CONFIG, folder / RESULTS)
    config, results = (read_table(file) if file.is_file() else {} for file in files)
    return Run(folder.resolve(), dict(flatten(config)), results)


OneRun = TypeVar("OneRun", bound=AnyRun)


class Group(Generic[OneRun]):
    """Runs of one network and recipe, by rising seed; ValueError if two have the same seed."""

    def __init__(self, runs: Sequence[OneRun]):
        self.runs = sorted(runs, key=lambda run: (run.seed is None, run.seed or 0))
        self.first = self.runs[0]
        for seed in {run.seed for run in self.runs if run.seed is not None}:
            same = [str(run.folder) for run in self.runs if run.seed == seed]
            if len(same) > 1:
                raise ValueError(
                    f"{' and '.join(same)} have the same recipe and seed {seed}: give one of them"
                )

    def values(self, key: str) -> list[float]:
        """Returns a number, in percent, of every run that has it."""
        found = [run.numbers.get(key) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def differing_keys(self, other: Group) -> dict[str, tuple[Any, Any]]:
        """Returns recipe keys that both have, with differing values: key -> (own, other)."""
        mine, theirs = self.first.recipe, other.first.recipe
        return {k: (v, theirs[k]) for k, v in mine.items() if k in theirs and theirs[k] != v}


def group_by(runs: Iterable[OneRun], identity: Callable[[OneRun], Any]) -> list[list[OneRun]]:
    members: dict[str, list[OneRun]] = {}
    for run in runs:
        key = json.dumps(identity(run), sort_keys=True, default=str)
        members.setdefault(key, []).append(run)
    return list(members.values())
