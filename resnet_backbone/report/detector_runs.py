"""Run folders of train-net, and of the evaluations that --eval-only makes of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet_backbone.report.runs import (
    DETECTOR_METRICS,
    ELEVEN_POINT,
    AnyRun,
    Metrics,
    load_metrics,
    read_table,
)
from resnet_backbone.runtime.records import CONFIG, RESULTS, flatten

VOC_RESULTS, LOG = "voc_results.json", "log.txt"
EVALUATION = "eval"  # name of the folder of an evaluation


@dataclass(frozen=True)
class DetectorRun(AnyRun):
    """A run folder of train-net."""

    # From voc_results.json. For a run on COCO's format, reading its detections adds them.
    details: dict[str, Any] = field(default_factory=dict)
    training: Path | None = None  # see `home`

    not_recipe = re.compile(  # MODEL.WEIGHTS counts by its file name, see `weights`
        r"(SEED|OUTPUT_DIR|VIS_PERIOD|VERSION|CUDNN_BENCHMARK|GLOBAL\.HACK|MODEL\.(DEVICE|WEIGHTS)"
        r"|DATALOADER\.NUM_WORKERS|SOLVER\.CHECKPOINT_PERIOD|TEST\.EVAL_PERIOD"
        r"|RESNET_BACKBONE\.(CHANNELS_LAST|REFERENCE_BATCH|WEIGHTS_INPUT|BEST_METRIC))$"
    )
    seed_key = "SEED"

    @property
    def home(self) -> Path:
        """Folder of the training; of an evaluation another one than its own."""
        return self.training or self.folder

    @property
    def commands(self) -> list[str]:
        """Recorded commands: the training's, and the evaluation's if it is another one."""
        found = (self.results.get(key) for key in ("training_command", "command"))
        return [command for command in found if command]

    @property
    def numbers(self) -> dict[str, float | None]:
        return self.results["results"]["bbox"]

    @property
    def class_metric(self) -> str:
        """The metric of single classes, "AP50" or "AP"."""
        return by_class(self.numbers)[0]

    @property
    def protocol(self) -> str:
        """Whose metrics it was evaluated with: "voc", "coco" or "det" (ImageNet detection)."""
        if self.config.get("RESNET_BACKBONE.TEST.METRIC") == "imagenet_det":
            return "det"
        return "coco" if self.class_metric == "AP" or "APs" in self.numbers else "voc"

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
        """Reads the metrics of the training by name; empty if the run has none."""
        path = self.home / DETECTOR_METRICS
        return load_metrics(path) if path.is_file() else {}

    @property
    def inference(self) -> Path:
        """Folder of its evaluation on the first test set."""
        return self.folder.joinpath("inference", *(n.replace("/", "_") for n in self.test[:1]))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        paths = [place / LOG for place in dict.fromkeys((self.home, self.folder))]
        logs = [p.read_text(encoding="utf-8", errors="replace") for p in paths if p.is_file()]
        found = re.findall(r"data set (.+): (\d+) images, \d+ boxes", "".join(logs))
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
    """Reads a run that has results of a task, such as "bbox" or "localization".

    The folder of an evaluation gets what is known of the training whose weights it measured.
    """
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
    training = _find_training(folder.resolve(), config)
    if training != folder.resolve():
        config["MODEL.WEIGHTS"] = dict(flatten(read_table(training / CONFIG)))["MODEL.WEIGHTS"]
        ended = read_table(training / RESULTS) if (training / RESULTS).is_file() else {}
        results |= {key: ended[key] for key in ("iterations", "images_per_batch") if key in ended}
        results["training_command"] = ended.get("command")
    run = DetectorRun(folder.resolve(), config, results, training=training)
    if (run.inference / VOC_RESULTS).is_file():
        run.details.update(read_table(run.inference / VOC_RESULTS))
    return run


def _find_training(folder: Path, config: Mapping[str, Any]) -> Path:
    """Returns the run folder of an evaluation's weights; `folder` for a training or if unknown."""
    places = [Path(config.get("MODEL.WEIGHTS") or "").parent, folder.parent]
    runs = (place.resolve() for place in places if (place / DETECTOR_METRICS).is_file())
    found = [run for run in runs if (run / CONFIG).is_file()]
    return found[0] if found and folder.name == EVALUATION else folder


def load_detector_runs(folders: Iterable[str | os.PathLike]) -> list[DetectorRun]:
    """Reads runs; a folder of seeds (seed_1, seed_2, ...) stands for all of them.

    A folder that has only an evaluation stands for it.
    """
    runs = []
    for folder in map(Path, folders):
        if not (folder / CONFIG).is_file() and (folder / EVALUATION / CONFIG).is_file():
            folder = folder / EVALUATION
        seeds = [path for path in folder.glob("seed_*") if path.is_dir()]
        whole = not seeds or (folder / RESULTS).is_file()
        found = map(load_detector_run, [folder] if whole else seeds)
        runs += sorted(found, key=lambda run: run.seed or 0)
    return runs
