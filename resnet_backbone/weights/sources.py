"""Resolves names and addresses of weights to local files, with the input that the origin states.

This is the only table of conventions, each with its source. Machine-readable conventions
(torchvision, timm, Hugging Face) are read from the library and not copied. Nothing is assumed
about weights of unknown origin.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch.hub
from tqdm import tqdm

from resnet_backbone.runtime.files import sha256 as file_hash
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.weights.keymaps.huggingface import (
    check_hugging_face_network,
    hugging_face_preprocessing,
)
from resnet_backbone.weights.keymaps.table import LIBRARY_NETWORKS, OtherNetwork
from resnet_backbone.weights.keymaps.torchvision import (
    check_timm_network,
    published_hash,
    timm_preprocessing,
    torchvision_entry,
    torchvision_preprocessing,
)
from resnet_backbone.weights.preprocessing import (
    INPUT_SETTINGS,
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    named,
    one_line,
)
from resnet_backbone.weights.readers import (
    FOLDER_FILES,
    PREPROCESSING_KEY,
    SUFFIXES,
    RawFile,
    read_json,
)

MODEL_ZOO = "facebookresearch/detectron2, MODEL_ZOO.md and detectron2/checkpoint/catalog.py"
GROUP_NORM_CONFIG = "facebookresearch/detectron2, configs/Misc/mask_rcnn_R_50_FPN_3x_gn.yaml"
CONVERT_SCRIPT = "facebookresearch/detectron2, tools/convert-torchvision-to-d2.py"
DETECTRON2, DETECTRON1 = (
    f"https://dl.fbaipublicfiles.com/{name}/" for name in ("detectron2", "detectron")
)
PYTORCH = "https://download.pytorch.org/models/"
MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # bad config.json

_MSRA = replace(PREPROCESSINGS["msra"], source=f"{MODEL_ZOO}; {PREPROCESSINGS['msra'].source}")
_CONVERTED = replace(PREPROCESSINGS["torchvision"], source=CONVERT_SCRIPT)
DETECTRON2_DEFAULT = replace(
    PREPROCESSINGS["msra"],
    mean=(103.53, 116.28, 123.675),
    source="facebookresearch/detectron2, MODEL_ZOO.md and detectron2/config/defaults.py",
    resize_size=None,
    crop_size=None,
)
_GROUP_NORM = replace(DETECTRON2_DEFAULT, stride_in_1x1=False, source=GROUP_NORM_CONFIG)

# Beginning of an address -> convention of all weights below it.
BY_ADDRESS: dict[str, Preprocessing] = {
    f"{DETECTRON2}ImageNetPretrained/MSRA/": _MSRA,
    f"{DETECTRON2}ImageNetPretrained/torchvision/": _CONVERTED,
    f"{DETECTRON1}ImageNetPretrained/MSRA/": _MSRA,
    f"{DETECTRON1}ImageNetPretrained/47261647/": _GROUP_NORM,
    f"{DETECTRON1}ImageNetPretrained/47592356/": _GROUP_NORM,
    # Self-supervised ResNet-50s: torchvision's network, and its mean and standard deviation
    **{
        f"https://dl.fbaipublicfiles.com/{place}/": replace(
            PREPROCESSINGS["torchvision"], source=f"facebookresearch/{name}, {file}"
        )
        for place, name, file in (
            ("moco", "moco", "main_moco.py"),
            ("deepcluster", "swav", "src/multicropdataset.py"),
            ("dino", "dino", "main_dino.py"),
            ("barlowtwins", "barlowtwins", "main.py"),
            ("vicreg", "vicreg", "augmentations.py"),
        )
    },
}
# Detectron2's names of Detectron1's files (detectron2/checkpoint/catalog.py) -> address.
CATALOG = {
    "ImageNetPretrained/MSRA/R-50": f"{DETECTRON1}ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": f"{DETECTRON1}ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/R-50-GN": f"{DETECTRON1}ImageNetPretrained/47261647/R-50-GN.pkl",
    "ImageNetPretrained/FAIR/R-101-GN": f"{DETECTRON1}ImageNetPretrained/47592356/R-101-GN.pkl",
}


@dataclass(frozen=True)
class ResolvedSource:
    """A source as a local path."""

    path: Path  # a file, or a folder with one
    preprocessing: Preprocessing | None = None  # the origin's convention; None: unknown
    stride_in_1x1: bool | None = None  # from a config.json without a preprocessor_config.json
    sha256: str = ""  # first digits of the file's hash; "" if none are published


def resolve(source: str | os.PathLike) -> ResolvedSource:
    """Finds a source, and downloads it if needed.

    Raises WeightsError: an unknown name, no network connection, no such file.

    Args:
        source: a local file or folder; ``torchvision://resnet50/IMAGENET1K_V2`` (without an
            entry, torchvision's DEFAULT, its best one); ``timm://resnet50.a1_in1k``;
            ``hf://microsoft/resnet-50`` (``@revision`` may follow);
            ``detectron2://ImageNetPretrained/MSRA/R-101.pkl``;
            ``catalog://ImageNetPretrained/MSRA/R-50``; an ``https://`` address of a file.
    """
    scheme, separator, name = str(source).partition("://")
    if not separator:
        found = ResolvedSource(Path(source))
        # a config.json describes only files of the usual names beside it
        has_config = found.path.is_dir() or found.path.name in FOLDER_FILES
        return _described(found) if has_config else found
    if scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise WeightsError(f"{source}: unknown kind of source; use a local path or one of {known}")
    return SCHEMES[scheme](name)


def _from_address(url: str) -> ResolvedSource:
    if url.startswith(PYTORCH):
        entry = torchvision_entry(lambda weights: weights.url == url)
        if entry is not None:
            return _torchvision_file(entry)
    path = _cached(url)
    known = next((p for start, p in BY_ADDRESS.items() if url.startswith(start)), None)
    return ResolvedSource(path, known)


def _from_catalog(name: str) -> ResolvedSource:
    if name not in CATALOG:
        raise WeightsError(f"catalog://{name}: unknown; use one of {', '.join(CATALOG)}")
    return _from_address(CATALOG[name])


def _cached(url: str) -> Path:
    """Returns the local copy of an address, which is downloaded the first time."""
    with named(url):
        parts = urlsplit(url)
    names = [part for part in parts.path.split("/") if part]
    if not names or not parts.hostname or {".", ".."} & set(names) or "\\" in url or "\0" in url:
        raise WeightsError(f"{url}: not the address of a file")
    if Path(names[-1]).suffix not in SUFFIXES:
        raise WeightsError(f"{url}: only {', '.join(SUFFIXES)} files can be read")
    folder = Path(torch.hub.get_dir(), "resnet_backbone", parts.hostname, *names[:-1])
    if parts.query or parts.netloc.lower() != parts.hostname:  # another file under the same path
        folder /= hashlib.sha256(f"{parts.netloc}?{parts.query}".encode()).hexdigest()[:16]
    return download(url, folder / names[-1])


def download(url: str, target: Path, sha256: str = "") -> Path:
    """Downloads a file unless it exists; an interrupted download leaves nothing behind.

    Its sha256 must begin with the given digits. Raises WeightsError: the download failed. The
    message names the address, and where to put the file after a manual download.
    """
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, target, sha256)
    except (OSError, HTTPException, ValueError) as error:  # no network, another file, a bad address
        cause = one_line(error)
        raise WeightsError(
            f"{url} cannot be downloaded ({cause}): download it elsewhere, and put it at {target}"
        ) from error
    return target


def fetch(url: str, target: Path, sha256: str) -> None:
    """Downloads a file with a progress bar; ValueError if it has another hash, see above."""
    request = Request(url, headers={"User-Agent": "resnet_backbone"})
    with whole_file(target) as temporary:
        with urlopen(request, timeout=60) as answer, open(temporary, "wb") as file:
            bar = dict(total=answer.length, desc=target.name, disable=None)
            with tqdm.wrapattr(answer, "read", **bar) as stream:
                shutil.copyfileobj(stream, file)
            if answer.length:  # bytes that were announced and did not come
                raise OSError("the connection broke off")
        if sha256 and not file_hash(temporary).startswith(sha256):
            raise ValueError(f"its hash does not begin with {sha256}")


def _from_torchvision(name: str) -> ResolvedSource:
    model, _, entry = name.partition("/")
    models = _library("torchvision.models", f"torchvision://{name}")
    try:
        entries = models.get_model_weights(model)
    except ValueError as error:
        raise WeightsError(f"torchvision://{name}: torchvision has no {model!r}") from error
    if model.lower() not in LIBRARY_NETWORKS:
        known = ", ".join(LIBRARY_NETWORKS)
        raise WeightsError(
            f"torchvision://{name}: {model} is not among this package's networks, which are {known}"
        )
    entry = entry or "DEFAULT"
    if entry not in entries.__members__:
        known = ", ".join(entries.__members__)
        raise WeightsError(f"torchvision://{name}: {model} has {known}, not {entry!r}")
    return _torchvision_file(entries[entry])


def _torchvision_file(weights: Any) -> ResolvedSource:
    """Uses torchvision's own cache, and its check of the hash in the file's name."""
    sha256 = published_hash(weights)
    target = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    path = download(weights.url, target, sha256)
    return ResolvedSource(path, torchvision_preprocessing(weights), sha256=sha256)


def _library(name: str, source: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise WeightsError(f"{source} needs {package}: pip install {package}") from error


def _from_timm(name: str) -> ResolvedSource:
    timm = _library("timm", f"timm://{name}")
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise WeightsError(
            f"timm://{name}: {error} timm.list_pretrained() gives the names"
        ) from error
    check_timm_network(config.to_dict(), f"timm://{name}")
    preprocessing = timm_preprocessing(config.to_dict(), f"timm.get_pretrained_cfg({name!r})")
    if config.hf_hub_id:
        return replace(_from_hugging_face(config.hf_hub_id), preprocessing=preprocessing)
    if not config.url:
        raise WeightsError(f"timm://{name}: timm has no weights of this network")
    return ResolvedSource(_cached(config.url), preprocessing)


def _from_hugging_face(name: str) -> ResolvedSource:
    hub = _library("huggingface_hub", f"hf://{name}")
    repository, _, revision = name.partition("@")
    configs = ["config.json", "preprocessor_config.json"]
    try:
        for files in (["model.safetensors", "model*.safetensors*"], ["pytorch_model.bin"]):
            options = dict(revision=revision or None, allow_patterns=[*configs, *files])
            folder = Path(hub.snapshot_download(repository, **options))
            if any((folder / file).is_file() for file in FOLDER_FILES):
                return _described(ResolvedSource(folder))
    except WeightsError:  # what came cannot be used
        raise
    except Exception as error:  # the connection, the service or its client failed
        cause = one_line(error)
        raise WeightsError(
            f"hf://{name} cannot be downloaded ({cause}): fetch {', '.join(configs)} and "
            f"model.safetensors from https://huggingface.co/{repository} into a folder and give "
            "that folder"
        ) from error
    raise WeightsError(f"hf://{name} has none of {', '.join(FOLDER_FILES)}")


def stated_convention(file: RawFile) -> Preprocessing | None:
    """Returns the input stated by our detectors and by this package's files for Detectron2."""
    with named(file.path):
        if file.container in ("torch", "pickle") and PREPROCESSING_KEY in file.metadata:
            return Preprocessing.from_json(file.metadata[PREPROCESSING_KEY])
        for key, value in file.tensors.items():
            if key.endswith(f".{INPUT_SETTINGS}"):
                return Preprocessing.from_tensor(value)
    return None


def convention_of_content(file: RawFile) -> Preprocessing | None:
    """Returns the convention that a file's content states or identifies; None if unknown.

    torchvision's files are identified by their published hash, whatever their path, and
    Detectron2's pickles by an ``__author__`` that stands for one script. Raises WeightsError: it
    states something unreadable.
    """
    stated = stated_convention(file)
    if stated is not None:
        return stated
    if file.container != "torch":  # a Detectron2 pickle names its script
        return _CONVERTED if file.metadata.get("__author__") == "torchvision" else None
    published = torchvision_entry(
        lambda weights: file.sha256.startswith(published_hash(weights) or "none")
    )
    return None if published is None else torchvision_preprocessing(published)


def _described(found: ResolvedSource) -> ResolvedSource:
    """Adds the input stated by config.json and preprocessor_config.json beside the weights."""
    folder = found.path if found.path.is_dir() else found.path.parent

    def content_of(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    try:
        config = content_of("config.json")
        if "pretrained_cfg" in config or "architecture" in config:
            inner = config.get("pretrained_cfg", config)
            check_timm_network({**inner, **config}, str(folder / "config.json"))
            return replace(found, preprocessing=timm_preprocessing(inner, "timm's config.json"))
        check_hugging_face_network(config, str(folder / "config.json"))
        stride = config.get("downsample_in_bottleneck", False) if config else None
        processor = content_of("preprocessor_config.json")
        if not processor:
            return replace(found, stride_in_1x1=stride)
        return replace(found, preprocessing=hugging_face_preprocessing(processor, stride))
    except OtherNetwork:
        raise
    except (OSError, RecursionError, *MISFITS) as error:
        raise WeightsError(
            f"{folder}: config.json or preprocessor_config.json cannot be understood "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


SCHEMES: dict[str, Callable[[str], ResolvedSource]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hugging_face,
    "detectron2": lambda name: _from_address(DETECTRON2 + name),
    "catalog": _from_catalog,
    "https": lambda name: _from_address(f"https://{name}"),
}
