"""Candidates take turns within one run; speed is compared within each turn. Peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

Run = Callable[[], Any]


def measure(
    runs: dict[str, Run], images: int, repeats: int, device: torch.device | None = None
) -> list[dict[str, Any]]:
    """Measures, prints a table, and returns a row for each candidate.

    Args:
        runs: by name, the reference first; their order rotates from repeat to repeat.
        images: that a run processes.
        repeats: turns of each, after one that is not counted.
        device: a GPU is waited for.

    Returns:
        For each its name, its images/s in all repeats, their median and range, and the median
        and range of the ratio to the reference within the same repeat.
    """
    wait = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(repeats + 1) * len(names), desc="measuring", unit="turn") as bar:
        for repeat in range(repeats + 1):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = time.perf_counter()
                runs[name]()
                wait()
                if repeat:
                    rates[name].append(images / (time.perf_counter() - start))
                bar.update()
    rows = []
    print(f"{'':34}{'images/s':>10}  {'range':19}{'s/image':>9}{'ratio':>7}  range")
    for name, values in rates.items():
        pairs = zip(values, rates[names[0]], strict=True)
        speed, ratio = spread(values), spread([v / reference for v, reference in pairs])
        rows.append({"name": name, "images_per_s": speed, "ratio": ratio, "measurements": values})
        median = f"{1 / speed['median']:9.4f}{ratio['median']:7.2f}"
        ends = [f"{x['low']:.2f} ... {x['high']:.2f}" for x in (speed, ratio)]
        print(f"{name:34}{speed['median']:10.2f}  {ends[0]:19}{median}  {ends[1]}")
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare_and_measure(
    title: str, runs: dict[str, Run], compare: Callable[[Any, Any], Any], *setting: Any
) -> dict[str, Any]:
    """Compares the result of each run with the first one's, then lets them take turns.

    Args:
        setting: further arguments of :func:`measure`.
    """
    (_, reference), *others = runs.items()
    expected = reference()
    differences = {name: compare(run(), expected) for name, run in others}
    print(f"{title}:")
    rows = measure(runs, *setting)
    for name, value in differences.items():
        print(f"{name:34}differs by {as_text(value)}")
    return {"rows": rows, "differences": differences}


def as_text(value: float | dict[str, float]) -> str:
    values = value if isinstance(value, dict) else {"": value}
    return ", ".join(f"{name} {number:.1e}".lstrip() for name, number in values.items())


def repeated(run: Run, count: int) -> Run:
    """So many runs as one; the result is the last one's."""

    def repeat() -> Any:
        for _ in range(count):
            result = run()
        return result

    return repeat


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, as a fraction of the largest expected magnitude."""
    found, expected = found.float(), expected.float()
    difference = (found - expected).abs().max()
    return float(difference / expected.abs().max()) if difference else 0.0


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    """Statistics, scales and shifts that tell a misplaced norm; scales keep deep maps bounded."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.uniform_(0.4, 0.6)
            module.bias.normal_(0, 0.1)


def measure_memory(
    build: Callable[[Any, str], dict[str, Callable]], setting: Any, passes: list[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """Peak resident memory of passes, each in a process of its own, and before it, in MB (Linux).

    glibc returns freed blocks of 128 kB and more at once in these processes.

    Args:
        build: a module's function of the setting and a kind, to candidates by name: functions
            that prepare a pass.
        setting: a plain value, whose ``repr`` goes to the process.
        passes: (kind, name) of each.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    found = {}
    for kind, name in tqdm(passes, desc="memory", unit="process"):
        code = (
            f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
            f"from {__name__} import report_peak; from {build.__module__} import {build.__name__}; "
            f"report_peak({build.__name__}({setting!r}, {kind!r})[{name!r}]())"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, capture_output=True, env=environment)
        if done.returncode:
            lines = done.stderr.decode().strip().splitlines() or ["no message"]
            raise ValueError(f"memory of {kind}: {name}: {lines[-1]}")
        found[f"{kind}: {name}"] = json.loads(done.stdout.splitlines()[-1])
    print("memory of a process that does one pass, MB (compiled ones are not measured):")
    for name, value in found.items():
        print(f"{name:44}{value['peak']:8.0f} at most, {value['before']:.0f} before the pass")
    return found


def report_peak(run: Callable[[], Any]) -> None:
    """Prints the peak resident memory during a call and before it, in MB, as JSON.

    Both are ``VmHWM``, which is reset before the call so that building does not count; ``before``
    has the libraries and the weights.
    """

    def peak() -> float:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1000

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    run()
    print(json.dumps({"before": before, "peak": peak()}))
