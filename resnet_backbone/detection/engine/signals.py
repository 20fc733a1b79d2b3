"""Stopping in good order when a scheduler or the user asks for it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sized

from detectron2.utils import comm

from resnet_backbone.runtime import signals
from resnet_backbone.runtime.signals import Stopped

ROUNDS = 10  # batches of an evaluation between two questions to the other processes
SIGNAL_DELAY = 0.5  # seconds within which a signal to a whole process group reaches each of it
# What reading from a loader raises when a worker has ended, or while it hands a tensor over.
WORKER_ENDED = (RuntimeError, OSError, EOFError)


class StopRequest(signals.StopRequest):
    """Also tells what a signal to the whole process group did to loader workers."""

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


class Watched:
    """The batches of an evaluation; raises :class:`Stopped` on every process after a signal.

    Processes ask each other equally often, also when they have different numbers of batches.

    Args:
        loader: this process's batches.
        total: batches of all processes, which differ by at most one between them.
    """

    def __init__(self, loader: Sized, stop: StopRequest, total: int):
        self.loader, self.stop, self.total = loader, stop, total

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        world = comm.get_world_size()
        iterator, rounds = iter(self.loader), -(-self.total // world)
        self.stop.leave_workers()
        for number in range(rounds):
            if world == 1 or number % ROUNDS == 0:
                names = [name for name in comm.all_gather(self.stop.name) if name]
                if names:
                    raise Stopped(names[0])
            if number < len(self.loader):
                try:
                    images = next(iterator)
                except Exception as error:
                    asks_again = world == 1 or (number // ROUNDS + 1) * ROUNDS < rounds
                    if not asks_again or not self.stop.explains(error):
                        raise
                    name = self.stop.name
                    raise Stopped(next(filter(None, comm.all_gather(name)))) from error
                yield images
