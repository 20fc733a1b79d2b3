"""Files that are whole or not there, also after a power cut; configs by path or by name."""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnet_backbone.runtime.errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
BLOCK = 1 << 20
# What file systems answer, some of networks, that cannot wait for a folder's table of names.
NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EISDIR, errno.EACCES, errno.ENOTSUP)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """The one way to write a file or a folder that others rely on.

    Yields:
        A path beside `path`, where the block writes a file or makes a folder of files. When the
        block has ended that is on the disk and has its name; the old one stands until then. After
        an error nothing is left of it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # hidden: no checkpoint yet
    try:
        with naming(path):
            yield temporary
            put_in_place(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of writing `path` are OSErrors that say so, also those of PyTorch's file writer."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise OSError(f"{path} cannot be written ({' '.join(str(error).split())})") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text, UTF-8, by :func:`whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """:func:`write_text` of JSON; `options` are those of ``json.dumps``, indent 2 by default."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def put_in_place(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives a complete file or folder its name; a power cut leaves the old one or the new one.

    Both are in the same folder; a folder holds files alone.
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


def keep_rows(path: str | os.PathLike, is_kept: Callable[[dict], bool]) -> tuple[list[dict], int]:
    """Drops rows of a file with a JSON object a line, such as those that a run will write again.

    Returns the rows that stay, and the number of incomplete lines, which go.
    """
    kept, incomplete = [], 0
    lines = Path(path).read_text(encoding="utf-8").splitlines(True) if os.path.exists(path) else []
    for line in lines:
        try:
            row = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            row = None
        incomplete += row is None
        if row is not None and is_kept(row):
            kept.append((line, row))
    if len(kept) < len(lines):
        write_text(path, "".join(line for line, _ in kept))
    return [row for _, row in kept], incomplete


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[int]:
    """Keeps other processes out of a folder, which is made where it is not there.

    A child that has the descriptor that it yields (``pass_fds``) keeps them out even when this
    process is killed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process uses {folder}: wait for it, or choose another folder"
            ) from None
        yield file.fileno()


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def config_folder() -> Path:
    """``configs`` of the checkout, or what the wheel has of it."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str | os.PathLike, task: str) -> Path:
    """The file of a config.

    Args:
        name: a path, or where there is no such file a name below ``configs/TASK`` or ``configs``
            such as "voc/faster_rcnn_R_50_FPN", with or without ".yaml".
        task: "detection" or "classification".

    Raises:
        UsageError: no such file; the message names the nearest config.
    """
    path = Path(name)
    if path.is_file():
        return path
    configs = config_folder()
    for folder in (configs / task, configs, configs.parent):
        found = folder / (str(path).removesuffix(".yaml") + ".yaml")
        if found.is_file() and not path.is_absolute():
            return found
    names = [str(file.relative_to(configs / task)) for file in (configs / task).rglob("*.yaml")]
    wanted = str(path).removesuffix(".yaml") + ".yaml"
    near = difflib.get_close_matches(wanted.removeprefix(f"configs/{task}/"), sorted(names), n=1)
    hint = f"did you mean {near[0].removesuffix('.yaml')}? " if near else ""
    raise UsageError(f"{name}: no such config file; {hint}The configs are in {configs / task}")
