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
from resnet_backbone.weights import Checkpoint, WeightsError
from resnet_backbone.weights.architecture import COUNTER
from resnet_backbone.weights.export import refuse_other_inputs
from resnet_backbone.weights.keymaps import LAYOUTS, check_support
from resnet_backbone.weights.keymaps.huggingface import hugging_face_model

__all__ = ["backbone_config", "image_normalization", "load_backbone", "rgb_checkpoint"]


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
        freeze_at: number of frozen stages, counted from the stem. DETR's paper has 2, but
            transformers 5 freezes all stages of a ``ResNetConfig`` backbone. Frozen parameters get
            no gradients. Batch norms are constants only in models that make them so, as DETR's do.

    Raises:
        WeightsError: no ResNet or several, another network or stride than the weights', or
            weights that were not converted. The model is left unchanged.
    """
    image_normalization(checkpoint.preprocessing)
    found = [module for module in model.modules() if isinstance(module, ResNetBackbone)]
    if len(found) != 1:
        raise WeightsError(
            f"{type(model).__name__} has {len(found)} ResNetBackbone modules, not one: build it "
            "with backbone_config=backbone_config(checkpoint)"
        )
    backbone = found[0]
    for name, needed in _model_settings(checkpoint).items():
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
    for index, stage in enumerate([backbone.embedder, *backbone.encoder.stages]):
        stage.requires_grad_(index >= freeze_at)


def _model_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the keys of transformers' ``config.json`` that define the network."""
    check_support("huggingface", checkpoint.model)
    refuse_other_inputs(checkpoint, "huggingface")
    config = hugging_face_model(checkpoint)
    names = ("architectures", "model_type", "id2label", "label2id", "torch_dtype")
    return {key: value for key, value in config.items() if key not in names}
