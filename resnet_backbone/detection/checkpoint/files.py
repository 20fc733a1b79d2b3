"""Weight files of detectors: located by name, identified by content, read as data; their input."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir

from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.weights.keymaps.detectron2 import OTHER_BLOBS
from resnet_backbone.weights.preprocessing import (
    Preprocessing,
    WeightsError,
    get_preprocessing,
    one_line,
    same_mean,
    same_std,
)
from resnet_backbone.weights.readers import INDEX_SUFFIX, RawFile, open_file, read_tensors
from resnet_backbone.weights.reading import UnknownInput, split_key
from resnet_backbone.weights.sources import (
    BY_ADDRESS,
    CATALOG,
    DETECTRON2,
    DETECTRON2_DEFAULT,
    SCHEMES,
    resolve,
    stated_convention,
)

FORMAT, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
NAME_KEY = "RESNET_BACKBONE.WEIGHTS_PREPROCESSING"  # names the input of weights that do not
# Detectors in Detectron2's zoo that our backbones fit, all trained on its config's default input.
# gn and syncbn have the stride in the 3x3 convolution, and dconv has other layers.
ZOO = re.compile(
    r"(COCO-\w+|LVISv\d.\d-\w+|Cityscapes|PascalVOC-Detection|Detectron1-Comparisons|Misc)"
    r"/(?!\w*(gn|syncbn|dconv))\w+_R_(50|101)_\w+/"
)
LAST = "last_checkpoint"  # file in the run folder that names the newest checkpoint
CLASSIFIERS_ONLY = ("torchvision", "timm", "hf")  # schemes without detectors
# Prefixes of a detector's tensor names in Detectron2 and in Detectron1.
PARTS = ("backbone.", "roi_heads.", "proposal_generator.", "sem_seg_head.")
CAFFE2_PARTS = tuple(part for part in OTHER_BLOBS if part != "__preserve__/")


@dataclass(frozen=True)
class WeightsFile:
    """The weights in ``MODEL.WEIGHTS``; tensors are read lazily."""

    source: str  # of a backbone or a classifier, as resnet_backbone.weights finds it
    file: RawFile | None = None  # None for folders and library names, which only readers open
    is_detector: bool = False  # it holds a whole detector
    matching_heuristics: bool = False  # match names by their suffixes

    def read(self, reader: Callable, preprocessing: str) -> Any:
        """Returns the result of a ``weights.reading`` reader for a backbone or classifier."""
        raw = None if self.file is None else read_tensors(self.file.path, self.file)
        try:
            return reader(self.source, preprocessing or origin_input(self.source) or "", raw=raw)
        except UnknownInput as error:
            raise UnknownInput(self.source, NAME_KEY) from error

    def content(self) -> dict[str, Any]:
        """Returns a detector as Detectron2's checkpointer does: ``{"model": {name: tensor}, ...}``.

        Other entries are the training state, or ``__author__`` and ``matching_heuristics`` for
        files of Detectron1 and Caffe2.
        """
        file, rest = self.file, dict(self.file.rest)
        if file.path.suffix == ".pkl" and (file.wrapper != "model" or "__author__" not in rest):
            rest = {"__author__": "Caffe2", "matching_heuristics": True}
        if self.matching_heuristics:
            rest["matching_heuristics"] = True
        return {**rest, "model": file.tensors}


def open_weights(source: str) -> WeightsFile:
    """Opens the weights in ``MODEL.WEIGHTS``, and downloads them if needed.

    Detectron2's suffix ``?matching_heuristics=True`` is supported, and ``FILE#KEY``. WeightsError:
    the name is unknown, the download fails, or the file is missing, damaged, or contains code.
    """
    query = re.fullmatch(r"(.*)\?matching_heuristics=(True|False)", source)
    name, key = split_key(query[1] if query else source)
    scheme, separator, _ = name.partition("://")
    if separator and scheme in CLASSIFIERS_ONLY:
        return WeightsFile(name)
    path = Path(_locate(name))
    if not path.exists():
        raise WeightsError(f"{path}: no such file; check MODEL.WEIGHTS or the path")
    # resnet_backbone.weights finds a backbone by name, except under schemes of PathManager alone
    known = not separator or scheme in SCHEMES
    backbone = _cached_by_detectron2(name) or name if known else str(path)
    if key:  # one of several networks, none of them a detector
        return WeightsFile(f"{backbone}#{key}")
    if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
        return WeightsFile(backbone)
    file = open_file(path)
    is_detector = any(key.startswith((*PARTS, *CAFFE2_PARTS)) for key in file.tensors)
    return WeightsFile(backbone, file, is_detector, query is not None and query[2] == "True")


def _locate(source: str) -> str:
    """Returns the local path of a file or folder; remote ones are fetched once per machine."""
    cached = _cached_by_detectron2(source)
    if cached or "://" not in source:
        return cached or source
    if comm.get_local_rank() == 0:  # other local processes then find the file
        _fetch(source)
    comm.synchronize()
    return _fetch(source)


def _fetch(source: str) -> str:
    """Fetches a file and returns its path; Detectron2's ``PathManager`` handles other schemes."""
    if source.partition("://")[0] in SCHEMES:
        return str(resolve(source).path)
    try:
        return PathManager.get_local_path(source)
    except Exception as error:  # handlers may raise anything
        raise WeightsError(f"{source} cannot be fetched ({one_line(error)})") from error


def _cached_by_detectron2(source: str) -> str:
    """Returns the path of a zoo file cached by Detectron2, or ""."""
    url = re.sub("^detectron2://", DETECTRON2, source)
    path = Path(get_cache_dir(), urlparse(url).path.lstrip("/"))
    return str(path) if url.startswith(DETECTRON2) and path.is_file() else ""


def origin_input(source: str) -> Preprocessing | None:
    """Returns the input that published weights expect, if their name or path implies it.

    An example is ``detectron2://ImageNetPretrained/MSRA/R-50.pkl``, or a copy in a folder
    ``ImageNetPretrained/MSRA``. Detectors of Detectron2's zoo work too. Nothing is fetched.
    """
    source = CATALOG.get(source.removeprefix("catalog://"), source)
    for address, known in BY_ADDRESS.items():
        folder = address.split("/", 4)[-1]  # https: / / host / project / folder
        if source.startswith(address) or (folder and folder in source):
            return known
    return DETECTRON2_DEFAULT if ZOO.search(source) else None


def detector_input(file: WeightsFile, source: str, name: str) -> Preprocessing | None:
    """Returns the input that a detector's checkpoint was trained on; None if it is unknown.

    If the file does not state it, `name` from ``PREPROCESSINGS`` or else `source`, as given by the
    user, determines it. WeightsError: the file contradicts `name`.
    """
    stated, named = stated_convention(file.file), get_preprocessing(name) if name else None
    if stated is None:
        return named or origin_input(source)
    if named is not None and differences(stated, named):
        raise WeightsError(
            f"{source} carries its own preprocessing, which is not {name!r}: leave {NAME_KEY} out"
        )
    return stated


def input_keys(known: Preprocessing) -> dict[str, Any]:
    """Returns the config's input keys with an input's values; an unknown stride is None."""
    return {
        FORMAT: known.channel_order,
        MEAN: [round(value, 4) for value in known.pixel_mean_255()],
        STD: [round(value, 4) for value in known.pixel_std_255()],
        STRIDE: known.stride_in_1x1,
    }


def agree(key: str, have: Any, want: Any) -> bool:
    """Whether two values of an input key agree up to rounding; None agrees with anything."""
    if key in (MEAN, STD):
        return (same_mean if key == MEAN else same_std)(have, want)
    return have == want or None in (have, want)


def differences(actual: Preprocessing, expected: Preprocessing) -> dict[str, tuple[Any, Any]]:
    """Returns the values of `actual` and `expected` for each input key in which they differ."""
    have, want = input_keys(actual), input_keys(expected)
    return {key: (have[key], want[key]) for key in have if not agree(key, have[key], want[key])}


def refuse_other_input(actual: Preprocessing | None, expected: Preprocessing, where: str) -> None:
    """Refuses weights that were trained on other input than the detector's."""
    if actual is None:
        raise WeightsError(
            f"{where}: these weights need INPUT.FORMAT RGB or BGR, and MODEL.PIXEL_MEAN and "
            "MODEL.PIXEL_STD of three values"
        )
    found, mend = [], []
    for key, (have, want) in differences(actual, expected).items():
        found.append(f"{key} is {_spell(have)}")
        mend.append(f"{key} {want}" if isinstance(want, bool) else f'{key} "{_spell(want)}"')
    if found:
        given, wanted = ", ".join(found), " ".join(mend)
        raise WeightsError(f"{where} was trained on other input: {given}; set {wanted}")


def _spell(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "[" + ", ".join(f"{number:.6g}" for number in value) + "]"


def find_last_checkpoint(folder: str) -> str:
    """Returns the checkpoint from which a run resumes, or ""."""
    mark = Path(folder, LAST)
    return os.path.join(folder, mark.read_text("utf-8").strip()) if mark.is_file() else ""


def find_weights(run: str) -> str:
    """Returns a run's last checkpoint, or ``model_final.pth`` if that is missing; or UsageError."""
    last, final = find_last_checkpoint(run), os.path.join(run, "model_final.pth")
    found = next(filter(os.path.isfile, (last, final)), last)
    if not found:
        raise UsageError(f"{run} has no checkpoint; give a run folder of train-net")
    return found
