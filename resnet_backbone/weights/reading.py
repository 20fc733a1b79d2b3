"""Weights from any source, under our key names, with their network and their preprocessing."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from resnet_backbone.models import BottleneckBlock, list_models
from resnet_backbone.models.resnet import DEPTHS
from resnet_backbone.weights.architecture import (
    FIRST_KEYS,
    check_tensors,
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
from resnet_backbone.weights.keymaps import LAYOUTS, recognize
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    named,
)
from resnet_backbone.weights.readers import (
    RawFile,
    find_file,
    read_tensors,
)
from resnet_backbone.weights.sources import ResolvedSource, convention_of_content, resolve

logger = logging.getLogger(__name__)


class UnknownInput(WeightsError):
    """Weights whose preprocessing is unknown.

    Args:
        source: of the weights.
        option: where the caller's user says it: an option or a config key.
    """

    def __init__(self, source: str, option: str = ""):
        *names, last = PREPROCESSINGS
        where = f" ({option})" if option else ""
        super().__init__(
            f"{source} does not say which input it was trained on: name it{where}, "
            f"{', '.join(names)} or {last} (tools/convert_weights.py takes any other)"
        )
        self.source = source


class Weights(NamedTuple):
    """What was read from a source, before its network is known."""

    tensors: dict[str, Tensor]
    preprocessing: Preprocessing
    model: ModelSpec | None  # the network, where the file says it
    origin: Origin


def read_checkpoint(
    source: str | os.PathLike,
    preprocessing: str | Preprocessing = "",
    model: ModelSpec | None = None,
    raw: RawFile | None = None,
) -> Checkpoint:
    """Reads the weights of one network, with all that has to be known of them.

    Args:
        source: a local file or folder, an address, or a name such as
            ``torchvision://resnet50/IMAGENET1K_V2``; see :func:`sources.resolve` and
            :func:`readers.read_tensors`. ``FILE#KEY`` is one of several networks in a file.
        preprocessing: a name of ``PREPROCESSINGS`` or a convention of your own, needed for
            weights whose origin does not say it; one that contradicts the origin is an error.
        model: the network, for weights that fit more than one and do not say which.
        raw: the source's file, where it was read before.

    Raises:
        WeightsError: missing, damaged or hostile file, unknown keys, non-finite values, no
            preprocessing; tensors of no network of this package, or of another than the file or
            ``model`` says.
    """
    read = read_network(source, preprocessing, model, raw)
    spec = _network_of(read, model, str(source))
    return Checkpoint(read.tensors, spec, read.preprocessing, read.origin)


def read_weights(
    path: str | os.PathLike, preprocessing: str | Preprocessing = ""
) -> tuple[dict[str, Tensor], Preprocessing]:
    """Reads a network's weights and what they expect of their input.

    Args, raises: see :func:`read_checkpoint`.

    Returns:
        (state dict in our key names, fp32; preprocessing)
    """
    read = read_network(path, preprocessing)
    return single_precision(read.tensors), read.preprocessing


def single_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp32, in which networks run."""
    return {key: value.float() for key, value in tensors.items()}


def read_source(
    source: str | os.PathLike, preprocessing: str | Preprocessing = "", raw: RawFile | None = None
) -> Weights:
    """Tensors with the source's own names, types and counters; see :func:`read_checkpoint`."""
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
    """Tensors under this package's names, those of the network that the file states, if any.

    The preprocessing says the stride of bottlenecks. See :func:`read_checkpoint`.

    Args:
        given: what the user says of the network.
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


# Ends of the first keys of networks; what stands before is the prefix of the network in its file.
ANCHORS = ("conv1.weight", "features.0.weight", *FIRST_KEYS)
# Networks of self-supervised trainers beside one another: the one that is used comes first.
PREFERRED = ("encoder_q", "base_encoder", "teacher", "online", "student", "encoder", "backbone")
# What trainers keep beside a network, under its prefix too.
BESIDE = re.compile(
    r"(queue(_ptr|\d*)|(projection|prediction)(_head)?|projector|predictor|prototypes|heads?|fc|"
    r"bn_proj|lambd)(\.|$)"
)
HEADS = re.compile(r"(fc|head)\.(weight|bias)$")  # of a classifier, which belongs to its network


def split_key(source: str | os.PathLike) -> tuple[str | os.PathLike, str]:
    """``FILE#KEY`` as (FILE, KEY): one of several networks in a file; (source, "") for others."""
    file, mark, key = str(source).rpartition("#")
    return (file, key) if mark and file and not os.path.exists(source) else (source, "")


def find_network(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """The layout of one network, and its tensors under our names.

    A common prefix and what lies beside the network are left out: trainers write
    ``backbone.body.layer1...`` or, beside queues and projectors, ``module.encoder_q.layer1...``.
    Where a file has several networks, the choice is logged.

    Raises:
        ValueError: there is none.
    """
    try:
        return _to_ours(tensors)
    except (KeyError, ValueError, TypeError):
        networks = _inner_networks(tensors)
        if not networks:
            raise

    def rank(prefix: str) -> tuple[int, str]:
        places = [k for k, word in enumerate(PREFERRED) if word in prefix.split(".")]
        return min(places, default=len(PREFERRED)), prefix

    best, *others = sorted(networks, key=rank)
    if others:
        logger.warning("%s: the network %r is read; the file also has %s", source, best, others)
    return networks[best]


def _inner_networks(
    tensors: Mapping[str, Tensor],
) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Prefix -> the network whose tensors have it; none lies within another."""
    prefixes = {key.removesuffix(end) for key in tensors for end in ANCHORS if key.endswith(end)}
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for prefix in sorted(prefixes, key=len):
        if any(prefix.startswith(outer) for outer in found if outer):
            continue
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        inside = {k: v for k, v in inside.items() if HEADS.match(k) or not BESIDE.match(k)}
        with suppress(KeyError, ValueError, TypeError):
            layout, ours = _to_ours(inside)
            if infer_models(ours):
                found[prefix] = layout, ours
    return found


def _to_ours(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    layout = recognize(tensors)
    return layout, LAYOUTS[layout].to_ours(tensors)


def check_stated(
    stated: ModelSpec, tensors: Mapping[str, Tensor], who: str = "its metadata say"
) -> None:
    """Refuses tensors that are not those of the network that they are said to be of.

    Raises:
        ValueError: another depth, shortcut, norm or number of classes, with both.
    """
    found = infer_models(tensors)[0]
    if stated.num_classes is None:  # not stated
        stated = replace(stated, num_classes=found.num_classes)
    said = f"{who} {_spell(stated)}, its tensors {_spell(found)}"
    name = stated.name.rpartition("/")[2]  # of another library's network
    same_family = {found.name, found.name.replace("resnet", "plain")}
    if name not in list_models() and name not in same_family:  # and may be of any size
        raise ValueError(said)
    if stated.num_classes is not None and found.num_classes is None:
        raise ValueError(f"{said}: linear.weight is missing")
    try:
        check_tensors(tensors, replace(stated, name=name))
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{said}: {error}") from error


def _spell(spec: ModelSpec) -> str:
    return f"{spell(spec)} with {spec.num_classes or 'no'} classes"


def _network_of(read: Weights, given: ModelSpec | None, source: str) -> ModelSpec:
    """The network, with the number of classes and the stride that its weights have."""
    stated = read.model or given
    with named(source):
        candidates = infer_models(read.tensors)
        if stated is None and len(candidates) > 1:
            names = " and ".join(map(spell, candidates))
            raise ValueError(f"its tensors fit {names}: say which network it is")
        if given is not None and given.name != stated.name:
            raise ValueError(f"it says that it is a {stated.name}, not {given.name}")
        if read.model is None and given is not None:
            check_stated(given, read.tensors, "you say")
    spec = stated or candidates[0]
    name = spec.name.rpartition("/")[2]
    options = dict(spec.options)
    if "stride_in_1x1" in constructor_options(name) and has_bottlenecks(read.tensors):
        options["stride_in_1x1"] = read.preprocessing.stride_in_1x1
    return ModelSpec(name, candidates[0].num_classes, options)


def describe_weights(
    path: str | os.PathLike, preprocessing: str | Preprocessing = "", raw: RawFile | None = None
) -> FileMetadata:
    """Reads what weights say of themselves; of our own files only the header.

    Args:
        path, preprocessing, raw: see :func:`read_checkpoint`.

    Raises:
        WeightsError: missing or damaged file, no preprocessing.
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
    # the network's name alone says whether it has bottlenecks: no tensor was read
    name = said.model.name if said.model else ""
    match = re.fullmatch(r"(?:\w+/)?(?:\w+_)?(?:resnet|plain)(\d+)\w*", name)
    block, _ = DEPTHS.get(int(match[1]) if match else 0, (None, ()))
    if block is BottleneckBlock:
        known = with_stride(said.preprocessing, said.model, None, str(path))
        said = said._replace(preprocessing=known)
    return said


def read_header(path: str | os.PathLike) -> FileMetadata:
    """What a local safetensors file says of itself, without its weights.

    Raises:
        WeightsError: the file is missing, damaged or of a later version.
    """
    return FileMetadata.read(find_file(path))


# What file, origin and user agree on


def agreed_preprocessing(
    source: str,
    found: ResolvedSource,
    metadata: FileMetadata,
    given: str | Preprocessing,
    content: Preprocessing | None = None,
) -> Preprocessing:
    """The one preprocessing on which a file, its origin and the user (``given``) agree.

    Args:
        content: what the file's content says beside its metadata.

    Raises:
        UnknownInput: none of them says it.
        WeightsError: two of them say different things.
    """
    stated = {
        "its metadata": metadata.preprocessing,
        "its origin": found.preprocessing,
        "its content": content,
        repr(given) if isinstance(given, str) else "the given one": (
            get_preprocessing(given) if given else None
        ),
    }
    known = [(who, value) for who, value in stated.items() if value is not None]
    if not known:
        raise UnknownInput(source)
    (who, first), *others = known
    for other, value in others:
        if not first.same_input(value):
            _contradiction(source, who, other)
        if first.stride_in_1x1 is None:
            first = replace(first, stride_in_1x1=value.stride_in_1x1)
    if found.stride_in_1x1 is not None:
        if first.stride_in_1x1 not in (None, found.stride_in_1x1):
            _contradiction(source, "the config.json beside it, by its stride,", who)
        first = replace(first, stride_in_1x1=found.stride_in_1x1)
    return first


def _contradiction(source: str, first: str, second: str) -> None:
    if first == "its metadata":
        raise WeightsError(f"{source} carries its own preprocessing, which is not {second}")
    raise WeightsError(f"{source}: {first} says another preprocessing than {second}")


def with_stride(
    known: Preprocessing, stated: ModelSpec | None, given: ModelSpec | None, source: str
) -> Preprocessing:
    """A preprocessing that says where bottlenecks have their stride, which no tensor shows.

    Raises:
        WeightsError: it is unknown, or file and user disagree.
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
