"""Hooks of the training loop: checkpoints, evaluation, metrics, a progress bar."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from tqdm import tqdm

from resnet_backbone.detection.checkpoint.checkpointer import Checkpointer, refuse_not_finite
from resnet_backbone.detection.config import with_keys
from resnet_backbone.detection.engine.writers import WINDOW
from resnet_backbone.detection.inference.predictor import Speed
from resnet_backbone.runtime.errors import Stopped, UsageError
from resnet_backbone.runtime.records import spell_hours

logger = logging.getLogger(__name__)

BEST = "model_best"
TIMINGS = ("time", "data_time", "eta_seconds")  # belong to a process, not to a run
FIRST = 5  # number of first iterations that are logged
LONG_HOURS = 24  # longer trainings on a CPU log a warning


class RepeatablePreciseBN(PreciseBN):
    """Detectron2's hook, but always on the same training images."""

    def update_stats(self) -> None:
        if self._data_loader is None:  # only now the run's seed is known
            cfg = with_keys(self.trainer.cfg, "DATALOADER.NUM_WORKERS", 0)
            self._data_loader = self.trainer.build_train_loader(cfg)
        self._data_iter = None
        super().update_stats()


class Checkpoints(HookBase):
    """Saves every `period` iterations, after the last one, and before it raises :class:`Stopped`.

    Evaluation and metrics of the iteration come later, so a resumed run repeats them.
    """

    def __init__(self, checkpointer: Checkpointer, period: int):
        self.checkpointer, self.period, self._saved = checkpointer, period, -1

    def after_step(self) -> None:
        done, stopping = self.trainer.iter + 1, self.trainer.stopping
        if stopping or done % self.period == 0 or done >= self.trainer.max_iter:
            self.save()
        if stopping:
            raise Stopped(stopping)

    def save(self, final: bool = False) -> None:
        """Saves this iteration once; with `final` as ``model_final``."""
        iteration = self.trainer.iter
        if self._saved == iteration and not final:
            return
        refuse_not_finite(self.checkpointer.model)
        final = final or iteration + 1 >= self.trainer.max_iter
        name = "model_final" if final else f"model_{iteration:07d}"
        self.checkpointer.save(name, iteration=iteration)
        self._saved = iteration
        comm.synchronize()  # no process exits while the main one is writing


class Evaluation(HookBase):
    """Evaluates every `period` iterations and at the end, keeps the best weights, stops early.

    Args:
        evaluate: returns results such as {"bbox": {"AP50": percent}} (main process) and the speed.
        period: in iterations; 0 for the end only.
        metric: such as "bbox/AP50", larger is better; "" keeps no best weights.
        patience: consecutive evaluations without a better metric before the run ends; 0: never.
        checkpointer: writes ``model_best.pth``.
    """

    def __init__(
        self,
        evaluate: Callable[[], tuple[Any, Speed | None]],
        period: int,
        metric: str,
        patience: int,
        checkpointer: Checkpointer,
    ):
        self._evaluate, self.period, self.metric = evaluate, period, metric
        self.patience, self.checkpointer = patience, checkpointer
        self.results, self.speed = {}, None  # last evaluation; speed in this process
        self.evaluated = 0  # number of iterations done at that time
        self.best, self._without_gain = None, 0  # {"metric", "value", "iterations"}

    @property
    def has_ended(self) -> bool:
        """Whether the run ends early."""
        return 0 < self.patience <= self._without_gain

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = self.period > 0 and done % self.period == 0
        if (is_due or done >= self.trainer.max_iter) and done != self.evaluated:
            results, self.speed = self._evaluate()
            plain = json.loads(json.dumps(results or {}, default=float))  # plain Python numbers
            self.results = comm.all_gather(plain)[0]
            numbers = flatten_results_dict(self.results)
            self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
            if self.metric and numbers:
                self._compare(numbers, done)
            self.evaluated = done
            comm.synchronize()

    def _compare(self, numbers: dict[str, float], done: int) -> None:
        if self.metric not in numbers:
            raise UsageError(
                f"RESNET_BACKBONE.BEST_METRIC {self.metric}: the evaluation gives "
                f"{', '.join(numbers)}"
            )
        value, best = numbers[self.metric], self.best or {"value": -math.inf, "iterations": 0}
        if value > best["value"]:  # never for nan
            self.best = {"metric": self.metric, "value": value, "iterations": done}
            self._without_gain = 0
            refuse_not_finite(self.checkpointer.model)
            self.checkpointer.save(BEST, iteration=done - 1, best=self.best)
            logger.info("best %s so far: %.3f; %s.pth is written", self.metric, value, BEST)
            return
        self._without_gain += 1
        text = "%s %.3f, the best is %.3f after %d iterations; %d evaluations without a better one"
        had = best["value"], best["iterations"]
        logger.info(text, self.metric, value, *had, self._without_gain)
        if self.has_ended:
            logger.info("the run ends early: RESNET_BACKBONE.EARLY_STOP %d", self.patience)

    def state_dict(self) -> dict[str, Any]:
        state = {"results": self.results, "evaluated": self.evaluated}
        return state | {"best": self.best, "without_gain": self._without_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.results, self.evaluated = state["results"], state["evaluated"]
        if state["best"] and state["best"]["metric"] == self.metric:
            self.best, self._without_gain = state["best"], state["without_gain"]


class Metrics(HookBase):
    """Writes the storage's values every :data:`WINDOW` iterations and after evaluations."""

    def __init__(self) -> None:
        self._writers: list[EventWriter] = []
        self._scalars: dict[str, dict] = {}

    def before_train(self) -> None:
        for name, kept in self._scalars.items():
            for value, iteration in kept["values"]:
                self.trainer.storage.put_scalar(name, value, kept["smoothed"], iteration)
        if comm.is_main_process():
            self._writers = self.trainer.build_writers()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % WINDOW == 0 or self.trainer.evaluation.evaluated == done:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        """Writes the last values, except after a stop, when the resumed run writes them."""
        for writer in self._writers:
            if not self.trainer.stopping and not isinstance(writer, CommonMetricPrinter):
                writer.write()
            writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the values that the next rows need."""
        storage = self.trainer.storage
        hints, first = storage.smoothing_hints(), self.trainer.iter - WINDOW
        scalars = {}
        for name, buffer in storage.histories().items():
            if name not in TIMINGS:
                values = [list(pair) for pair in buffer.values()[-1000:]]
                values = [pair for pair in values if pair[1] > first] or values[-1:]
                scalars[name] = {"smoothed": hints[name], "values": values}
        return {"scalars": scalars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scalars = state["scalars"]


def _losses(trainer: Any) -> dict[str, str]:
    latest = trainer.storage.latest()
    return {name: f"{value:.3f}" for name, (value, _) in latest.items() if "loss" in name}


class FirstIterations(HookBase):
    """Logs the losses of the first iterations and the estimated duration of the training."""

    def before_train(self) -> None:
        self._seconds: list[float] = []

    def after_step(self) -> None:
        if len(self._seconds) == FIRST:
            return
        self._seconds.append(self.trainer.stop.step_seconds)
        losses = ", ".join(map(" ".join, _losses(self.trainer).items()))
        logger.info("iteration %d: %s", self.trainer.iter, losses)
        if len(self._seconds) < FIRST:
            return
        step = sorted(self._seconds[1:])[(FIRST - 1) // 2]  # the first iteration is slower
        hours = step * (self.trainer.max_iter - self.trainer.iter - 1) / 3600
        logger.info("%.2f s per iteration: about %s without evaluations", step, spell_hours(hours))
        if hours > LONG_HOURS and next(self.trainer.model.parameters()).device.type == "cpu":
            logger.warning(
                "this training will take %s on this CPU: use a GPU, smaller images (INPUT."
                "MIN_SIZE_TRAIN), SOLVER.AMP.ENABLED True, or fewer RESNET_BACKBONE.EPOCHS",
                spell_hours(hours),
            )


class ProgressBar(HookBase):
    """A progress bar with losses, rate and remaining time, for terminals."""

    def before_train(self) -> None:
        total, initial = self.trainer.max_iter, self.trainer.start_iter
        self.bar = tqdm(total=total, initial=initial, unit="it", smoothing=0.1)

    def after_step(self) -> None:
        self.bar.set_postfix(_losses(self.trainer), refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        self.bar.close()
