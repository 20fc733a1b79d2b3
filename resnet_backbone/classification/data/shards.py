"""Tar shards in WebDataset's layout, with an index that makes them a map-style data set.

A shard is a tar of ``<key>.<image extension>`` and ``<key>.cls`` (the class index as text), as
the webdataset library writes and reads them. Streaming readers know a position in a shard only
by counting; here an index beside the shards says where each image's bytes lie, so that epochs
are exact and a run resumes at any sample. Shards may lie wherever fsspec reads: a folder,
``s3://``, ``gs://``, ``https://``.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np

from resnet_backbone.classification.data.decode import BadImage
from resnet_backbone.classification.data.imagenet import EXTENSIONS, EncodedSample, ImageFiles
from resnet_backbone.runtime.errors import DataError

INDEX_NAME = "index.npz"
SHARD_PATTERN = "shard-%06d.tar"


class TarShards:
    """Images in tar shards, map-style.

    Attributes:
        labels: int64 (N,).
        class_names: one per class index.
        group_sizes: samples of each shard, for ``SampleStream``: shards are shuffled, and samples
            within some shards, so that reading stays near.

    Args:
        url: folder of the shards and their index, any that fsspec reads.
        cache: a local folder that remote shards are copied to when they are first needed (it must
            hold all of them). Without it each sample is one request for a range of bytes.

    Raises:
        DataError: no index, or one that is not ours.
    """

    def __init__(self, url: str | os.PathLike, cache: str | os.PathLike | None = None):
        self.url = os.fspath(url).rstrip("/")
        self.cache = None if cache is None else Path(cache)
        index = _read_index(self.url)
        self.shard_names = tuple(str(name) for name in index["shard_names"])
        self._shard_bytes = index["shard_bytes"]
        self.group_sizes = tuple(int(count) for count in index["shard_counts"])
        self._ends = np.cumsum(self.group_sizes)
        self._keys, self._offsets, self._sizes = index["keys"], index["offsets"], index["sizes"]
        self.labels = index["labels"].astype(np.int64)
        self.class_names = tuple(str(name) for name in index["class_names"])
        self._local = "://" not in self.url
        self._opened: dict[tuple[int, int], int] = {}  # (process, shard) -> file descriptor

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self.url}/{self.shard_names[shard]}/{os.fsdecode(self._keys[index])}"

    def __getitem__(self, index: int) -> EncodedSample:
        """Reads one image's bytes; BadImage where the shard does not hold them."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            if self._local or self.cache is not None:
                data = os.pread(self._file(shard), size, offset)
            else:
                data = _cat(f"{self.url}/{self.shard_names[shard]}", offset, offset + size)
        except OSError as error:
            raise BadImage(self.name(index), error.strerror or str(error)) from error
        if len(data) != size:
            raise BadImage(self.name(index), "the shard is shorter than its index says")
        return EncodedSample(data, int(self.labels[index]), self.name(index))

    def _file(self, shard: int) -> int:
        """A descriptor of a shard's file; ``pread`` lets threads share it."""
        key = os.getpid(), shard
        if key not in self._opened:
            if len(self._opened) >= 64:
                os.close(self._opened.pop(next(iter(self._opened))))
            self._opened[key] = os.open(self._local_path(shard), os.O_RDONLY)
        return self._opened[key]

    def _local_path(self, shard: int) -> Path:
        name = self.shard_names[shard]
        if self._local:
            return Path(self.url) / name
        path = self.cache / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{name}.{os.getpid()}.tmp")
            filesystem, remote = fsspec.url_to_fs(f"{self.url}/{name}")
            try:
                filesystem.get_file(remote, os.fspath(temporary))
                if temporary.stat().st_size != self._shard_bytes[shard]:
                    raise OSError(f"{self.url}/{name}: its size differs from the index")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}

    def __del__(self):
        for (process, _), descriptor in getattr(self, "_opened", {}).items():
            if process == os.getpid():
                os.close(descriptor)


def write_shards(
    dataset: ImageFiles,
    folder: str | os.PathLike,
    samples_per_shard: int = 1000,
    seed: int | None = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Writes a data set as shards and their index.

    Args:
        folder: a new or empty local folder.
        seed: of the order in which samples are dealt to the shards; None keeps the data set's.
            Shuffled samples make neighboring shards as good as the whole for mixing.
        progress: wraps the iteration over the samples, such as ``tqdm``.

    Raises:
        DataError: the folder is not empty, or webdataset is not installed.
        BadImage: a file cannot be read (its content is not looked at).
    """
    try:
        from webdataset import ShardWriter
    except ImportError as error:
        raise DataError("writing shards needs webdataset: pip install webdataset") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: give a new folder for the shards")
    order = np.arange(len(dataset))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    pattern = os.path.join(folder, SHARD_PATTERN).replace("%", "%%").replace("%%06d", "%06d")
    with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=1e12, verbose=0) as writer:
        for place, index in enumerate(progress(order)):
            data, label, name = dataset[int(index)]
            extension = os.path.splitext(name)[1].lstrip(".").lower()
            writer.write({"__key__": f"{place:09d}", extension: data, "cls": str(label).encode()})
    index_shards(folder, dataset.class_names)


def index_shards(
    folder: str | os.PathLike,
    class_names: Sequence[str] = (),
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Writes the index of the ``*.tar`` in a local folder, ours or anyone's in this layout.

    Args:
        class_names: one per class index; by default "class 0", "class 1", ...

    Raises:
        DataError: no shards, a damaged one, a sample without image or class.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} has no .tar files")
    rows: list[tuple[bytes, int, int, int]] = []
    counts = []
    for shard in progress(shards):
        found = list(_samples_of(shard))
        rows += found
        counts.append(len(found))
    keys, offsets, sizes, labels = zip(*rows, strict=True)
    names = tuple(class_names) or tuple(f"class {i}" for i in range(max(labels) + 1))
    if max(labels) >= len(names):
        raise DataError(f"{folder}: label {max(labels)}, but there are {len(names)} class names")
    content = io.BytesIO()
    np.savez(
        content,
        format=np.array(1),
        shard_names=np.array([shard.name for shard in shards]),
        shard_bytes=np.array([shard.stat().st_size for shard in shards], np.int64),
        shard_counts=np.array(counts, np.int64),
        keys=np.array(keys, np.bytes_),
        offsets=np.array(offsets, np.int64),
        sizes=np.array(sizes, np.int64),
        labels=np.array(labels, np.int64),
        class_names=np.array(names),
    )
    temporary = folder / f"{INDEX_NAME}.{os.getpid()}.tmp"
    temporary.write_bytes(content.getvalue())
    os.replace(temporary, folder / INDEX_NAME)


def _samples_of(shard: Path) -> Iterator[tuple[bytes, int, int, int]]:
    """(file name, offset, size, label) of each sample of a shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                base, _, extension = os.path.basename(member.name).partition(".")
                key = os.path.join(os.path.dirname(member.name), base)
                if extension == "cls":
                    labels[key] = int(tar.extractfile(member).read())
                elif member.isfile() and f".{extension.lower()}" in EXTENSIONS:
                    images[key] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{shard}: not a whole shard ({error})") from error
    if not images or set(images) != set(labels):
        odd = min(set(images) ^ set(labels), default="")
        raise DataError(
            f"{shard}: every sample needs <key>.<image extension> and <key>.cls"
            + (f", {odd} has only one of them" if odd else ", there are none")
        )
    for key, member in images.items():
        yield os.fsencode(member.name), member.offset_data, member.size, labels[key]


def _read_index(url: str) -> dict[str, np.ndarray]:
    try:
        with fsspec.open(f"{url}/{INDEX_NAME}", "rb") as file:
            content = file.read()
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"{url}: {INDEX_NAME} cannot be read ({error}); write it with "
            "tools/prepare_data.py shards index"
        ) from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            index = dict(file)
        known = int(index["format"]) == 1
    except Exception as error:  # numpy and zipfile raise errors of many types
        raise DataError(f"{url}/{INDEX_NAME} is damaged: write it again") from error
    if not known:
        raise DataError(f"{url}/{INDEX_NAME} was written by another version: write it again")
    return index


def _cat(url: str, start: int, end: int) -> bytes:
    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.cat_file(path, start=start, end=end)
