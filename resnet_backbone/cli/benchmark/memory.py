"""Peak memory of one call in a process of its own (Linux)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def run_fresh(code: str, what: str) -> dict[str, float]:
    """Runs Python code that ends in :func:`report_peak`, and returns what that reports.

    glibc returns freed blocks of 128 kB and more at once in that process.

    Raises:
        ValueError: the code failed; with its last line, and ``what`` was measured.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, env=environment)
    if done.returncode:
        lines = done.stderr.decode().strip().splitlines() or ["no message"]
        raise ValueError(f"memory of {what}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def report_peak(run: Callable[[], Any]) -> None:
    """Prints the peak resident memory during a call and before it, in MB, as JSON.

    Both are ``VmHWM``, which is reset before the call so that building does not count; ``before``
    has the libraries and the weights.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _peak()
    run()
    print(json.dumps({"before": before, "peak": _peak()}))


def _peak() -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000
