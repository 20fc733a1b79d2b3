"""Candidates that take turns within one run: their speed, memory, and differences."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from resnet_backbone.fast import optimize_for_inference
from resnet_backbone.fast.engines import check_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
Run = Callable[[], Any]


def measure(
    runs: dict[str, Run], images: int, repeats: int, device: torch.device | None = None
) -> list[dict[str, Any]]:
    """Measures candidates in turns, prints a table, and returns a row for each.

    Args:
        runs: by name, the reference first; their order rotates between repeats.
        images: number of images in a run.
        repeats: turns of each candidate. In a turn it runs twice, and the second run counts.
        device: a GPU is synchronized.

    Returns:
        For each candidate its name, images/s in all repeats, their median and range, and the
        median and range of the ratio to the reference in the same repeat.
    """
    wait = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=repeats * len(names), desc="measuring", unit="turn") as bar:
        for repeat in range(repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                runs[name]()  # not counted: it pays for what other candidates left in memory
                wait()
                start = time.perf_counter()
                runs[name]()
                wait()
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


def forms_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns pairs (precision, engine) of --dtype and --engines that the engine supports."""
    forms, problems = [], []
    for dtype, engine in itertools.product(args.dtype, args.engines):
        try:
            check_engine(engine, DTYPES[dtype], torch.device(args.device))
            forms.append((dtype, engine))
        except ValueError as error:
            problems.append(f"{dtype}: {error}")
    if not forms:
        raise ValueError("; ".join(problems))
    print("".join(f"not measured: {problem}\n" for problem in problems), end="")
    return forms


def fast_forms(model: nn.Module, forms: Sequence[tuple[str, str]], inputs: Any) -> dict[str, Run]:
    """Returns functions by name that optimize a model; int8 is calibrated on its `inputs`."""
    make = partial(optimize_for_inference, model, calibration=[inputs])
    return {
        f"ours, {dtype}, {engine}": partial(make, dtype=DTYPES[dtype], engine=engine)
        for dtype, engine in forms
    }


def compare_and_measure(
    title: str, runs: dict[str, Run], compare: Callable[[Any, Any], Any], *setting: Any
) -> dict[str, Any]:
    """Compares each run's result with the first one's, then calls :func:`measure`."""
    (_, reference), *others = runs.items()
    expected = reference()
    differences = {name: compare(run(), expected) for name, run in others}
    print(f"{title}:")
    rows = measure(runs, *setting)
    for name, value in differences.items():
        values = value if isinstance(value, dict) else {"": value}
        text = ", ".join(f"{key} {number:.1e}".lstrip() for key, number in values.items())
        print(f"{name:34}differs by {text}")
    return {"rows": rows, "differences": differences}


def repeated(run: Run, count: int) -> Run:
    return lambda: deque((run() for _ in range(count)), maxlen=1).pop()


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    """Randomizes norms, so that a misplaced one shows; small scales keep deep maps bounded."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.uniform_(0.4, 0.6)
            module.bias.normal_(0, 0.1)


def measure_memory(
    build: Callable[[Any, str], dict[str, Callable[[], Run]]],
    setting: Any,
    passes: list[tuple[str, str]],
) -> dict[str, dict[str, float]]:
    """Measures resident memory in MB (Linux) during and before each pass, in its own process.

    Args:
        build: a module's function from setting and kind to functions by name that prepare a pass.
        passes: (kind, name) of each.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc returns freed blocks from 128 kB on
    found = {}
    for kind, name in tqdm(passes, desc="memory", unit="process"):
        found[f"{kind}: {name}"] = in_own_process(build, setting, kind, name)
    print("memory of a process that does one pass, MB (compiled ones are not measured):")
    for name, value in found.items():
        print(f"{name:44}{value['peak']:8.0f} at most, {value['before']:.0f} before the pass")
    return found


def in_own_process(build: Callable, setting: Any, kind: str, name: str) -> dict[str, float]:
    """Calls :func:`measure_pass` in a fresh process with as many threads as this one has."""
    threads = dict(initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **threads) as process:
        try:
            return process.submit(measure_pass, build, setting, kind, name).result()
        except BrokenProcessPool as error:
            raise ValueError(f"memory of {kind}: {name}: its process was killed") from error


def measure_pass(build: Callable, setting: Any, kind: str, name: str) -> dict[str, float]:
    """Returns a pass's seconds, its peak resident memory in MB, and the memory before it.

    The memory is ``VmHWM``, reset before the pass; ``before`` includes libraries and weights.
    """

    def peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))

    run = build(setting, kind)[name]()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak()}
