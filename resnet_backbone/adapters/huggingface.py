"""Backbones for Hugging Face transformers' detectors, through their ``backbone_config``.

Classification needs no adapter: ``tools/convert_weights.py`` writes a folder that
``ResNetForImageClassification.from_pretrained`` reads. For a detector such as DETR, build it with
:func:`backbone_config`, then call :func:`load_backbone`. Its image processor takes
``image_normalization(checkpoint.preprocessing)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import ResNetBackbone, ResNetConfig

from resnet_backbone.adapters import image_normalization, rgb_checkpoint
from resnet_backbone.models.layers import freeze
from resnet_backbone.weights import Checkpoint, WeightsError
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.export import refuse_other_inputs
from resnet_backbone.weights.keymaps import LAYOUTS, check_support
from resnet_backbone.weights.keymaps.huggingface import hugging_face_model

__all__ = [
    "backbone_config",
    "freeze_backbone",
    "image_normalization",
    "load_backbone",
    "rgb_checkpoint",
]


def backbone_config(
    checkpoint: Checkpoint, out_features: Sequence[str] = ("stage4",)
) -> ResNetConfig:
    """Returns the configuration of transformers' ResNet for these weights.

    Args:
        checkpoint: a ResNet's, see :func:`rgb_checkpoint`.
        out_features: "stage1" to "stage4", transformers' names for res2 to res5.

    Raises:
        WeightsError: a network that transformers' ResNet cannot represent, a per-pixel mean image,
            or another BN epsilon than PyTorch's.
    """
    return ResNetConfig(**_model_settings(checkpoint), out_features=list(out_features))


def load_backbone(model: nn.Module, checkpoint: Checkpoint, freeze_at: int = 2) -> None:
    """Loads weights into the only transformers ResNet in a model, and freezes its first stages.

    Args:
        model: for example ``DetrForObjectDetection``, built with :func:`backbone_config`.
        checkpoint: weights for RGB in 0..1, see :func:`rgb_checkpoint`.
        freeze_at: see :func:`freeze_backbone`. DETR's paper has 2, but transformers 5 freezes all
            stages of a ``ResNetConfig`` backbone.

    Raises:
        WeightsError: no ResNet or several, another network or stride than the weights', or
            weights that were not converted. The model is left unchanged.
    """
    settings = _model_settings(checkpoint)
    image_normalization(checkpoint.preprocessing)
    backbone = _find_backbone(model)
    for name, needed in settings.items():
        value = getattr(backbone.config, name)
        value = list(value) if isinstance(value, tuple) else value
        if value != needed:
            raise WeightsError(
                f"the weights need {name}={needed}, but the model's backbone has {value}: build it "
                "with backbone_config=backbone_config(checkpoint)"
            )
    headless = {k: v for k, v in checkpoint.tensors.items() if not k.startswith("linear.")}
    tensors = LAYOUTS["huggingface"].from_ours(headless, checkpoint.model)
    own = backbone.state_dict()  # DETR's frozen norms have no counters
    backbone.load_state_dict(
        {k: v for k, v in tensors.items() if k in own or not k.endswith(COUNTER)}
    )
    freeze_backbone(model, freeze_at)


def freeze_backbone(model: nn.Module, freeze_at: int = 2) -> None:
    """Freezes the first stages of the only transformers ResNet in a model, and frees the others.

    :func:`load_backbone` calls it. Call it again after ``from_pretrained``, which restores neither
    frozen parameters nor frozen norms.

    Args:
        freeze_at: number of frozen stages, 0 to 5, counted from the stem. Their parameters get no
            gradients, and their batch norms become constants.

    Raises:
        ValueError: another `freeze_at`.
        WeightsError: no ResNet or several.
    """
    if freeze_at not in range(6):
        raise ValueError(f"freeze_at must be 0 to 5, not {freeze_at!r}")
    backbone = _find_backbone(model)
    for index, stage in enumerate([backbone.embedder, *backbone.encoder.stages]):
        if index < freeze_at:
            freeze(stage)
        else:
            stage.requires_grad_()


def _find_backbone(model: nn.Module) -> ResNetBackbone:
    found = [module for module in model.modules() if isinstance(module, ResNetBackbone)]
    if len(found) != 1:
        raise WeightsError(
            f"{type(model).__name__} has {len(found)} ResNetBackbone modules, not one: build it "
            "with backbone_config=backbone_config(checkpoint)"
        )
    return found[0]


def _model_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the keys of transformers' ``config.json`` that define the network."""
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"expected rgb_checkpoint(weights), not a {type(checkpoint).__name__}")
    check_support("huggingface", checkpoint.model)
    refuse_other_inputs(checkpoint, "huggingface")
    config = hugging_face_model(checkpoint)
    names = ("architectures", "model_type", "id2label", "label2id", "torch_dtype")
    return {key: value for key, value in config.items() if key not in names}
