"""One folder a run: config, environment, log, metrics, results."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_backbone.runtime.files import keep_rows, naming, write_json, write_text
from resnet_backbone.runtime.processes import World
from resnet_backbone.runtime.provenance import (
    command_line,
    date,
    hardware,
    source_revision,
    versions,
)

logger = logging.getLogger(__name__)

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
RESULTS, ENVIRONMENT = "results.json", "environment.json"


class RunFolder:
    """Writes the files of a run, on the main process only.

    Args:
        path: made if it is not there.
        tensorboard: whether metrics also go to TensorBoard.
    """

    def __init__(self, path: str | os.PathLike, tensorboard: bool = True):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.tensorboard, self._writer = tensorboard, None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def start(self, config_yaml: str, world: World) -> None:
        """Writes the resolved config and, for each start of the run, a line on where it ran."""
        write_text(self / CONFIG, config_yaml)
        starts, path = [], self / ENVIRONMENT
        if path.exists():
            starts = json.loads(path.read_text())["starts"]
        entry = {"date": date(), "command": command_line(), "revision": source_revision()}
        entry |= {"versions": versions(), **hardware(world.device), "processes": world.size}
        write_json(path, {"starts": [*starts, entry]})

    def keep_metrics(self, is_kept: Callable[[dict], bool]) -> None:
        """Drops rows of metrics that a resumed run will write again."""
        if keep_rows(self / METRICS, is_kept)[1]:
            logger.warning("%s: an incomplete line is dropped", self / METRICS)

    def add_metrics(self, row: dict) -> None:
        """Appends one row, which has "iteration", to metrics.jsonl and TensorBoard."""
        path = self / METRICS
        with naming(path), open(path, "a", encoding="utf-8") as file:
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


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
    """A run's results.json; empty while the run has not ended."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def set_up_logging(folder: Path | None, is_main: bool) -> None:
    """Messages go to the terminal and to ``log.txt``; other processes show warnings only."""
    root = logging.getLogger("resnet_backbone")
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    root.propagate = False
    root.handlers.clear()
    form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and is_main:
        handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)


def spell_hours(hours: float) -> str:
    """ "12 min", "3.5 hours" or "2.1 days"."""
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
