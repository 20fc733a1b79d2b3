"""The records of a run: its folder, and the provenance of its numbers."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.runtime.files import keep_rows, naming, write_json, write_text
from resnet_backbone.runtime.processes import World

logger = logging.getLogger(__name__)

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
RESULTS, ENVIRONMENT = "results.json", "environment.json"
PROGRAM = "resnet-backbone"  # the console script
SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("resnet_backbone", "torch", "torchvision", "timm", "numpy", "omegaconf", "safetensors"),
    *("pillow", "simplejpeg", "nvidia-nvimgcodec-cu12", "detectron2", "sal-detectron2"),
    *("onnxruntime", "openvino", "hotcoco", "pycocotools"),
)


def say_nothing_to_resume(folder: str | os.PathLike) -> None:
    """Says that ``--resume`` found no run, before data and weights are read."""
    text = f"nothing to resume in {folder}: starting from iteration 0"
    print(text, file=sys.stderr, flush=True)


class RunFolder:
    """Writes the files of a run, on the main process only; metrics also go to TensorBoard."""

    def __init__(self, path: str | os.PathLike, tensorboard: bool = True):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.tensorboard, self._writer = tensorboard, None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def start(self, config_yaml: str, world: World) -> None:
        """Writes the resolved config, and adds this start of the run to environment.json."""
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
    """Reads a run's results.json; empty before the run has ended."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def set_up_logging(folder: Path | None, is_main: bool) -> None:
    """Logs messages to the terminal and, with level DEBUG, to ``log.txt``.

    Processes other than the main one show only warnings.
    """
    root = logging.getLogger("resnet_backbone")
    root.setLevel(logging.DEBUG if is_main else logging.WARNING)
    root.propagate = False
    root.handlers.clear()
    form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and is_main:
        handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
    handlers[0].setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)


def spell_hours(hours: float) -> str:
    """Formats hours as "12 min", "3.5 hours" or "2.1 days"."""
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def command_line(command: str = "", arguments: Sequence[str] | None = None) -> str:
    """Returns a command, by default this process's, as it can be typed again.

    ``python tools/train_net.py ...`` if a script of the checkout is running, or else
    ``resnet-backbone train-net ...``.
    """
    program, *own = sys.argv
    words = own if arguments is None else list(arguments)
    name, running = Path(program).name, Path(program).resolve()
    by_name = name.startswith(f"{PROGRAM} ")  # set by the dispatcher
    if not command:
        if by_name:
            command = name.removeprefix(f"{PROGRAM} ")
        elif running.parent == SOURCE / "resnet_backbone" / "cli":  # python -m
            command = running.stem
        else:
            return shlex.join(["python", program, *words])
    door = f"tools/{command.replace('-', '_')}.py"
    if by_name or not (SOURCE / door).is_file():
        return shlex.join([PROGRAM, command.replace("_", "-"), *words])
    return shlex.join(["python", door, *words])


def date() -> str:
    """Returns the current time, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of installed :data:`PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_revision() -> str:
    """Returns the git commit of this source tree, with "+changes" if it differs, or "unknown"."""
    if not (SOURCE / ".git").exists():  # installed: a repository around it is not ours
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=SOURCE,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def hardware(device: torch.device) -> dict:
    found = {"device": device.type, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("data.format", "cifar10"), ... from a nested config; "options" is not flattened."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "options":
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
