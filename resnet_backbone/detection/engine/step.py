"""One step of a training: parts of a batch, mixed precision, several processes, one path."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_backbone.detection.config import seed_of
from resnet_backbone.detection.data.sampling import BatchPlan, TrainingLoader
from resnet_backbone.runtime.errors import TrainingDiverged, UsageError
from resnet_backbone.runtime.seeding import STEP, seed_everything
from resnet_backbone.runtime.signals import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What all processes know of a step.

    Attributes:
        losses: mean over parts and processes, by name.
        data_time: seconds that the slowest process waited for images.
        stop: name of a signal that reached any process; "" for none.
    """

    losses: dict[str, float]
    data_time: float
    stop: str = ""


def distribute(model: nn.Module) -> nn.Module:
    """The model under DistributedDataParallel where there are several processes.

    As Detectron2's ``create_ddp_model``, which does not take models on a CPU.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).device.type == "cuda"
    devices = [comm.get_local_rank()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


class CustomLoader:
    """What a subclass's ``build_train_loader`` gave, such as Detectron2's own loader, as parts.

    It cannot be asked for the images of an iteration: a resumed run starts it from its beginning.

    Args:
        loader: endless; each item is this process's images of a batch.
    """

    def __init__(self, cfg: CfgNode, loader: Iterable):
        self.loader, self.plan = loader, BatchPlan.from_config(cfg)
        self.seed = seed_of(cfg)

    def start(self, iteration: int) -> Iterator:
        """See :meth:`TrainingLoader.start`.

        Raises:
            UsageError: a batch does not divide into ``RESNET_BACKBONE.ACCUMULATE`` parts.
        """
        if iteration:
            logger.warning("a custom loader restarts from its beginning on resume")
        count = self.plan.accumulate
        for images in self.loader:
            if count > 1 and len(images) % count:
                raise UsageError(
                    f"the loader gave {len(images)} images, which do not divide into {count} "
                    "parts (RESNET_BACKBONE.ACCUMULATE)"
                )
            size = len(images) // count
            for part in range(count):
                yield images[part * size : (part + 1) * size] if count > 1 else images


class TrainStep:
    """Forward, backward and update for one batch.

    The batch goes through the network in ``RESNET_BACKBONE.ACCUMULATE`` parts whose gradients are
    averaged. Batch norms that are not frozen see one part at a time. Before each part torch, numpy
    and random are seeded with its place in the run. With ``SOLVER.AMP`` the forward pass is fp16
    with scaled losses on a GPU and bf16 on a CPU.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        data_loader: TrainingLoader | Iterable,
        optimizer: torch.optim.Optimizer,
        stop: StopRequest,
    ):
        self.model, self.optimizer, self.stop = model.train(), optimizer, stop
        self.read_from(cfg, data_loader)
        self.device, self.amp = torch.device(cfg.MODEL.DEVICE).type, cfg.SOLVER.AMP.ENABLED
        scaled = self.amp and self.device == "cuda"
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=scaled)

    def read_from(self, cfg: CfgNode, data_loader: TrainingLoader | Iterable) -> None:
        """Takes the images and the seed of another loader from the next step on."""
        self.data_loader = data_loader
        is_ours = hasattr(data_loader, "start") and hasattr(data_loader, "plan")
        self._parts = data_loader if is_ours else CustomLoader(cfg, data_loader)
        self.plan, self.seed = self._parts.plan, self._parts.seed
        self._batches: Iterator | None = None

    def run(self, iteration: int) -> StepReport:
        """Does one step.

        Args:
            iteration: counted from 0; one more than that of the last call.

        Raises:
            TrainingDiverged: on every process, before any weight changes.
        """
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        waited = 0.0
        for part in range(self.plan.accumulate):
            start = time.perf_counter()
            images = self._read(iteration, part)
            waited += time.perf_counter() - start
            seed_everything(STEP, self.seed, self.plan.number(iteration, part))
            is_last = part == self.plan.accumulate - 1
            with nullcontext() if is_last else self._unsynchronized():
                losses, problem = self._forward(images)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.detach().float()
                if is_last or problem:
                    report = self._agree(sums, waited, problem)
                total = sum(losses.values()) / self.plan.accumulate
                self.grad_scaler.scale(total).backward()
        self.grad_scaler.unscale_(self.optimizer)  # so that clipping sees true gradients
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return report

    def _forward(self, images: list[dict]) -> tuple[dict[str, Tensor], str]:
        """Losses by name, and what Detectron2 found not finite."""
        dtype = torch.float16 if self.device == "cuda" else torch.bfloat16
        try:
            with torch.autocast(self.device, dtype=dtype, enabled=self.amp):
                losses = self.model(images)
        except FloatingPointError as error:
            return {}, str(error).partition("\n")[0]
        return losses if isinstance(losses, dict) else {"total_loss": losses}, ""

    def _unsynchronized(self) -> Any:
        """Gradients of all but the last part stay in their process."""
        is_distributed = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_distributed else nullcontext()

    def _agree(self, sums: dict[str, Tensor], waited: float, problem: str) -> StepReport:
        """Exchanges losses and signals, before gradients are."""
        values = torch.stack([*sums.values()]).tolist() if sums else []
        means = [value / self.plan.accumulate for value in values]
        own = dict(zip(sums, means, strict=True)), waited, self.stop.name, problem
        losses, times, names, problems = zip(*comm.all_gather(own), strict=True)
        count = len(losses)
        mean = {key: sum(one.get(key, math.nan) for one in losses) / count for key in losses[0]}
        found = next((text for text in problems if text), "")
        bad = [f"{key} {value:.4g}" for key, value in mean.items() if not math.isfinite(value)]
        if found or bad:
            raise TrainingDiverged(found or ", ".join(bad))
        return StepReport(mean, max(times), next((name for name in names if name), ""))

    def _read(self, iteration: int, part: int) -> list[dict]:
        """The next part; loader workers that a signal to the whole group ended are replaced."""
        try:
            if self._batches is None:
                self._batches = self._start(iteration, part)
            return next(self._batches)
        except Exception as error:
            if not self.stop.explains(error):
                raise
            self._batches = self._start(iteration, part)
            return next(self._batches)
        finally:
            self.stop.leave_workers()

    def _start(self, iteration: int, part: int) -> Iterator[list[dict]]:
        batches = self._parts.start(iteration)
        for _ in range(part):
            next(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict(), "seed": self.seed}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler.is_enabled() and "grad_scaler" in state:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
