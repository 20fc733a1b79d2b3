"""The training loop, whose checkpoints hold its complete state."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resnet_backbone.classification.networks import Checkpoints, checkpoints_in
from resnet_backbone.classification.step import Schedule, TrainStep, set_rate
from resnet_backbone.runtime.errors import DataError, Stopped, TrainingDiverged, UsageError
from resnet_backbone.runtime.files import write_json
from resnet_backbone.runtime.processes import World
from resnet_backbone.runtime.records import RunFolder, spell_hours
from resnet_backbone.runtime.signals import StopRequest, killed_worker
from resnet_backbone.weights import WeightsError

logger = logging.getLogger(__name__)

BEST, FINAL, DIVERGED = "best.safetensors", "final.safetensors", "diverged.json"
SAYS_HOW_LONG = 3  # iterations before the time is estimated; the first one is slower
LOG_SECONDS = 15  # between log lines without a progress bar
# The trainer's own attributes in a checkpoint.
STATE = ("iteration", "evaluated_at", "best", "seconds", "latest", "recent_errors")


class Window:
    """Losses and errors since the last row of metrics, kept on the device."""

    def __init__(self, length: int, device: torch.device):
        self.losses = torch.zeros(length, device=device)
        self.wrong = torch.zeros((), device=device)
        self.filled = 0
        self.data_seconds, self.started = 0.0, time.perf_counter()

    def add(self, loss: Tensor, wrong: Tensor) -> None:
        self.losses[self.filled] = loss
        self.wrong += wrong
        self.filled += 1

    def restart(self) -> None:
        self.wrong.zero_()
        self.filled, self.data_seconds, self.started = 0, 0.0, time.perf_counter()

    def state_dict(self, world: World) -> dict:
        """Returns the mean loss and the errors of all processes; all must call this."""
        return {
            "losses": (world.sum(self.losses.clone()) / world.size).cpu(),
            "wrong_total": world.sum(self.wrong.clone()).cpu(),
            "filled": self.filled,
            "data_seconds": self.data_seconds,
            "elapsed": time.perf_counter() - self.started,
        }

    def load_state_dict(self, state: dict, world: World) -> None:
        if len(state["losses"]) == len(self.losses) and "wrong_total" in state:
            self.losses.copy_(state["losses"])
            if world.is_main:  # for all processes, whose number may have changed
                self.wrong.copy_(state["wrong_total"])
            self.filled, self.data_seconds = state["filled"], state["data_seconds"]
            self.started = time.perf_counter() - state["elapsed"]


@dataclass
class Trainer:
    """Trains, logs, evaluates, writes checkpoints, and resumes exactly from one."""

    step: TrainStep
    source: Any  # training data, with `num_samples` and `batches(first_iteration)`
    prepare: Callable[[Any], tuple[Tensor, Tensor]]  # a batch -> normalized images, labels
    schedule: Schedule
    momentum_form: str  # of the optimizer, see `set_rate`
    # returns numbers, among them "val_top1_error" (%)
    validate: Callable[[nn.Module, StopRequest], dict[str, float]]
    checkpoints: Checkpoints
    folder: RunFolder
    stop: StopRequest
    log_every: int  # iterations, like the next two
    evaluate_every: int  # 0: only at the end
    checkpoint_every: int
    batch_size: int  # images of an iteration, over all processes

    def __post_init__(self):
        self.world, self.iterations = self.step.world, self.schedule.iterations
        self.iteration, self.evaluated_at, self.best = 0, 0, math.inf
        self.seconds = 0.0  # of training, over all starts
        self.latest: dict[str, float] = {}
        self.window = Window(self.log_every, self.world.device)
        self.recent_errors: list[float] = []
        self._begun = 0  # iterations of this process
        self._last_line = 0.0
        self._is_within_step = False

    def resume(self) -> bool:
        """Loads the newest checkpoint; False if there is none.

        Raises:
            WeightsError: none can be read, or processes read different ones.
            UsageError: the number of training images has changed since the run began.
        """
        state = self.checkpoints.load_latest(self.step.model, clean=self.world.is_main)
        found = -1 if state is None else state["iteration"]
        if self.world.any(found != self.world.broadcast(found)):
            where = f"{self.folder.path}: is the run folder shared by all machines?"
            raise WeightsError(f"the processes read different checkpoints in {where}")
        if state is not None:
            self._load(state)
        if self.world.is_main:
            self.folder.keep_metrics(self._is_kept)
        return state is not None

    def _load(self, state: dict) -> None:
        if state["num_samples"] != self.source.num_samples:
            raise UsageError(
                f"the run began with {state['num_samples']} training images, but now has "
                f"{self.source.num_samples}: restore them, or start in another output.dir"
            )
        self.step.load_state_dict(state["step"])
        self.step.load_buffers(state.get("buffers", []))  # earlier versions saved the mean alone
        self.schedule.load_state_dict(state["schedule"])
        self.window.load_state_dict(state["window"], self.world)
        for name in STATE:
            setattr(self, name, state[name])

    def _is_kept(self, row: dict) -> bool:
        limit = self.evaluated_at if "val_top1_error" in row else self.iteration
        return row.get("iteration", math.inf) <= limit

    def state_dict(self) -> dict:
        return {
            **{name: getattr(self, name) for name in STATE},
            "num_samples": self.source.num_samples,
            "step": self.step.state_dict(),
            "schedule": self.schedule.state_dict(),
            "window": self.window.state_dict(self.world),
        }

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Stopped: a signal arrived; a checkpoint of the last complete iteration was written.
            DataError: the data cannot be read; the same.
            TrainingDiverged: the loss became NaN or infinite.
        """
        shown = self.world.is_main and sys.stderr.isatty()
        bar = tqdm(total=self.iterations, initial=self.iteration, unit="it", disable=not shown)
        try:
            self._evaluate_if_due()
            batches = iter(self.source.batches(self.iteration))
            if not self.window.filled:
                self.window.restart()
            while self.iteration < self.iterations:
                self._iterate(batches)
                bar.update()
                last = self.iteration == self.iterations
                if last or self.iteration % self.log_every == 0:
                    self._log(bar)
                if last or self.iteration % self.checkpoint_every == 0:
                    self.save()
                self._evaluate_if_due()
        except (Stopped, OSError, ValueError) as error:
            # the first two are raised on all processes, other errors perhaps on one of them
            is_on_all = isinstance(error, Stopped | DataError)
            if is_on_all or (self.world.size == 1 and not self._is_within_step):
                self.save()
            raise
        finally:
            batches = None  # ends the loader's workers first
            bar.close()

    def _iterate(self, batches: Iterator[Any]) -> None:
        started, batch, error = time.perf_counter(), None, None
        try:
            batch = next(batches)
        except (OSError, ValueError, RuntimeError, EOFError) as failure:  # or a worker was killed
            error = killed_worker(failure, "data.workers") or failure
        finally:
            self.stop.leave_workers()
        self.window.data_seconds += time.perf_counter() - started
        self.stop.raise_if_any(error)
        set_rate(self.step.optimizer, self.schedule.at(self.iteration), self.momentum_form)
        images, labels = self.prepare(batch)
        self._is_within_step = True  # statistics may be half updated, which is no state to save
        self.window.add(*self.step(images, labels, self.iteration))
        self._is_within_step = False
        self.iteration += 1
        self.stop.step_seconds = seconds = time.perf_counter() - started
        self._begun += 1
        if self._begun == SAYS_HOW_LONG and self.world.is_main:
            hours = seconds * (self.iterations - self.iteration) / 3600
            logger.info("%.2f s per iteration: about %s in total", seconds, spell_hours(hours))

    def _log(self, bar: tqdm) -> None:
        window = self.window
        losses = self._check_losses()
        error = self.world.sum(window.wrong.clone()).item() / (window.filled * self.batch_size)
        elapsed = time.perf_counter() - window.started
        self.seconds += elapsed
        row = {
            "iteration": self.iteration,
            "epoch": self.iteration * self.batch_size / self.source.num_samples,
            "lr": self.schedule.at(self.iteration - 1),
            "train_loss": sum(losses) / len(losses),
            "train_error": 100.0 * error,
            "images_per_second": window.filled * self.batch_size / elapsed,
            "data_seconds": window.data_seconds / window.filled,
            "step_seconds": elapsed / window.filled,
        }
        window.restart()
        self.recent_errors = [*self.recent_errors[-4999:], row["train_error"]]
        if self.schedule.observe_training(row["train_error"]):
            logger.info("iteration %d: warm-up ends, error %.1f %%", self.iteration, 100 * error)
        if self.world.is_main:
            self.folder.add_metrics(row)
            self._show(bar, row)

    def _show(self, bar: tqdm, row: dict) -> None:
        text = (
            f"loss {row['train_loss']:.3f}, error {row['train_error']:.1f} %, lr {row['lr']:.2g}, "
            f"data {1000 * row['data_seconds']:.1f} of {1000 * row['step_seconds']:.0f} ms, "
            f"{row['images_per_second']:.0f} images/s"
        )
        if not bar.disable:
            bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line > LOG_SECONDS:
            self._last_line = time.monotonic()
            left = (self.iterations - self.iteration) * row["step_seconds"] / 60
            at = f"{self.iteration}/{self.iterations}"
            logger.info("iteration %s: %s, %.0f min left", at, text, left)

    def _check_losses(self) -> list[float]:
        """Returns the window's losses, averaged over processes; raises TrainingDiverged if bad."""
        losses = self.world.sum(self.window.losses[: self.window.filled].clone())
        losses = [value / self.world.size for value in losses.tolist()]
        bad = [place for place, value in enumerate(losses) if not math.isfinite(value)]
        if bad:
            self._stop_diverged(self.iteration - len(losses) + bad[0], losses[: bad[0] + 1])
        return losses

    def _stop_diverged(self, step: int, losses: list[float]) -> None:
        good = str((checkpoints_in(self.folder.path) or ["none yet"])[-1])
        if self.world.is_main:
            history = [repr(value) for value in losses]
            content = {"iteration": step, "losses": history, "last_good_checkpoint": good}
            write_json(self.folder / DIVERGED, content)
        before = ", ".join(f"{value:.3g}" for value in losses[-6:-1]) or "none in this window"
        raise TrainingDiverged(
            f"the loss is {losses[-1]} at iteration {step} (learning rate "
            f"{self.schedule.at(step):.3g}; losses before it: {before}); last good checkpoint: "
            f"{good}; history: {self.folder / DIVERGED}. Lower schedule.lr or set "
            "optimizer.clip_norm, and start again in another output.dir"
        )

    def save(self) -> None:
        """Writes a checkpoint, unless the loss or the weights are NaN or infinite."""
        self._check_losses()
        finite = [value.isfinite().all() for value in self.step.model.parameters()]
        if not torch.stack(finite).all():
            self._stop_diverged(self.iteration, [math.nan])
        averaged = self.step.ema and self.step.evaluated_model
        with self.step.shared_buffers() as own:
            buffers = self.world.gather([buffer.cpu() for buffer in own])
            state = {**self.state_dict(), "buffers": buffers}
            if self.world.is_main:
                self.checkpoints.save(self.iteration, self.step.model, state, averaged)
            self.world.barrier()

    def _evaluate_if_due(self) -> None:
        every, last = self.evaluate_every, self.iteration == self.iterations
        due = last or (every and self.iteration and self.iteration % every == 0)
        if not due or self.evaluated_at == self.iteration:
            return
        self._check_losses()
        started = time.perf_counter()
        with self.step.shared_buffers():
            found = self.validate(self.step.evaluated_model, self.stop)
            self._note_evaluation(found)
        self.window.started += time.perf_counter() - started  # evaluation is not training time

    def _note_evaluation(self, found: dict[str, float]) -> None:
        self.evaluated_at, self.latest = self.iteration, found
        error = found["val_top1_error"]
        if self.schedule.observe_validation(error):
            rate = self.schedule.at(self.iteration)
            logger.info("iteration %d: plateau, learning rate %.3g", self.iteration, rate)
        if self.world.is_main:
            self.folder.add_metrics({"iteration": self.iteration, **found})
            logger.info("iteration %d: validation error %.2f %%", self.iteration, error)
        if error < self.best:
            self.best = error
            if self.world.is_main:
                self.write_weights(BEST)

    def write_weights(self, name: str) -> None:
        """Writes the weights for evaluations to the run folder."""
        self.checkpoints.write_weights(self.folder / name, self.step.evaluated_model)
