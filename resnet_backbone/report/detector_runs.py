"""Run folders of tools/train_net.py, and groups of them that differ in their seeds alone."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet_backbone.report.curves import Metrics, load_metrics
from resnet_backbone.report.runs import CONFIG, RESULTS, flatten, read_table

METRICS, DETAILS, LOG = "metrics.json", "voc_results.json", "log.txt"
PER_CLASS = ("AP50-", "AP-")  # of VOC's evaluator, of COCO's
ELEVEN_POINT = "AP50-11pt"

# Keys of a config that change where, how fast or how often a run does something, not what it
# trains. Of MODEL.WEIGHTS the file's name counts.
NOT_RECIPE = re.compile(
    r"(SEED|OUTPUT_DIR|VIS_PERIOD|VERSION|CUDNN_BENCHMARK|GLOBAL\.HACK|MODEL\.(DEVICE|WEIGHTS)"
    r"|DATALOADER\.NUM_WORKERS|SOLVER\.CHECKPOINT_PERIOD|TEST\.EVAL_PERIOD"
    r"|RESNET_BACKBONE\.(CHANNELS_LAST|REFERENCE_BATCH|WEIGHTS_INPUT|BEST_METRIC))$"
)


@dataclass(frozen=True)
class DetectorRun:
    """One run folder.

    Attributes:
        folder: of the run.
        config: its resolved config, "MODEL.RESNETS.DEPTH" -> 50.
        results: content of results.json.
        details: content of voc_results.json; empty where the run has none (COCO).
    """

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float | None]:
        """AP in percent by name: AP, AP50, AP75, and others."""
        return self.results["results"]["bbox"]

    @property
    def class_metric(self) -> str:
        """ "AP50" or "AP": what the numbers per class are."""
        return next((p[:-1] for p in PER_CLASS if _of_classes(self.numbers, p)), "AP50")

    @property
    def classes(self) -> dict[str, float | None]:
        """AP in percent by class; None for a class without ground truth."""
        return _of_classes(self.numbers, self.class_metric + "-")

    @property
    def objects(self) -> dict[str, int]:
        """Boxes that count, by class; empty where voc_results.json is missing."""
        return {row["class"]: row["ground_truth"] for row in self.details.get("classes", ())}

    @property
    def seed(self) -> int | None:
        return self.results.get("seed", self.config.get("SEED"))

    @property
    def iterations(self) -> int | None:
        return self.results.get("iterations")

    @property
    def seconds_per_image(self) -> float | None:
        """Of one process in the run's own evaluation; None where it was not measured."""
        return self.results.get("seconds_per_image")

    @property
    def planned_iterations(self) -> int | None:
        """More than :attr:`iterations` where the run ended early."""
        return self.config.get("SOLVER.MAX_ITER", self.iterations)

    @property
    def images_per_batch(self) -> int | None:
        return self.results.get("images_per_batch", self.config.get("SOLVER.IMS_PER_BATCH"))

    @property
    def test(self) -> list[str]:
        return list(self.results.get("test") or self.config.get("DATASETS.TEST", ()))

    @property
    def weights(self) -> str:
        """File name of the weights that it began with; "" for none."""
        given = self.config.get("MODEL.WEIGHTS", self.results.get("weights")) or ""
        return given.rstrip("/").rpartition("/")[2]

    @property
    def family(self) -> str:
        return "VGG" if "vgg" in self.config.get("MODEL.BACKBONE.NAME", "") else "ResNet"

    @property
    def depth(self) -> int:
        key = "RESNET_BACKBONE.VGG.DEPTH" if self.family == "VGG" else "MODEL.RESNETS.DEPTH"
        return int(self.config.get(key, 0))

    @property
    def head(self) -> str:
        """ "FPN", "C4" (a single map; for VGG conv5_3), "DC5" or "RetinaNet"."""
        if self.config.get("MODEL.META_ARCHITECTURE") == "RetinaNet":
            return "RetinaNet"
        if "fpn" in self.config.get("MODEL.BACKBONE.NAME", ""):
            return "FPN"
        return "DC5" if "res5" in self.config.get("MODEL.ROI_HEADS.IN_FEATURES", ()) else "C4"

    @property
    def title(self) -> str:
        """Such as "R-50-FPN", "VGG-16"."""
        network = f"{'VGG' if self.family == 'VGG' else 'R'}-{self.depth}"
        if self.config.get("RESNET_BACKBONE.SHORTCUT") == "none" and self.family != "VGG":
            network = f"plain-{self.depth}"
        return network if (self.family, self.head) == ("VGG", "C4") else f"{network}-{self.head}"

    def metrics(self) -> Metrics:
        """Series by name; empty where the run kept none."""
        path = self.folder / METRICS
        return load_metrics(path) if path.is_file() else {}

    @cached_property
    def log(self) -> str:
        path = self.folder / LOG
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def size_of(self, dataset: str) -> tuple[int, int] | None:
        """Images and boxes of a data set, difficult ones included, as the log has them."""
        pattern = rf"data set {re.escape(dataset)}: (\d+) images, (\d+) boxes"
        found = re.findall(pattern, self.log)
        return (int(found[-1][0]), int(found[-1][1])) if found else None


def _of_classes(numbers: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value
        for key, value in numbers.items()
        if key.startswith(prefix) and key != ELEVEN_POINT
    }


def load_detector_run(folder: str | os.PathLike) -> DetectorRun:
    """Reads a run that has ended.

    Raises:
        FileNotFoundError: no results.json or no config.yaml.
        ValueError: a damaged file, or results without boxes.
    """
    folder = Path(folder)
    for name in (RESULTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: either it is no run folder of tools/train_net.py, or "
                "the run has not ended: go on with --resume"
            )
    config = dict(flatten(read_table(folder / CONFIG)))
    results = read_table(folder / RESULTS)
    if not (results.get("results") or {}).get("bbox"):
        raise ValueError(f"{folder / RESULTS} has no results of boxes: evaluate the run first")
    details = {}
    for dataset in results.get("test") or ():
        path = folder / "inference" / dataset.replace("/", "_") / DETAILS
        details = read_table(path) if path.is_file() else details
    return DetectorRun(folder.resolve(), config, results, details)


def load_detector_runs(folders: Iterable[str | os.PathLike]) -> list[DetectorRun]:
    """Reads runs; a folder of seeds (seed_1, seed_2, ...) stands for all of them.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_detector_run`.
    """
    runs = []
    for folder in map(Path, folders):
        seeds = [path for path in folder.glob("seed_*") if path.is_dir()]
        whole = not seeds or (folder / RESULTS).is_file()
        runs += map(load_detector_run, [folder] if whole else sorted(seeds, key=_natural))
    return runs


def _natural(path: Path) -> tuple[int, str]:
    digits = re.sub(r"\D", "", path.name)
    return int(digits or 0), path.name


class DetectorGroup:
    """Runs of one detector and recipe, by rising seed.

    Attributes:
        runs: at least one.
        label: its title, with a letter where other groups have the same title.
        particulars: what those groups do not have, "KEY value".
    """

    def __init__(self, runs: Sequence[DetectorRun]):
        self.runs = sorted(runs, key=lambda run: (run.seed is None, run.seed or 0))
        self.first = self.runs[0]
        self.label = self.first.title
        self.particulars: tuple[str, ...] = ()
        for seed in {run.seed for run in self.runs}:
            same = [str(run.folder) for run in self.runs if run.seed == seed]
            if len(same) > 1:
                raise ValueError(
                    f"{' and '.join(same)} have the same recipe and seed {seed}: give one of them"
                )

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    def values(self, key: str) -> list[float]:
        """One number of every run that has it, in percent."""
        found = [run.numbers.get(key) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def class_values(self, name: str) -> list[float]:
        """AP of a class in every run."""
        found = [run.classes.get(name) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def seconds_per_image(self, measured: Mapping[Path, float]) -> float | None:
        """Mean over the runs for which it was measured.

        Args:
            measured: apart from the runs, by run folder, resolved; where there is none of them
                the runs' own evaluations count.
        """
        folders = [run.folder.resolve() for run in self.runs]
        apart = [measured[folder] for folder in folders if folder in measured]
        own = [run.seconds_per_image for run in self.runs if run.seconds_per_image is not None]
        found = apart or own
        return statistics.fmean(found) if found else None

    def differing_keys(self, other: DetectorGroup) -> dict[str, tuple[Any, Any]]:
        """Keys of the recipe -> their values here and there; those of one side alone left out."""
        mine, theirs = self.first.config, other.first.config
        return {
            key: (value, theirs[key])
            for key, value in mine.items()
            if key in theirs and theirs[key] != value and not NOT_RECIPE.match(key)
        }


def group_runs(runs: Sequence[DetectorRun]) -> list[DetectorGroup]:
    """Groups runs that differ in their seeds alone: VGG first, then by depth and head.

    Raises:
        ValueError: no runs, the same seed twice, or runs of different test sets.
    """
    if not runs:
        raise ValueError("no runs to report; give at least one run folder")
    _check_same_test(runs)
    members: dict[str, list[DetectorRun]] = {}
    for run in runs:
        recipe = {key: value for key, value in run.config.items() if not NOT_RECIPE.match(key)}
        parts = [recipe, run.weights, run.planned_iterations, run.images_per_batch]
        members.setdefault(json.dumps(parts, sort_keys=True, default=str), []).append(run)
    groups = [DetectorGroup(group) for group in members.values()]
    groups.sort(key=lambda g: (g.first.family == "ResNet", g.first.depth, g.first.head))
    for group in groups:
        _name_apart(group, [g for g in groups if g.first.title == group.first.title])
    return groups


def _check_same_test(runs: Sequence[DetectorRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        mine, theirs = ({"data": one.test, "classes": sorted(one.classes)} for one in (first, run))
        if run.objects and first.objects:
            mine["objects"], theirs["objects"] = first.objects, run.objects
        wrong = next((key for key in mine if mine[key] != theirs[key]), None)
        if wrong:
            what = f": {mine[wrong]} and {theirs[wrong]}" if wrong == "data" else f" ({wrong})"
            raise ValueError(
                f"{first.folder} and {run.folder} were evaluated on different test sets{what}; "
                "give runs of one"
            )


def _name_apart(group: DetectorGroup, same: Sequence[DetectorGroup]) -> None:
    """Where several groups have one title: a letter in the label, and what is particular."""
    if len(same) == 1:
        return
    group.label = f"{group.first.title} {chr(ord('a') + same.index(group))}"
    notes: dict[str, str] = {}
    for other in same:
        if other.first.weights != group.first.weights:
            notes["weights"] = group.first.weights or "no weights"
        planned = group.first.planned_iterations
        if other.first.planned_iterations != planned:
            notes["length"] = f"{planned} iterations"
        for key, (value, _) in group.differing_keys(other).items():
            if key not in ("SOLVER.MAX_ITER", "SOLVER.STEPS"):
                notes[key] = f"{key} {value!r}"
    group.particulars = tuple(notes[key] for key in sorted(notes))
