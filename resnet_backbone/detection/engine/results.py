"""Results of runs: comparison with expected ones, and mean and spread over several seeds."""

from __future__ import annotations

import logging
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from resnet_backbone.runtime.errors import EXIT_STOPPED, UnexpectedResults, UsageError
from resnet_backbone.runtime.files import alone, write_json
from resnet_backbone.runtime.records import command_line, read_results
from resnet_backbone.runtime.signals import run_child

logger = logging.getLogger(__name__)


def check_expectations(cfg: CfgNode) -> None:
    """Raises UsageError for malformed ``TEST.EXPECTED_RESULTS``."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        words = list(entry) if isinstance(entry, (list, tuple)) else []
        numbers = [isinstance(word, (int, float)) for word in words]
        if numbers != [False, False, True, True]:
            raise UsageError(
                f"TEST.EXPECTED_RESULTS {entry!r}: write [task, metric, expected, tolerance], such "
                "as ['bbox', 'AP', 38.5, 0.2]"
            )
        if len(set(cfg.DATASETS.TEST)) > 1 and "/" not in words[0]:
            raise UsageError(
                f"TEST.EXPECTED_RESULTS {entry!r}: with the test sets "
                f"{', '.join(cfg.DATASETS.TEST)} write SET/{words[0]}"
            )


def check_results(cfg: CfgNode, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares results with ``TEST.EXPECTED_RESULTS``, like Detectron2's ``verify_results``.

    Raises:
        UnexpectedResults: a number is missing, not finite, or beyond its tolerance.
    """
    wrong = []
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = flatten_results_dict(results).get(f"{task}/{metric}")  # SET/TASK with several
        if actual is None or not abs(actual - expected) <= tolerance:  # also for nan
            shown = "not measured" if actual is None else f"{actual:.4g}"
            wrong.append(f"{task}/{metric} is {shown}, expected {expected:g} +- {tolerance:g}")
    if wrong:
        raise UnexpectedResults(f"TEST.EXPECTED_RESULTS: {'; '.join(wrong)}")
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info("TEST.EXPECTED_RESULTS: all as expected")


def read_seeds(words: Sequence[str]) -> list[int]:
    """Reads the seeds of ``--seeds 1 2 3``; UsageError unless they are distinct integers."""
    seeds = [int(word) for word in words if word.isdecimal()]
    if len(set(seeds)) < len(words):
        given = " ".join(words)
        raise UsageError(f"--seeds {given}: give whole numbers, each once, such as --seeds 1 2 3")
    return seeds


def seed_folder(output_dir: str, seed: int) -> str:
    return os.path.join(output_dir, f"seed_{seed}")


def train_seeds(module: str, arguments: Sequence[str], seeds: Sequence[int], output: str) -> None:
    """Runs a training tool for each seed in its own process, then writes ``seeds.json``.

    The tool's module gets `arguments` and ``--seed-run N``; its runs are in `output`/``seed_N``.
    SystemExit: a run failed, with its exit status. The same command resumes.
    """
    folders = {seed: seed_folder(output, seed) for seed in seeds}
    with alone(output) as lock:
        for number, (seed, folder) in enumerate(folders.items(), 1):
            print(f"seed {seed} ({number} of {len(seeds)}): {folder}", flush=True)
            command = [sys.executable, "-m", module, *arguments, "--seed-run", str(seed)]
            status, stop = run_child(command, pass_fds=(lock,))
            if status or stop:  # a run may succeed before it notices a signal
                raise SystemExit(status or EXIT_STOPPED)
    numbers = summarize([_numbers(folder) for folder in folders.values()])
    path = os.path.join(output, "seeds.json")
    content = {"command": command_line(), "seeds": list(seeds), "results": numbers}
    write_json(path, content, allow_nan=False)
    print(format_summary(numbers))
    print(f"mean and spread of {len(seeds)} seeds are in {path}")


def _numbers(folder: str) -> dict[str, float | None]:
    """Returns every number in a run's results.json by TASK/NAME."""
    content = read_results(folder)
    numbers = flatten_results_dict(content["results"])
    if content.get("best"):
        numbers[f"best {content['best']['metric']}"] = content["best"]["value"]
    return numbers


def summarize(runs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Returns {"mean", "std" (the sample's), "values"} over runs for each number by name.

    The mean is None if a run lacks the number (None or NaN), the std also for a single run.
    """
    table = {}
    for name in dict.fromkeys(name for numbers in runs for name in numbers):
        values = [numbers.get(name) for numbers in runs]
        values = [None if value is None or math.isnan(value) else value for value in values]
        whole = None not in values
        table[name] = {
            "mean": statistics.fmean(values) if whole else None,
            "std": statistics.stdev(values) if whole and len(values) > 1 else None,
            "values": values,
        }
    return table


def format_summary(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the result of :func:`summarize` as a table with one row per number."""
    rows = [(name, found["mean"], found["std"], *found["values"]) for name, found in table.items()]
    runs = [f"run {number}" for number in range(1, len(rows[0]) - 2)] if rows else []
    return tabulate(rows, ["", "mean", "std", *runs], floatfmt=".2f", missingval="-")
