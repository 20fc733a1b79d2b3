"""Where a number comes from: the command, the source, the hardware, the versions."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

PROGRAM = "resnet-backbone"  # the console script
SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("resnet_backbone", "torch", "torchvision", "timm", "numpy", "omegaconf", "safetensors"),
    *("pillow", "simplejpeg", "nvidia-nvimgcodec-cu12", "detectron2", "sal-detectron2"),
    *("onnxruntime", "openvino", "hotcoco", "pycocotools"),
)


def command_line(command: str = "", arguments: Sequence[str] | None = None) -> str:
    """A command as it can be typed again.

    ``python tools/train_net.py ...`` where the checkout's doors are used, else
    ``resnet-backbone train-net ...``.

    Args:
        command: its name, such as "train-net"; by default the one that this process runs.
        arguments: what follows; by default those of this process.
    """
    program, *own = sys.argv
    words = own if arguments is None else list(arguments)
    name, running = Path(program).name, Path(program).resolve()
    by_name = name.startswith(f"{PROGRAM} ")  # as the dispatcher calls itself
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
    """Now, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of Python and of those of :data:`PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_revision() -> str:
    """The git commit of this source tree with "+changes" if it differs, or "unknown"."""
    if not (SOURCE / ".git").exists():  # installed: what is around is not our repository
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
    """What the run computes on."""
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
