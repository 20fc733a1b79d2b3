#!/usr/bin/env python
"""Replace batch-norm statistics by true averages over the training set, as in the paper's models.

Reads a run of tools/train_classifier.py (its config, data and weights) and writes new weights; the
run's own files stay. Says the validation error with the old and the new statistics.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from resnet_backbone.config import Config, ConfigError, load_config
from resnet_backbone.data.build import ClassificationData, build_data
from resnet_backbone.data.evaluation import EvaluationLoader
from resnet_backbone.engine.batchnorm import LAYER_INPUTS, TrainingImages, recompute_statistics
from resnet_backbone.engine.cli import launch, one_line_errors, set_up_logging
from resnet_backbone.engine.distributed import World, join
from resnet_backbone.engine.evaluation import evaluate
from resnet_backbone.engine.networks import load_network, read_spec, save_network
from resnet_backbone.engine.run_folder import CONFIG
from resnet_backbone.engine.step import AMP
from resnet_backbone.engine.views import Centre, Full
from resnet_backbone.weights.inputs import InputNormalizer

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


class Run:
    """A run's config, data and network, on this process's device."""

    def __init__(self, args: argparse.Namespace, config: Config, world: World):
        self.config, self.world = config, world
        weights = Path(args.weights or Path(args.run) / "final.safetensors")
        if not weights.is_file():
            raise ConfigError(f"{weights}: no such file; give --weights FILE")
        self.spec = read_spec(weights)
        if self.spec is None:
            raise ConfigError(f"{weights} does not name its network: was it trained here?")
        chosen = config.evaluation
        full = chosen.protocol == "full"
        self.protocol = Full() if full else Centre(chosen.short_side, chosen.crop)
        self.data: ClassificationData = build_data(
            config,
            Path(args.run),
            rank=world.rank,
            world=world.size,
            device=world.device,
            prepare=self.protocol.prepare,
        )
        self.model = self.spec.build()
        self.preprocessing = load_network(self.model, weights)
        self.model.to(world.device)
        self.normalizer = InputNormalizer(self.preprocessing, world.device)

    def evaluate(self) -> str:
        loader = EvaluationLoader(
            self.data.evaluation,
            self.config.evaluation.batch_size,
            workers=self.config.data.workers,
            rank=self.world.rank,
            world=self.world.size,
        )
        models = [(self.model, self.normalizer)]
        most, amp = self.config.evaluation.max_bad_images, AMP[self.config.train.amp]
        return str(
            evaluate(
                models, self.protocol, loader, world=self.world, autocast=amp, max_bad_images=most
            )
        )

    def recompute(self, args: argparse.Namespace) -> None:
        train, source = self.config.train, self.data.source
        local = train.batch_size // self.world.size
        report = recompute_statistics(
            self.model,
            TrainingImages(source, args.images, train.batch_size, self.world),
            self.normalizer,
            layer_inputs=args.layer_inputs,
            micro_batch=args.micro_batch or train.micro_batch or local,
            world=self.world,
            autocast=AMP[train.amp],
        )
        logger.info(
            "new statistics of %d batch norms from %d images, %d normalised together (%s)",
            len(report.layers),
            report.num_images,
            report.micro_batch,
            report.layer_inputs,
        )


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not (Path(args.run) / CONFIG).is_file():
        raise ConfigError(f"{args.run} has no {CONFIG}: --run is a folder of train_classifier.py")
    config = load_config([Path(args.run) / CONFIG], args.overrides)
    if args.num_gpus > 1 and "WORLD_SIZE" not in os.environ:
        launch(__file__, args.num_gpus, args.arguments)
    world = join(config.train.device)
    set_up_logging(None, world.is_main)
    if config.train.batch_size % world.size:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} does not divide over {world.size} "
            "processes"
        )
    run = Run(args, config, world)
    logger.info("before: %s", run.evaluate())
    run.recompute(args)
    logger.info("after:  %s", run.evaluate())
    if world.is_main:
        output = Path(args.output or Path(args.run) / "true_bn.safetensors")
        save_network(output, run.model, run.spec, run.preprocessing)
        logger.info("written: %s", output)


if __name__ == "__main__":
    main()
