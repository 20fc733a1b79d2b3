"""ImageNet and anything laid out like it: folders of classes, or a flat folder and a list."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_backbone.classification.data.decode import read_bytes
from resnet_backbone.runtime.errors import DataError

EXTENSIONS = frozenset(
    ".jpeg .jpg .jpe .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .pbm".split()
)
DEVKIT_HINT = (
    "numbers alone are the development kit's ILSVRC2012_IDs, whose order is not that of the "
    "sorted wnids: let tools/prepare_data.py imagenet --devkit convert them, or write one "
    "'name wnid' a line"
)


class EncodedSample(NamedTuple):
    """A sample as it is stored.

    Attributes:
        data: a whole image file.
        label: class index.
        name: path, or the place in a shard.
    """

    data: bytes
    label: int
    name: str


class ImageFiles:
    """Image files and their classes, map-style.

    The names are kept as one array of bytes: a list of 1.3 million strings would be copied page
    by page into every worker that counts references to them.

    Attributes:
        root: the folder.
        labels: int64 (N,).
        class_names: one per class index.

    Args:
        names: paths below ``root``.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        names: Sequence[str],
        labels: Sequence[int],
        class_names: Sequence[str],
    ):
        self.root = Path(root)
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def samples(self) -> list[tuple[Path, int]]:
        """(path, label) of each image."""
        return [(Path(self.name(i)), int(self.labels[i])) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> EncodedSample:
        """Reads a file; BadImage where that fails."""
        name = self.name(index)
        return EncodedSample(read_bytes(name), int(self.labels[index]), name)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[index]))


def read_image_folder(
    root: str | os.PathLike, classes: Mapping[str, int] | None = None, num_classes: int = 0
) -> ImageFiles:
    """Lists ``root/<class>/<image>``, such as ``imagenet/train/n01440764/n01440764_18.JPEG``.

    Args:
        classes: class name -> index, for a selection that keeps the indices of the whole; see
            :func:`read_class_list`. By default the sorted class names are counted from 0.
        num_classes: of the whole; by default as many as ``classes`` needs.

    Raises:
        DataError: missing folder, no class folders, an empty one, or one that is not in
            ``classes``.
    """
    root = _existing_folder(root)
    folders = sorted(entry.name for entry in os.scandir(root) if _is_class_folder(entry))
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


def read_flat_folder(
    root: str | os.PathLike,
    label_file: str | os.PathLike,
    classes: Mapping[str, int] | None = None,
    num_classes: int = 0,
) -> ImageFiles:
    """Lists a folder of images whose classes are in a file of ``name label`` lines.

    Args:
        label_file: a line for each image; the label is a class name (wnid) or a class index.
        classes: class name -> index: of the training set, or by :func:`read_class_list`. By
            default the sorted class names of the list are counted from 0.
        num_classes: of the whole; by default as many as are needed.

    Raises:
        DataError: missing folder or file, an unreadable line, an unknown class, an image that is
            listed twice or missing, or one that is not listed.
    """
    root = _existing_folder(root)
    entries = _read_label_lines(Path(label_file))
    wnids = {label for label in entries.values() if not label.isdigit()}
    if classes is None:
        classes = {name: index for index, name in enumerate(sorted(wnids))}
    found, listed = set(list_images(root)), set(entries)
    if listed - found:
        raise DataError(
            f"{label_file} lists {len(listed - found)} images that are not in {root}, the first "
            f"is {min(listed - found)}"
        )
    if found - listed:
        raise DataError(
            f"{root} has {len(found - listed)} images that {label_file} does not list, the "
            f"first is {min(found - listed)}"
        )
    unknown = wnids - set(classes)
    if unknown:
        raise DataError(f"{label_file}: class {min(unknown)} is not in the class list")
    names = sorted(entries)
    labels = [int(entries[n]) if entries[n].isdigit() else classes[entries[n]] for n in names]
    known = name_classes(classes, num_classes)
    if max(labels) >= len(known):
        if known:
            raise DataError(
                f"{label_file}: label {max(labels)}, but there are {len(known)} classes"
            )
        known = name_classes({}, num_classes or max(labels) + 1)
    return ImageFiles(root, names, labels, known)


def read_class_list(path: str | os.PathLike) -> dict[str, int]:
    """Reads class name -> index: a ``wnid index`` on each line, or a wnid on each (counted from 0).

    What follows on a line, such as a readable name, is not read; so the usual
    ``LOC_synset_mapping.txt`` is such a list.
    """
    path = Path(path)
    lines = [line.split() for line in _read_text(path).splitlines() if line.strip()]
    numbered = [len(words) > 1 and words[1].isdigit() for words in lines]
    if not lines or any(numbered) != all(numbered):
        raise DataError(f"{path}: write 'wnid index' on every line, or a wnid alone on every line")
    indices = [int(words[1]) if numbered[0] else i for i, words in enumerate(lines)]
    classes = {words[0]: index for words, index in zip(lines, indices, strict=True)}
    if len(classes) != len(lines) or len(set(indices)) != len(lines):
        raise DataError(f"{path}: a class or an index stands there twice")
    return classes


def class_indices(dataset: ImageFiles) -> dict[str, int]:
    """Class name -> index of a data set, to read another one (validation) with."""
    return {name: index for index, name in enumerate(dataset.class_names)}


def check_same_classes(train: ImageFiles, val: ImageFiles) -> None:
    """DataError unless training and validation have the same classes with the same indices."""
    if train.class_names == val.class_names:
        return
    only_train = sorted(set(train.class_names) - set(val.class_names))
    only_val = sorted(set(val.class_names) - set(train.class_names))
    parts = [
        f"{len(names)} only in {where} (the first is {names[0]})"
        for names, where in ((only_train, "training"), (only_val, "validation"))
        if names
    ]
    raise DataError(
        f"training ({train.root}) and validation ({val.root}) have different classes: "
        f"{', '.join(parts) or 'their order differs'}; both need the same, or one class list"
    )


def list_images(folder: Path) -> list[str]:
    """Sorted names of the image files directly in a folder, by extension; hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            and entry.is_file()
        )


def name_classes(classes: Mapping[str, int], num_classes: int = 0) -> tuple[str, ...]:
    """A name for every index: "class 7" where ``classes`` has none."""
    needed = max(classes.values(), default=-1) + 1
    if num_classes and num_classes < needed:
        raise DataError(f"the class list has index {needed - 1}, but num_classes is {num_classes}")
    names = [f"class {index}" for index in range(num_classes or needed)]
    for name, index in classes.items():
        names[index] = name
    return tuple(names)


def _existing_folder(root: str | os.PathLike) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; tools/prepare_data.py imagenet builds it")
    return root


def _is_class_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: {reason}") from error


def _read_label_lines(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in _read_text(path).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path} is empty: it needs a line 'name label' for each image")
    if all(re.fullmatch(r"\d+", line) for line in lines):
        raise DataError(f"{path}: {DEVKIT_HINT}")
    return _unique_pairs(path, lines)


def _unique_pairs(path: Path, lines: Iterable[str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ") if " " in line else line.rpartition("\t")
        name, label = name.strip(), label.strip()
        if not name or not label:
            raise DataError(f"{path}: line {number} is not 'name label': {line!r}")
        if name in entries:
            raise DataError(f"{path}: {name} is listed twice")
        entries[name] = label
    return entries
