"""Stopping in good order when a scheduler asks for it."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any

from resnet_backbone.engine.distributed import World

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command with --resume
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and every process knows it."""


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT arrived; a second SIGINT interrupts at once."""

    def __init__(self, world: World):
        self.world, self.name = world, ""

    def install(self) -> StopRequest:
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_if_any(self) -> None:
        """Raises :class:`Stopped` on every process once any of them was signalled.

        All processes must call it equally often.
        """
        if self.world.any(bool(self.name)):
            raise Stopped(self.name or "a signal to another process")

    def watch(self, batches: Iterable, rounds: int) -> Iterator:
        """The same batches, looking out for signals before each.

        Args:
            rounds: the largest number of batches that any process has.
        """
        iterator = iter(batches)
        for _ in range(rounds):
            self.raise_if_any()
            batch = next(iterator, None)
            if batch is not None:
                yield batch
