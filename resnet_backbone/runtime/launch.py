"""Starts a run's processes, on one machine or several, by command-line options or torchrun."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing

from resnet_backbone.runtime.errors import (
    EXIT_STOPPED,
    ONE_LINE,
    UsageError,
    outcome,
    wants_traceback,
)
from resnet_backbone.runtime.processes import available_cores, choose_device, leave
from resnet_backbone.runtime.signals import STOP_SIGNALS, handled

TORCHRUN = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = datetime.timedelta(minutes=30)  # of collective operations, as in Detectron2
PATIENCE = 60.0  # seconds for the other processes to end after one has failed
INTERRUPTED = 5.0  # the same after a second Ctrl-C


class Launch(NamedTuple):
    processes: int = 1  # on each machine
    machines: int = 1
    machine_rank: int = 0
    url: str = ""  # rendezvous, tcp://HOST:PORT of the first machine
    uses_gpus: bool = False  # NCCL and a GPU for each process, or else gloo and the CPU

    @property
    def world(self) -> int:
        return self.processes * self.machines


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds Detectron2's options and ``--num-processes``."""
    text = "With several machines, run the same command on each, with its --machine-rank."
    add = parser.add_argument_group("processes", text).add_argument
    add("--num-gpus", type=int, help="GPUs per machine (default: 1)")
    text = "processes per machine, for CPUs (default: one per GPU)"
    add("--num-processes", type=int, metavar="N", help=text)
    add("--num-machines", type=int, default=1, help="number of machines (default: 1)")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    text = "address of machine 0 (default: a free port of this machine)"
    add("--dist-url", default="auto", metavar="tcp://HOST:PORT", help=text)


def plan_launch(args: argparse.Namespace, device: str, on_cpu: str) -> Launch:
    """Reads the options of :func:`add_launch_arguments`, for device "cpu", "cuda" or "auto".

    `on_cpu` is the option that selects the CPU, such as "MODEL.DEVICE cpu", for messages.
    """
    gpus, count = args.num_gpus, torch.cuda.device_count()
    for name, value in (("--num-gpus", gpus), ("--num-processes", args.num_processes)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: give at least 1")
    if gpus and gpus > max(1, count):
        raise UsageError(
            f"--num-gpus {gpus}: this machine has {count}; for CPUs give --num-processes"
        )
    if gpus and args.num_processes and gpus != args.num_processes:
        raise UsageError("give either --num-gpus or --num-processes")
    processes = gpus or args.num_processes or 1
    uses_gpus = device not in ("cpu", "auto") or (device == "auto" and count > 0)
    if uses_gpus and processes > count:
        have = f"{count} GPUs" if count else "no GPU"
        raise UsageError(
            f"{processes} processes need a GPU each, but this machine has {have}; give {on_cpu}"
        )
    machines, rank = args.num_machines, args.machine_rank
    if not 0 <= rank < machines:
        raise UsageError(
            f"--machine-rank {rank}: give 0 to {machines - 1} (--num-machines {machines})"
        )
    if machines > 1 and not re.fullmatch(r"tcp://.+:\d+", args.dist_url):
        raise UsageError("--num-machines needs --dist-url tcp://HOST:PORT of machine 0")
    url = args.dist_url if args.dist_url != "auto" else f"tcp://127.0.0.1:{_free_port()}"
    launch = Launch(processes, machines, rank, url, uses_gpus)
    if "WORLD_SIZE" in os.environ:
        _check_torchrun(launch)
    return launch


def _check_torchrun(launch: Launch) -> None:
    if launch.world > 1:
        options = "--num-gpus, --num-processes and --num-machines"
        raise UsageError(f"torchrun has started the processes: leave out {options}")
    missing = ", ".join(key for key in TORCHRUN if key not in os.environ)
    if missing:
        raise UsageError(f"WORLD_SIZE is set but not {missing}: start with torchrun, or unset it")


def run_processes(launch: Launch, run: Callable[[Any], None], argument: Any) -> None:
    """Calls ``run(argument)`` in every process of a run, and returns when all are done.

    Under torchrun, or for a single process, it is called here. Otherwise processes are spawned, so
    ``run`` must be a module's function. Signals are forwarded to them, and an error message of
    several processes is printed once. Exits with the status of a process that failed.
    """
    if "WORLD_SIZE" in os.environ:
        _join("env://", launch.uses_gpus)
        _call(run, argument)
    elif launch.world == 1:
        run(argument)
    else:
        method = multiprocessing.get_start_method()
        # files, not a queue: a long message cannot block, a killed process leaves no lock
        with tempfile.TemporaryDirectory() as messages:
            started = multiprocessing.start_processes(
                _work, (launch, run, argument, messages, method), launch.processes, join=False
            )
            status = _watch(started.processes)
            paths = sorted(Path(messages).iterdir())
            said = [path.read_text(encoding="utf-8").partition(" ") for path in paths]
        for text in dict.fromkeys(text for _, _, text in said):  # each message once
            print(text, file=sys.stderr)
        if said:  # takes precedence over the exit status of the process
            status = int(said[0][0])
        if status:
            raise SystemExit(status)


def _work(
    local_rank: int, launch: Launch, run: Callable, argument: Any, messages: str, method: str
) -> None:
    """Runs a spawned process, whose loaders start workers by `method`, as in a single process."""
    multiprocessing.set_start_method(method, force=True)
    os.environ |= {"LOCAL_RANK": f"{local_rank}", "LOCAL_WORLD_SIZE": f"{launch.processes}"}
    try:
        rank = launch.machine_rank * launch.processes + local_rank
        _join(launch.url, launch.uses_gpus, rank=rank, world_size=launch.world)
        _call(run, argument)
    except ONE_LINE as error:
        if wants_traceback():
            traceback.print_exc()
            raise SystemExit(1) from None
        message, status = outcome(error)
        Path(messages, f"{local_rank:06d}").write_text(f"{status} {message}", encoding="utf-8")
        raise SystemExit(status) from None
    except Exception:  # PyTorch's wrapper would not print it
        traceback.print_exc()
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _call(run: Callable, argument: Any) -> None:
    try:
        run(argument)
    finally:
        leave()


def local_size() -> int:
    """Returns the number of this run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _join(url: str, uses_gpus: bool, **place: int) -> None:
    if uses_gpus:
        choose_device("cuda")
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_size()))
    try:
        backend = "nccl" if uses_gpus else "gloo"
        dist.init_process_group(backend, init_method=url, timeout=TIMEOUT, **place)
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise UsageError(f"{url}: the processes cannot connect to one another ({cause})") from error
    dist.barrier()


def _watch(processes: list) -> int:
    """Waits for all, ends them when one fails, and returns the status of the first to fail."""
    interrupts = 0

    def forward(number: int, frame: Any) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        # a terminal's Ctrl-C reaches them directly, and a second one interrupts them at once
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
    """Returns the exit status of the first process that failed; 0 for none."""
    code = next((code for process in processes if (code := process.exitcode)), 0)
    return code if code >= 0 else 128 - code  # negative: ended by a signal


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
