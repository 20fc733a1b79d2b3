"""Training batches from encoded images: the same ones for any number of workers."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resnet_backbone.classification.data.augment import Augmented
from resnet_backbone.classification.data.bad_images import BAD, CONVERTED, BadImageReport, ImageNote
from resnet_backbone.classification.data.crops import EncodedImage
from resnet_backbone.classification.data.decode import BadImage
from resnet_backbone.classification.data.imagenet import EncodedSample
from resnet_backbone.classification.data.stream import Batch, SampleStream, sample_rng
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.seeding import make_rng

REPLACEMENT = 2  # the first word of a seed, beside those in `stream`
MAX_REPLACEMENTS = 100
WORKER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Augmentation = Callable[[EncodedImage, np.random.Generator], Augmented]


class EncodedDataset(Protocol):
    """``ImageFiles``, ``TarShards``, or anything like them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EncodedSample: ...

    def name(self, index: int) -> str: ...


class WorkerBatch(NamedTuple):
    """What a worker sends.

    Attributes:
        images: uint8 (N, 3, size, size).
        labels: int64 (N,).
        shift: float32 (N, 3) or None.
        notes: unusual images, as plain tuples.
        failure: why the run must stop, or empty.
    """

    images: Tensor
    labels: Tensor
    shift: Tensor | None
    notes: list[tuple[str, str, str]]
    failure: str = ""


@dataclass(frozen=True)
class BatchMaker:
    """Reads, decodes and augments the samples of a batch: what a worker runs.

    A bad image is replaced by another sample, which is a function of the seed, the epoch and the
    bad one's index, and augmented by the random numbers of the bad one.

    Args:
        replace: False leaves bad images out: the batch is smaller.
    """

    dataset: EncodedDataset
    augment: Augmentation
    seed: int = 0
    replace: bool = True

    def __getitem__(self, samples: list[tuple[int, int]]) -> WorkerBatch:
        """A batch of (index, epoch) pairs."""
        notes: list[tuple[str, str, str]] = []
        images, labels, shifts = [], [], []
        for index, epoch in samples:
            made = self._sample(index, epoch, notes)
            if isinstance(made, str):
                return WorkerBatch(torch.empty(0), torch.empty(0), None, notes, made)
            if made is not None:
                augmented, label = made
                images.append(augmented.image)
                labels.append(label)
                shifts.append(augmented.shift)
        shift = None
        if shifts and shifts[0] is not None:
            shift = torch.from_numpy(np.stack(shifts))
        stacked = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
        return WorkerBatch(stacked, torch.tensor(labels, dtype=torch.int64), shift, notes)

    def _sample(self, index: int, epoch: int, notes: list) -> tuple[Augmented, int] | str | None:
        """An augmented sample with its label; None to leave it out; a text to stop the run."""
        chosen = None
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self._read(index if chosen is None else chosen, (epoch, index), notes)
            except BadImage as bad:
                notes.append((BAD, bad.path, bad.reason))
            if not self.replace:
                return None
            if chosen is None:
                rng = make_rng(self.seed, REPLACEMENT, epoch, index)
            chosen = int(rng.integers(len(self.dataset)))
        return (
            f"{MAX_REPLACEMENTS} samples in a row cannot be read, the last is {notes[-1][1]} "
            f"({notes[-1][2]}); is the data still there?"
        )

    def _read(self, index: int, moment: tuple[int, int], notes: list) -> tuple[Augmented, int]:
        data, label, name = self.dataset[index]
        image = EncodedImage(data, name)
        augmented = self.augment(image, sample_rng(self.seed, *moment))
        if image.note:
            notes.append((CONVERTED, name, image.note))
        return augmented, label


def read_batches(
    maker: BatchMaker,
    batches: Iterable[list[tuple[int, int]]],
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[WorkerBatch]:
    """Makes batches in order, in this process or in others.

    Args:
        batches: (index, epoch) pairs of each.
        workers: processes; 0 makes the batches here. They leave signals to this process, which
            may want to write a checkpoint first, and end when the iterator is closed or dropped.
        prefetch: batches that each worker makes ahead.
    """
    several = {"prefetch_factor": prefetch, "worker_init_fn": init_worker} if workers else {}
    loader = DataLoader(
        maker,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        **several,
    )
    running = Running(loader)
    try:
        yield from running
    finally:
        running.close()


class Running:
    """An iteration of a loader, whose workers certainly end.

    Workers that ignore SIGTERM would outlast multiprocessing's attempt to end them when the
    program ends, and it would wait for them.
    """

    def __init__(self, loader: DataLoader):
        others = set(multiprocessing.active_children())
        self._process = os.getpid()
        self._iterator = iter(loader)  # nobody else may hold it: its deletion ends the workers
        self._workers = [p for p in multiprocessing.active_children() if p not in others]
        atexit.register(self.close)

    def __iter__(self) -> Iterator[WorkerBatch]:
        return self

    def __next__(self) -> WorkerBatch:
        return next(self._iterator)

    def close(self) -> None:
        if os.getpid() != self._process:  # a copy in a forked process
            return
        self._iterator = iter(())  # torch tells its workers to end, and waits for some seconds
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
        self._workers = []
        atexit.unregister(self.close)


def _unchanged(made: WorkerBatch) -> WorkerBatch:
    return made


def init_worker(_worker: int) -> None:
    for number in WORKER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class LoaderSource:
    """Training batches of one process, without end, from any iteration on.

    The batches are a function of the data set, the stream and the augmentation: the number of
    workers and the iteration at which a run starts change nothing.

    Args:
        dataset: encoded images.
        stream: which samples make up an iteration, and the seed. For shards give it their
            ``group_sizes``.
        augment: such as ``PaperAugmentation``.
        workers: processes that read, decode and augment; 0 does it in this one.
        prefetch: batches that each worker makes ahead.
        report: counts bad images and limits their number; by default they are counted in memory.
        pin_memory: for faster copies to a GPU; by default where there is one.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        stream: SampleStream,
        augment: Augmentation,
        *,
        workers: int = 0,
        prefetch: int = 2,
        report: BadImageReport | None = None,
        pin_memory: bool | None = None,
    ):
        if len(dataset) != stream.num_samples:
            raise DataError(
                f"the data set has {len(dataset)} samples, the stream {stream.num_samples}"
            )
        if workers < 0 or prefetch < 1:
            raise DataError(f"workers >= 0 and prefetch >= 1, not {workers} and {prefetch}")
        self.dataset, self.stream, self.augment = dataset, stream, augment
        self.workers, self.prefetch = workers, prefetch
        self.report = BadImageReport() if report is None else report
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    def batches(self, first_iteration: int = 0) -> Iterator[Batch]:
        """Batches without end; close or drop the iterator to end the workers.

        Raises:
            DataError: more bad images than the report allows, or nothing readable.
        """
        maker = BatchMaker(self.dataset, self.augment, self.stream.seed)
        order = map(self._samples, itertools.count(first_iteration))
        made = read_batches(maker, order, self.workers, self.prefetch, self.pin_memory)
        try:
            for images, labels, shift, notes, failure in made:
                self.report.add(*(ImageNote(*note) for note in notes))
                if failure:
                    raise DataError(failure)
                yield Batch(images, labels, shift)
        finally:
            made.close()

    def _samples(self, iteration: int) -> list[tuple[int, int]]:
        """(index, epoch) pairs of this process's part of an iteration."""
        indices, epochs = self.stream.batch(iteration)
        return list(zip(indices.tolist(), epochs.tolist(), strict=True))
