"""Plans: YAML files that name networks, configs and data of a reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

IMPROVEMENTS = ("baseline", "refinement", "context", "multi-scale", "ensemble")
"""Rows of tools/evaluate_detector.py."""


class PlanError(ValueError):
    """A plan or command line that cannot be meant; the message says what to write."""


@dataclass(frozen=True)
class Training:
    """A command of tools/train_classifier.py or tools/train_net.py.

    Attributes:
        config: YAML file or files, relative to the root of the project.
        overrides: trailing words of the command.
        hours: of one ``gpu``, by calculation; 0: not known.
        gpu: that it is meant for; empty: a CPU will do.
        basis: what the hours are calculated from.
        batch: images of a step, where it is less than the GPUs that may be given; 0: more.
    """

    config: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    hours: float = 0.0
    gpu: str = ""
    basis: str = ""
    batch: int = 0


@dataclass(frozen=True)
class Network:
    """A network of the comparison.

    Attributes:
        detect: the detector's training.
        pretrain: the classifier's training; None: weights must be given.
        batch_norm: whether it has batch norms, whose statistics are then computed.
    """

    detect: Training
    pretrain: Training | None = None
    batch_norm: bool = True


@dataclass(frozen=True)
class Plan:
    """Everything that a reproduction trains.

    Attributes:
        title: one line.
        data: "built-in", or "official": data sets that the user has.
        networks: by name; the first one is what the others are compared with.
        seeds: of the detectors.
        improvements: rows of tools/evaluate_detector.py on the last network; the others have the
            baseline, for its seconds per image.
        datasets: folders in $DETECTRON2_DATASETS that official data lie in.
        note: a paragraph for the page with the results.
    """

    title: str
    data: str
    networks: dict[str, Network]
    seeds: tuple[int, ...] = (1,)
    improvements: tuple[str, ...] = ("baseline",)
    datasets: tuple[str, ...] = ()
    note: str = ""


def read_plan(path: Path, seeds: Sequence[int] | None = None) -> Plan:
    """Reads a plan.

    Args:
        seeds: in place of the plan's.

    Raises:
        PlanError: no such file, unknown or missing keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    plan = _make(Plan, content, str(path))
    if plan.data not in ("built-in", "official"):
        raise PlanError(f"{path}: data is built-in or official, not {plan.data!r}")
    if not isinstance(plan.networks, Mapping) or not plan.networks:
        raise PlanError(f"{path}: networks: give at least one, NAME: with detect: below it")
    networks = {name: _network(node, f"{path}: {name}") for name, node in plan.networks.items()}
    unknown = sorted({str(row) for row in plan.improvements} - set(IMPROVEMENTS))
    if unknown:
        known = ", ".join(IMPROVEMENTS)
        raise PlanError(f"{path}: no improvement {unknown[0]!r}; known are {known}")
    seeds = tuple(seeds or plan.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) for s in seeds):
        raise PlanError(f"seeds {list(seeds)}: give integers, each once")
    if "ensemble" in plan.improvements and len(seeds) < 2:
        raise PlanError(f"seeds {list(seeds)}: the row ensemble needs two or more")
    return replace(plan, networks=networks, seeds=seeds)


def _network(node: Any, where: str) -> Network:
    network = _make(Network, node, where)
    pretrain = network.pretrain and _training(network.pretrain, f"{where}: pretrain")
    return replace(network, detect=_training(network.detect, f"{where}: detect"), pretrain=pretrain)


def _training(node: Any, where: str) -> Training:
    """Words of a command, which YAML may have read as numbers."""
    training = _make(Training, node, where)
    config, overrides = (tuple(map(str, v)) for v in (training.config, training.overrides))
    return replace(training, config=config, overrides=overrides)


def _make(kind: type, node: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping; a single value is a tuple's only item."""
    if not isinstance(node, Mapping):
        raise PlanError(f"{where}: expected keys with values, found {node!r}")
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(node.keys() - known.keys())
    needed = {n for n, item in known.items() if item.default is item.default_factory is MISSING}
    absent = sorted(needed - node.keys())
    if unknown or absent:
        problem = f"unknown key {unknown[0]}" if unknown else f"the key {absent[0]} is missing"
        raise PlanError(f"{where}: {problem}; known are {', '.join(known)}")
    lists = {item.name for item in fields(kind) if str(item.type).startswith("tuple")}
    return kind(**{k: _items(v) if k in lists else v for k, v in node.items()})


def _items(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
