"""The learning rate of every iteration, with the paper's three ways to set it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


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
    state: ScheduleState = field(default_factory=lambda: ScheduleState())

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


@dataclass
class ScheduleState:
    """What a schedule has learnt from the run."""

    warming_up: bool = False
    drops: int = 0
    waited: int = 0
    best: float = math.inf
