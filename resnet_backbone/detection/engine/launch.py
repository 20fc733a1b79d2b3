"""One process or many, on one machine or several: by Detectron2's options or by torchrun."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import multiprocessing

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data.sampling import available_cores
from resnet_backbone.detection.engine.command_line import ONE_LINE, outcome
from resnet_backbone.runtime.signals import EXIT_STOPPED, STOP_SIGNALS, handled

TORCHRUN = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 60.0  # seconds that processes have to end once one of them has
INTERRUPTED = 5.0  # the same after a second Ctrl-C


@dataclass(frozen=True)
class Launch:
    """What processes make up a run.

    Attributes:
        processes: on each machine.
        url: where they meet, ``tcp://HOST:PORT`` of the first machine.
        uses_gpus: NCCL and a GPU for each process; else gloo and the CPU.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    url: str = ""
    uses_gpus: bool = False

    @property
    def world(self) -> int:
        return self.processes * self.machines


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Detectron2's options, and ``--num-processes``."""
    group = parser.add_argument_group(
        "processes", "On several machines the same command runs on each, with its --machine-rank."
    )
    group.add_argument("--num-gpus", type=int, help="GPUs of each machine (default: 1)")
    group.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes of each machine, for training on CPUs (default: one for each GPU)",
    )
    group.add_argument("--num-machines", type=int, default=1, help="machines (default: 1)")
    group.add_argument("--machine-rank", type=int, default=0, help="this machine, counted from 0")
    group.add_argument(
        "--dist-url",
        default="auto",
        metavar="tcp://HOST:PORT",
        help="of machine 0, where all machines reach it (default: a free port of this machine)",
    )


def plan_launch(args: argparse.Namespace, device: str) -> Launch:
    """Reads the options of :func:`add_launch_arguments`.

    Args:
        device: ``MODEL.DEVICE``.

    Raises:
        UsageError: GPUs that are not there, options that contradict one another.
    """
    gpus, count = args.num_gpus, torch.cuda.device_count()
    given = [f"--{name.replace('_', '-')}" for name in ("num_gpus", "num_processes")]
    for name, value in zip(given, (gpus, args.num_processes), strict=True):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: it is at least 1")
    if gpus and gpus > max(1, count):
        raise UsageError(
            f"--num-gpus {gpus}: there are {count} here; --num-processes trains on CPUs"
        )
    if gpus and args.num_processes and gpus != args.num_processes:
        raise UsageError("give --num-gpus or --num-processes, not both")
    processes, on_gpu = gpus or args.num_processes or 1, device != "cpu"
    if on_gpu and processes > count:
        raise UsageError(
            f"--num-processes {processes}: there are {count} GPUs here; give MODEL.DEVICE cpu"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise UsageError(
            f"--machine-rank {args.machine_rank}: with --num-machines {args.num_machines} it is 0 "
            f"to {args.num_machines - 1}"
        )
    if args.num_machines > 1 and not re.fullmatch(r"tcp://.+:\d+", args.dist_url):
        raise UsageError("--num-machines needs --dist-url tcp://HOST:PORT of machine 0")
    url = args.dist_url if args.dist_url != "auto" else f"tcp://127.0.0.1:{_free_port()}"
    launch = Launch(processes, args.num_machines, args.machine_rank, url, on_gpu)
    if "WORLD_SIZE" in os.environ and launch.world > 1:
        raise UsageError(
            "torchrun has started the processes: leave --num-gpus, --num-processes and "
            "--num-machines out"
        )
    missing = [key for key in TORCHRUN if key not in os.environ]
    if "WORLD_SIZE" in os.environ and missing:
        raise UsageError(
            f"the environment has WORLD_SIZE but not {', '.join(missing)}: start with torchrun, "
            "or unset WORLD_SIZE"
        )
    return launch


def run_processes(launch: Launch, run: Callable[[Any], None], argument: Any) -> None:
    """Calls ``run(argument)`` in every process of a run, and returns when all are done.

    Under torchrun this process is one of them; a single process is this one as well; others are
    spawned, so `run` must be a function of a module. Signals to this process go on to them.

    Raises:
        SystemExit: with the status of a process that failed.
        UsageError: the processes do not find one another.
    """
    if "WORLD_SIZE" in os.environ:
        _join("env://", launch.uses_gpus)
        _call(run, argument)
    elif launch.world == 1:
        run(argument)
    else:
        errors = multiprocessing.get_context("spawn").SimpleQueue()
        started = multiprocessing.start_processes(
            _work, (launch, run, argument, errors), launch.processes, join=False
        )
        status = _watch(started.processes)
        messages = []
        while not errors.empty():
            messages.append(errors.get())
        for message in dict.fromkeys(messages):  # what all say is said once
            print(message, file=sys.stderr)
        if status:
            raise SystemExit(status)


def _work(local_rank: int, launch: Launch, run: Callable, argument: Any, errors: Any) -> None:
    """One spawned process."""
    os.environ |= {"LOCAL_RANK": f"{local_rank}", "LOCAL_WORLD_SIZE": f"{launch.processes}"}
    try:
        rank = launch.machine_rank * launch.processes + local_rank
        _join(launch.url, launch.uses_gpus, rank=rank, world_size=launch.world)
        _call(run, argument)
    except ONE_LINE as error:
        if os.environ.get("RESNET_BACKBONE_TRACEBACK"):
            raise
        message, status = outcome(error)
        errors.put(message)
        raise SystemExit(status) from None
    except Exception:  # PyTorch's wrapper would keep it to itself
        traceback.print_exc()
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _call(run: Callable, argument: Any) -> None:
    try:
        run(argument)
    finally:
        dist.destroy_process_group()


def _join(url: str, uses_gpus: bool, **place: int) -> None:
    """Joins the process group, as Detectron2's ``launch`` does, which cannot choose its backend."""
    local_rank, local_size = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if uses_gpus:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_size))
    try:
        backend = "nccl" if uses_gpus else "gloo"
        dist.init_process_group(backend, init_method=url, timeout=DEFAULT_TIMEOUT, **place)
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise UsageError(f"{url}: the processes do not find one another ({cause})") from error
    comm.create_local_process_group(local_size)
    comm.synchronize()


def _watch(processes: list) -> int:
    """Waits for all, ends them when one fails; the exit status of the first that failed."""
    interrupts = 0

    def forward(number: int, frame: Any) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        # a terminal's Ctrl-C has reached them by itself, a second one interrupts them at once
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    status, deadline = 0, float("inf")
    with handled(STOP_SIGNALS, forward):
        while alive := [process for process in processes if process.is_alive()]:
            wait([process.sentinel for process in alive], timeout=1.0)
            if not status and (status := _first_failure(processes)):
                deadline = min(deadline, time.monotonic() + PATIENCE)
                if status != EXIT_STOPPED:
                    forward(signal.SIGTERM, None)
            if interrupts > 1:
                deadline = min(deadline, time.monotonic() + INTERRUPTED)
            if time.monotonic() > deadline:
                for process in alive:
                    process.kill()
    return status or _first_failure(processes)


def _first_failure(processes: list) -> int:
    """Exit status of the first process that failed, 0 for none."""
    code = next((code for process in processes if (code := process.exitcode)), 0)
    return code if code >= 0 else 128 - code  # it was ended by a signal


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
