"""One training with several seeds: a run for each, and what they have in common."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from resnet_backbone.runtime.errors import EXIT_STOPPED, UsageError
from resnet_backbone.runtime.files import alone, write_json
from resnet_backbone.runtime.records import command_line, read_results
from resnet_backbone.runtime.signals import run_child


def read_seeds(words: Sequence[str]) -> list[int]:
    """The seeds of ``--seeds 1 2 3``; UsageError where they are not whole, or not different."""
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--seeds {' '.join(words)}: whole numbers, such as --seeds 1 2 3")
    if len(set(map(int, words))) < len(words):
        raise UsageError(f"--seeds {' '.join(words)}: one of them is there twice")
    return [int(word) for word in words]


def seed_folder(output_dir: str, seed: int) -> str:
    return os.path.join(output_dir, f"seed_{seed}")


def train_seeds(module: str, arguments: Sequence[str], seeds: Sequence[int], output: str) -> None:
    """Runs a training tool for each seed in a process of its own, then writes ``seeds.json``.

    Args:
        module: of the tool; it gets `arguments` and ``--seed-run N``.
        output: folder of the runs ``seed_N``.

    Raises:
        SystemExit: with the status of a run that did not end well; the same command goes on.
    """
    with alone(output) as lock:
        for number, seed in enumerate(seeds, 1):
            place = f"{number} of {len(seeds)}"
            print(f"seed {seed} ({place}): {seed_folder(output, seed)}", flush=True)
            command = [sys.executable, "-m", module, *arguments, "--seed-run", str(seed)]
            status, stop = run_child(command, pass_fds=(lock,))
            if status or stop:  # a run may end well before it takes notice of a signal
                raise SystemExit(status or EXIT_STOPPED)
    summary = summarize({seed: _numbers(seed_folder(output, seed)) for seed in seeds})
    path = os.path.join(output, "seeds.json")
    content = {"command": command_line(), "seeds": list(seeds), **summary}
    write_json(path, content, allow_nan=False)
    print(format_summary(summary))
    print(f"mean and spread of {len(seeds)} seeds are in {path}")


def _numbers(folder: str) -> dict[str, float | None]:
    """Every number of a run's results.json, by TASK/NAME."""
    content = read_results(folder)
    numbers = flatten_results_dict(content["results"])
    if content.get("best"):
        numbers[f"best {content['best']['metric']}"] = content["best"]["value"]
    return numbers


def summarize(results: dict[int, dict[str, float | None]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every number over seeds.

    Returns:
        {"results": {name: {"mean", "std", "values"}}}, values in the order of the seeds; mean is
        None where a seed has no number (None or NaN), std also for one seed.
    """
    names = dict.fromkeys(name for numbers in results.values() for name in numbers)
    table = {}
    for name in names:
        values = [numbers.get(name) for numbers in results.values()]
        values = [None if value is None or math.isnan(value) else value for value in values]
        whole = None not in values
        table[name] = {
            "mean": statistics.fmean(values) if whole else None,
            "std": statistics.stdev(values) if whole and len(values) > 1 else None,
            "values": values,
        }
    return {"results": table}


def format_summary(summary: dict[str, Any]) -> str:
    """A table with a row for each number."""
    rows = [
        (name, found["mean"], found["std"], *found["values"])
        for name, found in summary["results"].items()
    ]
    count = len(rows[0]) - 3 if rows else 0
    headers = ["", "mean", "std", *[f"run {number}" for number in range(1, count + 1)]]
    return tabulate(rows, headers=headers, floatfmt=".2f", missingval="-")
