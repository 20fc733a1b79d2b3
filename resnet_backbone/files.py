"""Small things on files that every layer needs: written whole, told apart by their content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in one go: the old one stands until the new one is complete."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """:func:`write_text` of JSON; `options` are those of ``json.dumps``, indent 2 by default."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
