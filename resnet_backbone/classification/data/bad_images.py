"""The report of images that could not be read, or only after a conversion."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from resnet_backbone.classification.data.decode import BadImage, decode, read_bytes
from resnet_backbone.runtime.errors import DataError

BAD, CONVERTED = "bad", "converted"
MAX_CONVERTED = 1000  # lines; a data set of nothing but such images needs no list of them
SHOWN = 3  # bad files in the message that stops a run


class ImageNote(NamedTuple):
    """What is worth telling about one image.

    Attributes:
        kind: "bad" (not readable) or "converted" (readable, but not an ordinary image).
        path: file, or place in a shard.
        reason: one line.
    """

    kind: str
    path: str
    reason: str


def inspect_file(path: str) -> ImageNote | None:
    """Decodes an image file; what is worth telling about it, or None."""
    try:
        note = decode(read_bytes(path), path).note
    except BadImage as bad:
        return ImageNote(BAD, bad.path, bad.reason)
    return ImageNote(CONVERTED, path, note) if note else None


class BadImageReport:
    """Counts unusual images and lists each once in a file that outlives the run.

    A line is ``kind<TAB>path<TAB>reason``. The file is only ever appended to, under a lock:
    several processes may share it, and a resumed run continues it. All counts are of
    different files, over all of these processes and runs.

    Args:
        path: of the report, or None to keep it in memory.
        max_bad_images: :meth:`add` raises DataError when there are more bad files; None for no
            limit.
        option: what the message tells to change.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        max_bad_images: int | None = None,
        option: str = "max_bad_images",
    ):
        self.path = None if path is None else Path(path)
        self.max_bad_images, self.option = max_bad_images, option
        self._listed: dict[str, dict[str, str]] = {BAD: {}, CONVERTED: {}}
        self._read = 0  # bytes of the file that are known
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._learn(file)

    @property
    def num_bad(self) -> int:
        return len(self._listed[BAD])

    @property
    def num_converted(self) -> int:
        return len(self._listed[CONVERTED])

    @property
    def bad(self) -> dict[str, str]:
        """Path -> reason, in the order of discovery."""
        return dict(self._listed[BAD])

    def add(self, *notes: ImageNote) -> None:
        """Counts images, and lists those that are not in the report yet.

        Raises:
            DataError: more than ``max_bad_images`` bad ones.
        """
        notes = [ImageNote(*map(_one_line, note)) for note in notes]
        new = self._unknown(notes)
        if new and self.path is None:
            self._enter(new)
        elif new:
            self._append(new)
        self.check()

    def check(self) -> None:
        """DataError when there are more bad images than allowed."""
        if self.max_bad_images is None or self.num_bad <= self.max_bad_images:
            return
        first = "; ".join(f"{path} ({why})" for path, why in list(self.bad.items())[:SHOWN])
        where = f", all are listed in {self.path}" if self.path else ""
        raise DataError(
            f"{self.num_bad} images cannot be read, {self.max_bad_images} are allowed: {first}"
            f"{where}; mend or remove them, or raise {self.option}"
        )

    def _append(self, notes: list[ImageNote]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._learn(file)  # what other processes have written meanwhile
            new = self._unknown(notes)
            self._enter(new)
            if self.num_converted > MAX_CONVERTED:
                new = [note for note in new if note.kind == BAD]
            content = "".join("\t".join(note) + "\n" for note in new).encode(
                "utf-8", "surrogateescape"
            )
            file.write(content)
            file.flush()
            self._read += len(content)

    def _learn(self, file) -> None:
        file.seek(self._read)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line may be half-written
        for line in whole.decode("utf-8", "surrogateescape").splitlines():
            kind, _, rest = line.partition("\t")
            path, _, reason = rest.partition("\t")
            if kind in self._listed:
                self._listed[kind].setdefault(path, reason)
        self._read += len(whole)
        if len(whole) < len(content) and file.writable():
            file.truncate(self._read)  # the run died while it wrote this line

    def _unknown(self, notes: Iterable[ImageNote]) -> list[ImageNote]:
        new = {(n.kind, n.path): n for n in notes if n.path not in self._listed[n.kind]}
        return list(new.values())

    def _enter(self, notes: Iterable[ImageNote]) -> None:
        for note in notes:
            self._listed[note.kind][note.path] = note.reason


def _one_line(text: str) -> str:
    return " ".join(text.replace("\t", " ").splitlines())
