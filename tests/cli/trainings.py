"""Trainings of classifiers as users run them: in processes of their own, which can be killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TIMING = ("images_per_second", "data_seconds", "step_seconds")


def command(*arguments) -> list[str]:
    script = ROOT / "tools" / "train_classifier.py"
    return [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]


def run(*arguments) -> subprocess.CompletedProcess:
    options = dict(capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    return subprocess.run(command(*arguments), **options)


def succeed(*arguments) -> subprocess.CompletedProcess:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def refused(*arguments) -> str:
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def start(*words, until=None) -> subprocess.Popen:
    """A command that goes on; it still runs when `until()` is true.

    Args:
        words: arguments of the trainer, or a whole command.
    """
    whole = words if words[0] == sys.executable else command(*words)
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(whole, **out, env=ENVIRONMENT)
    while until and not until() and process.poll() is None:
        time.sleep(0.01)
    assert not until or process.poll() is None, process.communicate()[0]
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def reached(folder: Path) -> int:
    """The newest checkpoint's iteration."""
    names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
    return max(map(int, names), default=0)


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in found]


def assert_same_weights(*files: Path) -> None:
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), f"{files[0].name}: {key}"
