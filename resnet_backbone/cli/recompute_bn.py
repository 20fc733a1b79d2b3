#!/usr/bin/env python
"""Replace batch-norm statistics by true averages over the training set, as the paper does.

Reads a run of tools/train_classifier.py (its config, data and weights) and writes new weights; the
run's own files stay. Says the validation error with the old and the new statistics.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from resnet_backbone.classification.batch_norm import LAYER_INPUTS
from resnet_backbone.classification.command_line import launch, one_line_errors, set_up_logging
from resnet_backbone.classification.config import ConfigError, load_config
from resnet_backbone.classification.networks import save_network
from resnet_backbone.classification.run import Job, check_processes
from resnet_backbone.classification.run_folder import CONFIG, RunFolder
from resnet_backbone.runtime.distributed import join

logger = logging.getLogger("resnet_backbone.recompute_bn")

EPILOG = """\
examples:
  python tools/recompute_bn.py --run output/resnet20
  python tools/recompute_bn.py --run output/resnet50 --images 100000 --num-gpus 8 \\
      --output output/resnet50/true_bn.safetensors data.root=imagenet
  python tools/recompute_bn.py --run output/resnet20 --weights output/resnet20/best.safetensors \\
      --layer-inputs population

tools/train_classifier.py does this by itself after training, unless train.recompute_bn=False.
Images come with the augmentation of training, in the batches of training: --micro-batch images are
normalised together (the paper: 32 per GPU). --layer-inputs batch makes one pass, in which layers
normalise by their micro-batch, as in training; population makes one pass for each batch norm, in
which the layers before it already have their new statistics, as in testing."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="run of train_classifier.py")
    parser.add_argument("--weights", metavar="FILE", help="(default: DIR/final.safetensors)")
    parser.add_argument(
        "--output", metavar="FILE", help="new weights (default: DIR/true_bn.safetensors)"
    )
    parser.add_argument(
        "--images", type=int, default=0, metavar="N", help="training images (default: all of them)"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="(default: that of the run)"
    )
    parser.add_argument("--layer-inputs", choices=LAYER_INPUTS, default="batch")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=PATH")
    args = parser.parse_intermixed_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    if args.images < 0 or args.micro_batch < 0:
        raise ConfigError("--images and --micro-batch: give 0 or more")
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not (Path(args.run) / CONFIG).is_file():
        raise ConfigError(f"{args.run} has no {CONFIG}: --run is a folder of train_classifier.py")
    config = load_config([Path(args.run) / CONFIG], args.overrides)
    if args.num_gpus > 1 and "WORLD_SIZE" not in os.environ:
        launch("resnet_backbone.cli.recompute_bn", args.num_gpus, args.arguments)
    world = join(config.train.device)
    set_up_logging(None, world.is_main)
    check_processes(config, world)
    weights = Path(args.weights or Path(args.run) / "final.safetensors")
    if not weights.is_file():
        raise ConfigError(f"{weights}: no such file; give --weights FILE")
    config.train.recompute_bn_samples = args.images
    config.train.micro_batch = args.micro_batch or config.train.micro_batch
    job = Job(config, world, RunFolder(args.run), weights)
    logger.info("before: %s", job.evaluate(job.model))
    report = job.true_statistics(job.model, layer_inputs=args.layer_inputs)
    logger.info(
        "new statistics of %d batch norms from %d images, %d normalised together (%s)",
        len(report.layers),
        report.num_images,
        report.micro_batch,
        report.layer_inputs,
    )
    logger.info("after:  %s", job.evaluate(job.model))
    if world.is_main:
        output = Path(args.output or Path(args.run) / "true_bn.safetensors")
        save_network(output, job.model, job.spec, job.preprocessing)
        logger.info("written: %s", output)


if __name__ == "__main__":
    main()
