"""Stopping in good order when a scheduler asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from resnet_backbone.runtime import signals
from resnet_backbone.runtime.distributed import World
from resnet_backbone.runtime.signals import Stopped


class StopRequest(signals.StopRequest):
    """A signal to any process of a run stops all of them."""

    def __init__(self, world: World):
        super().__init__()
        self.world = world

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
