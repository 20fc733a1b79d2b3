"""The one step path: mixed precision, micro-batches, clipping, averaging, many processes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_backbone.classification.networks import logits_of
from resnet_backbone.runtime.processes import World
from resnet_backbone.runtime.seeding import STEP, seed_everything

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepOptions:
    """How a step is made.

    Attributes:
        amp: "none", "bf16" or "fp16" (with loss scaling).
        micro_batch: images that pass the network at once, and share BN statistics; 0 means all
            that this process has. The paper's 256 is 8 x 32.
        clip_norm: largest norm of the gradient; 0 means any.
        compile: "none", or a mode of ``torch.compile``.
        ema: decay of the averaged weights; 0 means none are kept.
        label_smoothing: of the cross-entropy.
        seed: of the run; dropout and the like draw from (seed, iteration, rank).
    """

    amp: str = "none"
    micro_batch: int = 0
    clip_norm: float = 0.0
    compile: str = "none"
    ema: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0


class TrainStep:
    """One optimizer step on one batch, the same code for every setting.

    Args:
        model: on its device; its state dict never shows wrappers.
        optimizer: with its learning rate set by the caller.
        mixer: (images, labels, iteration) -> (images, soft labels), or None: mixup and the like.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        world: World,
        mixer: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
    ):
        self.model, self.optimizer, self.options = model, optimizer, options
        self.world, self.mixer = world, mixer
        self.criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.ema = None
        if options.ema:
            average = get_ema_multi_avg_fn(options.ema)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        fp16 = options.amp == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=fp16)
        self.network: Any = model
        if world.size > 1:
            self.network = _distributed(model, world)
        self.ddp = self.network if world.size > 1 else None
        if options.compile != "none":
            mode = None if options.compile == "default" else options.compile
            self.network = torch.compile(self.network, mode=mode)

    def __call__(self, images: Tensor, labels: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Makes one step.

        Args:
            images: normalized float32 (N, C, H, W) on the device; labels: int64 (N,).

        Returns:
            (mean loss, number of wrong predictions) of this process, on the device.
        """
        seed_everything(STEP, self.options.seed, iteration, self.world.rank)
        targets = labels
        if self.mixer is not None:
            images, targets = self.mixer(images, labels, iteration)
        size = self.options.micro_batch or len(images)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        loss = torch.zeros((), device=images.device)
        wrong = torch.zeros((), device=images.device)
        self.model.train()
        for number, (part, target) in enumerate(parts):
            with self._sync_at_last(number == len(parts) - 1):
                share, logits = self._forward(part, target)
                self.scaler.scale(share * (len(part) / len(images))).backward()
            loss += share.detach() * (len(part) / len(images))
            classes = target.argmax(1) if target.dim() == 2 else target
            wrong += (logits.detach().argmax(1) != classes).sum()
        self._update()
        return loss, wrong

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = AMP[self.options.amp]
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            logits, auxiliary = logits_of(self.network(images))
            loss = self.criterion(logits, targets)
            for weight, others in auxiliary:
                loss = loss + weight * self.criterion(others, targets)
        return loss, logits

    @contextlib.contextmanager
    def _sync_at_last(self, is_last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if is_last or self.ddp is None else self.ddp.no_sync():
            yield

    def _update(self) -> None:
        if self.options.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that evaluations and final results use: the averaged ones if there are."""
        return self.model if self.ema is None else self.ema.module

    def _own_buffers(self) -> list[Tensor]:
        """What each of several processes has for itself: BN's statistics, and their averages."""
        models = {id(model): model for model in (self.model, self.evaluated_model)}
        buffers = (buffer for model in models.values() for buffer in model.buffers())
        return [buffer for buffer in buffers if buffer.is_floating_point() and self.world.size > 1]

    @contextlib.contextmanager
    def shared_buffers(self) -> Iterator[list[Tensor]]:
        """Inside, all processes have the mean of their BN statistics; afterwards their own again.

        So it changes nothing of what a run computes later when it is evaluated or saved.

        Yields:
            This process's own statistics, for :meth:`load_buffers`; none with one process.
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
        """Gives each process its own statistics again, from a list by rank.

        Where there were other processes, all go on from the mean that the checkpoint holds.
        """
        if len(saved) == self.world.size:
            for buffer, own in zip(self._own_buffers(), saved[self.world.rank], strict=True):
                buffer.copy_(own)

    def state_dict(self) -> dict:
        """All but the model: optimizer, loss scale, averaged weights."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def _distributed(model: nn.Module, world: World) -> DistributedDataParallel:
    """DDP in which each process keeps its own BN statistics, as the paper's GPUs did."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=ids, **{option: False})
