"""SGD as the paper's Caffe ran it, and the learning rate of every iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import nn


def build_sgd(
    model: nn.Module, momentum: float, weight_decay: float, decay_norm_and_bias: bool = True
) -> torch.optim.SGD:
    """SGD over a network's trainable parameters.

    Args:
        momentum, weight_decay: as in the paper, 0.9 and 1e-4.
        decay_norm_and_bias: False leaves parameters of fewer than two dimensions (biases, BN)
            undecayed.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            chosen = decayed if decay_norm_and_bias or parameter.ndim > 1 else plain
            chosen.append(parameter)
    groups = [{"params": decayed}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)


class LearningRate:
    """Sets an optimizer's learning rate, keeping the chosen form of momentum.

    Caffe's update is v = m v + lr g, w -= v (the released models' README); PyTorch's is
    v = m v + g, w -= lr v. They are the same while the rate stands still. When it changes, the
    old steps in Caffe's v keep the rate they were made with; scaling PyTorch's v by old / new
    does exactly that.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, form: str = "caffe"):
        if form not in ("caffe", "pytorch"):
            raise ValueError(f"unknown momentum form {form!r}: use caffe or pytorch")
        self.optimizer, self.form = optimizer, form

    def set(self, rate: float) -> None:
        old = self.optimizer.param_groups[0]["lr"]
        if rate == old:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.form == "caffe" and old > 0 and rate > 0:
            states = self.optimizer.state.values()
            buffers = [state.get("momentum_buffer") for state in states]
            buffers = [buffer for buffer in buffers if buffer is not None]
            if buffers:
                torch._foreach_mul_(buffers, old / rate)


@dataclass
class ScheduleState:
    """What a schedule has learned from the run."""

    warming_up: bool = False
    drops: int = 0
    waited: int = 0
    best: float = math.inf


@dataclass
class Schedule:
    """Learning rate by iteration (counted from 0), and by what evaluations show.

    Args:
        lr: the initial rate.
        iterations: of the whole run.
        policy: "steps" (times ``gamma`` at each milestone), "plateau" (times ``gamma`` when the
            validation error stops falling: paper, section 3.4) or "cosine" (to 0, arXiv
            1608.03983).
        milestones: iterations, rising.
        patience: plateau: evaluations in a row without progress.
        threshold: plateau: what counts as progress, an absolute number of points of error. A
            relative one, PyTorch's default, hardly ever fires on ImageNet.
        max_drops: plateau.
        warmup_lr: rate during warm-up by error, and at the start of linear warm-up.
        warmup_iterations: linear warm-up.
        warmup_until_error: warm-up lasts until the training error, %, is below this (paper,
            section 4.2: the 110-layer network starts at 0.01 until it is below 80 %).
    """

    lr: float
    iterations: int
    policy: str = "steps"
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    patience: int = 5
    threshold: float = 0.1
    max_drops: int = 3
    warmup_lr: float = 0.0
    warmup_iterations: int = 0
    warmup_until_error: float = 0.0
    state: ScheduleState = field(default_factory=ScheduleState)

    def __post_init__(self):
        self.state.warming_up = self.warmup_until_error > 0

    def at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        if self.state.warming_up:
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
        drops = self.state.drops
        if self.policy == "steps":
            drops = sum(iteration >= milestone for milestone in self.milestones)
        return self.lr * self.gamma**drops

    def observe_training(self, error: float) -> bool:
        """Takes note of the training error, %; True if this ends the warm-up."""
        ends = self.state.warming_up and error < self.warmup_until_error
        self.state.warming_up &= not ends
        return ends

    def observe_validation(self, error: float) -> bool:
        """Takes note of the validation error, %; True if this drops the rate."""
        state = self.state
        if self.policy != "plateau":
            return False
        if error < state.best - self.threshold:
            state.best, state.waited = error, 0
            return False
        state.waited += 1
        if state.waited < self.patience or state.drops >= self.max_drops:
            return False
        state.drops, state.waited = state.drops + 1, 0
        return True

    def state_dict(self) -> dict:
        return asdict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = ScheduleState(**state)
