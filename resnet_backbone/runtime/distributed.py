"""One process or many: what torchrun started, and what the processes agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LaunchError(ValueError):
    """Processes or devices that cannot be had; the message says what to change."""


@dataclass(frozen=True)
class World:
    """This process's place among all of a run.

    Attributes:
        rank, size: of the process group; 0 and 1 without one.
        device: where this process computes.
        control: a CPU (gloo) group for flags, so that asking does not wait for the GPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every process if the flag is set on any."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def sum(self, values: Tensor) -> Tensor:
        """Sums over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's object, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu or cuda -> this process's device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError("train.device is cuda, but PyTorch sees no GPU here: use cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"process {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}; start that many processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join(device: str) -> World:
    """Joins the process group that torchrun described in the environment, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        return World(device=chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo")
    return World(dist.get_rank(), size, chosen, control)


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
