#!/usr/bin/env python
"""Train any network of the package on ImageNet, CIFAR-10 or the built-in data, as the paper did."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from resnet_backbone.config import (
    Config,
    ConfigError,
    differences,
    load_config,
    to_yaml,
)
from resnet_backbone.data.build import ClassificationData, build_data
from resnet_backbone.data.evaluation import EvaluationLoader
from resnet_backbone.engine import networks
from resnet_backbone.engine.batchnorm import TrainingImages, recompute_statistics
from resnet_backbone.engine.checkpoints import AVERAGED, WEIGHTS, Checkpoints, iterations_in
from resnet_backbone.engine.cli import launch, one_line_errors, set_up_logging
from resnet_backbone.engine.distributed import World, join
from resnet_backbone.engine.evaluation import EvaluationResult, evaluate
from resnet_backbone.engine.loop import FINAL, LoopOptions, Trainer
from resnet_backbone.engine.networks import NetworkSpec
from resnet_backbone.engine.optimizer import LearningRate, build_sgd
from resnet_backbone.engine.run_folder import (
    CONFIG,
    RESULTS,
    RunFolder,
    hardware,
    holds_run,
    write_json,
)
from resnet_backbone.engine.schedule import Schedule
from resnet_backbone.engine.signals import EXIT_STOPPED, StopRequest
from resnet_backbone.engine.step import AMP, StepOptions, TrainStep
from resnet_backbone.engine.views import Centre, Full
from resnet_backbone.weights.inputs import InputNormalizer

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

Keys and their meaning: resnet_backbone/config.py. SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint
and exit with status {EXIT_STOPPED}; the same command with --resume goes on, in the middle of an
epoch, with exactly the images, weights and rates that an uninterrupted run would have had.
The weights for detection: tools/train_net.py --weights RUN/final.safetensors."""

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
        help="config and overlays, merged in order; ready ones are in configs/classification",
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


def make_schedule(config: Config) -> Schedule:
    values = asdict(config.schedule)
    values.pop("scale")
    for name in ("patience", "threshold", "drops"):
        value = values.pop(f"plateau_{name}")
        values["max_drops" if name == "drops" else name] = value
    return Schedule(**values)


def make_protocol(config: Config) -> Full | Centre:
    chosen = config.evaluation
    return Full() if chosen.protocol == "full" else Centre(chosen.short_side, chosen.crop)


class Job:
    """One run: its data, network and trainer, made from the config.

    Args:
        weights: file to start from or to evaluate; the input is then what it says, and not the
            config's. Empty: He initialisation.
    """

    def __init__(self, config: Config, world: World, folder: RunFolder, weights: str | Path = ""):
        self.config, self.world, self.folder = config, world, folder
        self.device = world.device
        self.protocol = make_protocol(config)
        self.data: ClassificationData = build_data(
            config,
            folder.path,
            rank=world.rank,
            world=world.size,
            device=self.device,
            prepare=self.protocol.prepare,
        )
        classes = config.model.num_classes or len(self.data.class_names)
        if classes < len(self.data.class_names):
            raise ConfigError(
                f"model.num_classes is {classes}, the data have {len(self.data.class_names)} "
                "classes: give as many, or 0"
            )
        self.spec = NetworkSpec(config.model.name, classes, config.model.options)
        self.model = self._network()
        self.preprocessing = networks.describe(self.model, self.data.preprocessing)
        if weights:
            self.preprocessing = networks.load_network(
                self.model, weights, config.model.preprocessing
            )
            logger.info("%s, with its own mean, order and range of the input", weights)
        self.normalizer = InputNormalizer(self.preprocessing, self.device)

    def _network(self) -> nn.Module:
        torch.manual_seed(self.config.train.seed)  # the same first weights on all processes
        model = self.spec.build()
        if self.config.train.sync_bn and self.world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def prepare(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalizer(batch.images, batch.shift)
        if not self.config.train.channels_last:
            images = images.contiguous()
        return images, batch.labels.to(self.device, non_blocking=True)

    def loader(self) -> EvaluationLoader:
        return EvaluationLoader(
            self.data.evaluation,
            self.config.evaluation.batch_size,
            workers=self.config.data.workers,
            rank=self.world.rank,
            world=self.world.size,
            pin_memory=self.device.type == "cuda",
        )

    def evaluate(self, model: nn.Module, stop: StopRequest | None = None) -> EvaluationResult:
        loader = self.loader()
        if stop is not None:
            loader = Watched(loader, stop, self.world)
        return evaluate(
            [(model, self.normalizer)],
            self.protocol,
            loader,
            world=self.world,
            autocast=AMP[self.config.train.amp],
            channels_last=self.config.train.channels_last,
            max_bad_images=self.config.evaluation.max_bad_images,
        )

    def validate(self, model: nn.Module, stop: StopRequest) -> dict[str, float]:
        return as_metrics(self.evaluate(model, stop))

    def trainer(self, stop: StopRequest) -> Trainer:
        config = self.config
        chosen = config.optimizer
        optimizer = build_sgd(
            self.model, chosen.momentum, chosen.weight_decay, chosen.decay_norm_and_bias
        )
        train = config.train
        options = StepOptions(
            amp=train.amp,
            micro_batch=train.micro_batch,
            clip_norm=chosen.clip_norm,
            compile=train.compile,
            ema=train.ema,
            label_smoothing=config.loss.label_smoothing,
            seed=train.seed,
        )
        output = config.output
        return Trainer(
            TrainStep(self.model, optimizer, options, self.world, self.mixer()),
            self.data.source,
            self.prepare,
            schedule=make_schedule(config),
            rate=LearningRate(optimizer, chosen.momentum_form),
            validate=self.validate,
            checkpoints=Checkpoints(
                self.folder.path,
                self.spec,
                self.preprocessing,
                keep=output.keep,
                keep_every=output.keep_every,
            ),
            folder=self.folder,
            stop=stop,
            options=LoopOptions(
                config.schedule.iterations,
                train.batch_size,
                output.log_every,
                config.evaluation.every,
                output.checkpoint_every,
            ),
        )

    def mixer(self):
        loss = self.config.loss
        if not loss.mixup and not loss.cutmix:
            return None
        from resnet_backbone.data.mix import BatchMixer

        return BatchMixer(
            self.spec.num_classes,
            loss.mixup,
            loss.cutmix,
            seed=self.config.train.seed + 1000003 * self.world.rank,
        )

    def true_statistics(self, model: nn.Module, stop: StopRequest) -> None:
        """Replaces the moving averages of BN by averages over the training set, in place."""
        train = self.config.train
        images = TrainingImages(
            self.data.source,
            train.recompute_bn_samples,
            train.batch_size,
            self.world,
            before_each=stop.raise_if_any,
            sync_bn=train.sync_bn,
        )
        recompute_statistics(
            model,
            images,
            self.normalizer,
            micro_batch=train.micro_batch or train.batch_size // self.world.size,
            world=self.world,
            autocast=AMP[train.amp],
        )


class Watched:
    """An evaluation loader that ends the evaluation when a signal arrives."""

    def __init__(self, loader: EvaluationLoader, stop: StopRequest, world: World):
        self.loader, self.stop = loader, stop
        share = -(-loader.num_images // world.size)
        self.rounds = -(-share // loader.batch_size)

    num_images = property(lambda self: self.loader.num_images)

    def name_of(self, index: int) -> str:
        return self.loader.name_of(index)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return self.stop.watch(self.loader, self.rounds)


def as_metrics(result: EvaluationResult) -> dict[str, float]:
    found = {"val_top1_error": result.top1_error, "val_loss": result.cross_entropy}
    if result.top5_error is not None:
        found["val_top5_error"] = result.top5_error
    return found


def check_processes(config: Config, world: World) -> None:
    train = config.train
    if train.batch_size % world.size:
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not divide over {world.size} processes"
        )
    local = train.batch_size // world.size
    if train.micro_batch and local % train.micro_batch:
        raise ConfigError(
            f"{world.size} processes have {local} images each, no multiple of train.micro_batch "
            f"{train.micro_batch}"
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
        "command": " ".join(sys.argv),
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
    newest = newest_weights(folder.path) if args.resume else ""
    job = Job(config, world, folder, newest or config.model.weights)
    trainer = job.trainer(stop)
    stop.install()  # from here on there is something to save
    if args.resume:
        begun = trainer.resume()
        at = f"going on at iteration {trainer.iteration}" if begun else "no checkpoint, starting"
        logger.info("%s: %s", folder.path, at)
    logger.info(
        "%s, %.2f M parameters; %d training images, batch %d; evaluated on %s",
        job.spec.name,
        networks.count_parameters(job.model) / 1e6,
        job.data.source.num_samples,
        config.train.batch_size,
        job.data.evaluated_on,
    )
    try:
        trainer.run()
        finish(job, trainer, stop)
    finally:
        folder.close()


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
        launch(__file__, args.num_gpus, args.arguments)
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
