"""A run folder that is there already: what may go on in it, and what has ended."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from resnet_backbone.detection.checkpoint.files import find_last_checkpoint
from resnet_backbone.detection.config import UsageError

logger = logging.getLogger(__name__)

CONFIG, RESULTS = "config.yaml", "results.json"
# Where and how fast a run computes; everything else makes it another run.
PLACES = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS")
# Checkpoints hold what these say, so other values would have no effect.
KEPT = tuple(
    f"SOLVER.{key}"
    for key in ("BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV")
    + ("WEIGHT_DECAY", "WEIGHT_DECAY_BIAS", "WEIGHT_DECAY_NORM")
)


def check_folder(folder: str, resume: bool) -> str:
    """The checkpoint from which a run in this folder goes on; "" where it starts.

    Raises:
        UsageError: there is a run, and it is not to be resumed; or some machines do not see it.
    """
    last = find_last_checkpoint(folder)
    found = comm.all_gather(last and os.path.isfile(last))
    if not resume and found[0]:
        raise UsageError(
            f"{folder} holds a run: --resume goes on with it; or choose another --output-dir"
        )
    if not all(found) and any(found):
        raise UsageError(f"--resume: {folder} must be the same on every machine, on a shared disk")
    if last and not found[0]:
        raise UsageError(f"{last} is missing, which last_checkpoint in {folder} names")
    return last


def saved_seed(folder: str, otherwise: int) -> int:
    """The seed that a run drew when it started."""
    return _read_config(folder).get("SEED", otherwise)


def config_digest(cfg: CfgNode) -> str:
    """Equal for configs that make the same run."""
    content = _flat(yaml.safe_load(cfg.dump()))
    kept = {key: value for key, value in content.items() if key not in PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def has_ended(cfg: CfgNode, last: str, is_seed: bool = False) -> bool:
    """Whether the folder's results are those of this config; says how it differs if they are not.

    Args:
        last: the checkpoint to go on from; "" for none.
        is_seed: a run of several seeds, which must all have one config.

    Raises:
        UsageError: a key that cannot change in the middle of a run.
    """
    if not last:
        return False
    if _read_results(cfg.OUTPUT_DIR).get("config_sha256") == config_digest(cfg):
        return True
    before, after = _read_config(cfg.OUTPUT_DIR), _flat(yaml.safe_load(cfg.dump()))
    changed = [key for key in after if key not in PLACES and before.get(key) != after[key]]
    if not before or not changed:
        return False
    refused = [key for key in changed if key in KEPT]
    if is_seed or refused:
        raise UsageError(
            f"{cfg.OUTPUT_DIR} was started with another {', '.join(refused or changed)}: go on "
            "with the same, or choose another --output-dir"
        )
    for key in changed:
        logger.warning("resumed with another %s: %s -> %s", key, before.get(key), after[key])
    return False


def saved_results(folder: str) -> dict[str, Any]:
    """The last evaluation of a run that has ended, by task."""
    return _read_results(folder).get("results", {})


def _read_results(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, RESULTS)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _read_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return _flat(yaml.safe_load(file))


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
