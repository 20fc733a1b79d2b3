"""Files of detectors: found by name, told apart by their content, read as data, written whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from safetensors import SafetensorError, safe_open

from resnet_backbone.runtime.files import whole_file, write_text
from resnet_backbone.weights.keymaps.detectron2 import OTHER_BLOBS
from resnet_backbone.weights.preprocessing import WeightsError, one_line
from resnet_backbone.weights.readers import (
    INDEX_SUFFIX,
    RawFile,
    open_file,
    read_tensors,
)
from resnet_backbone.weights.sources import DETECTRON2, SCHEMES, resolve

LAST = "last_checkpoint"  # a file in the run folder that names its newest checkpoint
CLASSIFIERS_ONLY = ("torchvision", "timm", "hf")  # schemes under which there is no detector here
# How the names in a detector begin, in Detectron2 and in Detectron1.
PARTS = ("backbone.", "roi_heads.", "proposal_generator.", "sem_seg_head.")
CAFFE2_PARTS = tuple(part for part in OTHER_BLOBS if part != "__preserve__/")


@dataclass(frozen=True)
class WeightsFile:
    """What ``MODEL.WEIGHTS`` names.

    Attributes:
        source: of a backbone or a classifier, as :mod:`resnet_backbone.weights` finds it.
        file: None where only its reader opens it: a folder, a safetensors file of a classifier.
        is_detector: it holds a whole detector.
        matching_heuristics: names are to be matched by their ends.
    """

    source: str
    file: RawFile | None = None
    is_detector: bool = False
    matching_heuristics: bool = False

    def raw(self) -> RawFile | None:
        """The weights of a backbone or a classifier; None where they are still to be read."""
        return None if self.file is None else read_tensors(self.file.path, self.file)

    def content(self) -> dict[str, Any]:
        """A detector in the form of Detectron2's checkpointer, ``{"model": {name: tensor}, ...}``.

        Beside the model lies the state of a training, or ``__author__`` and
        ``matching_heuristics``. Files of Detectron1 and Caffe2 get both of these.
        """
        file = self.file
        if file.path.suffix == ".pkl" and not (
            file.wrapper == "model" and "__author__" in file.rest
        ):
            rest = {"__author__": "Caffe2", "matching_heuristics": True}
        else:
            rest = dict(file.rest)
        if self.matching_heuristics:
            rest["matching_heuristics"] = True
        return {**rest, "model": file.tensors}


def open_weights(source: str) -> WeightsFile:
    """Opens what ``MODEL.WEIGHTS`` names, and fetches it if need be.

    Raises:
        WeightsError: an unknown name, no network; a file that is missing, damaged, or holds more
            than data.
    """
    name, heuristics = without_query(source)
    scheme, separator, _ = name.partition("://")
    if separator and scheme in CLASSIFIERS_ONLY:
        return WeightsFile(name)
    path = Path(locate(name))
    if not path.exists():
        raise WeightsError(f"{path}: no such file; check MODEL.WEIGHTS or the path")
    backbone = WeightsFile(_backbone_source(name, path))
    if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
        return backbone
    if path.suffix == ".safetensors" and not is_detector(_header_keys(path)):
        return backbone
    file = open_file(path)
    return WeightsFile(backbone.source, file, is_detector(file.tensors), heuristics)


def _backbone_source(name: str, path: Path) -> str:
    """Where :mod:`resnet_backbone.weights` finds weights of a backbone: a file, or their name."""
    scheme, separator, _ = name.partition("://")
    if separator and scheme not in SCHEMES:  # of Detectron2's PathManager alone
        return str(path)
    return cached_by_detectron2(name) or name


def without_query(source: str) -> tuple[str, bool]:
    """A source without ``?matching_heuristics=True``, and whether it asks for that.

    It is Detectron2's way to have names matched by their ends.
    """
    match = re.fullmatch(r"(.*)\?matching_heuristics=(True|False)", source)
    return (match[1], match[2] == "True") if match else (source, False)


def is_detector(keys: Iterable[str]) -> bool:
    """Whether tensors of these names are a detector's, and not a backbone's or a classifier's."""
    names = [key.removeprefix("module.") for key in keys]
    return any(name.startswith((*PARTS, *CAFFE2_PARTS)) for name in names)


def _header_keys(path: Path) -> list[str]:
    """Names of tensors; none for a damaged file, of which its reader says what is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def locate(source: str) -> str:
    """The local path of a file or folder; remote ones are fetched once per machine.

    Names of Detectron2 are looked for in its own cache first. Schemes that
    :mod:`resnet_backbone.weights.sources` does not know are Detectron2's ``PathManager``'s.
    """
    scheme, separator, _ = source.partition("://")
    if not separator:
        return source
    cached = cached_by_detectron2(source)
    if cached:
        return cached
    fetch = _resolved if scheme in SCHEMES else _fetched_by_detectron2
    if comm.get_local_rank() == 0:  # the other processes of this machine find the file
        fetch(source)
    comm.synchronize()
    return fetch(source)


def _resolved(source: str) -> str:
    return str(resolve(source).path)


def _fetched_by_detectron2(source: str) -> str:
    try:
        return PathManager.get_local_path(source)
    except Exception as error:  # of whatever handler serves this scheme
        raise WeightsError(f"{source} cannot be fetched ({one_line(error)})") from error


def cached_by_detectron2(source: str) -> str:
    """Where Detectron2's own scripts have put a file of its zoo; "" if they have not."""
    url = re.sub("^detectron2://", DETECTRON2, source)
    path = Path(get_cache_dir(), urlparse(url).path.lstrip("/"))
    return str(path) if url.startswith(DETECTRON2) and path.is_file() else ""


# Writing


class AtomicWriter(DetectionCheckpointer):
    """:class:`DetectionCheckpointer` whose files appear under their names when they are whole.

    Attributes:
        marks_last: whether ``--resume`` continues from what is saved.
    """

    marks_last = True

    def save(self, name: str, **kwargs: Any) -> None:
        """As fvcore's, which writes in place.

        Raises:
            OSError: the file cannot be written; the one that it would replace is there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: one.state_dict() for key, one in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        for left in Path(self.save_dir).glob(".*.pth.*.tmp"):  # by a process that was killed
            left.unlink()
        with whole_file(path) as temporary:
            torch.save(content, temporary)
        if self.marks_last:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, LAST), last_filename_basename)


def find_last_checkpoint(folder: str) -> str:
    """The checkpoint from which a run resumes; "" where there is none."""
    mark = os.path.join(folder, LAST)
    if not os.path.isfile(mark):
        return ""
    with open(mark, encoding="utf-8") as file:
        return os.path.join(folder, file.read().strip())
