"""Builds a classification run from its config: data, network, trainer and evaluation."""

from __future__ import annotations

import datetime
import logging
import math
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from resnet_backbone.classification import networks
from resnet_backbone.classification.batch_norm import (
    BatchNormReport,
    TrainingImages,
    recompute_statistics,
)
from resnet_backbone.classification.config import Config, scale_schedule
from resnet_backbone.classification.data.augment import BatchMixer
from resnet_backbone.classification.data.build import BAD_IMAGES, build_data
from resnet_backbone.classification.data.evaluation import EvaluationArrays, EvaluationLoader
from resnet_backbone.classification.data.loader import BadImageReport
from resnet_backbone.classification.evaluation import EvaluationResult, evaluate
from resnet_backbone.classification.networks import Checkpoints, NetworkSpec
from resnet_backbone.classification.protocols import Center, Full
from resnet_backbone.classification.step import AMP, Schedule, TrainStep, build_sgd
from resnet_backbone.classification.trainer import FINAL, Trainer
from resnet_backbone.models import count_parameters
from resnet_backbone.models.layers import TRAINABLE_BATCH_NORMS
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.files import write_json
from resnet_backbone.runtime.processes import World
from resnet_backbone.runtime.records import RESULTS, RunFolder, command_line, hardware
from resnet_backbone.runtime.signals import StopRequest, Watched
from resnet_backbone.weights import Preprocessing
from resnet_backbone.weights.preprocessing import InputNormalizer
from resnet_backbone.weights.reading import UnknownInput

logger = logging.getLogger(__name__)


def check_processes(config: Config, world: World) -> None:
    train = config.train
    if train.batch_size % world.size:
        raise UsageError(
            f"train.batch_size {train.batch_size} cannot be divided among {world.size} processes: "
            f"give train.batch_size={-(-train.batch_size // world.size) * world.size}"
        )
    local, micro = train.batch_size // world.size, train.micro_batch
    if micro and local % micro:
        fits = next(size for size in range(min(local, micro), 0, -1) if local % size == 0)
        raise UsageError(
            f"train.micro_batch {micro} does not divide the {local} images of each process: "
            f"give train.micro_batch={fits}"
        )


def count_epochs(config: Config, num_images: int) -> str:
    """Converts ``schedule.epochs`` to iterations in place, and returns a line for the log, or "".

    Evaluations and checkpoints are then made at least once an epoch.
    """
    schedule, batch = config.schedule, config.train.batch_size
    if not schedule.epochs:
        return ""
    schedule.scale = max(1, math.ceil(schedule.epochs * num_images / batch)) / schedule.iterations
    scale_schedule(schedule)
    epoch = math.ceil(num_images / batch)
    config.output.checkpoint_every = min(config.output.checkpoint_every, epoch)
    config.evaluation.every = min(config.evaluation.every, epoch)
    drops = f", rate drops at {schedule.milestones}" if schedule.milestones else ""
    return (
        f"{schedule.epochs:g} epochs of {num_images:,} images are {schedule.iterations:,} "
        f"iterations of {batch}{drops}"
    )


class ClassificationRun:
    """A run's data, network and trainer, built from the config by all processes of the world.

    Args:
        folder: where means, reports and results are written.
        weights: file to start from or to evaluate, whose input replaces the config's. Empty: He
            initialization.
    """

    def __init__(self, config: Config, world: World, folder: RunFolder, weights: str | Path = ""):
        self.config, self.world, self.folder = config, world, folder
        self.device = world.device
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        shown = config.evaluation
        cropped = shown.protocol == "center"
        self.protocol = Center(shown.short_side, shown.crop) if cropped else Full()
        self.data = build_data(config, folder.path, world, self.protocol)
        classes = config.model.num_classes or len(self.data.class_names)
        if classes < len(self.data.class_names):
            raise UsageError(
                f"model.num_classes is {classes}, but the data have {len(self.data.class_names)} "
                "classes: give at least as many, or 0"
            )
        self.schedule_line = count_epochs(config, self.data.source.num_samples)
        self.spec = NetworkSpec(config.model.name, classes, config.model.options)
        self.model = self._network()
        self.use_input(networks.describe(self.model, self.data.preprocessing))
        if weights:
            self.check_classes(weights)
            preprocessing, new_head = config.model.preprocessing, config.model.new_head
            try:
                found = networks.load_network(self.model, weights, preprocessing, new_head)
            except UnknownInput as error:
                raise UnknownInput(error.source, "model.preprocessing=NAME") from error
            self.use_input(found)
            logger.info("%s, with the channel order, range, and mean of its input", weights)

    def check_classes(self, weights: str | Path) -> None:
        """Raises UsageError if a file names other classes than the data have."""
        theirs, ours = networks.read_class_names(weights), list(self.data.class_names)
        if theirs and theirs != ours and not self.config.model.new_head:
            pairs = zip_longest(theirs, ours, fillvalue="none")
            number, pair = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            raise UsageError(
                f"{weights} was trained on other classes: its class {number} is {pair[0]}, that of "
                f"the data is {pair[1]}; evaluate-classifier matches classes by name"
            )

    def use_input(self, preprocessing: Preprocessing) -> None:
        sizes = {"resize_size": None, "crop_size": None}  # the default test of the written weights
        if isinstance(self.protocol, Center):
            sizes = {"resize_size": self.protocol.resize, "crop_size": self.protocol.crop}
            sizes["interpolation"] = self.protocol.interpolation  # not that of loaded weights
        elif isinstance(self.data.evaluation, EvaluationArrays):  # whole images of one size
            sizes = dict.fromkeys(sizes, self.data.evaluation.images.shape[-1])
        self.preprocessing = replace(preprocessing, **sizes)
        self.normalizer = InputNormalizer(preprocessing, self.device)

    def _network(self) -> nn.Module:
        torch.manual_seed(self.config.train.seed)  # the same first weights on all processes
        model = self.spec.build()
        if self.config.train.sync_bn and self.world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        last = self.config.train.channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        return model.to(self.device, memory_format=layout)

    def prepare(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalizer(batch.images, batch.shift)
        if not self.config.train.channels_last:
            images = images.contiguous()
        return images, batch.labels.to(self.device, non_blocking=True)

    def evaluate(self, model: nn.Module, stop: StopRequest | None = None) -> EvaluationResult:
        loader = EvaluationLoader(
            self.data.evaluation,
            self.config.evaluation.batch_size,
            workers=self.config.data.workers,
            rank=self.world.rank,
            world=self.world.size,
        )
        if stop is not None:
            share = -(-loader.num_images // self.world.size)  # of the process with the most images
            loader = Watched(loader, stop, -(-share // loader.batch_size))
        result = evaluate(
            [(model, self.normalizer)],
            self.protocol,
            loader,
            world=self.world,
            autocast=AMP[self.config.train.amp],
            channels_last=self.config.train.channels_last,
            max_bad_images=self.config.evaluation.max_bad_images,
        )
        for one in result.bad:
            logger.warning("counts as wrong: %s: %s", one.name, one.reason)
        return result

    def validate(self, model: nn.Module, stop: StopRequest) -> dict[str, float]:
        result = self.evaluate(model, stop)
        found = {"val_top1_error": result.top1_error, "val_loss": result.cross_entropy}
        if result.top5_error is not None:
            found["val_top5_error"] = result.top5_error
        return found

    def trainer(self, stop: StopRequest) -> Trainer:
        config, train, output = self.config, self.config.train, self.config.output
        chosen = config.optimizer
        optimizer = build_sgd(
            self.model, chosen.momentum, chosen.weight_decay, chosen.decay_norm_and_bias
        )
        step = TrainStep(
            self.model,
            optimizer,
            self.world,
            self.mixer(),
            amp=train.amp,
            micro_batch=train.micro_batch,
            clip_norm=chosen.clip_norm,
            compile=train.compile,
            ema=train.ema,
            label_smoothing=config.loss.label_smoothing,
            seed=train.seed,
        )
        return Trainer(
            step,
            self.data.source,
            self.prepare,
            schedule=Schedule(**asdict(config.schedule)),
            momentum_form=chosen.momentum_form,
            validate=self.validate,
            checkpoints=self.checkpoints(),
            folder=self.folder,
            stop=stop,
            log_every=output.log_every,
            evaluate_every=config.evaluation.every,
            checkpoint_every=output.checkpoint_every,
            batch_size=train.batch_size,
        )

    def checkpoints(self) -> Checkpoints:
        output = self.config.output
        kept = (output.keep, output.keep_every, self.data.class_names)
        return Checkpoints(self.folder.path, self.spec, self.preprocessing, *kept)

    def mixer(self) -> BatchMixer | None:
        loss = self.config.loss
        if not loss.mixup and not loss.cutmix:
            return None
        seed = self.config.train.seed + 1000003 * self.world.rank
        return BatchMixer(self.spec.num_classes, loss.mixup, loss.cutmix, seed=seed)

    @property
    def normalized_together(self) -> int:
        """Images that pass through the network, and its BN, at once."""
        return self.config.train.micro_batch or self.config.train.batch_size // self.world.size

    def true_statistics(
        self, model: nn.Module, stop: StopRequest | None = None, layer_inputs: str = "batch"
    ) -> BatchNormReport:
        """Replaces BN's moving averages by statistics of the training set, in place."""
        train = self.config.train
        images = TrainingImages(
            self.data.source,
            train.recompute_bn_samples,
            train.batch_size,
            self.world,
            before_each=stop.raise_if_any if stop else lambda: None,
            sync_bn=train.sync_bn,
        )
        return recompute_statistics(
            model,
            images,
            self.normalizer,
            layer_inputs=layer_inputs,
            micro_batch=self.normalized_together,
            world=self.world,
            autocast=AMP[train.amp],
        )

    def finish(self, trainer: Trainer) -> None:
        """Ends a run: true BN statistics, the final weights and results.json."""
        config, step = self.config, trainer.step
        moving = found = dict(trainer.latest)
        has_norms = any(
            isinstance(module, TRAINABLE_BATCH_NORMS) for module in self.model.modules()
        )
        recompute = config.train.recompute_bn and has_norms
        with step.shared_buffers():
            if recompute:
                self.true_statistics(step.evaluated_model, trainer.stop)
                found = self.validate(step.evaluated_model, trainer.stop)
            if not self.world.is_main:
                return
            trainer.write_weights(FINAL)
        bad = BadImageReport(self.folder / BAD_IMAGES).num_bad
        if bad:
            logger.warning(
                "%d images were replaced by others: see %s", bad, self.folder / BAD_IMAGES
            )
        windows = self.data.source.num_samples / config.train.batch_size / config.output.log_every
        recent = trainer.recent_errors[-max(1, round(windows)) :]  # the last epoch
        content = {
            "command": command_line(),
            "model": self.spec.name,
            "options": dict(self.spec.options),
            "parameters": count_parameters(self.model),
            "seed": config.train.seed,
            "iterations": config.schedule.iterations,
            "batch_size": config.train.batch_size,
            **found,
            "evaluated_on": self.data.evaluated_on,
            "num_classes": self.spec.num_classes,
            "train_images": self.data.source.num_samples,
            "bad_images": bad,
            "bn_statistics": "training set" if recompute else "moving averages",
            "with_moving_averages": moving,
            "best_val_top1_error": trainer.best,
            "train_error": sum(recent) / len(recent) if recent else None,
            "hours": trainer.seconds / 3600,
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(self.device),
        }
        write_json(self.folder / RESULTS, content)
        error = found["val_top1_error"]
        logger.info("validation error %.2f %%; results: %s", error, self.folder.path)
