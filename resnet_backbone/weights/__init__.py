"""Reading, writing and loading of weights, whose preprocessing is stored with them and checked."""

from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec, Origin, write_checkpoint
from resnet_backbone.weights.load import build_model, build_network, load_weights, save_weights
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    InputNormalizer,
    Preprocessing,
    WeightsError,
    get_preprocessing,
)
from resnet_backbone.weights.reading import describe_weights, read_checkpoint

__all__ = [
    "PREPROCESSINGS",
    "Checkpoint",
    "InputNormalizer",
    "ModelSpec",
    "Origin",
    "Preprocessing",
    "WeightsError",
    "build_model",
    "build_network",
    "describe_weights",
    "get_preprocessing",
    "load_weights",
    "read_checkpoint",
    "save_weights",
    "write_checkpoint",
]
