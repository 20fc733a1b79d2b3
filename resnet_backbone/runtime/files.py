"""Atomic writes, which survive a power cut, and configs by path or by name."""

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
from typing import Any, TextIO

from resnet_backbone.runtime.errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
BLOCK = 1 << 20
# Errors of (network) file systems that cannot sync a folder.
NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EISDIR, errno.EACCES, errno.ENOTSUP)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems without locks


def names_below(folder: str | os.PathLike, *suffixes: str) -> Iterator[str]:
    """Yields the names of files below a folder, relative to it, sorted in each folder.

    Hidden files and folders are left out, and symbolic links are followed.

    Args:
        suffixes: of file names, in lower case; files may have them in any case.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(place, folder)
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Writes a file or a folder atomically.

    Yields:
        A temporary path beside `path`, where the block writes a file or makes a folder of files.
        At the end of the block it is synced to disk and replaces `path`. After an error it is
        removed, and `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # hidden, not a checkpoint yet
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
    """Turns errors of writing, also of PyTorch's file writer, into OSErrors that name `path`."""
    try:
        yield
    except OSError as error:
        name = os.path.basename(os.fsdecode(error.filename or ""))
        is_temporary = name.startswith(f".{Path(path).name}.")
        if (error.filename is None or is_temporary) and error.strerror:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise OSError(f"{path} cannot be written ({' '.join(str(error).split())})") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically, and creates its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Writes JSON as text; `options` are for ``json.dumps``, with indent 2 by default."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


def put_in_place(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Renames a complete file or folder; a power cut leaves either the old or the new one.

    Both are in the same folder.
    """
    temporary, path = Path(temporary), Path(path)
    for file in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
        _to_disk(file)
    os.replace(temporary, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Syncs a file to disk, or a folder's entries if the file system can."""
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
    """Drops rows of a file of JSON lines, such as rows that a resumed run will write again.

    Returns the rows that are kept, and the number of incomplete lines, which are dropped.
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
def in_use(folder: str | os.PathLike) -> Iterator[None]:
    """Locks a run folder against other processes, and creates it if needed.

    Unlike with :func:`alone`, children do not hold the lock: a killed run can go on at once.
    """
    with _locked(Path(folder), fcntl.lockf):
        yield


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[int]:
    """Locks a folder against other processes, and creates it if needed.

    A child that gets the yielded descriptor (``pass_fds``) holds the lock even if this process is
    killed. Raises BlockingIOError: another process holds the lock.
    """
    with _locked(Path(folder), fcntl.flock) as file:
        yield file.fileno()


@contextmanager
def _locked(folder: Path, lock: Callable[[Any, int], None]) -> Iterator[TextIO]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(
                f"another process uses {folder}: wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield file


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def config_folder() -> Path:
    """Returns the folder ``configs`` of the checkout or of the wheel."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str | os.PathLike, task: str) -> Path:
    """Returns the path of a config file.

    Args:
        name: a path, or else a name below ``configs/TASK`` or ``configs``, such as
            "voc/faster_rcnn_R_50_FPN", with or without ".yaml".
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
