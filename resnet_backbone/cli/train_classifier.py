#!/usr/bin/env python
"""Train any network of the package on ImageNet, CIFAR-10 or the built-in data, as the paper did."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import shlex
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from resnet_backbone.classification import networks
from resnet_backbone.classification.checkpoints import AVERAGED, WEIGHTS, iterations_in
from resnet_backbone.classification.command_line import launch, one_line_errors, set_up_logging
from resnet_backbone.classification.config import (
    Config,
    ConfigError,
    differences,
    load_config,
    to_yaml,
)
from resnet_backbone.classification.run import Job, check_processes
from resnet_backbone.classification.run_folder import (
    CONFIG,
    RESULTS,
    RunFolder,
    holds_run,
)
from resnet_backbone.classification.signals import StopRequest
from resnet_backbone.classification.trainer import FINAL, Trainer
from resnet_backbone.runtime.distributed import World, join
from resnet_backbone.runtime.files import write_json
from resnet_backbone.runtime.provenance import hardware
from resnet_backbone.runtime.signals import EXIT_STOPPED

logger = logging.getLogger("resnet_backbone.train_classifier")

EPILOG = f"""\
examples:
  python tools/train_classifier.py --config-file configs/classification/cifar10/resnet20.yaml \\
      data.root=cifar10 output.dir=output/resnet20
  python tools/train_classifier.py --resume --output-dir output/resnet20
  cd configs/classification/imagenet; python ../../../tools/train_classifier.py --num-gpus 8 \\
      --config-file resnet50.yaml modern.yaml data.root=imagenet train.amp=bf16
  python tools/train_classifier.py --config-file configs/classification/imagenet/resnet50.yaml \\
      model=torchvision/googlenet data.root=imagenet output.dir=output/googlenet
  torchrun --nnodes 2 --nproc-per-node 8 ... tools/train_classifier.py --config-file ...

Keys and their meaning: resnet_backbone/classification/config.py. SIGTERM, SIGUSR1 and Ctrl-C write
a checkpoint and exit with status {EXIT_STOPPED}; the same command with --resume goes on, in the
middle of an epoch, with exactly the images, weights and rates that an uninterrupted run would have
had. The weights for detection: tools/train_net.py --weights RUN/final.safetensors."""

# Where and how fast a run computes; everything else would make it another run.
MAY_CHANGE = (
    *("output.", "data.root", "data.val_root", "data.val_labels", "data.workers", "train.threads"),
    *("data.max_bad_images", "evaluation.max_bad_images", "evaluation.batch_size"),
    "model.weights",  # the checkpoint has taken their place
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        nargs="+",
        default=[],
        metavar="FILE",
        help="config and overlays, merged in order; files, or names below configs/classification",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="run folder, short for output.dir=DIR")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the run folder; its own config is used, so none"
        " is needed (a run without checkpoint starts afresh)",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the run's newest checkpoint, or model.weights=FILE, and write no file",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="GPUs, or processes, on this machine (default: 1)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    # "--config-file A.yaml key=value": the list of files ends where the overrides begin
    args.overrides = [word for word in args.config_file if "=" in word] + args.overrides
    args.config_file = [word for word in args.config_file if "=" not in word]
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    return args


def read_config(args: argparse.Namespace) -> Config:
    """The run's config: from files and overrides, or from the run folder when it goes on."""
    overrides = list(args.overrides)
    if args.output_dir:
        overrides.append(f"output.dir={args.output_dir}")
    wanted = load_config(args.config_file, overrides) if args.config_file else None
    folder = Path(wanted.output.dir if wanted else args.output_dir or "")
    if wanted and not wanted.output.dir:
        folder = Path("output") / Path(args.config_file[0]).stem
        wanted.output.dir = str(folder)
    saved = folder / CONFIG if (wanted or args.output_dir) else None
    goes_on = (args.resume or args.eval_only) and saved is not None and saved.is_file()
    if not goes_on:
        if wanted is None:
            hint = f"{folder} holds no run" if args.output_dir else "give --config-file"
            raise ConfigError(f"nothing to do: {hint}; see --help for examples")
        return wanted
    config = load_config([saved], overrides)
    changed = differences(wanted or config, load_config([saved]))
    refused = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if "output.log_every" in changed and config.schedule.warmup_until_error:
        refused.append("output.log_every")  # it decides when the warm-up ends
    if refused and args.resume:
        raise ConfigError(
            f"{folder} was started with another {', '.join(refused)}: go on with its own config "
            "(leave out --config-file and these keys), or choose another output.dir"
        )
    return wanted or config


def refuse_overwriting(args: argparse.Namespace, config: Config) -> None:
    if not args.resume and not args.eval_only and holds_run(config.output.dir):
        raise ConfigError(
            f"{config.output.dir} holds a run: --resume goes on with it; or choose another "
            "folder with --output-dir"
        )


def finish(job: Job, trainer: Trainer, stop: StopRequest) -> None:
    """True BN statistics, the final weights and results.json."""
    config, world = job.config, job.world
    moving = dict(trainer.latest)
    model = trainer.step.evaluated_model
    found = moving
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    recompute = config.train.recompute_bn and any(isinstance(m, norms) for m in model.modules())
    if recompute:
        job.true_statistics(model, stop)
        found = job.validate(model, stop)
    if not world.is_main:
        return
    trainer.write_weights(FINAL)
    windows = job.data.source.num_samples / config.train.batch_size / config.output.log_every
    recent = trainer.recent_errors[-max(1, round(windows)) :]  # the last epoch
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "model": job.spec.name,
        "options": dict(job.spec.options),
        "parameters": networks.count_parameters(job.model),
        "seed": config.train.seed,
        "iterations": config.schedule.iterations,
        "batch_size": config.train.batch_size,
        **found,
        "evaluated_on": job.data.evaluated_on,
        "bn_statistics": "training set" if recompute else "moving averages",
        "with_moving_averages": moving,
        "best_val_top1_error": trainer.best,
        "train_error": sum(recent) / len(recent) if recent else None,
        "hours": trainer.seconds / 3600,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(job.device),
    }
    write_json(job.folder / RESULTS, content)
    logger.info("validation error %.2f %%; results: %s", found["val_top1_error"], job.folder.path)


def train(config: Config, args: argparse.Namespace, world: World) -> None:
    folder = RunFolder(config.output.dir, config.output.tensorboard)
    set_up_logging(folder.path, world.is_main)
    if args.resume and (folder / RESULTS).exists():
        logger.info("%s: the run has ended, see %s", folder.path, folder / RESULTS)
        return
    stop = StopRequest(world)
    if world.is_main:
        folder.start(to_yaml(config), world.device, world.size)
        logger.info("resolved config (also in %s):\n%s", folder / CONFIG, to_yaml(config))
    goes_on = args.resume and iterations_in(folder / "checkpoints")
    job = Job(config, world, folder, "" if goes_on else config.model.weights)
    trainer = job.trainer(stop)
    with stop, closing(folder):  # from here on there is something to save
        if args.resume:
            begun = trainer.resume()
            job.take_input(trainer.checkpoints.preprocessing)
            at = trainer.iteration
            found = f"going on at iteration {at}" if begun else "no checkpoint, starting"
            logger.info("%s: %s", folder.path, found)
        logger.info(
            "%s, %.2f M parameters; %d training images, batch %d; evaluated on %s",
            job.spec.name,
            networks.count_parameters(job.model) / 1e6,
            job.data.source.num_samples,
            config.train.batch_size,
            job.data.evaluated_on,
        )
        trainer.run()
        finish(job, trainer, stop)


def newest_weights(folder: Path) -> str:
    """The weights of a run's newest checkpoint that evaluations use; empty if there is none."""
    found = iterations_in(folder / "checkpoints")
    if not found:
        return ""
    newest = folder / "checkpoints" / f"{found[-1]:08d}"
    averaged = newest / AVERAGED
    return str(averaged if averaged.is_file() else newest / WEIGHTS)


def evaluate_only(config: Config, given: str, world: World) -> None:
    """Evaluates the file given on the command line, or the run's final or newest weights.

    What data sets write into a run folder (means, reports) goes to a temporary one.
    """
    set_up_logging(None, world.is_main)
    folder = Path(config.output.dir)
    final = str(folder / FINAL) if (folder / FINAL).is_file() else ""
    weights = given or final or newest_weights(folder)
    if not weights:
        raise ConfigError(f"{folder} has no weights: give model.weights=FILE")
    config.data.mean, config.data.std = "imagenet", "one"  # nothing to compute: the file says it
    with tempfile.TemporaryDirectory() as temporary:
        job = Job(config, world, RunFolder(temporary), weights)
        logger.info("%s: %s", weights, job.evaluate(job.model))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = read_config(args)
    refuse_overwriting(args, config)
    if args.num_gpus > 1 and "WORLD_SIZE" not in os.environ:
        launch("resnet_backbone.cli.train_classifier", args.num_gpus, args.arguments)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = join(config.train.device)
    check_processes(config, world)
    if args.eval_only:
        given = [word for word in args.overrides if word.startswith("model.weights=")]
        evaluate_only(config, config.model.weights if given else "", world)
    else:
        train(config, args, world)


if __name__ == "__main__":
    main()
