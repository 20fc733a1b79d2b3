"""Checkpoints of whole detectors: weights with the state of a training, read as data alone.

Nothing in a file is executed; see :mod:`resnet_backbone.weights.pickles`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor, from_numpy

from resnet_backbone.weights.conventions import DETECTRON2
from resnet_backbone.weights.input_settings import INPUT_SETTINGS, from_tensor
from resnet_backbone.weights.keymaps import caffe2
from resnet_backbone.weights.numpy_records import (
    NUMPY_AND_CONTAINERS,
    ArrayRecord,
    Latin1,
    Refused,
)
from resnet_backbone.weights.pickles import Machine
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError
from resnet_backbone.weights.readers import INDEX_SUFFIX
from resnet_backbone.weights.sources import SCHEMES, resolve
from resnet_backbone.weights.torch_files import TensorRecord, read_torch

MAX_GROWTH = 2  # tensors of a file together, in sizes of the file: more is one storage many times
PREPROCESSING_KEY = "preprocessing"  # of Checkpointer.save: Preprocessing.to_json()
CLASSIFIERS_ONLY = ("torchvision", "timm", "hf")  # schemes under which there is no detector here
WRAPPERS = ("model", "state_dict", "blobs")
# How the names in a detector begin, in Detectron2 and in Detectron1.
PARTS = ("backbone.", "roi_heads.", "proposal_generator.", "sem_seg_head.")
CAFFE2_PARTS = tuple(part for part in caffe2.OTHER_PARTS if part != "__preserve__/")


@dataclass(frozen=True)
class DetectorFile:
    """What a file of Detectron2's kind holds; tensors are read when they are asked for.

    Attributes:
        path: of the file, for messages.
        content: ``{"model": {name: record of a tensor}, ...}`` as Detectron2's checkpointer has
            it: beside the model the state of a training, or ``__author__`` and
            ``matching_heuristics``. Files of Detectron1 and Caffe2 get both of these.
        fill: reads the data of the records given to it.
    """

    path: str
    content: dict[str, Any]
    fill: Callable[[list], None]

    def stated_input(self) -> Preprocessing | None:
        """The input that it says it was trained on; None if it does not.

        Raises:
            WeightsError: it says something unreadable.
        """
        text = self.content.get(PREPROCESSING_KEY)
        if isinstance(text, str):
            return Preprocessing.from_json(text)
        settings = (key for key in self.content["model"] if key.endswith(f".{INPUT_SETTINGS}"))
        for key in settings:
            with _named_errors(self.path):
                values = _to_tensor(self.content["model"][key], self.fill)
            return from_tensor(values)
        return None

    def read(self) -> dict[str, Any]:
        """The content with tensors in place of all records.

        Raises:
            WeightsError: it is damaged, holds more than data, or numbers that are not finite.
        """
        with _named_errors(self.path):
            found = _walk(self.content, partial(_to_tensor, fill=self.fill), {})
            for key, value in found["model"].items():
                if not key.endswith(f".{INPUT_SETTINGS}") and not value.isfinite().all():
                    raise ValueError(f"{key[:80]} has NaN or infinite values")
            return found


def open_weights(source: str) -> DetectorFile | None:
    """Opens what ``MODEL.WEIGHTS`` names, and fetches it if need be.

    Returns:
        The file of a whole detector; None for weights of a backbone or a classifier, which
        :func:`resnet_backbone.weights.read_weights` reads.

    Raises:
        WeightsError: see :func:`open_detector_file`; an unknown name, no network.
    """
    source, heuristics = without_query(source)
    scheme, separator, _ = source.partition("://")
    if separator and scheme in CLASSIFIERS_ONLY:
        return None
    path = Path(locate(source))
    if not path.exists():
        raise WeightsError(f"{path}: no such file; check MODEL.WEIGHTS or the path")
    if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
        return None
    if path.suffix == ".safetensors" and not is_detector(_header_keys(path)):
        return None
    found = open_detector_file(path)
    if not is_detector(found.content["model"]):
        return None
    if heuristics:
        found.content["matching_heuristics"] = True
    return found


def backbone_source(source: str) -> str:
    """Where :mod:`resnet_backbone.weights` finds weights of a backbone: a file, or their name."""
    source, _ = without_query(source)
    scheme, separator, _ = source.partition("://")
    if separator and scheme not in SCHEMES:  # of Detectron2's PathManager alone
        return locate(source)
    return cached_by_detectron2(source) or source


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
        cause = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} cannot be fetched ({cause})") from error


def cached_by_detectron2(source: str) -> str:
    """Where Detectron2's own scripts have put a file of its zoo; "" if they have not."""
    url = re.sub("^detectron2://", DETECTRON2, source)
    path = Path(get_cache_dir(), urlparse(url).path.lstrip("/"))
    return str(path) if url.startswith(DETECTRON2) and path.is_file() else ""


def open_detector_file(path: str | os.PathLike) -> DetectorFile:
    """Opens ``.safetensors``, ``.pkl`` of numpy arrays, or a file of ``torch.save`` of any name.

    Raises:
        WeightsError: a file that is missing, damaged, or holds more than data.
    """
    path = Path(path)
    with _named_errors(path):
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            return DetectorFile(str(path), {"model": load_safetensors(data)}, _nothing_to_fill)
        if path.suffix == ".pkl":
            stream = io.BytesIO(data)
            found, fill = Machine(NUMPY_AND_CONTAINERS).run(stream), _nothing_to_fill
            if stream.tell() != len(data):
                raise Refused(f"{len(data) - stream.tell()} bytes behind its end")
        else:
            found, fill = read_torch(data)
        content = _as_detectron2(found, is_pickle=path.suffix == ".pkl")
        _refuse_growth(content, len(data))
        return DetectorFile(str(path), content, fill)


def _as_detectron2(found: Any, is_pickle: bool) -> dict[str, Any]:
    """The form of Detectron2's checkpointer, see ``DetectionCheckpointer._load_file``."""
    if not isinstance(found, dict):
        raise Refused(f"a {type(found).__name__} and no checkpoint")
    inner = next((key for key in WRAPPERS if isinstance(found.get(key), dict)), None)
    model = found if inner is None else found[inner]
    rest = {} if inner is None else {key: value for key, value in found.items() if key != inner}
    if is_pickle and not (inner == "model" and "__author__" in found):
        model = {key: value for key, value in model.items() if not key.endswith("_momentum")}
        rest = {"__author__": "Caffe2", "matching_heuristics": True}
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, (TensorRecord, ArrayRecord)):
            raise Refused(f"{str(key)[:80]!r}, which is a {type(value).__name__} and no tensor")
    return {"model": model, **rest}


def _refuse_growth(content: dict[str, Any], size: int) -> None:
    """Many keys for one storage would fill the memory from a small file."""
    records: dict[int, TensorRecord | ArrayRecord] = {}
    _walk(content, lambda record: records.setdefault(id(record), record), {})
    if sum(record.nbytes for record in records.values()) > MAX_GROWTH * size:
        raise Refused(f"more than {MAX_GROWTH} times its own size of {size} bytes in tensors")


def _walk(value: Any, convert: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    """A copy of nested containers with ``convert(record)`` for each record, once per object."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (TensorRecord, ArrayRecord)):
        found = convert(value)
    elif isinstance(value, dict):
        found = {key: _walk(inner, convert, memo) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        found = type(value)(_walk(inner, convert, memo) for inner in value)
    else:
        return value.text if isinstance(value, Latin1) else value
    memo[id(value)] = found
    return found


def _to_tensor(record: TensorRecord | ArrayRecord | Tensor, fill: Callable[[list], None]) -> Tensor:
    if isinstance(record, Tensor):
        return record
    if isinstance(record, ArrayRecord):
        return from_numpy(record.array().copy())
    fill([record])
    found = record.tensor()
    record.storage.data = None
    return found


def _nothing_to_fill(records: list) -> None:
    """Arrays of a pickle have their bytes already."""


@contextmanager
def _named_errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # a hostile file can make a parser fail in any way
        cause = " ".join(f"{error}".split())[:300] or type(error).__name__
        kind = "holds" if isinstance(error, Refused) else "is damaged or not what its name says:"
        raise WeightsError(f"{path} {kind} {cause}") from error
