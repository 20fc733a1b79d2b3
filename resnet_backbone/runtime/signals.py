"""Signals that ask a run to stop: remembered, watched for, or passed on to other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from resnet_backbone.runtime.errors import EXIT_STOPPED, Stopped
from resnet_backbone.runtime.processes import World, current_world

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# By what is passed on to a child: it does not know of the terminal that hangs up.
PASSED_ON = {**{number: number for number in STOP_SIGNALS}, signal.SIGHUP: signal.SIGTERM}
ROUNDS = 10  # batches of an evaluation between two questions to the other processes
SIGNAL_DELAY = 0.5  # seconds within which a signal to a whole process group reaches each of it
# What reading from a loader raises when a worker has ended, or while it hands a tensor over.
WORKER_ENDED = (RuntimeError, OSError, EOFError)


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT arrived; a second SIGINT interrupts at once.

    A context manager, inside of which signals are looked out for. A signal to any process of a run
    (by default of those that are joined now) stops all of them.
    """

    def __init__(self, world: World | None = None):
        self.name = ""  # of the signal that arrived at this process
        self.step_seconds = 0.0  # how long a step takes, for the answer to a signal; 0: not known
        self.world = world or current_world()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: Any) -> None:
        first, self.name = not self.name, self.name or signal.Signals(number).name
        if first and self.world.is_main:  # os.write: this may interrupt a print
            time_left = f", about {self.step_seconds:.0f} s" if self.step_seconds >= 1 else ""
            answer = f"\n{self.name}: stopping after this iteration{time_left}\n"
            os.write(2, answer.encode())
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_if_any(self) -> None:
        """Raises :class:`Stopped` on all processes, which call it equally often, after a signal."""
        if self.world.any(bool(self.name)):
            raise Stopped(next(filter(None, self.world.gather(self.name))))

    def leave_workers(self) -> None:
        """To be called once a loader has workers: only reading from it then says that one ended.

        PyTorch's handler of SIGCHLD raises wherever the program is, also in the middle of a step.
        """
        if self._before:
            self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))

    def explains(self, error: Exception) -> bool:
        """Whether a loader failed because the signal that stops the run ended its workers too."""
        if isinstance(error, WORKER_ENDED):
            time.sleep(SIGNAL_DELAY)
        return isinstance(error, WORKER_ENDED) and bool(self.name)


def ignore_interrupts(worker: int) -> None:
    """A loader's ``worker_init_fn``: a terminal's Ctrl-C is for the process that reads from it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Watched:
    """A loader of an evaluation; raises :class:`Stopped` on every process after a signal.

    Processes ask each other equally often, as `rounds` is the largest number of batches that any of
    them has. Other attributes of the loader are this object's, too.
    """

    def __init__(self, loader: Sized, stop: StopRequest, rounds: int):
        self.loader, self.stop, self.rounds = loader, stop, rounds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        alone = self.stop.world.size == 1
        iterator = iter(self.loader)
        self.stop.leave_workers()
        for number in range(self.rounds):
            if alone or number % ROUNDS == 0:
                self.stop.raise_if_any()
            if number < len(self.loader):
                try:
                    batch = next(iterator)
                except Exception as error:
                    if self.stop.explains(error):
                        self.stop.raise_if_any()  # the others ask after their next batches
                    raise
                yield batch
        if not alone:
            self.stop.raise_if_any()


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Gives signals to a handler for as long as the block runs."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def run_child(command: Sequence[str], **options: Any) -> tuple[int, bool]:
    """Runs a command by ``subprocess.Popen``; signals that ask to stop are passed on.

    Returns:
        Its exit status, 75 where it was stopped by a signal that was passed on and 128 + its
        number by another one, as in a shell; whether a signal was passed on.
    """
    process, passed_on, early = None, [], []

    def pass_on(number: int, frame: Any) -> None:
        passed_on.append(PASSED_ON[number])
        if process is None:
            early.append(PASSED_ON[number])
        else:
            process.send_signal(PASSED_ON[number])

    numbers = set(PASSED_ON)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        numbers.remove(signal.SIGHUP)
    with handled(numbers, pass_on):
        # in a session of its own, else a terminal's Ctrl-C would reach it twice
        process = subprocess.Popen(command, start_new_session=True, **options)
        for number in early:
            process.send_signal(number)
        status = process.wait()
    if status < 0:
        status = EXIT_STOPPED if -status in passed_on else 128 - status
    return status, bool(passed_on)
