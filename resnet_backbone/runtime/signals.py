"""Signals that ask a run to stop: remembered, or passed on to the processes that do the work."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command with --resume
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# By what is passed on to a child: it does not know of the terminal that hangs up.
PASSED_ON = {**{number: number for number in STOP_SIGNALS}, signal.SIGHUP: signal.SIGTERM}


class Stopped(Exception):
    """The run was asked to stop, and every process knows it."""


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT arrived; a second SIGINT interrupts at once.

    A context manager, inside of which signals are looked out for.

    Attributes:
        name: of the signal that arrived at this process; "" for none.
    """

    def __init__(self):
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """Runs a command; signals that ask to stop are passed on, and waited for.

    Args:
        options: of ``subprocess.Popen``.

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
