"""ImageNet and data in the same layouts: class folders, a flat folder with labels, tar shards."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np

from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import EXTENSIONS, BadImage, list_images, read_bytes
from resnet_backbone.weights.preprocessing import one_line

INDEX_NAME = "index.npz"
# lines of class lists, with or without an index: a whole name; a word before a description
NAME, WORD = re.compile(r"(.+?)(?:\s+(\d+))?$"), re.compile(r"(\S+)(?:\s+(\d+)(?!\S))?")
WNID = re.compile(r"n\d+")
# a line of a label list, whose image has one of the known extensions
LABELED = re.compile(rf"(.*({'|'.join(map(re.escape, EXTENSIONS))}))\s+(.+)", re.IGNORECASE)


class EncodedSample(NamedTuple):
    data: bytes  # a whole image file
    label: int
    name: str  # path of the file, or in a shard


class ImageFiles:
    """A map-style data set of image files below a folder, and their classes.

    Attributes:
        labels: int64 (N,).
        class_names: one per class index.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        names: Sequence[str],
        labels: Sequence[int],
        class_names: Sequence[str],
    ):
        self.root = Path(root)
        # an array, since a list of 1.3 million strings would be copied into every forked worker
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    @property
    def samples(self) -> list[tuple[Path, int]]:
        """(path, label) of each image."""
        return [(Path(self.name(i)), int(self.labels[i])) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> EncodedSample:
        name = self.name(index)
        return EncodedSample(read_bytes(name), int(self.labels[index]), name)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[index]))


class TarShards:
    """A map-style data set of tar shards that fsspec reads: a folder, ``s3://``, ``https://``.

    Shards are in WebDataset's layout. Their index has the offset of each image, so a sample is one
    range request. With ``simplecache::`` before the URL, shards are copied to this machine on first
    use. Raises DataError: there is no index of this package.

    Attributes:
        labels: int64 (N,).
        class_names: one per class index.
        group_sizes: samples of each shard, see ``SampleStream``.
    """

    def __init__(self, url: str | os.PathLike):
        self.url = os.fspath(url).rstrip("/")
        index = _read_index(self.url)
        self._shards = index["shard_names"]
        self.group_sizes = tuple(index["shard_counts"].tolist())
        self._ends = np.cumsum(self.group_sizes)
        self._keys, self._offsets, self._sizes = index["keys"], index["offsets"], index["sizes"]
        self.labels = index["labels"].astype(np.int64)
        self.class_names = tuple(index["class_names"].tolist())

    def __len__(self) -> int:
        return len(self.labels)

    def _shard(self, index: int) -> str:
        return f"{self.url}/{self._shards[np.searchsorted(self._ends, index, side='right')]}"

    def name(self, index: int) -> str:
        return f"{self._shard(index)}/{os.fsdecode(self._keys[index])}"

    def __getitem__(self, index: int) -> EncodedSample:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:  # fsspec caches file systems in each process
            filesystem, path = fsspec.url_to_fs(self._shard(index))
            data = filesystem.cat_file(path, start=offset, end=offset + size)
        except Exception as error:  # libraries of remote storage raise errors of many types
            reason = getattr(error, "strerror", None) or one_line(error)
            raise BadImage(self.name(index), reason) from error
        if len(data) > size:
            shard = self._shard(index)
            raise DataError(f"{shard}: the server sends whole shards: give simplecache::{shard}")
        if len(data) < size:
            raise BadImage(self.name(index), "the shard is shorter than its index says")
        return EncodedSample(data, int(self.labels[index]), self.name(index))


EncodedDataset = ImageFiles | TarShards


def _read_index(url: str) -> dict[str, np.ndarray]:
    try:
        with fsspec.open(f"{url}/{INDEX_NAME}", "rb") as file:
            content = io.BytesIO(file.read())
        with np.load(content, allow_pickle=False) as arrays:
            index = dict(arrays)
        if int(index["format"]) != 1:
            raise ValueError("another version wrote it")
        return index
    except ImportError as error:
        raise DataError(f"{url} needs a library: {error} (pip install it)") from error
    except Exception as error:  # fsspec, numpy and zipfile raise errors of many types
        raise DataError(
            f"{url}: {INDEX_NAME} cannot be read ({error}); write it with prepare-data shards index"
        ) from error


def read_image_folder(
    root: str | os.PathLike, classes: Mapping[str, int] | None = None, num_classes: int = 0
) -> ImageFiles:
    """Lists ``root/<class>/<image>``, such as ``imagenet/train/n01440764/n01440764_18.JPEG``.

    Args:
        classes: class name -> index, for a subset of classes with the indices of the full set. By
            default the sorted class names are counted from 0.
        num_classes: of the full set; by default as many as ``classes`` needs.

    Raises:
        DataError: a missing folder, no class folders, an empty one, or one that is not in
            ``classes``.
    """
    root = _existing_folder(root)
    folders = class_folders(root)
    if not folders:
        raise DataError(
            f"{root} has no class folders: ROOT/<class>/<image> is expected; for a flat folder "
            "give its label list"
        )
    if classes is None:
        classes = {name: index for index, name in enumerate(folders)}
    names, labels = [], []
    for folder in folders:
        if folder not in classes:
            raise DataError(f"{root / folder} is not in the class list: add it or move it away")
        files = list_images(root / folder)
        if not files:
            raise DataError(f"{root / folder} holds no images: fill it or remove it")
        names += [os.path.join(folder, file) for file in files]
        labels += [classes[folder]] * len(files)
    return ImageFiles(root, names, labels, name_classes(classes, num_classes))


def class_folders(root: str | os.PathLike) -> list[str]:
    """Returns the sorted names of the folders in ``root``, without hidden ones; none for ""."""
    return sorted(path.name for path in Path(root).glob("[!.]*") if root and path.is_dir())


def read_flat_folder(
    root: str | os.PathLike,
    label_file: str | os.PathLike,
    classes: Mapping[str, int] | None = None,
    num_classes: int = 0,
) -> ImageFiles:
    """Lists a folder of images whose classes are in a file of ``name label`` lines.

    Args:
        label_file: a line for each image; the labels are class names (wnids), or class indices. A
            number that is a class name is no index.
        classes, num_classes: see :func:`read_image_folder`.

    Raises:
        DataError: a missing folder or file, an unreadable line, an unknown class, names and indices
            in one file, or an image that is listed twice, missing or not listed.
    """
    root = _existing_folder(root)
    entries = _read_labels(label_file)
    used = set(entries.values())
    if classes is None:
        in_order = sorted(label for label in used if not label.isdecimal())
        classes = {name: index for index, name in enumerate(in_order)}
    found, listed = set(list_images(root)), set(entries)
    if found != listed:
        odd = min(found ^ listed)
        where = f"listed in {label_file}" if odd in listed else f"in {root}"
        raise DataError(
            f"{root} and {label_file} differ in {len(found ^ listed)} images; the first, {odd}, is "
            f"only {where}"
        )
    numbers = {label for label in used - set(classes) if label.isdecimal()}
    if unknown := used - set(classes) - numbers:
        raise DataError(
            f"{label_file}: {min(unknown)} is none of the {len(classes)} classes (of a list, the "
            "weights, or the training images), such as "
            f"{min(classes)}: name the classes alike, or number them"
        )
    if numbers and numbers != used:
        raise DataError(
            f"{label_file}: {min(numbers)} is a class index, {min(used - numbers)} a class name: "
            "write names for all images, or indices for all"
        )
    names = sorted(entries)
    labels = [int(entries[name]) if numbers else classes[entries[name]] for name in names]
    known = name_classes(classes, num_classes) or name_classes({}, num_classes or max(labels) + 1)
    if max(labels) >= len(known):
        raise DataError(f"{label_file}: label {max(labels)}, but there are {len(known)} classes")
    return ImageFiles(root, names, labels, known)


def read_class_list(
    path: str | os.PathLike,
    root: str | os.PathLike | None = None,
    label_file: str | os.PathLike | None = None,
) -> dict[str, int]:
    """Reads class name -> index from lines of ``class index``, or of a class (counted from 0).

    A name may have spaces. What follows a wnid, or a word that is a class of the data, is ignored.
    So the usual ``LOC_synset_mapping.txt`` can be read.

    Args:
        root, label_file: the data, if known: class folders, or a flat folder and its labels.

    Raises:
        DataError: a missing file, unclear lines, or a class or an index that is listed twice.
    """
    used = set(_read_labels(label_file).values() if label_file else class_folders(root or ""))
    lines = read_lines(path)
    whole, first = ([form.match(line).groups() for line in lines] for form in (NAME, WORD))
    if whole == first or all(WNID.fullmatch(word) for word, _ in first):
        rows = first
    else:
        rows = next((rows for rows in (whole, first) if _is_certain(rows, used)), ())
    numbered = [number is not None for _, number in rows]
    if not rows or any(numbered) != all(numbered):
        raise DataError(
            f"{path}: write 'class index' on every line, or only a class, of one word, on every "
            "line"
        )
    indices = [int(number) if number else i for i, (_, number) in enumerate(rows)]
    classes = {name: index for (name, _), index in zip(rows, indices, strict=True)}
    if len(classes) != len(rows) or len(set(indices)) != len(rows):
        raise DataError(f"{path}: a class or an index is listed twice")
    return classes


def _is_certain(rows: Sequence[tuple[str, str | None]], used: set[str]) -> bool:
    """Returns whether a class list is read rightly: it names the data's classes, or has indices."""
    names = {name for name, _ in rows}
    return (bool(used) and used <= names) or all(number for _, number in rows)


def check_same_classes(train: ImageFiles, val: ImageFiles) -> None:
    """Raises DataError unless training and validation have the same classes and indices."""
    odd = sorted(set(train.class_names) ^ set(val.class_names))
    if train.class_names != val.class_names:
        raise DataError(
            f"training ({train.root}) and validation ({val.root}) need the same classes, or one "
            f"class list; only one of them has {', '.join(odd[:3])}"
        )


def name_classes(classes: Mapping[str, int], num_classes: int = 0) -> tuple[str, ...]:
    """Returns a name for every index, "class 7" if ``classes`` has none."""
    needed = max(classes.values(), default=-1) + 1
    if num_classes and num_classes < needed:
        raise DataError(f"the class list has index {needed - 1}, but num_classes is {num_classes}")
    names = [f"class {index}" for index in range(num_classes or needed)]
    for name, index in classes.items():
        names[index] = name
    return tuple(names)


def _existing_folder(root: str | os.PathLike) -> Path:
    if not os.path.isdir(root):
        raise DataError(
            f"{root}: no such folder; give one with a folder of images for each class "
            "(prepare-data imagenet builds ImageNet's)"
        )
    return Path(root)


def read_lines(path: str | os.PathLike) -> list[str]:
    """Reads the non-empty lines of a text file, stripped; DataError if it is not text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from error
    return [line.strip() for line in lines if line.strip()]


def _read_labels(path: str | os.PathLike) -> dict[str, str]:
    lines = read_lines(path)
    if not lines:
        raise DataError(f"{path} is empty: it needs a line 'name label' for each image")
    if all(line.isdecimal() for line in lines):
        raise DataError(
            f"{path}: numbers without names are the development kit's ILSVRC2012_IDs, whose order "
            "is not that of the sorted wnids: let prepare-data imagenet --devkit convert them, "
            "or write one 'name wnid' per line"
        )
    entries: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        found = LABELED.fullmatch(line)
        if not found:
            raise DataError(f"{path}: line {number} is not 'image label', as 'a.jpg cat': {line!r}")
        name, _, label = found.groups()
        if name in entries:
            raise DataError(f"{path}: {name} is listed twice")
        entries[name] = label
    return entries
