"""Registered data sets: scanned once, with the scan cached for other processes and later starts.

The loader, the check before training and the evaluator share the records and the report of one
scan, so that a loader drops exactly what the report lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import resnet_backbone
from resnet_backbone.detection.data.problems import (
    DataProblem,
    DataReport,
    apply_policy,
    in_threads,
    reading,
    stamp_of,
)
from resnet_backbone.detection.data.records import Records, Store, collector_at_rest
from resnet_backbone.runtime.errors import ONE_LINE
from resnet_backbone.runtime.files import PACKAGE, whole_file

logger = logging.getLogger(__name__)

KEPT_FROM = 500  # minimum number of images for which a single process keeps a scan
ARRAYS = (*Store._fields, "stamps", "about")  # in the file of a kept scan
UNUSED = 90 * 24 * 3600  # seconds without use after which a kept scan is deleted

Scanned = tuple[Records, DataReport]
Scan = Callable[[], tuple[Iterable[dict], DataReport]]  # the report is complete after the records
Select = Callable[[Records], Records]

# Digests of kept scans just verified or written by another process of this machine
_trusted: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())


class ScannedDataset:
    """A registered data set that is read and checked on first use.

    Calling it without arguments, as Detectron2's catalog does, returns the usable records.

    Args:
        scan: reads the data set, and returns Detectron2's dicts of usable records and the report.
        on_bad: see :func:`apply_policy`.
        select: selects the records for loaders; None for all.
        key: everything that `scan` depends on, apart from the files that its report lists.
    """

    def __init__(self, scan: Scan, on_bad: str, key: Mapping, select: Select | None = None):
        self._scan, self._on_bad, self._select = scan, on_bad, select
        self.file = KeptScan(key)
        self._found: Scanned | None = None
        self._has_looked = self._is_accepted = False

    def kept(self) -> Scanned | None:
        """Returns the scan of an earlier start if nothing has changed since, else None."""
        if not self._has_looked:
            self._found, self._has_looked = self.file.read(), True
        return self._found

    def scan(self) -> Scanned:
        """Returns all usable records and the report; raises as :func:`apply_policy` does."""
        self._found = self._found or self.kept() or self._read()
        if not self._is_accepted:
            apply_policy(self._found[1], self._on_bad)
            self._is_accepted = True
        return self._found

    def _read(self) -> Scanned:
        with collector_at_rest():
            records, report = self._scan()
            with reading(report.name):
                records = Records.pack(records)
        if report.num_images >= KEPT_FROM or comm.get_world_size() > 1:
            self.file.write(records, report)
            with _trusting({self.file.digest}):  # processes share the file's pages
                records = (self.file.read() or (records,))[0]
        return records, report

    def records(self) -> Records:
        """Returns the records for a loader."""
        records = self.scan()[0]
        return self._select(records) if self._select else records

    def __call__(self) -> list[dict]:
        with collector_at_rest():
            return list(self.records())


class KeptScan:
    """A file in the user's cache with the result of a scan and the stamps of all files it read.

    It is used only if these files are unchanged and its checksum is correct.
    """

    def __init__(self, key: Mapping[str, Any]):
        self.digest = ""  # of the scan that was read or written
        self.state = {"key": json.loads(json.dumps(key)), "code": code_digest()}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self.path = cache_folder() / f"{name}.scan"

    def read(self) -> Scanned | None:
        """Returns the kept scan, or None if there is none or it cannot be used."""
        try:
            with safe_open(self.path, "pt") as file:
                digest = file.metadata()["digest"]
                arrays = {name: file.get_tensor(name).numpy() for name in ARRAYS}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            return self._ignore(f"is damaged ({error})")
        is_trusted = digest in _trusted.get()
        if not is_trusted and digest != _digest(arrays):
            return self._ignore("is damaged (its checksum is wrong)")
        about = json.loads(bytes(arrays["about"]))
        if about["state"] != self.state:
            return self._ignore("is of another version")
        files = about["files"]
        if not is_trusted:
            now = in_threads(stamp_of, ((path,) for path in files))
            same = np.array(list(now), np.int64).reshape(-1, 2) == arrays["stamps"]
            if not same.all():
                return self._ignore(f"is old: {files[int(np.argmin(same.all(axis=1)))]} changed")
        with suppress(OSError):
            os.utime(self.path)
        self.digest = digest
        store = Store(*(arrays[name] for name in Store._fields))
        return Records(store), _read_report(about["report"], files, arrays["stamps"])

    def _ignore(self, reason: str) -> None:
        logger.info("%s %s: the data are checked again", self.path, reason)

    def write(self, records: Records, report: DataReport) -> None:
        """Writes the scan, or logs a warning; then each process and each start scans."""
        about = {"state": self.state, "files": list(report.files)}
        about["report"] = {
            one.name: getattr(report, one.name) for one in fields(report) if one.name != "files"
        }
        arrays = {
            **records.store._asdict(),
            "stamps": np.array(list(report.files.values()), np.int64).reshape(-1, 2),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _delete_unused(self.path.parent)
            digest = _digest(arrays)
            with whole_file(self.path) as temporary:
                save_file(arrays, temporary, {"digest": digest})
            self.digest = digest
        except (OSError, SafetensorError) as error:
            text = "the check of %s cannot be kept, so each start checks again (%s)"
            logger.warning(text, report.name, error)
        else:
            logger.info("the check of %s is kept in %s", report.name, self.path)


def _read_report(values: dict[str, Any], files: list[str], stamps: np.ndarray) -> DataReport:
    values["problems"] = [DataProblem(*problem) for problem in values["problems"]]
    for counts in ("boxes", "difficult"):
        values[counts] = Counter(values[counts])
    stamps = (tuple(stamp) for stamp in stamps.tolist())
    return DataReport(**values, files=dict(zip(files, stamps, strict=True)))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Returns a digest of our code and Pillow's version, on which scans depend."""
    digest = hashlib.sha256(f"{resnet_backbone.__version__} {PIL.__version__}".encode())
    runtime = [PACKAGE / "runtime/files.py", PACKAGE / "runtime/images.py"]
    for file in [*sorted(Path(__file__).parent.rglob("*.py")), *runtime]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Returns the folder of kept scans: RESNET_BACKBONE_CACHE, else the user's cache."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("RESNET_BACKBONE_CACHE") or Path(user, "resnet_backbone"))


def _delete_unused(folder: Path) -> None:
    for file in folder.glob("*.scan"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > UNUSED:
                file.unlink()


@contextmanager
def _trusting(digests: Iterable[str]) -> Iterator[None]:
    token = _trusted.set(frozenset(digests) - {""})
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def first_process_first() -> Iterator[dict[str, Any]]:
    """Lets each machine's first process run the block before the others.

    The others find and trust its scans. If it raises one of our errors, all processes do.

    Yields:
        A dict whose contents the first process passes to the others.
    """
    if comm.get_world_size() == 1:
        yield {}
        return
    rank, shared = comm.get_local_rank(), {}
    if rank:
        shared = comm.all_gather(None)[comm.get_rank() - rank]
        if isinstance(shared, Exception):
            raise shared
        with _trusting(shared["digests"]):
            yield shared
        return
    try:
        yield shared
    except ONE_LINE as error:
        comm.all_gather(error)
        raise
    found = (registered_scan(name) for name in DatasetCatalog.list())
    comm.all_gather(shared | {"digests": [one.file.digest for one in found if one]})


def register_once(name: str, dataset: ScannedDataset, metadata: Mapping[str, Any]) -> None:
    """Registers a data set; repeating the same registration does nothing.

    Args:
        metadata: for Detectron2's catalog.

    Raises:
        ValueError: `name` is already registered with other metadata.
    """
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, dataset)
        MetadataCatalog.get(name).set(**metadata)
        return
    known = MetadataCatalog.get(name)
    changed = [key for key, value in metadata.items() if known.get(key) != value]
    if changed:
        raise ValueError(
            f"data set {name!r} is already registered with another {', '.join(changed)};"
            " choose another name"
        )


def dataset_records(name: str) -> Records:
    """Returns a loader's records of any registered data set."""
    dataset = registered_scan(name)
    if dataset:
        return dataset.records()
    with collector_at_rest():  # other code's dicts may contain any objects
        return Records.pack(DatasetCatalog.get(name), pickle.loads)


def registered_scan(name: str) -> ScannedDataset | None:
    """Returns a data set registered by this package; None if other code registered it."""
    found = DatasetCatalog[name] if name in DatasetCatalog else None
    return found if isinstance(found, ScannedDataset) else None
