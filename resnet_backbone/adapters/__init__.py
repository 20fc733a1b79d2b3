"""Backbones for other libraries' detectors: one module per library, importing only that library.

``torchvision_models``, ``timm_models``, ``huggingface`` and ``mmdetection``. Each accepts weights
from any source, builds the matching network, and returns or checks the mean and standard
deviation of its input. This file has what they share: weights for RGB images in 0..1.
"""

from __future__ import annotations

import os

from resnet_backbone.fast import build_model
from resnet_backbone.models import StagedNetwork
from resnet_backbone.weights import (
    Checkpoint,
    Preprocessing,
    WeightsError,
    get_preprocessing,
    read_checkpoint,
)
from resnet_backbone.weights.convert import convert_input
from resnet_backbone.weights.load import load_tensors


def rgb_checkpoint(
    weights: str | os.PathLike, preprocessing: str | Preprocessing = ""
) -> Checkpoint:
    """Reads weights and converts them to RGB in 0..1, the input of torchvision, timm, transformers.

    The conversion is exact: the input channels of the first convolution are reordered, and the mean
    and standard deviation are divided by the range. No weight is rounded.

    Args:
        weights: any source that :func:`resnet_backbone.weights.read_checkpoint` accepts.
        preprocessing: the weights' convention, for files that do not state it: a name or a
            :class:`~resnet_backbone.weights.Preprocessing`.

    Raises:
        WeightsError: unreadable weights, or no preprocessing.
    """
    checkpoint = read_checkpoint(weights, preprocessing)
    return convert_input(checkpoint, channel_order="RGB", value_range=1.0)


def image_normalization(preprocessing: Preprocessing) -> dict[str, list[float]]:
    """Returns ``image_mean`` and ``image_std`` for torchvision's and transformers' classes.

    Raises:
        WeightsError: the preprocessing is not for RGB images in 0..1.
    """
    if (preprocessing.channel_order, preprocessing.value_range) != ("RGB", 1.0):
        raise WeightsError(
            f"preprocessing of {preprocessing.channel_order} in 0..{preprocessing.value_range:g}, "
            "but images will be RGB in 0..1: convert the weights with rgb_checkpoint"
        )
    return dict(image_mean=list(preprocessing.mean), image_std=list(preprocessing.std))


def build_backbone(
    name: str,
    weights: str | os.PathLike | None = None,
    preprocessing: str | Preprocessing = "",
    **options,
) -> tuple[StagedNetwork, Preprocessing]:
    """Builds a network for RGB images in 0..1, and returns it with its normalization.

    With weights, the network gets their stride, shortcut and norm. Its batch norms and its first
    two stages are frozen unless ``norm`` and ``freeze_at`` say otherwise. Without weights, nothing
    is frozen and the normalization is torchvision's.

    Args:
        name: one of ``list_models()``; weights of another network are an error.
        weights, preprocessing: see :func:`rgb_checkpoint`; no weights: random initialization.
        **options: arguments of the network's class, such as ``out_features``.

    Raises:
        WeightsError: weights of another network, or with another stride than ``options`` give.
    """
    if weights is None:
        return build_model(name, **options), get_preprocessing("torchvision")
    checkpoint = rgb_checkpoint(weights, preprocessing)
    if checkpoint.model.name != name:
        raise WeightsError(f"{weights} holds a {checkpoint.model.name}, not a {name}")
    options = {"freeze_at": 2, **options}
    if checkpoint.has_batch_norms:
        options.setdefault("norm", "FrozenBN")
    network = checkpoint.model.build(**options)
    load_tensors(network, checkpoint, str(weights))
    return network, checkpoint.preprocessing
