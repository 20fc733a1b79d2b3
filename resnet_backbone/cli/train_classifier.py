"""Train a network of the package on ImageNet, CIFAR-10, or the built-in data, as in the paper."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from contextlib import closing, nullcontext
from pathlib import Path

from resnet_backbone.classification.config import Config, differences, load_config, to_yaml
from resnet_backbone.classification.networks import checkpoints_in, newest_weights
from resnet_backbone.classification.run import ClassificationRun, check_processes
from resnet_backbone.classification.trainer import FINAL
from resnet_backbone.cli import CommandParser
from resnet_backbone.models import count_parameters
from resnet_backbone.runtime.errors import EXIT_STOPPED, UsageError, one_line_errors
from resnet_backbone.runtime.files import in_use
from resnet_backbone.runtime.launch import add_launch_arguments, plan_launch, run_processes
from resnet_backbone.runtime.processes import World, choose_device, current_world
from resnet_backbone.runtime.records import (
    CONFIG,
    METRICS,
    RESULTS,
    RunFolder,
    say_nothing_to_resume,
    set_up_logging,
)
from resnet_backbone.runtime.signals import StopRequest

logger = logging.getLogger("resnet_backbone.train_classifier")

EPILOG = f"""\
examples:
  resnet-backbone train-classifier --config-file cifar10/resnet20 \\
      data.root=cifar10 output.dir=output/resnet20
  resnet-backbone train-classifier --resume --output-dir output/resnet20
  resnet-backbone train-classifier --config-file imagenet/resnet50 imagenet/modern \\
      --num-gpus 8 data.root=imagenet train.amp=bf16
  torchrun --nnodes 2 --nproc-per-node 8 ... -m resnet_backbone.cli.train_classifier \\
      --config-file ...

resnet_backbone/classification/config.py explains the keys. SIGTERM, SIGUSR1, and Ctrl-C write a
checkpoint and exit with status {EXIT_STOPPED}. The same command with --resume continues, also in
the middle of an epoch, with the images, weights, and rates of an uninterrupted run. Other statuses:
2, wrong input; 3, the training diverged. A detector takes the weights with train-net --weights
RUN/final.safetensors."""

# Keys that a resumed run may change, since they do not affect its result.
MAY_CHANGE = (
    *("output.", "data.root", "data.val_root", "data.val_labels", "data.workers", "train.threads"),
    *("data.max_bad_images", "evaluation.max_bad_images", "evaluation.batch_size"),
    "model.weights",  # the checkpoint has taken their place
    "train.recompute_bn",  # done after the last iteration
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    text = "config and overlays, merged in order: files, or names in configs/classification"
    add("--config-file", nargs="+", default=[], metavar="FILE", help=text)
    text = "run folder; short for output.dir=DIR"
    add("--output-dir", type=os.path.expanduser, metavar="DIR", help=text)
    text = "continue from the run folder's newest checkpoint, with its config"
    add("--resume", action="store_true", help=text)
    text = "evaluate model.weights=FILE, or the run's final or newest weights; writes no file"
    add("--eval-only", action="store_true", help=text)
    add_launch_arguments(parser)
    add("overrides", nargs="*", metavar="key=value", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    # "--config-file A.yaml key=value": the list of files ends where the overrides begin
    args.overrides = [word for word in args.config_file if "=" in word] + args.overrides
    args.config_file = [word for word in args.config_file if "=" not in word]
    return args


def read_config(args: argparse.Namespace) -> Config:
    """Reads the config from files and overrides, or from the run folder if the run continues."""
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
            raise UsageError(f"nothing to do: {hint}; --help has examples")
        return wanted
    config = load_config([saved], overrides)
    changed = differences(wanted or config, load_config([saved]))
    refused = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if "output.log_every" in changed and config.schedule.warmup_until_error:
        refused.append("output.log_every")  # it decides when the warm-up ends
    if refused and args.resume:
        raise UsageError(
            f"{folder} was started with another {', '.join(refused)}: omit --config-file and "
            "these keys, or choose another output.dir"
        )
    return wanted or config


def check_folder(args: argparse.Namespace, config: Config) -> None:
    """Refuses to overwrite a run, and prints a note if there is none to resume."""
    folder = config.output.dir
    holds_run = checkpoints_in(folder) or (Path(folder) / METRICS).exists()
    if holds_run and not args.resume and not args.eval_only:
        raise UsageError(
            f"{folder} holds a run: continue it with --resume, or choose another --output-dir"
        )
    if args.resume and not holds_run:
        say_nothing_to_resume(folder)


def train(config: Config, resume: bool, world: World) -> None:
    folder = RunFolder(config.output.dir, config.output.tensorboard)
    set_up_logging(folder.path, world.is_main)
    if resume and (folder / RESULTS).exists():
        logger.info("%s: the run has ended, see %s", folder.path, folder / RESULTS)
        return
    if world.is_main:
        folder.start(to_yaml(config), world)
        logger.info("resolved config: %s", folder / CONFIG)
        logger.debug("\n%s", to_yaml(config))
    goes_on = resume and bool(checkpoints_in(folder.path))
    run = ClassificationRun(config, world, folder, "" if goes_on else config.model.weights)
    stop = StopRequest(world)
    trainer = run.trainer(stop)
    with stop, closing(folder):  # from here on, signals save a checkpoint
        if resume:
            if goes_on:
                run.check_classes(newest_weights(folder.path))
            begun = trainer.resume()
            run.use_input(trainer.checkpoints.preprocessing)
            if begun:
                logger.info("%s: resuming at iteration %d", folder.path, trainer.iteration)
        size = f"{run.spec.name}, {count_parameters(run.model) / 1e6:.2f} M parameters"
        data = f"{run.data.source.num_samples} training images, batch {config.train.batch_size}"
        logger.info("%s; %s; evaluated on %s", size, data, run.data.evaluated_on)
        if run.schedule_line:
            logger.info("%s", run.schedule_line)
        trainer.run()
        run.finish(trainer)


def evaluate_only(config: Config, given: str, world: World) -> None:
    """Evaluates the file given on the command line, or the run's final or newest weights.

    Means and reports, which data sets write to the run folder, go to a temporary folder.
    """
    set_up_logging(None, world.is_main)
    folder = Path(config.output.dir)
    final = str(folder / FINAL) if (folder / FINAL).is_file() else ""
    weights = given or final or newest_weights(folder)
    if not weights:
        raise UsageError(f"{folder} has no weights: give model.weights=FILE")
    config.model.weights, config.model.new_head = weights, False
    config.train.batch_size = world.size  # nothing is trained: any number of processes will do
    with tempfile.TemporaryDirectory() as temporary:
        run = ClassificationRun(config, world, RunFolder(temporary), weights)
        logger.info("%s: %s", weights, run.evaluate(run.model))


def work(task: tuple[Config, argparse.Namespace]) -> None:
    config, args = task
    world = current_world(choose_device(config.train.device))
    if args.eval_only:
        given = [word for word in args.overrides if word.startswith("model.weights=")]
        evaluate_only(config, config.model.weights if given else "", world)
    else:
        check_processes(config, world)
        with in_use(config.output.dir) if world.is_main else nullcontext():
            train(config, args.resume, world)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = read_config(args)
    check_folder(args, config)
    launch = plan_launch(args, config.train.device, "train.device=cpu")
    run_processes(launch, work, (config, args))


if __name__ == "__main__":
    main()
