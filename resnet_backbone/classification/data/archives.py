"""The official ILSVRC2012 archives to folders that ``imagenet.py`` reads, and checks of these."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from resnet_backbone.classification.data.bad_images import BadImageReport, inspect_file
from resnet_backbone.classification.data.imagenet import (
    EXTENSIONS,
    ImageFiles,
    read_flat_folder,
    read_image_folder,
)
from resnet_backbone.runtime.errors import DataError

TRAIN_IMAGES, VAL_IMAGES, CLASSES = 1_281_167, 50_000, 1000  # arXiv 1409.0575, table 2
IMAGES_PER_CLASS = (732, 1300)  # the same table: the smallest and the largest training class
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
CHUNK = 64  # images handed to a process at a time

Progress = Callable[[Iterable], Iterable]


def extract_train(archive: str | os.PathLike, folder: Path, progress: Progress = iter) -> None:
    """Unpacks ``ILSVRC2012_img_train.tar``, a tar of one tar per class, to ``folder/<wnid>/``.

    A class that is there already is left alone, so an interrupted call can be repeated.

    Raises:
        DataError: not such an archive, or a damaged one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open_tar(archive) as outer:
        members = [m for m in outer.getmembers() if m.isfile() and m.name.endswith(".tar")]
        if not members:
            raise DataError(f"{archive} holds no <wnid>.tar: is it ILSVRC2012_img_train.tar?")
        for member in progress(members):
            target = folder / Path(member.name).stem
            if target.is_dir():
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                _extract_images(inner, target)


def _extract_images(tar: tarfile.TarFile, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")  # hidden: not a class folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for member in _images_in(tar):
        _write(tar, member, partial / Path(member.name).name)
    partial.rename(target)


def extract_val(
    archive: str | os.PathLike,
    folder: Path,
    labels: Mapping[str, str],
    flat: bool = False,
    progress: Progress = iter,
) -> None:
    """Unpacks ``ILSVRC2012_img_val.tar`` to ``folder/<wnid>/``, or ``folder/`` if ``flat``.

    With ``flat`` the labels are written beside the folder, to ``<folder>_labels.txt``. An image
    that is there already is left alone.

    Args:
        labels: image name -> wnid, from :func:`devkit_labels` or :func:`read_labels`.

    Raises:
        DataError: not such an archive, or labels that do not belong to it.
    """
    with _open_tar(archive) as tar:
        members = list(_images_in(tar))
        names = {Path(member.name).name for member in members}
        odd = sorted(names ^ set(labels))
        if odd:
            raise DataError(
                f"{archive} has {len(names)} images, there are {len(labels)} labels, and "
                f"{odd[0]} is only in one of them"
            )
        for member in progress(members):
            name = Path(member.name).name
            place = folder if flat else folder / labels[name]
            place.mkdir(parents=True, exist_ok=True)
            target = place / name
            if not target.is_file():
                _write(tar, member, target)
    if flat:
        lines = "".join(f"{name} {labels[name]}\n" for name in sorted(labels))
        labels_file(folder).write_text(lines, encoding="utf-8")


def labels_file(folder: Path) -> Path:
    """Where the labels of a flat folder are."""
    return folder.with_name(f"{folder.name}_labels.txt")


def devkit_labels(archive: str | os.PathLike) -> dict[str, str]:
    """Validation image name -> wnid, from ``ILSVRC2012_devkit_t12.tar.gz``.

    The ground truth in it is a number for each image, the ILSVRC2012_ID of a class. These
    numbers are not the places of the wnids in sorted order, by which networks count classes; the
    kit's ``meta.mat`` says which wnid has which.

    Raises:
        DataError: not such an archive, or scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            "reading the development kit's meta.mat needs scipy: pip install scipy, or give a "
            "file of 'name wnid' lines with --val-labels"
        ) from error
    with _open_tar(archive) as tar:
        meta, truth = (_read_member(tar, archive, name) for name in ("meta.mat", GROUND_TRUTH))
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        numbers = [int(word) for word in truth.split()]
        names = (f"ILSVRC2012_val_{place:08d}.JPEG" for place in range(1, len(numbers) + 1))
        return {name: wnids[number] for name, number in zip(names, numbers, strict=True)}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{archive}: unreadable development kit ({error!r})") from error


def read_labels(path: str | os.PathLike) -> dict[str, str]:
    """Validation image name -> wnid, from a file.

    A ``name wnid`` on each line, or a wnid alone for each image in the order of their names.

    Raises:
        DataError: numbers, which say nothing without the development kit's table.
    """
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    wnids = [words[-1] for words in lines]
    odd = next((wnid for wnid in wnids if not re.fullmatch(r"n\d{8}", wnid)), None)
    if odd is not None or not lines:
        raise DataError(
            f"{path}: {odd or 'nothing'!r} is not a wnid such as n01440764; numbers are in the "
            "development kit's own order: give the kit itself with --devkit"
        )
    names = [
        words[0] if len(words) > 1 else f"ILSVRC2012_val_{place:08d}.JPEG"
        for place, words in enumerate(lines, 1)
    ]
    return dict(zip(names, wnids, strict=True))


def check_counts(counts: Mapping[str, int], images: int, classes: int, where: str) -> list[str]:
    """What is wrong with the number of images of each class; an empty list if nothing is.

    Args:
        images, classes: how many there should be; 0 is not checked.
    """
    problems = []
    if classes and len(counts) != classes:
        problems.append(f"{where} has {len(counts)} classes, {classes} are expected")
    total = sum(counts.values())
    if images and total != images:
        problems.append(f"{where} has {total:,} images, {images:,} are expected")
    if images == TRAIN_IMAGES:
        least, most = IMAGES_PER_CLASS
        for wnid, count in counts.items():
            if not least <= count <= most:
                problems.append(f"{where}: {wnid} has {count} images, {least} to {most} are usual")
    if images == VAL_IMAGES:
        for wnid, count in counts.items():
            if count != 50:
                problems.append(f"{where}: {wnid} has {count} images, not 50")
    return problems


def open_sets(folder: Path) -> dict[str, ImageFiles]:
    """The data sets that are in a folder: "train", "val".

    Raises:
        DataError: neither is there, or one of them cannot be listed.
    """
    sets = {}
    if (folder / "train").is_dir():
        sets["train"] = read_image_folder(folder / "train")
    val = folder / "val"
    if labels_file(val).is_file():
        sets["val"] = read_flat_folder(val, labels_file(val))
    elif val.is_dir():
        sets["val"] = read_image_folder(val)
    if not sets:
        raise DataError(f"{folder} has neither train nor val: give the archives to unpack")
    return sets


def count_problems(
    sets: Mapping[str, ImageFiles], images: Mapping[str, int], classes: int
) -> list[str]:
    """Wrong numbers of images and classes; see :func:`check_counts`.

    Args:
        sets: by name, as :func:`open_sets` gives them.
        images: how many each should have.
    """
    problems = []
    for name, dataset in sets.items():
        counts = Counter(dataset.class_names[label] for label in dataset.labels)
        problems += check_counts(counts, images[name], classes, str(dataset.root))
    if len({dataset.class_names for dataset in sets.values()}) > 1:
        problems.append("train and val have different classes")
    return problems


def read_every_image(sets: Mapping[str, ImageFiles], folder: Path, workers: int) -> BadImageReport:
    """Decodes all images in several processes; what is found goes to ``bad_images.txt``."""
    report = BadImageReport(folder / "bad_images.txt")
    paths = [dataset.name(i) for dataset in sets.values() for i in range(len(dataset))]
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(inspect_file, paths, chunksize=CHUNK)
        for note in filter(None, tqdm(found, total=len(paths), desc="images", unit="img")):
            report.add(note)
    return report


@contextmanager
def _open_tar(path: str | os.PathLike) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: {reason}; is the archive whole?") from error


def _images_in(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        name = Path(member.name).name
        if member.isfile() and not name.startswith("."):
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield member


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Writes one member, whatever path it claims to have, so that it is there whole or not."""
    content = tar.extractfile(member).read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends too early")
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, target)


def _read_member(tar: tarfile.TarFile, archive: str | os.PathLike, name: str) -> bytes:
    for member in tar.getmembers():
        if member.isfile() and Path(member.name).name == name:
            return tar.extractfile(member).read()
    raise DataError(f"{archive} has no {name}: is it ILSVRC2012_devkit_t12.tar.gz?")
