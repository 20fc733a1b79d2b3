"""Signals that ask a run to stop: recorded, polled, or forwarded to other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

from resnet_backbone.runtime.errors import EXIT_STOPPED, DataError, Stopped, plain_message
from resnet_backbone.runtime.processes import World, current_world

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Signal -> signal for a child, which has no terminal to hang up.
PASSED_ON = {**{number: number for number in STOP_SIGNALS}, signal.SIGHUP: signal.SIGTERM}
ROUNDS = 10  # batches of an evaluation between two checks with the other processes
SIGNAL_DELAY = 0.5  # seconds until a signal has reached all of a process group
# Errors of reading from a loader whose worker has ended, perhaps while sending a tensor.
WORKER_ENDED = (RuntimeError, OSError, EOFError)


class StopRequest:
    """Records that SIGTERM, SIGUSR1 or SIGINT arrived; a second SIGINT interrupts at once.

    A context manager that handles signals in its block. A signal to any process of a run (by
    default of the joined processes) stops all of them.
    """

    def __init__(self, world: World | None = None):
        self.name = ""  # of the signal that this process received
        self.step_seconds = 0.0  # duration of a step, for the reply to a signal; 0: unknown
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

    def raise_if_any(self, error: Exception | None = None) -> None:
        """Raises :class:`Stopped` on all processes after a signal; all must call it together.

        If data cannot be read on one of them, which gives the `error`, all raise DataError.
        """
        if not self.world.any(bool(self.name) or error is not None):
            return
        names = list(filter(None, self.world.gather(self.name)))
        if names:
            raise Stopped(names[0])
        messages = self.world.gather(error and plain_message(error))
        raise DataError(next(filter(None, messages))) from error

    def leave_workers(self) -> None:
        """Removes PyTorch's SIGCHLD handler, once a loader has started its workers.

        It would raise anywhere, even within a step; reading from the loader reports the end, too.
        """
        if self._before:
            self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))

    def explains(self, error: Exception) -> bool:
        """Returns whether a loader failed because the stop signal ended its workers, too."""
        if isinstance(error, WORKER_ENDED):
            time.sleep(SIGNAL_DELAY)
        return isinstance(error, WORKER_ENDED) and bool(self.name)


def killed_worker(error: Exception, option: str) -> DataError | None:
    """Returns the error to raise if a loader failed because a worker was killed, else None.

    `option` is the setting of the number of workers.
    """
    ended = isinstance(error, (ConnectionError, EOFError))  # while the worker sent a tensor
    if not ended and "DataLoader worker (pid" not in str(error):
        return None
    return DataError(
        f"a worker of the loader was killed, perhaps because memory ran out: lower {option}, and "
        "continue with --resume"
    )


def ignore_interrupts(worker: int) -> None:
    """A loader's ``worker_init_fn``: leaves a terminal's Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Watched:
    """Wraps an evaluation's loader to raise :class:`Stopped` on every process after a signal.

    `rounds` is the largest number of batches of any process, so that all of them check equally
    often. Other attributes are the loader's.
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
                        self.stop.raise_if_any()  # the others check after their next batches
                    raise
                yield batch
        if not alone:
            self.stop.raise_if_any()


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Sets a handler for signals in the block, then restores the former ones."""
    with ExitStack() as former:
        for number in numbers:
            former.callback(signal.signal, number, signal.signal(number, handler))
        yield


def run_child(command: Sequence[str], **options: Any) -> tuple[int, bool]:
    """Runs a command with ``subprocess.Popen``, and forwards signals that ask to stop.

    Returns:
        (exit status, whether a signal was forwarded). The status is 75 if a forwarded signal ended
        the command, and 128 + N, as in a shell, if another signal N did.
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
        # in its own session, or a terminal's Ctrl-C would reach it twice
        process = subprocess.Popen(command, start_new_session=True, **options)
        for number in early:
            process.send_signal(number)
        status = process.wait()
    if status < 0:
        status = EXIT_STOPPED if -status in passed_on else 128 - status
    return status, bool(passed_on)
