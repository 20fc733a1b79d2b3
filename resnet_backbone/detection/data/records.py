"""Packed records of a data set: bytes shared by processes, and tables of their main facts.

Millions of dicts cost gigabytes in each process, and seconds for each iteration over them.
"""

from __future__ import annotations

import gc
import io
import pickle
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

POLYGONS, RUN_LENGTHS = 1, 2  # kinds of masks; 0: no mask
IMAGE_COLUMNS = ("width", "height", "has_labels", "has_annotations")  # -1: side not stated
BOX_COLUMNS = ("image", "category", "crowd", "mask", "points", "difficult")


class _PlainUnpickler(pickle.Unpickler):
    """Reads only plain values, so nothing in a file is executed."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == (BoxMode.__module__, BoxMode.__name__):
            return BoxMode
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def load_plain(data: Any) -> dict:
    return _PlainUnpickler(io.BytesIO(data)).load()


class Store(NamedTuple):
    """All records of a data set, as arrays."""

    data: np.ndarray  # uint8: concatenated pickled records
    ends: np.ndarray  # int64: end of each record in `data`
    images: np.ndarray  # int32: IMAGE_COLUMNS of each record
    boxes: np.ndarray  # int32: BOX_COLUMNS of each annotation, in order


class Records(Sequence):
    """A sequence of Detectron2's dicts, unpacked on access, with columns that need no unpacking.

    Args:
        numbers: indices into the store of the records in this sequence; None for all.
        good: which annotations of the store are used (bool); None for all.
        loads: reads a record's bytes.
    """

    def __init__(
        self,
        store: Store,
        numbers: np.ndarray | None = None,
        good: np.ndarray | None = None,
        loads: Callable[[Any], dict] = load_plain,
    ):
        self.store, self.good, self._loads = store, good, loads
        self.numbers = np.arange(len(store.ends)) if numbers is None else numbers
        self._first = np.searchsorted(store.boxes[:, 0], np.arange(len(store.ends) + 1))

    @classmethod
    def pack(cls, records: Iterable[dict], loads: Callable[[Any], dict] = load_plain) -> Records:
        data, ends, images, boxes = bytearray(), array("q"), array("i"), array("i")
        for number, record in enumerate(records):
            data += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            ends.append(len(data))
            sides = record.get("width", -1), record.get("height", -1)
            has = "sem_seg_file_name" in record, "annotations" in record
            images.extend((*sides, *has))
            for entry in record.get("annotations", ()):
                boxes.extend((number, *_facts(entry)))
        tables = (
            np.frombuffer(column, np.int32).reshape(-1, len(names))
            for column, names in ((images, IMAGE_COLUMNS), (boxes, BOX_COLUMNS))
        )
        store = Store(np.frombuffer(data, np.uint8), np.frombuffer(ends, np.int64), *tables)
        return cls(store, loads=loads)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        number = self.numbers[index]
        start = self.store.ends[number - 1] if number else 0
        record = self._loads(self.store.data[start : self.store.ends[number]])
        if self.good is not None and "annotations" in record:
            good = self.good[self._first[number] : self._first[number + 1]]
            pairs = zip(record["annotations"], good.tolist(), strict=True)
            record["annotations"] = [entry for entry, is_good in pairs if is_good]
        return record

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def select(self, images: np.ndarray | None = None, boxes: np.ndarray | None = None) -> Records:
        """Returns a subset of the records and annotations, with the same store.

        Args:
            images: whether to keep each of these records (bool).
            boxes: whether to keep each annotation of the store (bool).
        """
        numbers = self.numbers if images is None else self.numbers[images]
        if boxes is not None and self.good is not None:
            boxes = boxes & self.good
        return Records(self.store, numbers, self.good if boxes is None else boxes, self._loads)

    def image_column(self, name: str) -> np.ndarray:
        """Returns one of :data:`IMAGE_COLUMNS` for each record, int32."""
        return self.store.images[self.numbers, IMAGE_COLUMNS.index(name)]

    def box_column(self, name: str) -> np.ndarray:
        """Returns one of :data:`BOX_COLUMNS` for each used annotation, int32.

        "image" is the position of the record in this sequence.
        """
        values = self.store.boxes[self._used, BOX_COLUMNS.index(name)]
        return np.searchsorted(self.numbers, values) if name == "image" else values

    @cached_property
    def _used(self) -> np.ndarray:
        is_one = np.zeros(len(self.store.ends), bool)
        is_one[self.numbers] = True
        used = is_one[self.store.boxes[:, 0]]
        return used if self.good is None else used & self.good

    def per_image(self, amounts: np.ndarray) -> np.ndarray:
        """Sums amounts, or counts a condition, over the annotations of each record."""
        return np.bincount(self.box_column("image"), amounts, len(self))


def _facts(entry: dict) -> tuple[int, ...]:
    mask, points = entry.get("segmentation"), entry.get("keypoints", ())
    kind = (RUN_LENGTHS if isinstance(mask, dict) else POLYGONS) if mask else 0
    visible = sum(one > 0 for one in points[2::3])
    crowd, difficult = bool(entry.get("iscrowd", 0)), bool(entry.get("difficult", 0))
    return entry.get("category_id", 0), crowd, kind, visible, difficult


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Context without garbage collection, which is slow while millions of objects are created."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
