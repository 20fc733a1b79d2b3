"""Small things on files that every layer needs: written whole, told apart by their content."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
# What file systems answer, some of networks, that cannot wait for a folder's table of names.
NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EISDIR, errno.EACCES, errno.ENOTSUP)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in one go: the old one stands until the new one is on the disk."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """:func:`write_text` of JSON; `options` are those of ``json.dumps``, indent 2 by default."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def put_in_place(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives a complete file or folder its name; a power cut leaves the old one or the new one.

    Args:
        temporary: in the same folder as `path`; a folder holds files alone.
    """
    temporary, path = Path(temporary), Path(path)
    for file in [*temporary.iterdir(), temporary] if temporary.is_dir() else [temporary]:
        _to_disk(file)
    os.replace(temporary, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Waits until a file is on the disk, or a folder's table of names where that can be done."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDERS):
            raise


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[int]:
    """Keeps other processes out of a folder, which is made where it is not there.

    Yields:
        The file descriptor of the lock. A child that has it too (``pass_fds``) keeps the others out
        even when this process is killed.

    Raises:
        BlockingIOError: another process is in it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process works in {folder}: wait for it, or choose another folder"
            ) from None
        yield file.fileno()


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
