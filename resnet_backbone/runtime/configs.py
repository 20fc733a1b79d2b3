"""The configs that come with the package, by path or by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from resnet_backbone.runtime.errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """``configs`` of the checkout, or what the wheel has of it."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str | os.PathLike, task: str) -> Path:
    """The file of a config.

    Args:
        name: a path, or where there is no such file a name below ``configs/TASK`` or ``configs``
            such as "voc/faster_rcnn_R_50_FPN", with or without ".yaml".
        task: "detection" or "classification".

    Raises:
        ValueError: no such file; the message names the nearest config.
    """
    path = Path(name)
    if path.is_file():
        return path
    configs = config_folder()
    for folder in (configs / task, configs, configs.parent):
        found = folder / (str(path).removesuffix(".yaml") + ".yaml")
        if found.is_file() and not path.is_absolute():
            return found
    names = [str(file.relative_to(configs / task)) for file in (configs / task).rglob("*.yaml")]
    wanted = str(path).removesuffix(".yaml") + ".yaml"
    near = difflib.get_close_matches(wanted.removeprefix(f"configs/{task}/"), sorted(names), n=1)
    hint = f"did you mean {near[0].removesuffix('.yaml')}? " if near else ""
    raise UsageError(f"{name}: no such config file; {hint}Ready ones are in {configs / task}")
