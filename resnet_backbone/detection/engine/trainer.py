"""Detectron2's trainer with safe loading, exact resume, and this package's data and evaluation."""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import IterationTimer, LRScheduler
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    TensorboardXWriter,
)
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer
from resnet_backbone.detection.checkpoint.files import find_last_checkpoint, find_weights
from resnet_backbone.detection.checkpoint.input_check import with_weights_input
from resnet_backbone.detection.config import (
    backbone_node,
    building,
    import_project,
    seed_of,
    with_keys,
)
from resnet_backbone.detection.data.mapper import TolerantMapper, mapper_options
from resnet_backbone.detection.data.sampling import TrainingLoader, build_loader
from resnet_backbone.detection.engine.hooks import (
    Checkpoints,
    Evaluation,
    FirstIterations,
    Metrics,
    ProgressBar,
    RepeatablePreciseBN,
)
from resnet_backbone.detection.engine.results import check_results
from resnet_backbone.detection.engine.schedule import check_best_metric, check_training
from resnet_backbone.detection.engine.step import TrainStep, exempt_slopes
from resnet_backbone.detection.engine.writers import LOGGERS, MetricsFile
from resnet_backbone.detection.evaluation import build_evaluator, evaluation_folder
from resnet_backbone.detection.evaluation.operating import OperatingPoints
from resnet_backbone.detection.inference.detector import read_switches
from resnet_backbone.detection.inference.predictor import (
    Speed,
    Timed,
    check_ensemble,
    for_testing,
    keep_members,
)
from resnet_backbone.detection.modeling import build_detector
from resnet_backbone.detection.modeling.localization import LocalizationRCNN
from resnet_backbone.runtime.errors import (
    Stopped,
    TrainingDiverged,
    UsageError,
    plain_message,
    wants_traceback,
)
from resnet_backbone.runtime.evaluation import evaluation_mode
from resnet_backbone.runtime.processes import distribute
from resnet_backbone.runtime.signals import StopRequest, Watched, ignore_interrupts

logger = logging.getLogger(__name__)
_watch: ContextVar[SimpleNamespace | None] = ContextVar("watch", default=None)


@contextmanager
def watching(stop: StopRequest | None = None) -> Iterator[SimpleNamespace]:
    """Context in which :meth:`Trainer.test`, a class method as in Detectron2, obeys `stop`.

    Yields:
        An object whose attribute `speed` is set to the detector's speed in this process.
    """
    before = _watch.set(SimpleNamespace(stop=stop, speed=None))
    try:
        yield _watch.get()
    finally:
        _watch.reset(before)


class Trainer(DefaultTrainer):
    """Trains and evaluates a detector with one of our backbones from a config.

    Differences from :class:`DefaultTrainer`: runs interrupted at any moment resume exactly (every
    random number is a function of ``SEED``, iteration and process; checkpoints contain a drawn
    seed). :class:`TrainStep` also works on CPUs and in several processes. :class:`Checkpointer`
    checks or sets the input of the weights. VOC and COCO data sets have an evaluator. Unreadable
    images do not end a run.

    `stop` is checked after each step; the run then ends with :class:`Stopped` and a checkpoint.
    """

    def __init__(self, cfg: CfgNode, stop: StopRequest | None = None):
        TrainerBase.__init__(self)  # not DefaultTrainer's, which builds its own step and loader
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(with_weights_input(cfg), comm.get_world_size())
        check_training(cfg)
        check_best_metric(cfg)
        check_ensemble(cfg)
        self._seed_is_drawn = cfg.SEED < 0
        cfg = with_keys(cfg, "SEED", seed_of(cfg))
        self.cfg, self.stop = cfg, stop or StopRequest()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self._trainer = TrainStep(cfg, distribute(model), loader, optimizer, self.stop)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        own = weakref.proxy(self)
        evaluated = self._trainer.evaluated_model
        self.checkpointer = self.build_checkpointer(cfg, evaluated, trainer=own)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.stopping = ""  # name of the signal that ends the run
        self.failure = ""  # why the last evaluation failed, or ""
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Like Detectron2's; also loads the proposal network of localization's R-CNN.

        With weight averaging, the loaded weights initialize both the model and its average.
        """
        super().resume_or_load(resume)
        model = self.checkpointer.model
        if self.start_iter:
            return
        if isinstance(model, LocalizationRCNN):  # check_training has refused empty PROPOSALS
            weights = find_weights(backbone_node(self.cfg).LOCALIZATION.PROPOSALS)
            proposer = self.build_checkpointer(self.cfg, model.proposer)
            proposer.load(weights, needs_detector=True)
        if self._trainer.ema is not None:
            self._trainer.network.load_state_dict(model.state_dict())

    def train(self) -> dict:
        """Trains from ``start_iter`` to ``max_iter`` or an early stop; returns the results.

        Raises:
            Stopped: a signal came; a checkpoint to resume from is written.
            TrainingDiverged: losses or weights are not finite; they are in no checkpoint.
            UnexpectedResults: see ``TEST.EXPECTED_RESULTS``; the run is complete.
        """
        logger.info("Starting training from iteration %d", self.start_iter)
        self.iter = self.start_iter
        with keep_members(), EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                self._finish_resumed_iteration()
                while self.iter + 1 < self.max_iter and not self.evaluation.has_ended:
                    self.iter += 1
                    self.before_step()
                    self.run_step()
                    self.after_step()
                if self.evaluation.has_ended:
                    self.checkpoints.save(final=True)
                self.iter += 1  # as in TrainerBase, for after_train of a complete run
            except Stopped as stopped:
                self.stopping = str(stopped)
                self.checkpoints.save()
                raise
            except FloatingPointError as error:
                raise TrainingDiverged(self._explain(error)) from error
            finally:
                self.after_train()
        check_results(self.cfg, self.results)
        return self.results

    def _finish_resumed_iteration(self) -> None:
        """Runs the hooks that come after the checkpoint in its iteration."""
        self.iter = self.start_iter - 1
        if self.iter >= 0:
            self.storage.iter = self.iter
            for hook in (self.evaluation, self.metrics):
                hook.after_step()

    def run_step(self) -> None:
        start = time.perf_counter()
        report = self._trainer.run(self.iter)
        self.stop.step_seconds = time.perf_counter() - start
        self.stopping = report.stop
        if comm.is_main_process():
            self.storage.put_scalar("data_time", report.data_time)
            self.storage.put_scalars(**{"total_loss": sum(report.losses.values())})
            if len(report.losses) > 1:
                self.storage.put_scalars(**report.losses)

    def _explain(self, error: FloatingPointError) -> str:
        group = LRScheduler.get_best_param_group_id(self.optimizer)
        rate = self.optimizer.param_groups[group]["lr"]
        last = find_last_checkpoint(self.cfg.OUTPUT_DIR)
        found = str(error).partition("\n")[0].rstrip(".")
        return (
            f"iteration {self.iter}, learning rate {rate:.4g}: {found}. The last good checkpoint: "
            f"{last or 'none'}. Lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True, and start again"
        )

    def _evaluate(self) -> tuple[dict, Speed | None]:
        """Evaluates; an error is stored in ``failure``, so that the training continues."""
        self.failure, model = "", self.checkpointer.model
        if comm.get_world_size() > 1:  # BN statistics differ; checkpoints have the first process's
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        with watching(self.stop) as watch, evaluation_mode(model):  # restored after errors, too
            try:
                return self.test(self.cfg, model), watch.speed
            except (Stopped, UsageError):
                raise
            except Exception as error:
                if comm.get_world_size() > 1 or wants_traceback():
                    raise  # otherwise the other processes would wait for this one
                self.failure = f"{type(error).__name__}: {plain_message(error)}"
                logger.error("the evaluation failed: %s", self.failure)
                return {}, None

    @property
    def results(self) -> dict:
        """Results of the last evaluation by task: {"bbox": {"AP50": percent, ...}}."""
        return self.evaluation.results

    def load_state_dict(self, state: dict) -> None:
        if self.cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR":  # would restore the old MAX_ITER
            hooks = state["hooks"]
            kept = {key: hooks["LRScheduler"][key] for key in ("base_lrs", "last_epoch")}
            state = {**state, "hooks": {**hooks, "LRScheduler": kept}}
        super().load_state_dict(state)
        seed = state["_trainer"].get("seed", self.cfg.SEED)
        if self._seed_is_drawn and seed != self.cfg.SEED:
            self.cfg = with_keys(self.cfg, "SEED", seed)
            self._trainer.read_from(self.cfg, self.build_train_loader(self.cfg))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        read_switches(cfg)  # checked before hours of training
        return build_detector(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainingLoader:
        with building("training images"):
            mapper = TolerantMapper(cfg, True, **mapper_options(cfg))
        return build_loader(cfg, mapper, seed_of(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        loader = build_detection_test_loader(cfg, dataset_name, mapper=TolerantMapper(cfg, False))
        loader.worker_init_fn = ignore_interrupts
        watch = _watch.get()
        if watch is None or watch.stop is None:
            return loader
        return Watched(loader, watch.stop, -(-len(loader.dataset) // comm.get_world_size()))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Like Detectron2's, without weight decay of PReLU slopes."""
        return exempt_slopes(super().build_optimizer(cfg, model), model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR":
            return import_project("deeplab").build_lr_scheduler(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder, node = evaluation_folder(cfg, dataset_name), backbone_node(cfg)
        choice = node.TEST.METRIC, node.LOCALIZATION.GUESSES, cfg.TEST.KEYPOINT_OKS_SIGMAS
        evaluator = build_evaluator(dataset_name, folder, *choice)
        if node.TEST.OPERATING_POINTS:
            evaluator = DatasetEvaluators([evaluator, OperatingPoints(dataset_name, folder)])
        return evaluator

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        timed = Timed(for_testing(cfg, model))
        results = super().test(cfg, timed, evaluators)
        if watch := _watch.get():
            watch.speed = timed.speed
        return results

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: nn.Module, **options) -> Checkpointer:
        return Checkpointer.from_config(cfg, model, cfg.OUTPUT_DIR, **options)

    def build_hooks(self) -> list[HookBase | None]:
        cfg, test, node = self.cfg, self.cfg.TEST, self.cfg.RESNET_BACKBONE
        best = self.build_checkpointer(cfg, self.checkpointer.model, marks_last=False)
        self.checkpoints = Checkpoints(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        choice = test.EVAL_PERIOD, node.BEST_METRIC, node.EARLY_STOP
        self.evaluation = Evaluation(self._evaluate, *choice, best)
        self.metrics, is_main = Metrics(), comm.is_main_process()
        statistics = test.EVAL_PERIOD, self.checkpointer.model, None, test.PRECISE_BN.NUM_ITER
        has_norms = test.PRECISE_BN.ENABLED and get_bn_modules(self.checkpointer.model)
        return [
            IterationTimer(),
            LRScheduler(),
            RepeatablePreciseBN(*statistics) if has_norms else None,
            self.checkpoints,
            self.evaluation,
            FirstIterations() if is_main else None,
            ProgressBar() if is_main and sys.stderr.isatty() else None,
            self.metrics,  # last, to write what other hooks measure
        ]

    def build_writers(self) -> list[EventWriter]:
        folder, start = self.cfg.OUTPUT_DIR, self.start_iter
        os.makedirs(folder, exist_ok=True)
        file = MetricsFile(os.path.join(folder, "metrics.json"), start)
        writers = [file, TensorboardXWriter(folder, purge_step=start)]
        for name in self.cfg.RESNET_BACKBONE.LOGGERS:
            writers.append(LOGGERS[name](self.cfg, self._final, start > 0, file.written))
        return writers if sys.stderr.isatty() else [CommonMetricPrinter(self.max_iter), *writers]

    def _final(self) -> dict:
        return {"results": self.results, "best": self.evaluation.best or {}}
