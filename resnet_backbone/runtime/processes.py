"""The processes of a run: rank, device, communication, and random numbers.

Random numbers depend only on the seed and the place in a run. No generator's state outlives an
iteration or a sample, so a resumed run has none to restore. The number of workers and earlier
random numbers do not matter.
"""

from __future__ import annotations

import inspect
import os
import random
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_backbone.runtime.errors import UsageError

# Caused by 1 x 1 convolutions in channels-last order; there is no remedy.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)

# The first word of a seed: the purpose of its random numbers.
ORDER, SUBSET, AUGMENTATION, REPLACEMENT, STEP = range(5)


@dataclass(frozen=True)
class World:
    """This process's place in a run. All processes must call its methods together."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # where this process computes
    control: Any = None  # a CPU (gloo) group, which does not wait for the GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Returns True on every process if the flag is set on any."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def sum(self, values: Tensor) -> Tensor:
        """Sums over processes, in place; `values` are on :attr:`device`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Returns the objects of all processes, by rank, on each of them."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Returns the main process's object on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def current_world(device: torch.device | str = "cpu") -> World:
    """Returns the joined processes, or this one alone; all must call this equally often."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(device=torch.device(device))
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device), _control_group())


@cache
def _control_group() -> Any:
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def leave() -> None:
    _control_group.cache_clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def distribute(model: nn.Module) -> nn.Module:
    """Wraps a model in DistributedDataParallel if there are several processes, on CPUs, too.

    Each process keeps its own BN statistics, like the paper's GPUs.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, **{option: False})


def choose_device(name: str) -> torch.device:
    """Turns "auto", "cpu" or "cuda" into this process's device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("the device is cuda, but PyTorch sees no GPU here: use cpu or auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(f"process {local_rank} of this machine has no GPU: start only {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def make_rng(*words: int) -> np.random.Generator:
    """Returns a generator for one purpose and place, such as (ORDER, seed, epoch).

    Equal words (non-negative) give equal numbers on every machine.
    """
    return np.random.default_rng(list(words))


def seed_everything(*words: int) -> None:
    """Seeds torch on all devices, numpy and random; words as in :func:`make_rng`."""
    state = np.random.SeedSequence(list(words)).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))
