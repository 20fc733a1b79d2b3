"""The official archives of VOC and COCO: published sizes and counts, and unpacking.

    ROOT/VOC2007  ROOT/VOC2012  ROOT/coco/annotations  ROOT/coco/train2017 ...

ROOT is the value of the environment variable DETECTRON2_DATASETS. Files are written atomically and
existing files are kept, so an interrupted call can be repeated.

Sizes and SHA-256 sums of the archives: TensorFlow Datasets (tensorflow/datasets on GitHub,
tensorflow_datasets/url_checksums/voc.txt and coco.txt). Images and boxes of the splits: Liu et
al., Deep Learning for Generic Object Detection: A Survey (IJCV 2020, arXiv 1809.02165), Table 3;
the test sets: TensorFlow Datasets' catalog, and for COCO's test-dev Ultralytics' coco.yaml.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import BLOCK

DAMAGE = (tarfile.TarError, zipfile.BadZipFile)
DAMAGE += (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)  # from compressed archives
DISK_BLOCK = 4096  # file sizes on disk are multiples of this
# name, size in bytes, SHA-256
_TABLE = """
VOCtrainval_06-Nov-2007.tar 460032000
    7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508
VOCtest_06-Nov-2007.tar 451020800 6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892
VOCtrainval_11-May-2012.tar 1999639040
    e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb
VOC2012test.tar 1850626560 f08582b1935816c5eab3bbb1eb6d06201a789eaa173cdf1cf400c26f0cac2fb3
train2014.zip 13510573713 ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775
val2014.zip 6645013297 fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0
test2014.zip 6660437059 ead40c62230cb2cf70ff4c8b4c70abdc260a7556e77b3282621d06d8e2e35bdf
test2015.zip 13270587935 1a2aa896b81140a850a78fa8bff07d455698d2abf364ff05721763458a8101ca
train2017.zip 19336861798 69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929
val2017.zip 815585330 4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05
test2017.zip 6646970404 c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba
annotations_trainval2014.zip 252872794
    031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009
annotations_trainval2017.zip 252907541
    113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268
image_info_test2014.zip 763464 7cecc66f6b09c1671c1896a1bcc1f35eb09b7fcf00a5c18420a5f0f5983dc8c9
image_info_test2015.zip 1887164 cf400242f8497257fb8a3e369bc766491f4a7e42625fb3d72555504e9a8c3b18
image_info_test2017.zip 1144034 e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8
"""
_WORDS = iter(_TABLE.split())
ARCHIVES = {
    name: (int(size), digest) for name, size, digest in zip(_WORDS, _WORDS, _WORDS, strict=True)
}
"""Name -> (size in bytes, SHA-256 as hexadecimal digits)."""


class Counts(NamedTuple):
    """Contents of a split; None if annotations are not public or no count is published."""

    images: int  # listed in the split
    boxes: int | None = None  # without difficult ones (VOC), with crowds (COCO)
    difficult: int | None = None  # VOC only


COUNTS = {
    ("VOC2007", "train"): Counts(2501, 6301, 7844 - 6301),
    ("VOC2007", "val"): Counts(2510, 6307, 7818 - 6307),
    ("VOC2007", "trainval"): Counts(5011, 12608, 7844 + 7818 - 12608),
    ("VOC2007", "test"): Counts(4952, 24640 - 12608),  # TensorFlow Datasets: 24,640 in the year
    ("VOC2012", "train"): Counts(5717, 13609, 15774 - 13609),
    ("VOC2012", "val"): Counts(5823, 13841, 15787 - 13841),
    ("VOC2012", "trainval"): Counts(11540, 27450, 15774 + 15787 - 27450),
    ("VOC2012", "test"): Counts(10991),
    ("coco", "instances_train2014"): Counts(82783, 604907),
    ("coco", "instances_val2014"): Counts(40504, 291875),
    ("coco", "instances_train2017"): Counts(118287, 860001),
    ("coco", "instances_val2017"): Counts(5000, 36781),
    ("coco", "image_info_test2014"): Counts(40775),
    ("coco", "image_info_test2015"): Counts(81434),
    ("coco", "image_info_test2017"): Counts(40670),
    ("coco", "image_info_test-dev2017"): Counts(20288),
}
"""(folder, split) -> counts; VOC's splits are files in ImageSets/Main, COCO's in annotations."""


def archive_of(folder: str, split: str, images: bool = False) -> str:
    """Returns the official archive that contains a split, or "".

    Args:
        folder, split: as in :data:`COUNTS`; for COCO any instances_* and image_info_*.
        images: return the archive of the images, which COCO keeps separate from annotations.
    """
    if folder == "VOC2007":
        name = "VOCtest_06-Nov-2007.tar" if split == "test" else "VOCtrainval_06-Nov-2007.tar"
    elif folder == "VOC2012":
        name = "VOC2012test.tar" if split == "test" else "VOCtrainval_11-May-2012.tar"
    elif images:
        name = f"{coco_image_folder(split)}.zip"
    elif split.startswith("image_info_"):
        name = f"image_info_{coco_image_folder(split)}.zip"
    else:
        name = f"annotations_trainval{split[-4:]}.zip"
    return name if (folder, split) in COUNTS and name in ARCHIVES else ""


def coco_image_folder(split: str) -> str:
    """Returns the image folder of an annotation file, by the names of COCO and Detectron2.

    "instances_train2017" -> "train2017", "image_info_test-dev2017" -> "test2017",
    "instances_valminusminival2014" -> "val2014", "instances_val2017_100" -> "val2017".
    """
    name = split.removeprefix("instances_").removeprefix("image_info_").removesuffix("_100")
    for variant, plain in (("test-dev", "test"), ("valminusminival", "val"), ("minival", "val")):
        name = name.replace(variant, plain)
    return name


class Member(NamedTuple):
    """A file in an archive."""

    path: PurePosixPath  # below the folder of data sets
    size: int  # in bytes
    open: Callable[[], IO[bytes]]


def verify_archive(path: str | os.PathLike, unverified: bool = False) -> str:
    """Compares an archive with its published size and checksum; returns a line with the outcome.

    Raises:
        DataError: no such file, or not the official archive unless `unverified` is set.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such archive")
    size = path.stat().st_size
    official_size, official = ARCHIVES.get(path.name, (size, ""))
    if size != official_size and not unverified:
        mend = "download it again"
        if size < official_size:
            mend = "the download stopped early: go on with it (wget -c, curl -C -)"
        raise DataError(
            f"{path} has {size:,} bytes, but the official archive has {official_size:,}: {mend}; "
            "--unverified accepts it"
        )
    digest = hashlib.sha256()
    options = dict(total=size, desc=f"checksum of {path.name}", disable=None)
    with open(path, "rb") as plain, tqdm.wrapattr(plain, "read", **options) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    sha256 = digest.hexdigest()
    if not official:
        return f"{path.name}: sha256 {sha256}; none is published for a file of this name"
    if sha256 == official:
        return f"{path.name}: sha256 is the official archive's"
    found = f"sha256 {sha256}, the official archive has {official}"
    if unverified:
        return f"{path.name}: NOT the official archive: {found}"
    raise DataError(f"{path} has {found}: download it again; --unverified accepts it")


def unpack(path: str | os.PathLike, root: str | os.PathLike, kind: str) -> str:
    """Unpacks an archive below a folder of data sets.

    All names and the free disk space are checked before the first file is written. Links and
    hidden files are skipped.

    Args:
        path: tar (compressed or not) or zip.
        kind: "voc" (VOCdevkit/VOC2007/... goes to VOC2007/...) or "coco" (to coco/...).

    Returns:
        A message: how many files were written, how many existed, and which have another size.

    Raises:
        DataError: the archive is damaged, is not of this kind, or has names that lead out of the
            folder, or there is too little space.
    """
    path, root = Path(path), Path(root)
    missing, kept, differing = [], 0, []
    with _members(path, kind) as members:
        for member in members:
            target = root / member.path
            if not target.exists():
                missing.append(member)
            elif target.stat().st_size == member.size:
                kept += 1
            else:
                differing.append(target)
        _check_space(missing, root)
        for member in tqdm(missing, desc=f"unpacking {path.name}", unit="file", disable=None):
            _write(member, root / member.path)
    done = f"{path}: {len(missing):,} files unpacked, {kept:,} were there"
    if differing:
        done += (
            f"\n{path}: {len(differing):,} files were there with another size and stay as they "
            f"are, the first is {differing[0]}; delete them to unpack them again"
        )
    return done


def _check_space(members: list[Member], root: Path) -> None:
    place = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    needed = sum(-(-member.size // DISK_BLOCK) * DISK_BLOCK for member in members)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{root}: {len(members):,} files need {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB "
            "are free: free some space, or give another folder"
        )


def _write(member: Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with member.open() as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, BLOCK)
        if temporary.stat().st_size != member.size:
            raise EOFError(f"{member.path} ends too early")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _members(path: Path, kind: str) -> Iterator[list[Member]]:
    """Opens an archive, checks all names, and yields its files."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield _place(path, kind, _zip_files(archive))
        else:
            with tarfile.open(path, "r:*") as archive:
                yield _place(path, kind, _tar_files(archive))
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} is damaged or not an archive ({reason}): download it again"
        ) from error
    except RuntimeError as error:  # zipfile: a password, an unknown compression
        raise DataError(f"{path} cannot be unpacked ({error})") from error


def _zip_files(archive: zipfile.ZipFile) -> Iterator[tuple]:
    link = 0o120000  # file type in the POSIX mode, the upper half of external_attr
    for info in archive.infolist():
        if not info.is_dir() and info.external_attr >> 16 & 0o170000 != link:
            yield info.filename, info.file_size, partial(archive.open, info)


def _tar_files(archive: tarfile.TarFile) -> Iterator[tuple]:
    for info in archive:
        if info.isfile():
            yield info.name, info.size, partial(archive.extractfile, info)
    archive.fileobj.seek(archive.offset)  # tarfile accepts a truncated header
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")
    while archive.fileobj.read(BLOCK):
        pass  # reads up to the checksum at the end of a compressed file


def _place(path: Path, kind: str, files: Iterator[tuple]) -> list[Member]:
    found = []
    for name, size, opened in files:
        parts = PurePosixPath(name.removeprefix("./")).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise DataError(f"{path} has a file {name!r}, which leads out of the folder: refused")
        if not parts or any(part.startswith(".") for part in parts):
            continue  # left by file managers
        parts = parts[1:] if kind == "voc" and parts[0] == "VOCdevkit" else parts
        if len(parts) < 2 or (kind == "voc") != parts[0].startswith("VOC"):
            raise DataError(f"{path} has a file {name!r}: it is not an archive of {kind.upper()}")
        folder = PurePosixPath("coco") if kind == "coco" else PurePosixPath()
        found.append(Member(folder.joinpath(*parts), size, opened))
    if not found:
        raise DataError(f"{path} holds no files")
    return found
