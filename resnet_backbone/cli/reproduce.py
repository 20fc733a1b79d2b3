"""Reproduce the paper's comparison of backbones in detection: from pre-training to the table."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from resnet_backbone import __version__
from resnet_backbone.cli import COMMANDS, PROGRAM, CommandParser, key_and_text, positive
from resnet_backbone.runtime.errors import EXIT_STOPPED, UsageError, one_line_errors
from resnet_backbone.runtime.files import alone, config_folder, find_config, sha256, write_json
from resnet_backbone.runtime.records import date
from resnet_backbone.runtime.signals import run_child

PLANS = config_folder() / "reproduction"
START = [sys.executable, "-m", "resnet_backbone.cli"]  # a command, of this installation
DONE = "step.json"  # written to a step's folder after its command
BRACES = re.compile(r"\{([^{}]+)\}")
FILLED = re.compile(r"([\w.]+)[ =\"'\[]+\{")  # a key whose value a plan fills in
PLAN = dict(title=None, steps=None, networks={}, seeds=[1], words={}, note="", _BASE_="")
STEP = dict(command=None, makes=None, datasets=[], seeds=False, batch=0, hours=0, gpu="", basis="")
STEP |= dict(published="", goal=False)  # keys with defaults, like PLAN; None: required
# Command -> its option for the input of weights that do not state it.
STATED = dict.fromkeys(("convert-weights", "evaluate-classifier"), "--preprocessing")
STATED["train-net"] = "RESNET_BACKBONE.WEIGHTS_PREPROCESSING"
OVERRIDDEN = {"train-classifier": True, "train-net": False}  # whether --set's words have a "="
TASKS = {"train-classifier": "classification", "train-net": "detection"}  # of their configs

EPILOG = """\
examples:
  resnet-backbone reproduce --scale mini      # built-in data, half an hour on two CPU cores
  resnet-backbone reproduce --scale voc07 --voc-root VOCdevkit/VOC2007 \\
      --weights VGG-16=vgg16_caffe.pth --preprocessing VGG-16=caffe_vgg \\
      --weights ResNet-50=R-50.pkl --preprocessing ResNet-50=msra    # at 320 px, for CPUs
  resnet-backbone reproduce --scale paper --imagenet imagenet --num-gpus 8 --plan  # runs nothing

Each step has a folder in --output. Its name has the hash of the step's command, configs, weights,
and data, and of this package's version (not of its code: after a change, give another --output).
Finished steps are not repeated. After an interruption, the same command continues. A plan is
configs/reproduction/NAME.yaml or FILE.yaml; mini.yaml explains it."""


def read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error


def checked(node: Any, keys: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks a mapping's keys and values, and returns it with defaults added."""
    if not isinstance(node, dict):
        raise UsageError(f"{where}: expected keys with values, found {node!r}")
    missing = [key for key, value in keys.items() if value is None and key not in node]
    problems = {**dict.fromkeys(node.keys() - keys, "unknown"), **dict.fromkeys(missing, "missing")}
    for key, problem in problems.items():
        raise UsageError(f"{where}: the key {key} is {problem}; keys are {', '.join(keys)}")
    for key, value in node.items():
        if keys[key] is not None and not isinstance(value, type(keys[key])) and key != "hours":
            kind = {list: "a list", dict: "keys with values"}.get(type(keys[key]), "a value")
            raise UsageError(f"{where}: {key} {value!r}: expected {kind}, such as {keys[key]!r}")
    return {**keys, **node}


def read_plan(path: Path, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Reads a plan with its defaults; `seeds` replace its own."""
    plan = checked(read_yaml(path), PLAN, str(path))
    if not isinstance(plan["steps"], dict) or not plan["steps"]:
        raise UsageError(f"{path}: steps: give at least one, NAME: with command: and makes: below")
    if plan["_BASE_"]:
        base = read_plan(path.parent / plan["_BASE_"])
        plan |= {key: base[key] | plan[key] for key in ("words", "steps")}
    plan["steps"] = {k: checked(v, STEP, f"{path}: {k}") for k, v in plan["steps"].items()}
    plan["seeds"] = given = list(seeds or plan["seeds"])
    if not given or len(set(given)) < len(given) or not all(isinstance(s, int) for s in given):
        raise UsageError(f"seeds {given}: give integers, each once")
    return plan


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def config_digests(path: Path) -> Iterator[str]:
    """Yields the digests of a YAML config and, recursively, of its ``_BASE_`` configs."""
    yield sha256(path)
    bases = (read_yaml(path) or {}).get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from config_digests(path.parent / base)


def tree_digest(folder: Path) -> str:
    """Returns a digest of a data set's folders, two levels deep, and when they last changed."""
    inside = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir()]
    times = ([str(f.relative_to(folder)), f.stat().st_mtime_ns] for f in [folder, *inside])
    return digest(sorted(times))


@dataclass(frozen=True, eq=False)
class Step:
    """A command with its own folder."""

    name: str
    folder: Path
    words: tuple[str, ...]  # a command of resnet-backbone and its arguments
    product: Path  # the file that it makes, which proves that it is complete
    key: str  # ten digits of the hash of all that the result depends on
    inputs: tuple[Step, ...]
    node: dict[str, Any]  # its entry in the plan

    @property
    def stage(self) -> str:
        return self.name.partition("_")[0]

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).is_file() and self.product.exists()

    @property
    def shown(self) -> str:
        """The command as typed in the current folder."""
        return shlex.join([PROGRAM, *(word.replace(f"{Path.cwd()}/", "") for word in self.words)])


class Value(NamedTuple):
    text: str
    identity: str  # its contribution to the hash
    steps: tuple[Step, ...] = ()  # the steps that make it


class Builder:
    """Makes steps from a plan and the command line; ``build`` also builds the steps it needs."""

    def __init__(self, plan: dict[str, Any], args: argparse.Namespace):
        self.plan, self.args = plan, args
        self.steps: dict[str, list[Step]] = {}
        self.absent: set[str] = set()  # missing data and options
        for name in {*args.weights, *args.preprocessing} - {*plan["networks"]}:
            raise UsageError(f"the plan has no {name}; its networks: {', '.join(plan['networks'])}")
        for name in args.preprocessing.keys() - args.weights.keys():
            raise UsageError(
                f"--preprocessing {name} is of a file: give --weights {name}=FILE, too"
            )

    def build(self, name: str) -> list[Step]:
        """Builds a step, once for each seed, after the steps that it needs."""
        if name not in self.steps:
            seeds = self.plan["seeds"] if self.plan["steps"][name]["seeds"] else [None]
            self.steps[name] = [self._step(name, seed) for seed in seeds]
        return self.steps[name]

    def _step(self, name: str, seed: int | None) -> Step:
        args, node = self.args, self.plan["steps"][name]
        given = shlex.split(node["command"])
        command, networks = given[0], args.weights.keys() & {word[1:-1] for word in given}
        if command not in COMMANDS:
            raise UsageError(f"{name}: {PROGRAM} has no command {command}, see {PROGRAM} --help")
        stated = [args.preprocessing[n] for n in args.preprocessing if n in networks]
        given += [STATED[command], *stated] if stated else []
        own = [word for word in args.set if OVERRIDDEN.get(command) == ("=" in word)]
        given += own
        values = [value for word in given for value in self._expand(word, node, seed)]
        named = [after.text for word, after in pairwise(values) if word.text == "--config-file"]
        configs = [find_config(config, TASKS.get(command, "")) for config in named]
        if own:  # their keys and values
            load_config = importlib.import_module(
                f"resnet_backbone.{TASKS[command]}.config"
            ).load_config
            if command == "train-net":
                load_config(str(*configs), own)
            else:
                load_config(configs, ["data.root=.", *own])
        depends = [key for path in configs for key in config_digests(path)]
        if args.datasets:
            depends += [self._folder(args.datasets / data).identity for data in node["datasets"]]
        key = digest([__version__, [value.identity for value in values], depends])[:10]
        name += "" if seed is None else f"_seed{seed}"
        folder = args.output / f"{name}-{key}"
        words = [value.text.replace("{here}", str(folder)) for value in values]
        inputs = tuple(dict.fromkeys(step for value in values for step in value.steps))
        return Step(name, folder, tuple(words), folder / node["makes"], key, inputs, node)

    def _expand(self, word: str, node: dict[str, Any], seed: int | None) -> list[Value]:
        """Expands the names in a word; a word that is one name may become any number of words."""
        found = {name: self._values(name, node, seed) for name in BRACES.findall(word)}
        if word[1:-1] in found:
            return found[word[1:-1]]
        text = BRACES.sub(lambda match: found[match[1]][0].text, word)
        identity = BRACES.sub(lambda match: found[match[1]][0].identity, word)
        steps = tuple(step for values in found.values() for step in values[0].steps)
        return [Value(text, identity, steps)]

    def _values(self, name: str, node: dict[str, Any], seed: int | None) -> list[Value]:
        args, plan = self.args, self.plan
        gpus = min(args.num_gpus, node["batch"] or args.num_gpus)
        own = {
            "here": ["{here}"],
            "seed": [str(plan["seeds"][0] if seed is None else seed)],
            "note": [plan["note"]],
            "gpus": ["--num-gpus", str(gpus)] if gpus > 1 else [],
        }
        if name in own:
            return [Value(word, word.replace("{here}", "")) for word in own[name]]
        if name in plan["words"]:
            words = shlex.split(plan["words"][name])
            return [value for word in words for value in self._expand(word, node, seed)]
        if name in ("imagenet", "voc-root"):
            folder = getattr(args, name.replace("-", "_"))
            return [self._folder(folder) if folder else self._missing("DIR", f"--{name} DIR")]
        if name in args.weights:
            file = args.weights[name]
            path = str(file)
            return [Value(path, sha256(file)) if file.is_file() else self._missing(path, path)]
        if name in plan["networks"] and not plan["networks"][name]:
            lacking = {n for n, step in plan["networks"].items() if not step} - args.weights.keys()
            return [self._missing("FILE", *(f"--weights {n}=FILE" for n in sorted(lacking)))]
        match = re.fullmatch(r"(.+?)(?:\[(\d+)\])?(/?)", plan["networks"].get(name, name))
        if match[1] not in plan["steps"]:
            raise UsageError(f"{{{name}}} is neither a step nor a network nor words of the plan")
        steps = self.build(match[1])
        same = [step for step in steps if step.name == f"{match[1]}_seed{seed}"]  # also of a seed
        steps = steps[int(match[2]) :][:1] if match[2] else same or steps
        paths = (step.folder if match[3] else step.product for step in steps)
        return [Value(str(p), f"{s.name} {s.key}", (s,)) for p, s in zip(paths, steps, strict=True)]

    def _folder(self, folder: Path) -> Value:
        path = str(folder)
        return Value(path, tree_digest(folder)) if folder.is_dir() else self._missing(path, path)

    def _missing(self, value: str, *needed: str) -> Value:
        """Stands for data and options that are missing, in a plan that is only printed."""
        if not self.args.plan:
            raise UsageError(f"missing: {', '.join(needed)} (--plan shows the steps without)")
        self.absent.update(needed)
        return Value(value, "absent")


def build_steps(plan: dict[str, Any], args: argparse.Namespace) -> tuple[list[Step], set[str]]:
    """Returns the steps that the plan's goals need, in the plan's order, and missing data."""
    builder = Builder(plan, args)
    goals = [name for name, step in plan["steps"].items() if step["goal"]]
    try:
        for name in goals or list(plan["steps"])[-1:]:
            builder.build(name)
    except RecursionError:
        raise UsageError("steps of the plan depend on one another in a circle") from None
    texts = [*plan["words"].values(), *(step["command"] for step in plan["steps"].values())]
    filled = set(FILLED.findall(" ".join(texts)))
    for key in (word.partition("=")[0] for word in args.set):
        if key in filled:
            raise UsageError(f"--set {key}: the plan sets it, seeds from --seeds")
    trained = {step.words[0] for steps in builder.steps.values() for step in steps}
    for command, has_sign in OVERRIDDEN.items():
        words = [word for word in args.set if ("=" in word) == has_sign]
        if words and command not in trained:
            raise UsageError(f"--set {words[0]}: no step of this plan is a {command}")
    return [s for name in plan["steps"] for s in builder.steps.get(name, ())], builder.absent


def run(steps: Sequence[Step], stages: Sequence[str], output: Path) -> int:
    """Runs the stages' unfinished commands in order.

    Returns:
        0, or the exit status of the command that failed; 75 if it was stopped.
    """
    with alone(output) as lock:
        for number, step in enumerate(steps, 1):
            if step.stage not in stages or step.is_done:
                continue
            for needed in (one for one in step.inputs if not one.is_done):
                raise UsageError(f"{step.name} needs {needed.name}: add --stage {needed.stage}")
            print(f"\n== {number}/{len(steps)} {step.name}\n{step.shown}", flush=True)
            step.folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            # the child holds the lock, too, in case this process is killed
            status, stop = run_child([*START, *step.words], pass_fds=(lock,))
            if status:
                print(f"{step.name} ended with status {status}; the same command continues it")
                return status
            if not step.product.exists():
                raise UsageError(f"{step.name} left no {step.product}; see its output above")
            seconds = round(time.monotonic() - started, 1)
            content = dict(step=step.name, key=step.key, command=step.shown, date=date()[:10])
            content |= dict(seconds=seconds, inputs={one.name: one.key for one in step.inputs})
            write_json(step.folder / DONE, content, indent=1)
            print(f"-- {step.name}: {seconds:.0f} s", flush=True)
            if stop:
                return EXIT_STOPPED
    return 0


def print_plan(title: str, steps: Sequence[Step], stages: Sequence[str]) -> None:
    print(f"{title}: {len(steps)} steps")
    total: Counter[str] = Counter()
    for step in (step for step in steps if step.stage in stages):
        state, hours = "done" if step.is_done else "to do", step.node["hours"]
        print(f"\n[{step.stage}] {step.name}: {state}\n  {step.shown}")
        if step.node["published"]:
            print(f"  published: {step.node['published']}")
        if hours and not step.is_done:
            unit = step.node["gpu"] or "core"
            total[unit] += hours
            print(f"  about {hours:g} hours of one {unit}: {step.node['basis']}")
    for unit, hours in total.items():
        print(f"\nexpected: about {hours:.0f} hours of one {unit}, beside what has no estimate")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    pairs: dict[str, Any] = dict(type=key_and_text, action="append", default=[])
    folder: dict[str, Any] = dict(type=lambda text: Path(text).resolve(), metavar="DIR")
    add("--scale", required=True, metavar="PLAN", help="of configs/reproduction, or FILE.yaml")
    add("--stage", action="append", metavar="STAGE", help="stage to run; repeatable (default: all)")
    add("--output", help="folder (default: output/reproduction/SCALE)", **folder)
    add("--plan", action="store_true", help="only print the commands; files may be missing")
    add("--weights", metavar="NETWORK=FILE", help="skips its pre-training", **pairs)
    add("--preprocessing", metavar="NETWORK=NAME", help="their input, such as msra", **pairs)
    add("--imagenet", help="folder of ImageNet, with train/ and val/", **folder)
    add("--voc-root", help="folder of VOC 2007 (default: $DETECTRON2_DATASETS/VOC2007)", **folder)
    add("--num-gpus", type=positive, default=1, metavar="N", help="number of GPUs (default: 1)")
    add("--seeds", type=int, nargs="+", metavar="N", help="of the detectors (default: the plan's)")
    text = "overrides for all trainings: key=value for classifiers, KEY VALUE for detectors"
    add("--set", action="extend", nargs="+", default=[], metavar="WORD", help=text)
    args = parser.parse_args(argv)
    args.weights = {name: Path(file).resolve() for name, file in args.weights}
    args.preprocessing = dict(args.preprocessing)
    datasets = os.environ.get("DETECTRON2_DATASETS")
    args.datasets = Path(datasets).resolve() if datasets else None
    args.voc_root = args.voc_root or (args.datasets and args.datasets / "VOC2007")
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    own = args.scale.endswith((".yaml", ".yml"))
    file = Path(args.scale) if own else PLANS / f"{args.scale}.yaml"
    if not file.is_file():
        known = sorted(found.stem for found in PLANS.glob("[!B]*.yaml"))
        raise UsageError(f"--scale {args.scale}: no plan {file}; there are {', '.join(known)}")
    args.output = args.output or Path("output", "reproduction", file.stem).resolve()
    plan = read_plan(file, args.seeds)
    steps, absent = build_steps(plan, args)
    known = list(dict.fromkeys(step.stage for step in steps))
    stages = args.stage or known
    if set(stages) - set(known):
        raise UsageError(f"--stage: the stages of this plan are {', '.join(known)}")
    print_plan(plan["title"], steps, stages)
    if args.plan:
        if absent:
            print(f"\nmissing: {', '.join(sorted(absent))}; with these, steps get other folders")
        return 0
    left = [step for step in steps if step.stage in stages and not step.is_done]
    if not torch.cuda.is_available() and any(step.node["gpu"] for step in left):
        hint = "--plan shows its steps, --scale mini runs on a CPU"
        raise UsageError(f"this plan is for GPUs, and this machine has none: {hint}")
    status = run(steps, stages, args.output)
    if not status and steps[-1].stage in stages:
        print(f"\nresults: {steps[-1].product}")
    return status
