"""The training step, SGD as in the paper's Caffe, and the learning rate schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_backbone.classification.config import ScheduleConfig
from resnet_backbone.classification.networks import logits_of
from resnet_backbone.models.layers import prelu_slopes
from resnet_backbone.runtime.evaluation import moving_average
from resnet_backbone.runtime.processes import STEP, World, distribute, seed_everything

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULE_STATE = ("warming_up", "drops", "waited", "best")  # depends on the run's errors


class TrainStep:
    """Makes an optimizer step on a batch, with the same code for all settings.

    Args:
        model: on its device; its state dict has no wrapper prefixes.
        optimizer: the caller sets its learning rate.
        mixer: (images, labels, iteration) -> (images, soft labels), such as mixup; None for none.
        amp: "none", "bf16" or "fp16" (with loss scaling).
        micro_batch: images that pass through the network at once and share BN statistics; 0 for
            all of this process. The paper's 256 is 8 x 32.
        clip_norm: largest norm of the gradient; 0 for no clipping.
        compile: "none", or a mode of ``torch.compile``.
        ema: decay of the averaged weights; 0 for none.
        seed: of the run; random numbers, such as dropout's, depend on (seed, iteration, rank).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        mixer: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
        *,
        amp: str = "none",
        micro_batch: int = 0,
        clip_norm: float = 0.0,
        compile: str = "none",
        ema: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ):
        self.model, self.optimizer, self.world, self.mixer = model, optimizer, world, mixer
        self.dtype, self.micro_batch = AMP[amp], micro_batch
        self.clip_norm, self.seed = clip_norm, seed
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.ema = moving_average(model, ema) if ema else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp == "fp16")
        self.ddp = distribute(model) if world.size > 1 else None
        self.network: Any = self.ddp or model
        if compile != "none":
            mode = None if compile == "default" else compile
            self.network = torch.compile(self.network, mode=mode)

    def __call__(self, images: Tensor, labels: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Makes one step.

        Args:
            images: normalized float32 (N, C, H, W) on the device; labels: int64 (N,).

        Returns:
            (mean loss, number of wrong predictions) of this process, on the device.
        """
        seed_everything(STEP, self.seed, iteration, self.world.rank)
        targets = labels
        if self.mixer is not None:
            images, targets = self.mixer(images, labels, iteration)
        size = self.micro_batch or len(images)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        loss = torch.zeros((), device=images.device)
        wrong = torch.zeros((), device=images.device)
        self.model.train()
        for number, (part, target) in enumerate(parts, 1):
            waits = self.ddp is not None and number < len(parts)  # only the last one all-reduces
            with self.ddp.no_sync() if waits else contextlib.nullcontext():
                share, logits = self._forward(part, target)
                self.scaler.scale(share * (len(part) / len(images))).backward()
            loss += share.detach() * (len(part) / len(images))
            classes = target.argmax(1) if target.dim() == 2 else target
            wrong += (logits.detach().argmax(1) != classes).sum()
        self._update()
        return loss, wrong

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        enabled = self.dtype is not None
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=enabled):
            logits, auxiliary = logits_of(self.network(images))
            loss = self.criterion(logits, targets)
            for weight, others in auxiliary:
                loss = loss + weight * self.criterion(others, targets)
        return loss, logits

    def _update(self) -> None:
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model for evaluations and final results, with averaged weights if there are any."""
        return self.model if self.ema is None else self.ema.module

    def _own_buffers(self) -> list[Tensor]:
        """Returns the buffers that differ between processes: BN's statistics and averages."""
        models = {id(model): model for model in (self.model, self.evaluated_model)}
        buffers = (buffer for model in models.values() for buffer in model.buffers())
        return [buffer for buffer in buffers if buffer.is_floating_point() and self.world.size > 1]

    @contextlib.contextmanager
    def shared_buffers(self) -> Iterator[list[Tensor]]:
        """Averages BN statistics over processes in the block, then restores each process's own.

        Yields this process's own buffers, for :meth:`load_buffers`; none with one process.
        """
        buffers = self._own_buffers()
        own = [buffer.clone() for buffer in buffers]
        try:
            for buffer in buffers:
                self.world.sum(buffer)
                buffer /= self.world.size
            yield own
        finally:
            for buffer, before in zip(buffers, own, strict=True):
                buffer.copy_(before)

    def load_buffers(self, saved: list[list[Tensor]]) -> None:
        """Restores each process's own statistics, unless the number of processes has changed."""
        if len(saved) == self.world.size:
            for buffer, own in zip(self._own_buffers(), saved[self.world.rank], strict=True):
                buffer.copy_(own)

    def state_dict(self) -> dict:
        """Returns all state except the model's: optimizer, loss scale, averaged weights."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def build_sgd(
    model: nn.Module, momentum: float, weight_decay: float, decay_norm_and_bias: bool = True
) -> torch.optim.SGD:
    """Returns SGD for a network's trainable parameters; the paper has 0.9 and 1e-4.

    Without ``decay_norm_and_bias``, one-dimensional parameters (biases, BN) have no weight decay.
    Slopes of PReLU never have any.
    """
    slopes = prelu_slopes(model)
    groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for parameter in (p for p in model.parameters() if p.requires_grad):
        decays = id(parameter) not in slopes and (decay_norm_and_bias or parameter.ndim > 1)
        groups[0 if decays else 1]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, momentum_form: str = "caffe") -> None:
    """Sets the learning rate, for the "caffe" or "pytorch" form of momentum.

    Caffe's update is v = m v + lr g, w -= v (the released models' README); PyTorch's is
    v = m v + g, w -= lr v. They are equal at a constant rate. When the rate changes, the steps in
    Caffe's v keep their old rate. Scaling PyTorch's v by old / new has exactly this effect.
    """
    old = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = rate
    if momentum_form == "caffe" and rate != old and old > 0 and rate > 0:
        buffers = [state.get("momentum_buffer") for state in optimizer.state.values()]
        buffers = [buffer for buffer in buffers if buffer is not None]
        if buffers:
            torch._foreach_mul_(buffers, old / rate)


@dataclass
class Schedule(ScheduleConfig):
    """The learning rate by iteration (counted from 0) and, for "plateau", by validation error.

    The fields are the config's; ``scale`` and ``epochs`` have been applied before. Policies are
    "steps" (times ``gamma`` at each milestone), "plateau" (times ``gamma`` when the validation
    error stops falling: paper, section 3.4) and "cosine" (to 0, arXiv 1608.03983). The threshold of
    progress is absolute; a relative one, PyTorch's default, is hardly ever reached on ImageNet.
    With ``warmup_until_error``, warm-up lasts until the training error is below it, in percent
    (paper, section 4.2: the 110-layer network starts at 0.01 until the error is below 80 %).
    """

    def __post_init__(self):
        self.warming_up = self.warmup_until_error > 0
        self.drops, self.waited, self.best = 0, 0, math.inf

    def at(self, iteration: int) -> float:
        """Returns the learning rate of an iteration."""
        if self.warming_up:
            return self.warmup_lr
        rate = self._without_warmup(iteration)
        if iteration < self.warmup_iterations:
            part = (iteration + 1) / self.warmup_iterations
            return self.warmup_lr + (rate - self.warmup_lr) * part
        return rate

    def _without_warmup(self, iteration: int) -> float:
        if self.policy == "cosine":
            length = max(1, self.iterations - self.warmup_iterations)
            done = max(0, iteration - self.warmup_iterations) / length
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        drops = self.drops
        if self.policy == "steps":
            drops = sum(iteration >= milestone for milestone in self.milestones)
        return self.lr * self.gamma**drops

    def observe_training(self, error: float) -> bool:
        """Records the training error in percent; returns whether this ends the warm-up."""
        ends = self.warming_up and error < self.warmup_until_error
        self.warming_up &= not ends
        return ends

    def observe_validation(self, error: float) -> bool:
        """Records the validation error in percent; returns whether this drops the rate."""
        if self.policy != "plateau":
            return False
        if error < self.best - self.plateau_threshold:
            self.best, self.waited = error, 0
            return False
        self.waited += 1
        if self.waited < self.plateau_patience or self.drops >= self.plateau_drops:
            return False
        self.drops, self.waited = self.drops + 1, 0
        return True

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in SCHEDULE_STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in SCHEDULE_STATE:
            setattr(self, name, state[name])
