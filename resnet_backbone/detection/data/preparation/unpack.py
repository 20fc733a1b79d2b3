"""The official archives of VOC and COCO to the folders that Detectron2 looks for.

    ROOT/VOC2007  ROOT/VOC2012  ROOT/coco/annotations  ROOT/coco/train2017 ...

ROOT is what the environment variable DETECTRON2_DATASETS names. A file is there whole or not at
all, and what is there already is left alone, so an interrupted call can be repeated.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from resnet_backbone.detection.data.preparation.official import ARCHIVES
from resnet_backbone.runtime.errors import DataError

BLOCK = 1 << 20  # bytes read at a time
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
)
DISK_BLOCK = 4096  # a file takes a multiple of these


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        path: where it goes, below the folder of data sets.
        size: in bytes.
        handle: what the archive opens it by.
    """

    path: PurePosixPath
    size: int
    handle: Any


@dataclass
class Unpacked:
    """The outcome of unpacking one archive.

    Attributes:
        written, kept: numbers of files; kept ones were there with the archive's size.
        differing: files that were there with another size, which stay as they are.
    """

    written: int = 0
    kept: int = 0
    differing: list[str] = field(default_factory=list)


def verify_archive(path: str | os.PathLike, unverified: bool = False) -> str:
    """Compares an archive with the published size and checksums.

    Args:
        unverified: another file than the official one is told and not refused.

    Returns:
        A line that says what was compared.

    Raises:
        DataError: no such file, or not the official archive.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such archive")
    official, size = ARCHIVES.get(path.name), path.stat().st_size
    if official is not None and size != official.size and not unverified:
        mend = "download it again"
        if size < official.size:
            mend = "the download stopped early: go on with it (wget -c, curl -C -)"
        raise DataError(
            f"{path} has {size:,} bytes, the official archive has {official.size:,}: {mend}; "
            "--unverified takes it as it is"
        )
    md5, sha256 = _digests(path)
    if official is None:
        return f"{path.name}: md5 {md5}, sha256 {sha256}; none is published for a file of this name"
    if (sha256, md5) == (official.sha256, official.md5 or md5):
        if official.md5:
            return f"{path.name}: md5 and sha256 are the official archive's"
        return f"{path.name}: sha256 is the official archive's; md5 {md5}, none is published"
    found = f"sha256 {sha256} and md5 {md5}, the official archive has {official.sha256}"
    found += f" and {official.md5}" if official.md5 else ""
    if unverified:
        return f"{path.name}: NOT the official archive: {found}"
    raise DataError(f"{path} has {found}: download it again; --unverified takes it as it is")


def _digests(path: Path) -> tuple[str, str]:
    """MD5 and SHA-256 of a file, hexadecimal."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    size = path.stat().st_size
    bar = tqdm(desc=f"checksum of {path.name}", total=size, unit="B", unit_scale=True, disable=None)
    with bar, open(path, "rb") as file:
        while block := file.read(BLOCK):
            md5.update(block)
            sha256.update(block)
            bar.update(len(block))
    return md5.hexdigest(), sha256.hexdigest()


def unpack(path: str | os.PathLike, root: str | os.PathLike, kind: str) -> Unpacked:
    """Unpacks an archive below a folder of data sets.

    Every name in it is looked at, and the space on the disk, before the first file is written.
    Links and hidden files are left out.

    Args:
        path: tar (compressed or not) or zip.
        root: the folder of data sets.
        kind: "voc" (VOCdevkit/VOC2007/... goes to VOC2007/...) or "coco" (to coco/...).

    Raises:
        DataError: a damaged archive, one of something else, one with a name that leads out of the
            folder, or too little space.
    """
    path, root = Path(path), Path(root)
    report = Unpacked()
    with _open(path) as archive:
        missing = list(_absent(archive.members(kind), root, report))
        _check_space(missing, root)
        for member in tqdm(missing, desc=f"unpacking {path.name}", unit="file", disable=None):
            target = root / member.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source:
                _write(source, member, target)
            report.written += 1
    return report


def _absent(members: Iterable[Member], root: Path, report: Unpacked) -> Iterator[Member]:
    """The files that are not there yet; the others are counted."""
    for member in members:
        target = root / member.path
        try:
            size = target.stat().st_size
        except FileNotFoundError:
            yield member
            continue
        if size == member.size:
            report.kept += 1
        else:
            report.differing.append(str(target))


def _check_space(members: list[Member], root: Path) -> None:
    place = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    needed = sum(-(-member.size // DISK_BLOCK) * DISK_BLOCK for member in members)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{root}: {len(members):,} files need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
            "free: make room, or give another folder"
        )


def _write(source: IO[bytes], member: Member, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.part")
    try:
        with open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, BLOCK)
        if temporary.stat().st_size != member.size:
            raise EOFError(f"{member.path} ends too early")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class _Tar:
    def __init__(self, path: Path):
        self.path, self.file = path, tarfile.open(path, "r:*")

    def members(self, kind: str) -> list[Member]:
        files = [(m.name, m.size, m) for m in self.file if m.isfile()]
        self.file.fileobj.seek(self.file.offset)  # tarfile is content with a header cut short
        if self.file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of data")
        while self.file.fileobj.read(BLOCK):
            pass  # to the checksum at the end of a compressed file
        return _place(self.path, kind, files)

    def open(self, member: Member) -> IO[bytes]:
        return self.file.extractfile(member.handle)


class _Zip:
    def __init__(self, path: Path):
        self.path, self.file = path, zipfile.ZipFile(path)

    def members(self, kind: str) -> list[Member]:
        link = 0o120000  # of a POSIX file mode, in the upper half of external_attr
        files = (
            (info.filename, info.file_size, info)
            for info in self.file.infolist()
            if not info.is_dir() and info.external_attr >> 16 & 0o170000 != link
        )
        return _place(self.path, kind, files)

    def open(self, member: Member) -> IO[bytes]:
        return self.file.open(member.handle)


@contextmanager
def _open(path: Path) -> Iterator[_Tar | _Zip]:
    try:
        archive = (_Zip if zipfile.is_zipfile(path) else _Tar)(path)
        with archive.file:
            yield archive
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is damaged or no archive ({reason}): download it again") from error
    except RuntimeError as error:  # zipfile: a password, an unknown compression
        raise DataError(f"{path} cannot be unpacked ({error})") from error


def _place(path: Path, kind: str, files) -> list[Member]:
    """Members with their places; a list, so that all names are read before a file is written."""
    found = []
    for name, size, handle in files:
        parts = PurePosixPath(name.removeprefix("./")).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise DataError(f"{path} has a file {name!r}, which leads out of the folder: refused")
        if not parts or any(part.startswith(".") for part in parts):
            continue  # what file managers leave
        parts = parts[1:] if kind == "voc" and parts[0] == "VOCdevkit" else parts
        if len(parts) < 2 or (kind == "voc") != parts[0].startswith("VOC"):
            raise DataError(f"{path} has a file {name!r}: this is no archive of {kind.upper()}")
        folder = PurePosixPath("coco") if kind == "coco" else PurePosixPath()
        found.append(Member(folder.joinpath(*parts), size, handle))
    if not found:
        raise DataError(f"{path} holds no files")
    return found
