#!/usr/bin/env python
"""Reproduce the paper's comparison of backbones in detection: from pre-training to the table."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from resnet_backbone.cli.reproduction import (
    STAGES,
    Plan,
    PlanError,
    Runner,
    Step,
    build_steps,
    read_plan,
)
from resnet_backbone.cli.reproduction.runner import is_done, show
from resnet_backbone.cli.reproduction.steps import Options

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "configs" / "reproduction"

EPILOG = """\
examples:
  python tools/reproduce.py --scale mini
      all stages on built-in data, at most 30 minutes on two CPU cores
  python tools/reproduce.py --scale paper --imagenet imagenet --num-gpus 8 --plan
      prints the commands of the paper's protocol with the GPU hours to expect, and runs nothing
  python tools/reproduce.py --scale paper --num-gpus 8 \\
      --weights VGG-16=vgg16.pth --preprocessing VGG-16=caffe_vgg \\
      --weights ResNet-101=R-101.pkl --preprocessing ResNet-101=msra
      detection alone, from weights that are there; VOC lies in $DETECTRON2_DATASETS

stages: data (built-in), pretrain (tools/train_classifier.py), bn (tools/recompute_bn.py: statistics
of the training set, then fixed), convert (tools/convert_weights.py: Detectron2's format), detect
(tools/train_net.py, once a seed), improve (tools/evaluate_detector.py), report (tools/report.py).

Each step lies in a folder of its own in --output, named after the hash of its command, configs,
weights and data. What is done is not done again; after an interruption (SIGTERM and Ctrl-C write a
checkpoint) the same command goes on. The hash has this package's version, not its code: after a
change of the code give another --output.

Plans: configs/reproduction; own ones: --scale FILE.yaml."""


def name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"write NETWORK=VALUE and not {text!r}")
    return name, value


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", required=True, metavar="NAME", help="mini, paper, paper_coco, or a YAML file"
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=("all", *STAGES),
        help="stage to run; may be given several times (default: all)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default: output/reproduction/SCALE)"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the commands and stop; data need not be there yet",
    )
    parser.add_argument(
        "--weights",
        type=name_and_value,
        action="append",
        default=[],
        metavar="NETWORK=FILE",
        help="weights of a network: its pre-training is left out",
    )
    parser.add_argument(
        "--preprocessing",
        type=name_and_value,
        action="append",
        default=[],
        metavar="NETWORK=NAME",
        help="input of these weights where they do not carry it: msra, caffe_vgg, torchvision",
    )
    parser.add_argument("--imagenet", type=Path, metavar="DIR", help="folder with train and val")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="of the detectors (default: the plan's)"
    )
    parser.add_argument(
        "--set",
        action="append",
        nargs="+",
        default=[],
        metavar="WORD",
        help="overrides for all trainings: key=value for classifiers, KEY VALUE for detectors",
    )
    return parser.parse_args(argv)


def find_plan(scale: str) -> Path:
    path = Path(scale) if scale.endswith((".yaml", ".yml")) else PLANS / f"{scale}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in PLANS.glob("*.yaml")))
        raise PlanError(f"--scale {scale}: no plan {path}; there are {known}")
    return path


def read_options(args: argparse.Namespace, output: Path) -> Options:
    words = [word for group in args.set for word in group]
    datasets = os.environ.get("DETECTRON2_DATASETS")
    return Options(
        root=ROOT,
        output=output,
        weights={name: Path(file).resolve() for name, file in args.weights},
        preprocessing=dict(args.preprocessing),
        imagenet=args.imagenet and args.imagenet.resolve(),
        datasets=Path(datasets).resolve() if datasets else None,
        data_may_be_absent=args.plan,
        num_gpus=args.num_gpus,
        classification=[word for word in words if "=" in word],
        detection=[word for word in words if "=" not in word],
    )


def print_plan(plan: Plan, steps: list[Step], stages: tuple[str, ...], num_gpus: int) -> None:
    """The steps of the stages with their commands, and the hours to expect of those to do."""
    print(f"{plan.title}: {len(steps)} steps")
    hours: dict[str, float] = {}
    unknown = 0
    for step in steps:
        if step.stage not in stages:
            continue
        done, training = is_done(step), step.training
        state = "done" if done else "to do"
        print(f"\n[{step.stage}] {step.name}: {state}\n  {show(step, ROOT)}")
        if training is None or done:
            continue
        if training.hours:
            hours[training.gpu] = hours.get(training.gpu, 0) + training.hours
            print(f"  about {training.hours:g} hours of one {training.gpu}: {training.basis}")
        else:
            unknown += 1
    for gpu, total in hours.items():
        print(f"\nexpected: about {total:.0f} hours of one {gpu}; calculated, not measured")
    if hours:
        print(f"GPUs: {num_gpus}; trainings without an estimate: {unknown}")


def print_absent_data(plan: Plan, options: Options) -> None:
    folders = [options.imagenet] if options.imagenet else []
    if options.datasets:
        folders += [options.datasets / name for name in plan.datasets]
    absent = [str(folder) for folder in folders if not folder.is_dir()]
    if absent:
        print(f"\nnot there yet: {', '.join(absent)}")
        print("with these data there, the steps that read them get other folders")


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done; returns the exit status."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    stages = STAGES if not args.stage or "all" in args.stage else tuple(args.stage)
    try:
        path = find_plan(args.scale)
        plan = read_plan(path, args.seeds)
        output = (args.output or ROOT / "output" / "reproduction" / path.stem).resolve()
        options = read_options(args, output)
        steps = build_steps(plan, options)
        print_plan(plan, steps, stages, args.num_gpus)
        if args.plan:
            print_absent_data(plan, options)
            return 0
        refuse_without_gpu(step for step in steps if step.stage in stages and not is_done(step))
        status = Runner(ROOT, output).run(steps, stages)
    except (PlanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not status and "report" in stages:
        print(f"\nresults: {steps[-1].path}")
    return status


def refuse_without_gpu(steps: Iterable[Step]) -> None:
    import torch

    if any(s.training and s.training.gpu for s in steps) and not torch.cuda.is_available():
        raise PlanError(
            "this plan is meant for GPUs and there is none here: --plan shows its steps, "
            "--scale mini runs on a CPU"
        )


if __name__ == "__main__":
    sys.exit(main())
