"""Reads weights from any source, under our key names, with their network and preprocessing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from resnet_backbone.weights.architecture import (
    check_stated,
    constructor_options,
    infer_models,
    spell,
)
from resnet_backbone.weights.checkpoint import (
    MEAN_IMAGE_KEY,
    Checkpoint,
    FileMetadata,
    ModelSpec,
    Origin,
    has_bottlenecks,
)
from resnet_backbone.weights.keymaps import find_network
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    named,
)
from resnet_backbone.weights.readers import RawFile, find_file, read_tensors
from resnet_backbone.weights.sources import ResolvedSource, convention_of_content, resolve


class UnknownInput(WeightsError):
    """Weights whose preprocessing is unknown; ``option`` is the argument or key that gives it."""

    def __init__(self, source: str, option: str = "preprocessing"):
        *names, last = PREPROCESSINGS
        super().__init__(
            f"{source} does not state which input it was trained on: name it ({option}), "
            f"{', '.join(names)} or {last} (convert-weights takes any other)"
        )
        self.source = source


class Weights(NamedTuple):
    """Weights as read from a source, before their network is known."""

    tensors: dict[str, Tensor]
    preprocessing: Preprocessing
    model: ModelSpec | None  # the network, if the file states it
    origin: Origin


def read_checkpoint(
    source: str | os.PathLike,
    preprocessing: str | Preprocessing = "",
    model: ModelSpec | None = None,
    raw: RawFile | None = None,
) -> Checkpoint:
    """Reads the weights of one network, with its name, options and preprocessing.

    Args:
        source: a local file or folder, an address, or a name such as
            ``torchvision://resnet50/IMAGENET1K_V2``; see :func:`sources.resolve` and
            :func:`readers.read_tensors`. ``FILE#KEY`` is one of several networks in a file.
        preprocessing: a name in ``PREPROCESSINGS`` or a convention of your own, required for
            weights of unknown origin; a contradiction with a known origin is an error.
        model: the network, for weights that fit more than one and do not state which.
        raw: the source's file, if it was read before.

    Raises:
        WeightsError: a missing, damaged or hostile file, unknown keys, non-finite values, no
            preprocessing; tensors of no network of this package, or of a network other than the
            file or ``model`` states.
    """
    read = read_network(source, preprocessing, model, raw)
    spec = _network_of(read, model, str(source))
    return Checkpoint(read.tensors, spec, read.preprocessing, read.origin)


def single_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights in fp32, in which networks run."""
    return {key: value.float() for key, value in tensors.items()}


def read_source(
    source: str | os.PathLike, preprocessing: str | Preprocessing = "", raw: RawFile | None = None
) -> Weights:
    """Reads tensors with the source's own keys, types, counters; see :func:`read_checkpoint`."""
    source, key = split_key(source)
    found = resolve(source)
    raw = raw or read_tensors(found.path)
    if not raw.sha256.startswith(found.sha256):
        raise WeightsError(
            f"{found.path} is not {source}: its sha256 begins with {raw.sha256[:8]}, not "
            f"{found.sha256}; remove it, and it is fetched again"
        )
    metadata = FileMetadata.from_texts(raw.metadata, str(found.path))
    content = None
    if metadata.preprocessing is None and found.preprocessing is None:
        content = convention_of_content(raw)
    known = agreed_preprocessing(str(source), found, metadata, preprocessing, content)
    tensors = raw.part(key) if key else dict(raw.tensors)
    mean_image = tensors.pop(MEAN_IMAGE_KEY, None)
    if mean_image is not None:
        if mean_image.dim() != 3 or mean_image.shape[0] != 3:
            shape = tuple(mean_image.shape)
            raise WeightsError(f"{source}: {MEAN_IMAGE_KEY} has shape {shape}, not (3, H, W)")
        known = replace(known, mean_image=mean_image.float())
    origin = metadata.origin or Origin("", str(source), raw.sha256, "", known.source)
    return Weights(tensors, known, metadata.model, origin)


def read_network(
    source: str | os.PathLike,
    preprocessing: str | Preprocessing = "",
    given: ModelSpec | None = None,
    raw: RawFile | None = None,
) -> Weights:
    """Reads tensors under this package's keys, and checks them against the file's own network.

    The returned preprocessing has the stride of bottlenecks. ``given`` is the network that the
    user states. See :func:`read_checkpoint`.
    """
    read = read_source(source, preprocessing, raw)
    with named(source):
        layout, tensors = find_network(read.tensors, str(source))
        if read.model is not None:
            check_stated(read.model, tensors)
    origin = read.origin if read.origin.format else replace(read.origin, format=layout)
    known = read.preprocessing
    if has_bottlenecks(tensors):
        known = with_stride(known, read.model, given, str(source))
    return read._replace(tensors=tensors, origin=origin, preprocessing=known)


def split_key(source: str | os.PathLike) -> tuple[str | os.PathLike, str]:
    """Splits ``FILE#KEY``, one of several networks in a file; (source, "") without a key."""
    file, mark, key = str(source).rpartition("#")
    return (file, key) if mark and file and not os.path.exists(source) else (source, "")


def _network_of(read: Weights, given: ModelSpec | None, source: str) -> ModelSpec:
    """Returns the network, with the number of classes of its weights."""
    stated = read.model or given
    with named(source):
        candidates = infer_models(read.tensors)
        if stated is None and len(candidates) > 1:
            names = " and ".join(map(spell, candidates))
            raise ValueError(f"its tensors fit {names}: say which network it is")
        if given is not None and given.name != stated.name:
            raise ValueError(f"it states that it is a {stated.name}, not a {given.name}")
        if read.model is None and given is not None:
            check_stated(given, read.tensors, "you say")
    spec = stated or candidates[0]
    return ModelSpec(spec.name.rpartition("/")[2], candidates[0].num_classes, dict(spec.options))


def describe_weights(
    path: str | os.PathLike, preprocessing: str | Preprocessing = "", raw: RawFile | None = None
) -> FileMetadata:
    """Reads the metadata of weights; only the header is read from this package's files.

    Args:
        path, preprocessing, raw: see :func:`read_checkpoint`.

    Raises:
        WeightsError: a missing or damaged file, no preprocessing.
    """
    found = resolve(split_key(path)[0])
    file, said = find_file(found.path), None
    if file.suffix == ".safetensors":
        said = FileMetadata.read(file)
    if said and (said.preprocessing is not None or found.preprocessing is not None):
        known = agreed_preprocessing(str(path), found, said, preprocessing)
        said = said._replace(preprocessing=known)
    else:
        _, known, model, origin = read_source(path, preprocessing, raw)
        said = FileMetadata(known, model, origin, known.mean_image is not None)
    # no tensor was read: bottlenecks are known from the network's name
    if said.model and re.match(r"(?!cifar).*resnet(50|101|152)", said.model.name):
        known = with_stride(said.preprocessing, said.model, None, str(path))
        said = said._replace(preprocessing=known)
    return said


def read_header(path: str | os.PathLike) -> FileMetadata:
    """Reads the metadata of a local safetensors file, see :meth:`FileMetadata.read`."""
    return FileMetadata.read(find_file(path))


# Agreement of file, origin and user


def agreed_preprocessing(
    source: str,
    found: ResolvedSource,
    metadata: FileMetadata,
    given: str | Preprocessing,
    content: Preprocessing | None = None,
) -> Preprocessing:
    """Returns the preprocessing on which a file, its origin and the user (``given``) agree.

    ``content`` is inferred from the file's content beyond its metadata. Raises UnknownInput: none
    of them states it. Raises WeightsError: two of them contradict each other.
    """
    name = repr(given) if isinstance(given, str) else "the given one"
    stated = {
        "its metadata": metadata.preprocessing,
        "its origin": found.preprocessing,
        "its content": content,
        name: get_preprocessing(given) if given else None,
    }
    known = [(who, value) for who, value in stated.items() if value is not None]
    if not known:
        raise UnknownInput(source)
    (who, first), *others = known
    for other, value in others:
        if not first.same_input(value):
            raise WeightsError(f"{source}: {who} states another preprocessing than {other}")
        if first.stride_in_1x1 is None:
            first = replace(first, stride_in_1x1=value.stride_in_1x1)
    if found.stride_in_1x1 is not None:
        if first.stride_in_1x1 not in (None, found.stride_in_1x1):
            raise WeightsError(
                f"{source}: the config.json beside it, by its stride, states another preprocessing "
                f"than {who}"
            )
        first = replace(first, stride_in_1x1=found.stride_in_1x1)
    return first


def with_stride(
    known: Preprocessing, stated: ModelSpec | None, given: ModelSpec | None, source: str
) -> Preprocessing:
    """Adds the stride position of bottlenecks, which no tensor shows, to a preprocessing.

    Raises WeightsError: it is unknown, or the network and the preprocessing disagree.
    """
    spec, of_network = stated or given, None
    if spec is not None:  # torchvision's and timm's have it in the 3x3
        of_network = False if "/" in spec.name else spec.options.get("stride_in_1x1")
    if None not in (known.stride_in_1x1, of_network) and known.stride_in_1x1 != of_network:
        raise WeightsError(
            f"{source}: its network has stride_in_1x1={of_network}, its preprocessing "
            f"{known.stride_in_1x1}"
        )
    stride = of_network if known.stride_in_1x1 is None else known.stride_in_1x1
    if stride is None and stated is not None:
        stride = constructor_options(stated.name)["stride_in_1x1"]
    if stride is None:
        raise WeightsError(
            f"{source}: the stride of its bottlenecks is unknown; name a preprocessing that has "
            "it, such as msra or torchvision"
        )
    return replace(known, stride_in_1x1=stride)
