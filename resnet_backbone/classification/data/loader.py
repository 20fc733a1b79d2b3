"""Training batches from encoded images, identical for any number of workers.

Unreadable images are replaced by others and reported.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resnet_backbone.classification.data.augment import Augmented
from resnet_backbone.classification.data.imagenet import EncodedDataset
from resnet_backbone.classification.data.sources import REPLACEMENT, Batch, SampleStream, sample_rng
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import BadImage, EncodedImage, decode, read_bytes
from resnet_backbone.runtime.processes import available_cores, make_rng

BAD, CONVERTED = "bad", "converted"
MAX_CONVERTED = 1000  # lines; a data set may have only such images
SHOWN = 3  # bad files named in the message that stops a run
MAX_REPLACEMENTS = 100
WORKER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Augmentation = Callable[[EncodedImage, np.random.Generator], Augmented]


class ImageNote(NamedTuple):
    kind: str  # "bad" (not readable) or "converted" (readable, but not an ordinary image)
    path: str  # file, or place in a shard
    reason: str  # one line


def inspect_file(path: str) -> ImageNote | None:
    """Decodes an image file, and returns a note on it if it is unusual."""
    try:
        note = decode(read_bytes(path), path).note
    except BadImage as bad:
        return ImageNote(BAD, bad.path, bad.reason)
    return ImageNote(CONVERTED, path, note) if note else None


class BadImageReport:
    """Counts unusual images, and lists each once in a file of ``kind<TAB>path<TAB>reason`` lines.

    Several processes may share the file, and a resumed run continues it. Counts are of distinct
    files over all these processes and runs. Beyond ``MAX_CONVERTED``, converted images are counted
    as often as this process reads them.

    Args:
        path: of the report, or None to keep it in memory.
        max_bad_images: limit of bad files, above which :meth:`add` raises DataError; None: none.

    Attributes:
        bad: path -> reason, in the order of discovery.
    """

    def __init__(self, path: str | os.PathLike | None = None, max_bad_images: int | None = None):
        self.path = None if path is None else Path(path)
        self.max_bad_images = max_bad_images
        self.bad: dict[str, str] = {}
        self._converted: dict[str, str] = {}
        self._not_listed = 0  # converted images
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._learn(file)

    @property
    def num_bad(self) -> int:
        return len(self.bad)

    @property
    def num_converted(self) -> int:
        return len(self._converted) + self._not_listed

    def add(self, *notes: ImageNote) -> None:
        """Counts images, and lists new ones in the report.

        Raises:
            DataError: more than ``max_bad_images`` bad images, including those known before.
        """
        new = [ImageNote(*map(_one_line, note)) for note in notes]
        new = [note for note in new if note.path not in self._known(note.kind)]
        if len(self._converted) >= MAX_CONVERTED:
            self._not_listed += sum(note.kind == CONVERTED for note in new)
            new = [note for note in new if note.kind == BAD]
        if new and self.path is not None:
            self._append(new)
        for kind, path, reason in new:
            self._known(kind).setdefault(path, reason)
        if self.max_bad_images is None or self.num_bad <= self.max_bad_images:
            return
        first = "; ".join(f"{path} ({why})" for path, why in list(self.bad.items())[:SHOWN])
        where = f", all are listed in {self.path}" if self.path else ""
        raise DataError(
            f"{self.num_bad} images cannot be read, but only {self.max_bad_images} are allowed: "
            f"{first}{where}; repair or remove them, or raise data.max_bad_images"
        )

    def _known(self, kind: str) -> dict[str, str]:
        return self.bad if kind == BAD else self._converted

    def _append(self, notes: list[ImageNote]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(self._learn(file))  # a killed run may have left an incomplete line
            listed = len(self._converted) < MAX_CONVERTED  # other processes may have filled it
            for note in {note[:2]: note for note in notes}.values():
                if note.path not in self._known(note.kind) and (listed or note.kind == BAD):
                    file.write(os.fsencode("\t".join(note) + "\n"))

    def _learn(self, file: BinaryIO) -> int:
        """Reads the file's notes, and returns the length of its complete lines in bytes."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for line in os.fsdecode(whole).splitlines():
            kind, path, reason = (*line.split("\t", 2), "", "")[:3]
            self._known(kind).setdefault(path, reason)
        return len(whole)


def _one_line(text: str) -> str:
    return " ".join(text.replace("\t", " ").splitlines())


class WorkerBatch(NamedTuple):
    images: Tensor  # uint8 (N, 3, size, size)
    labels: Tensor  # int64 (N,)
    shift: Tensor | None  # float32 (N, 3)
    notes: list[ImageNote]
    failure: str = ""  # why the run must stop


@dataclass(frozen=True)
class BatchMaker:
    """Reads, decodes and augments the samples of a batch in a worker.

    The replacement of a bad image is a function of the seed, the epoch and the bad image's index.
    """

    dataset: EncodedDataset
    augment: Augmentation
    seed: int = 0
    replace: bool = True  # False drops bad images, and the batch is smaller

    def __getitem__(self, samples: list[tuple[int, int]]) -> WorkerBatch:
        """Makes a batch from (index, epoch) pairs."""
        notes: list[ImageNote] = []
        nothing = torch.empty(0, dtype=torch.uint8)
        try:
            made = [self._sample(index, epoch, notes) for index, epoch in samples]
        except DataError as error:
            return WorkerBatch(nothing, nothing, None, notes, str(error))
        made = [sample for sample in made if sample is not None]
        images = torch.stack([augmented.image for augmented, _ in made]) if made else nothing
        labels = torch.tensor([label for _, label in made], dtype=torch.int64)
        shift = None
        if made and made[0][0].shift is not None:
            shift = torch.from_numpy(np.stack([augmented.shift for augmented, _ in made]))
        return WorkerBatch(images, labels, shift, notes)

    def _sample(
        self, index: int, epoch: int, notes: list[ImageNote]
    ) -> tuple[Augmented, int] | None:
        """Returns an augmented sample with its label; None to drop it."""
        chosen, rng = index, None
        for _ in range(MAX_REPLACEMENTS):
            try:
                data, label, name = self.dataset[chosen]
                image = EncodedImage(data, name)
                augmented = self.augment(image, sample_rng(self.seed, epoch, index))
            except BadImage as bad:
                notes.append(ImageNote(BAD, bad.path, bad.reason))
                if not self.replace:
                    return None
                rng = rng or make_rng(self.seed, REPLACEMENT, epoch, index)
                chosen = int(rng.integers(len(self.dataset)))
                continue
            if image.note:
                notes.append(ImageNote(CONVERTED, name, image.note))
            return augmented, label
        raise DataError(
            f"{MAX_REPLACEMENTS} samples in a row cannot be read, the last is {notes[-1].path} "
            f"({notes[-1].reason}); is the data still there?"
        )


def run_loader(
    dataset: Any,
    sampler: Iterable,
    workers: int,
    batch_size: int | None = None,
    collate: Callable | None = None,
) -> Iterator[Any]:
    """Iterates over PyTorch's ``DataLoader``, with ``workers`` 0 in this process.

    There are at most as many workers as cores. Workers ignore signals, so that this process can
    write a checkpoint first. They end when the iterator is closed or dropped. At the program's end
    they are killed, because multiprocessing would send SIGTERM, which they ignore, and wait.
    """
    process, others = os.getpid(), set(multiprocessing.active_children())
    iterator = iter(  # the only reference, since its deletion ends the workers
        DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=min(workers, available_cores()),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=init_worker if workers else None,
        )
    )
    started = [child for child in multiprocessing.active_children() if child not in others]

    def end() -> None:
        nonlocal iterator
        if os.getpid() == process:  # not a copy in a forked process
            iterator = iter(())  # torch asks its workers to end, and waits some seconds
            for worker in started:
                if worker.is_alive():
                    worker.kill()

    atexit.register(end)
    try:
        while (batch := next(iterator, None)) is not None:
            yield batch
    finally:
        end()
        atexit.unregister(end)


def init_worker(_worker: int) -> None:
    for number in WORKER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class LoaderSource:
    """An endless stream of one process's training batches, from any iteration on.

    Batches do not depend on the number of workers or on the first iteration.
    """

    dataset: EncodedDataset
    stream: SampleStream  # has the seed and, for shards, their `group_sizes`
    augment: Augmentation
    workers: int = 0  # processes that read, decode and augment; 0 for this process
    report: BadImageReport = field(default_factory=BadImageReport)

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    def batches(self, first_iteration: int = 0) -> Iterator[Batch]:
        """Yields batches endlessly; close or drop the iterator to end the workers.

        Raises:
            DataError: more bad images than the report allows, or nothing readable.
        """
        maker = BatchMaker(self.dataset, self.augment, self.stream.seed)
        order = map(self._samples, itertools.count(first_iteration))
        with closing(run_loader(maker, order, self.workers)) as made:
            for images, labels, shift, notes, failure in made:
                self.report.add(*notes)
                if failure:
                    raise DataError(failure)
                yield Batch(images, labels, shift)

    def _samples(self, iteration: int) -> list[tuple[int, int]]:
        """Returns (index, epoch) pairs of this process's part of an iteration."""
        indices, epochs = self.stream.batch(iteration)
        return list(zip(indices.tolist(), epochs.tolist(), strict=True))
