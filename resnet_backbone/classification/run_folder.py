"""One folder a run: config, environment, metrics, TensorBoard, checkpoints, results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_backbone.classification.checkpoints import iterations_in
from resnet_backbone.runtime.files import write_json, write_text
from resnet_backbone.runtime.provenance import (
    command_line,
    date,
    hardware,
    source_revision,
    versions,
)

logger = logging.getLogger(__name__)

CONFIG, METRICS, RESULTS, ENVIRONMENT = (
    "config.yaml",
    "metrics.jsonl",
    "results.json",
    "environment.json",
)


def holds_run(folder: str | Path) -> bool:
    """Whether a folder has checkpoints or results that a new run would mix with."""
    folder = Path(folder)
    return bool(iterations_in(folder / "checkpoints")) or (folder / METRICS).exists()


class RunFolder:
    """Writes the files of a run, on the main process only.

    Args:
        path: made if it is not there.
        tensorboard: whether metrics also go to TensorBoard.
    """

    def __init__(self, path: str | Path, tensorboard: bool = True):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.tensorboard, self._writer = tensorboard, None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def start(self, config_yaml: str, device: torch.device, world_size: int) -> None:
        """Writes the resolved config and, for each start of the run, a line on where it ran."""
        write_text(self / CONFIG, config_yaml)
        starts = []
        if (self / ENVIRONMENT).exists():
            starts = json.loads((self / ENVIRONMENT).read_text())["starts"]
        entry = {
            "date": date(),
            "command": command_line(),
            "revision": source_revision(),
            "versions": versions(),
            **hardware(device),
            "processes": world_size,
        }
        write_json(self / ENVIRONMENT, {"starts": [*starts, entry]})

    def keep_metrics(self, wanted: Callable[[dict], bool]) -> None:
        """Drops rows of metrics that a resumed run will write again."""
        if not (self / METRICS).exists():
            return
        kept = []
        for line in (self / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                if wanted(json.loads(line)):
                    kept.append(line + "\n")
            except ValueError:
                logger.warning("%s: an incomplete line is dropped", self / METRICS)
        write_text(self / METRICS, "".join(kept))

    def add_metrics(self, row: dict) -> None:
        """Appends one row, which has "iteration", to metrics.jsonl and TensorBoard."""
        with open(self / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not self.tensorboard:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self / "tensorboard"), purge_step=row["iteration"])
        for key, value in row.items():
            if key != "iteration":
                self._writer.add_scalar(key, value, row["iteration"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
