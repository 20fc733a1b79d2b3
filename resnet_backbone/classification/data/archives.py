"""Unpacks the official ILSVRC2012 archives, checks folders, and writes them as tar shards."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from resnet_backbone.classification.data.imagenet import (
    INDEX_NAME,
    ImageFiles,
    read_flat_folder,
    read_image_folder,
    read_lines,
)
from resnet_backbone.classification.data.loader import BadImageReport, inspect_file
from resnet_backbone.runtime.errors import SYSTEM_ERRORS, DataError
from resnet_backbone.runtime.files import naming, whole_file
from resnet_backbone.runtime.images import is_image

TRAIN_IMAGES, VAL_IMAGES, CLASSES = 1_281_167, 50_000, 1000  # arXiv 1409.0575, table 2
USUAL = {TRAIN_IMAGES: (732, 1300), VAL_IMAGES: (50, 50)}  # images per class, same table
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
VAL_NAME = "ILSVRC2012_val_{:08d}.JPEG"
CHUNK = 64  # images handed to a process at a time
SHARD_PATTERN = "shard-%06d.tar"


def extract_train(archive: str | os.PathLike, folder: Path) -> None:
    """Unpacks ``ILSVRC2012_img_train.tar``, a tar of one tar per class, to ``folder/<wnid>/``.

    Existing class folders are skipped. Raises DataError: another archive, or a damaged one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open_tar(archive) as outer:
        members = [m for m in outer.getmembers() if m.isfile() and m.name.endswith(".tar")]
        if not members:
            raise DataError(f"{archive} holds no <wnid>.tar: is it ILSVRC2012_img_train.tar?")
        for member in tqdm(members, desc="training classes", unit="class"):
            target = folder / Path(member.name).stem
            if target.is_dir():
                continue
            partial = target.with_name(f".{target.name}.partial")  # hidden: not a class folder
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in _images_in(inner):
                    _extract(inner, image, partial)
            partial.rename(target)


def extract_val(
    archive: str | os.PathLike, folder: Path, labels: Mapping[str, str], flat: bool = False
) -> None:
    """Unpacks ``ILSVRC2012_img_val.tar`` to ``folder/<wnid>/``, or ``folder/`` if ``flat``.

    With ``flat`` the labels are written beside the folder, to ``<folder>_labels.txt``. Existing
    images are skipped.

    Args:
        labels: image name -> wnid.

    Raises:
        DataError: another or a damaged archive, or labels of other images.
    """
    with _open_tar(archive) as tar:
        members = {Path(member.name).name: member for member in _images_in(tar)}
        odd = sorted(set(members) ^ set(labels))
        if odd:
            raise DataError(
                f"{archive} has {len(members)} images, but there are {len(labels)} labels, and "
                f"{odd[0]} is only in one of them"
            )
        for name, member in tqdm(members.items(), desc="validation images", unit="img"):
            place = folder if flat else folder / labels[name]
            place.mkdir(parents=True, exist_ok=True)
            if not (place / name).is_file():
                _extract(tar, member, place)
    if flat:
        lines = "".join(f"{name} {labels[name]}\n" for name in sorted(labels))
        labels_file(folder).write_text(lines, encoding="utf-8")


def labels_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_labels.txt")


@contextmanager
def _open_tar(path: str | os.PathLike) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        if getattr(error, "errno", None) in SYSTEM_ERRORS:  # perhaps of what is written
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: {reason}; is the archive complete?") from error


def _images_in(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    return (m for m in tar if m.isfile() and is_image(Path(m.name).name))


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Writes a member to a folder atomically, ignoring the folders of its path."""
    name = Path(member.name).name
    temporary = folder / f".{name}.tmp"
    with tar.extractfile(member) as source, naming(temporary), open(temporary, "wb") as target:
        tarfile.copyfileobj(source, target, member.size)  # ReadError if the archive is truncated
    os.replace(temporary, folder / name)


def devkit_labels(archive: str | os.PathLike) -> dict[str, str]:
    """Reads validation image name -> wnid from ``ILSVRC2012_devkit_t12.tar.gz``, or DataError.

    Its ground truth is the ILSVRC2012_ID of each image's class, which ``meta.mat`` maps to a wnid;
    networks count classes in the order of the sorted wnids.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            "reading the development kit's meta.mat needs scipy: pip install scipy, or give a "
            "file of 'name wnid' lines with --val-labels"
        ) from error
    with _open_tar(archive) as tar:
        members = [m for m in tar if Path(m.name).name in (META, GROUND_TRUTH)]
        files = {Path(m.name).name: tar.extractfile(m).read() for m in members}
    try:
        synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        numbers = enumerate(files[GROUND_TRUTH].split(), 1)
        return {VAL_NAME.format(place): wnids[int(number)] for place, number in numbers}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"{archive}: unreadable ({error!r}); is it ILSVRC2012_devkit_t12.tar.gz?"
        ) from error


def read_labels(path: str | os.PathLike) -> dict[str, str]:
    """Reads image name -> wnid from ``name wnid`` lines, or from wnids in the order of the names.

    Raises DataError: numbers, which mean nothing without the development kit's table.
    """
    rows = [line.split() for line in read_lines(path)]
    odd = next((row[-1] for row in rows if not re.fullmatch(r"n\d{8}", row[-1])), None)
    if odd or not rows:
        raise DataError(
            f"{path}: {odd or 'nothing'!r} is not a wnid such as n01440764; numbers are in the "
            "development kit's own order: give the kit itself with --devkit"
        )
    return {
        row[0] if len(row) > 1 else VAL_NAME.format(place): row[-1]
        for place, row in enumerate(rows, 1)
    }


def check_counts(counts: Mapping[str, int], images: int, classes: int, where: str) -> list[str]:
    """Returns problems with the numbers of images per class; 0 images or classes: any number."""
    problems, total = [], sum(counts.values())
    if classes and len(counts) != classes:
        problems.append(f"{where} has {len(counts)} classes instead of {classes}")
    if images and total != images:
        problems.append(f"{where} has {total:,} images instead of {images:,}")
    least, most = USUAL.get(images, (0, total))
    for wnid, count in counts.items():
        if not least <= count <= most:
            problems.append(f"{where}: {wnid} has {count} images; {least} to {most} are usual")
    return problems


def open_sets(folder: Path) -> dict[str, ImageFiles]:
    """Opens the data sets "train" and "val" in a folder; DataError if there is neither."""
    train, val = folder / "train", folder / "val"
    sets = {}
    if train.is_dir():
        sets["train"] = read_image_folder(train)
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
    """Returns problems with the numbers of images and classes; see :func:`check_counts`."""
    problems = []
    for name, dataset in sets.items():
        counts = Counter(dataset.class_names[label] for label in dataset.labels)
        problems += check_counts(counts, images[name], classes, str(dataset.root))
    if len({dataset.class_names for dataset in sets.values()}) > 1:
        problems.append("train and val have different classes")
    return problems


def read_every_image(sets: Mapping[str, ImageFiles], folder: Path, workers: int) -> BadImageReport:
    """Decodes all images in several processes, and reports them in ``bad_images.txt``."""
    report = BadImageReport(folder / "bad_images.txt")
    paths = [dataset.name(i) for dataset in sets.values() for i in range(len(dataset))]
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(inspect_file, paths, chunksize=CHUNK)
        for note in filter(None, tqdm(found, total=len(paths), desc="images", unit="img")):
            report.add(note)
    return report


def write_shards(
    dataset: ImageFiles,
    folder: str | os.PathLike,
    samples_per_shard: int = 1000,
    seed: int | None = 0,
) -> None:
    """Writes a data set as tar shards in WebDataset's layout, and their index.

    Args:
        folder: a new or empty local folder, which is empty until all is written.
        seed: of the random order of samples; None keeps the data set's order.

    Raises:
        DataError: the folder is not empty, or webdataset is not installed.
        BadImage: a file cannot be read (its content is not checked).
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
    with whole_file(folder) as partial:
        partial.mkdir()
        pattern = os.path.join(str(partial).replace("%", "%%"), SHARD_PATTERN)
        with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=1e12, verbose=0) as writer:
            for place, index in enumerate(tqdm(order, desc="images", unit="img")):
                data, label, name = dataset[int(index)]
                extension = os.path.splitext(name)[1].lstrip(".").lower()
                sample = {extension: data, "cls": str(label).encode()}
                writer.write({"__key__": f"{place:09d}", **sample})
        index_shards(partial, dataset.class_names)


def index_shards(folder: str | os.PathLike, class_names: Sequence[str] = ()) -> None:
    """Writes the index of the ``*.tar`` shards in a local folder, whoever wrote them.

    Args:
        class_names: one per class index; by default "class 0", "class 1", ...

    Raises:
        DataError: no shards, a damaged one, a sample without image or class.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} has no .tar files")
    found = [_samples_of(shard) for shard in tqdm(shards, desc="shards", unit="shard")]
    rows = [row for samples in found for row in samples]
    keys, offsets, sizes, labels = zip(*rows, strict=True)
    names = tuple(class_names) or tuple(f"class {i}" for i in range(max(labels) + 1))
    if max(labels) >= len(names):
        raise DataError(f"{folder}: label {max(labels)}, but there are {len(names)} class names")
    with whole_file(folder / INDEX_NAME) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            format=np.array(1),
            shard_names=np.array([shard.name for shard in shards]),
            shard_bytes=np.array([shard.stat().st_size for shard in shards], np.int64),
            shard_counts=np.array([len(samples) for samples in found], np.int64),
            keys=np.array(keys, np.bytes_),
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
            labels=np.array(labels, np.int64),
            class_names=np.array(names),
        )


def _samples_of(shard: Path) -> list[tuple[bytes, int, int, int]]:
    """Returns (file name, offset, size, label) of each sample of a shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                base, _, extension = os.path.basename(member.name).partition(".")
                key = os.path.join(os.path.dirname(member.name), base)
                if extension == "cls":
                    labels[key] = int(tar.extractfile(member).read())
                elif member.isfile() and is_image(f"x.{extension}"):
                    images[key] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{shard}: not a complete shard ({error})") from error
    if not images or set(images) != set(labels):
        odd = min(set(images) ^ set(labels), default="none")
        raise DataError(
            f"{shard}: every sample needs <key>.<image extension> and <key>.cls; not so: {odd}"
        )
    return [
        (os.fsencode(member.name), member.offset_data, member.size, labels[key])
        for key, member in images.items()
    ]
