"""Small things on files that every layer needs: written whole, told apart by their content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


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
        temporary: in the same folder as `path`; of a folder the files in it are looked at.
    """
    temporary, path = Path(temporary), Path(path)
    for file in temporary.iterdir() if temporary.is_dir() else [temporary]:
        _to_disk(file)
    os.replace(temporary, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Waits until a file, or a folder's table of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
