"""Run folders of the two trainers: metrics, resolved config and results."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import yaml

from resnet_backbone.report.published import Network, parse_network
from resnet_backbone.runtime.records import CONFIG, METRICS, RESULTS

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> iterations (N,), values (N,)

DETECTOR_METRICS = "metrics.json"  # Detectron2's
VOC_RESULTS, LOC_RESULTS, LOG = "voc_results.json", "loc_results.json", "log.txt"
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("data.format", "cifar10"), ... from a nested config; "options" is not flattened."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "options":
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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


@dataclass(frozen=True)
class DetectorRun(AnyRun):
    """A run folder of train-net."""

    # From voc_results.json or loc_results.json. For a run on COCO's format, reading its detections
    # adds them.
    details: dict[str, Any] = field(default_factory=dict)

    not_recipe = re.compile(  # MODEL.WEIGHTS counts by its file name, see `weights`
        r"(SEED|OUTPUT_DIR|VIS_PERIOD|VERSION|CUDNN_BENCHMARK|GLOBAL\.HACK|MODEL\.(DEVICE|WEIGHTS)"
        r"|DATALOADER\.NUM_WORKERS|SOLVER\.CHECKPOINT_PERIOD|TEST\.EVAL_PERIOD"
        r"|RESNET_BACKBONE\.(CHANNELS_LAST|REFERENCE_BATCH|WEIGHTS_INPUT|BEST_METRIC))$"
    )
    seed_key = "SEED"

    @property
    def numbers(self) -> dict[str, float | None]:
        return self.results["results"]["bbox"]

    @property
    def class_metric(self) -> str:
        """The metric of single classes, "AP50" or "AP"."""
        return by_class(self.numbers)[0]

    @property
    def is_coco(self) -> bool:
        """Whether it was evaluated with COCO's metrics, not VOC's."""
        return self.class_metric == "AP"

    @property
    def classes(self) -> dict[str, float | None]:
        """AP in percent by class; None for a class without ground truth."""
        return by_class(self.numbers)[1]

    @property
    def objects(self) -> dict[str, int]:
        """Number of counted boxes by class; empty if details are unknown."""
        return {row["class"]: row["ground_truth"] for row in self.details.get("classes", ())}

    @property
    def iterations(self) -> int | None:
        return self.results.get("iterations")

    @property
    def planned_iterations(self) -> int | None:
        return self.config.get("SOLVER.MAX_ITER", self.iterations)

    @property
    def images_per_batch(self) -> int | None:
        return self.results.get("images_per_batch", self.config.get("SOLVER.IMS_PER_BATCH"))

    @property
    def train(self) -> list[str]:
        return list(self.config.get("DATASETS.TRAIN", ()))

    @property
    def test(self) -> list[str]:
        return list(self.results.get("test") or self.config.get("DATASETS.TEST", ()))

    @property
    def weights(self) -> str:
        """File name of the initial weights; "" for none."""
        given = self.config.get("MODEL.WEIGHTS", self.results.get("weights")) or ""
        return given.rstrip("/").rpartition("/")[2]

    @property
    def family(self) -> str:
        if "vgg" in self.config.get("MODEL.BACKBONE.NAME", ""):
            return "VGG"
        return "plain" if self.config.get("RESNET_BACKBONE.SHORTCUT") == "none" else "ResNet"

    @property
    def depth(self) -> int:
        key = "RESNET_BACKBONE.VGG.DEPTH" if self.family == "VGG" else "MODEL.RESNETS.DEPTH"
        return int(self.config.get(key, 0))

    @property
    def head(self) -> str:
        """The head: "FPN", "C4" (a single map; for VGG conv5_3), "DC5" or "RetinaNet"."""
        if self.config.get("MODEL.META_ARCHITECTURE") == "RetinaNet":
            return "RetinaNet"
        if "fpn" in self.config.get("MODEL.BACKBONE.NAME", ""):
            return "FPN"
        return "DC5" if "res5" in self.config.get("MODEL.ROI_HEADS.IN_FEATURES", ()) else "C4"

    @property
    def title(self) -> str:
        """Such as "R-50-FPN", "VGG-16"."""
        network = f"{'R' if self.family == 'ResNet' else self.family}-{self.depth}"
        return network if (self.family, self.head) == ("VGG", "C4") else f"{network}-{self.head}"

    def metrics(self) -> Metrics:
        """Reads the metrics by name; empty if the run has none."""
        path = self.folder / DETECTOR_METRICS
        return load_metrics(path) if path.is_file() else {}

    @property
    def inference(self) -> Path:
        """Folder of its evaluation on the first test set."""
        return self.folder.joinpath("inference", *(n.replace("/", "_") for n in self.test[:1]))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        path = self.folder / LOG
        log = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found = re.findall(r"data set (.+): (\d+) images, \d+ boxes", log)
        return {name: int(images) for name, images in found}

    def images_of(self, datasets: Sequence[str]) -> int | None:
        """Returns the number of images of data sets, from the end of the log; None if missing."""
        sizes = [self._sizes.get(name) for name in datasets]
        return None if None in sizes or not sizes else sum(sizes)


def by_class(numbers: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the metric of single classes, "AP50" (VOC) or "AP" (COCO), and class -> value."""
    for metric in ("AP50", "AP"):
        start = f"{metric}-"
        found = {key.removeprefix(start): numbers[key] for key in numbers if key.startswith(start)}
        found.pop(ELEVEN_POINT.removeprefix(start), None)
        if found:
            return metric, found
    return "AP50", {}


def load_detector_run(folder: str | os.PathLike, task: str = "bbox") -> DetectorRun:
    """Reads a run that has results of a task, such as "bbox" or "localization"."""
    folder = Path(folder)
    for name in (RESULTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: it is not a run folder of train-net, or the "
                "run has not ended (continue it with --resume)"
            )
    config, results = dict(flatten(read_table(folder / CONFIG))), read_table(folder / RESULTS)
    if not (results.get("results") or {}).get(task):
        raise ValueError(f"{folder / RESULTS} has no results of {task}: evaluate the run first")
    run = DetectorRun(folder.resolve(), config, results)
    for name in (VOC_RESULTS, LOC_RESULTS):
        if (run.inference / name).is_file():
            run.details.update(read_table(run.inference / name))
    return run


def load_detector_runs(folders: Iterable[str | os.PathLike]) -> list[DetectorRun]:
    """Reads runs; a folder of seeds (seed_1, seed_2, ...) stands for all of them."""
    runs = []
    for folder in map(Path, folders):
        seeds = [path for path in folder.glob("seed_*") if path.is_dir()]
        whole = not seeds or (folder / RESULTS).is_file()
        found = map(load_detector_run, [folder] if whole else seeds)
        runs += sorted(found, key=lambda run: run.seed or 0)
    return runs


OneRun = TypeVar("OneRun", Run, DetectorRun)


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
