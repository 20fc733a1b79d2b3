"""Replace batch-norm statistics by true averages over the training set, as the paper does.

The command reads a run of train-classifier (its config, data, and weights) and writes new weights.
The run's own files stay. It prints the validation error with the old and the new statistics.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from resnet_backbone.classification.batch_norm import LAYER_INPUTS
from resnet_backbone.classification.config import Config, load_config
from resnet_backbone.classification.run import ClassificationRun, check_processes
from resnet_backbone.classification.trainer import FINAL
from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.runtime.errors import UsageError, one_line_errors
from resnet_backbone.runtime.launch import add_launch_arguments, plan_launch, run_processes
from resnet_backbone.runtime.processes import choose_device, current_world
from resnet_backbone.runtime.records import CONFIG, RunFolder, set_up_logging

logger = logging.getLogger("resnet_backbone.recompute_bn")

EPILOG = """\
examples:
  resnet-backbone recompute-bn --run output/resnet20
  resnet-backbone recompute-bn --run output/resnet50 --images 100000 --num-gpus 8 \\
      --output output/resnet50/true_bn.safetensors data.root=imagenet
  resnet-backbone recompute-bn --run output/resnet20 --weights output/resnet20/best.safetensors \\
      --layer-inputs population

train-classifier does this after training, unless train.recompute_bn=False. Images have the
augmentation and the batches of training: --micro-batch images are normalized together (the paper:
32 per GPU). --layer-inputs batch makes one pass, in which layers normalize by their micro-batch, as
in training. population makes one pass per batch norm, in which the layers before it already have
their new statistics, as in testing."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add, number = parser.add_argument, dict(type=positive, metavar="N")
    add("--run", required=True, metavar="DIR", help="run folder of train-classifier")
    add("--weights", metavar="FILE", help="weights to start from (default: DIR/final.safetensors)")
    add("--output", metavar="FILE", help="new weights (default: DIR/true_bn.safetensors)")
    add("--overwrite", action="store_true", help="replace the file --output")
    add("--images", help="number of training images (default: as in the run)", **number)
    add("--micro-batch", help="images normalized together (default: as in the run)", **number)
    add("--layer-inputs", choices=LAYER_INPUTS, default="batch", help="(default: batch)")
    add_launch_arguments(parser)
    text = "config overrides, such as data.root=PATH"
    add("overrides", nargs="*", metavar="key=value", help=text)
    return parser.parse_intermixed_args(argv)


def work(task: tuple[Config, argparse.Namespace]) -> None:
    config, args = task
    world = current_world(choose_device(config.train.device))
    set_up_logging(None, world.is_main)
    check_processes(config, world)
    with tempfile.TemporaryDirectory() as temporary:  # for the data sets' means and reports
        run = ClassificationRun(config, world, RunFolder(temporary), args.weights)
        logger.info("before: %s", run.evaluate(run.model))
        report = run.true_statistics(run.model, layer_inputs=args.layer_inputs)
        found = f"{len(report.layers)} batch norms from {report.num_images} images"
        together = f"{run.normalized_together} normalized together ({args.layer_inputs})"
        logger.info("new statistics of %s, %s", found, together)
        logger.info("after:  %s", run.evaluate(run.model))
    if world.is_main:
        run.folder = RunFolder(args.run)  # which the new file names as its run
        run.checkpoints().write_weights(args.output, run.model)
        logger.info("written: %s", args.output)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    saved, args.weights = Path(args.run) / CONFIG, Path(args.weights or Path(args.run) / FINAL)
    if not saved.is_file():
        raise UsageError(f"{args.run} has no {CONFIG}: --run is a run folder of train-classifier")
    if any(word.startswith("model.weights=") for word in args.overrides):
        raise UsageError("give --weights FILE in place of model.weights")
    config = load_config([saved], args.overrides)
    if not args.weights.is_file():
        raise UsageError(f"{args.weights}: no such file; give --weights FILE")
    args.output = Path(args.output or Path(args.run) / "true_bn.safetensors")
    if args.output.suffix != ".safetensors":
        raise UsageError(f"--output {args.output}: give a .safetensors file")
    if args.output.exists() and not args.overwrite:
        raise UsageError(f"{args.output} already exists: give another --output, or --overwrite")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    config.model.weights = str(args.weights)
    config.model.new_head = False  # the run's weights have theirs
    config.train.recompute_bn_samples = args.images or config.train.recompute_bn_samples
    config.train.micro_batch = args.micro_batch or config.train.micro_batch
    launch = plan_launch(args, config.train.device, "train.device=cpu")
    run_processes(launch, work, (config, args))
