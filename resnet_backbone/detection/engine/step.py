"""One training step: gradient accumulation, mixed precision and several processes in one path."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_backbone.detection.config import backbone_node, seed_of
from resnet_backbone.detection.data.sampling import BatchPlan, TrainingLoader
from resnet_backbone.models.layers import prelu_slopes
from resnet_backbone.runtime.errors import TrainingDiverged, UsageError
from resnet_backbone.runtime.evaluation import moving_average
from resnet_backbone.runtime.processes import STEP, seed_everything
from resnet_backbone.runtime.signals import StopRequest, killed_worker

logger = logging.getLogger(__name__)
LOSS_NORMALIZER = "loss_normalizer"  # RetinaNet's and FCOS's moving average, which is no buffer


class StepReport(NamedTuple):
    """The outcome of a step, the same on all processes."""

    losses: dict[str, float]  # mean over parts and processes, by name
    data_time: float  # seconds that the slowest process waited for images
    stop: str = ""  # name of a signal received by any process


def exempt_slopes(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Moves a model's PReLU slopes, if any, to parameter groups without weight decay."""
    slopes = prelu_slopes(model)
    for group in list(optimizer.param_groups):
        mine = [one for one in group["params"] if id(one) in slopes]
        if mine:
            group["params"] = [one for one in group["params"] if id(one) not in slopes]
            optimizer.add_param_group({**group, "params": mine, "weight_decay": 0.0})
    return optimizer


def fuse_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Makes SGD read and write the weights once a step: memory limits it on CPUs.

    Detectron2's ``foreach`` makes a pass for each operation there.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if all(one.device.type == "cpu" for one in group["params"]):
            group["fused"], group["foreach"] = True, False


class CustomLoader:
    """Parts from a loader of a subclass's ``build_train_loader``, such as Detectron2's own.

    It cannot start at an iteration, so a resumed run starts it from its beginning.

    Args:
        loader: endless; each item is this process's images of a batch.
    """

    def __init__(self, cfg: CfgNode, loader: Iterable):
        self.loader, self.plan, self.seed = loader, BatchPlan.from_config(cfg), seed_of(cfg)

    def start(self, iteration: int) -> Iterator:
        """See :meth:`TrainingLoader.start`."""
        if iteration:
            logger.warning("a custom loader restarts from its beginning on resume")
        count = self.plan.accumulate
        for images in self.loader:
            size, rest = divmod(len(images), count)
            if rest:
                raise UsageError(
                    f"the loader gave {len(images)} images, which do not divide into {count} "
                    "parts (RESNET_BACKBONE.ACCUMULATE)"
                )
            yield from (images[part * size : (part + 1) * size] for part in range(count))


class TrainStep:
    """Forward, backward and update for one batch.

    The batch is divided into ``RESNET_BACKBONE.ACCUMULATE`` parts, whose gradients are averaged.
    Batch norms that are not frozen see one part at a time. Before each part, torch, numpy and
    random are seeded with its position in the run. With ``SOLVER.AMP`` the forward pass is fp16
    with scaled losses on a GPU and bf16 on a CPU. With ``RESNET_BACKBONE.EMA_DECAY`` each step
    updates :attr:`evaluated_model`, an average of the weights.
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
        fuse_on_cpu(optimizer)
        self.read_from(cfg, data_loader)
        self.device, self.amp = torch.device(cfg.MODEL.DEVICE).type, cfg.SOLVER.AMP.ENABLED
        scaled = self.amp and self.device == "cuda"
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=scaled)
        decay = backbone_node(cfg).EMA_DECAY
        self.ema = moving_average(self.network, decay) if decay else None

    @property
    def network(self) -> nn.Module:
        """The trained model, without a wrapper."""
        is_wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if is_wrapped else self.model

    @property
    def evaluated_model(self) -> nn.Module:
        """The model for evaluations and checkpoints, with averaged weights if enabled."""
        return self.network if self.ema is None else self.ema.module

    def read_from(self, cfg: CfgNode, data_loader: TrainingLoader | Iterable) -> None:
        """Uses the images and the seed of another loader from the next step on."""
        self.data_loader = data_loader
        is_ours = hasattr(data_loader, "start") and hasattr(data_loader, "plan")
        self._parts = data_loader if is_ours else CustomLoader(cfg, data_loader)
        self.plan, self.seed = self._parts.plan, self._parts.seed
        self._batches: Iterator | None = None

    def run(self, iteration: int) -> StepReport:
        """Runs one step; `iteration` counts from 0 and increases by one with each call.

        Raises:
            TrainingDiverged: losses are not finite; on every process, before any weight changes.
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
            stays = not is_last and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if stays else nullcontext():  # syncs gradients only once
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
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        return report

    def _forward(self, images: list[dict]) -> tuple[dict[str, Tensor], str]:
        """Returns losses by name, and Detectron2's message if they are not finite."""
        dtype = torch.float16 if self.device == "cuda" else torch.bfloat16
        try:
            with torch.autocast(self.device, dtype=dtype, enabled=self.amp):
                losses = self.model(images)
        except FloatingPointError as error:
            return {}, str(error).partition("\n")[0]
        return losses if isinstance(losses, dict) else {"total_loss": losses}, ""

    def _agree(self, sums: dict[str, Tensor], waited: float, problem: str) -> StepReport:
        """Exchanges losses and signals among processes, before gradients."""
        values = torch.stack([*sums.values()]).tolist() if sums else []
        means = [value / self.plan.accumulate for value in values]
        own = dict(zip(sums, means, strict=True)), waited, self.stop.name, problem
        losses, times, names, problems = zip(*comm.all_gather(own), strict=True)
        count = len(losses)
        mean = {key: sum(one.get(key, math.nan) for one in losses) / count for key in losses[0]}
        bad = [f"{key} {value:.4g}" for key, value in mean.items() if not math.isfinite(value)]
        if bad or any(problems):
            raise TrainingDiverged(next(filter(None, problems), ", ".join(bad)))
        return StepReport(mean, max(times), next(filter(None, names), ""))

    def _read(self, iteration: int, part: int) -> list[dict]:
        """Returns the next part; restarts the loader if a signal killed its workers."""
        try:
            if self._batches is None:
                self._batches = self._start(iteration, part)
            return next(self._batches)
        except Exception as error:
            if not self.stop.explains(error):
                if killed := killed_worker(error, "DATALOADER.NUM_WORKERS"):
                    raise killed from error
                raise
            self._batches = self._start(iteration, part)
            return next(self._batches)
        finally:
            self.stop.leave_workers()

    def _start(self, iteration: int, part: int) -> Iterator[list[dict]]:
        return islice(self._parts.start(iteration), part, None)

    def state_dict(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "grad_scaler": self.grad_scaler}
        state = {name: part.state_dict() for name, part in parts.items()} | {"seed": self.seed}
        if hasattr(self._parts, "dataset"):  # not of loaders of one's own
            state["num_images"] = len(self._parts.dataset)
        if hasattr(self.network, LOSS_NORMALIZER):
            state[LOSS_NORMALIZER] = getattr(self.network, LOSS_NORMALIZER)
        if self.ema is not None:
            averaged = self.ema.n_averaged.item()
            state |= {"raw_weights": self.network.state_dict(), "averaged": averaged}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint whose weights are already in :attr:`evaluated_model`.

        UsageError: the run began with another number of training images.
        """
        if "num_images" in state and hasattr(self._parts, "dataset"):
            before, now = state["num_images"], len(self._parts.dataset)
            if before != now:
                raise UsageError(
                    f"the run began with {before} training images, but now has {now}: restore "
                    "them, or start in another --output-dir"
                )
        if self.ema is not None:
            self.ema.n_averaged.fill_(state.get("averaged", 0))
        if self.ema is not None or "raw_weights" in state:
            weights = state.get("raw_weights") or self.evaluated_model.state_dict()
            self.network.load_state_dict(weights)
        if LOSS_NORMALIZER in state:
            setattr(self.network, LOSS_NORMALIZER, state[LOSS_NORMALIZER])
        self.optimizer.load_state_dict(state["optimizer"])
        fuse_on_cpu(self.optimizer)  # also states of a GPU or of earlier versions
        if state.get("grad_scaler"):  # empty without one
            self.grad_scaler.load_state_dict(state["grad_scaler"])
