"""What makes a checkpoint safe to use: its preprocessing travels with it and is checked."""

from resnet_backbone.weights.files import load_weights, read_weights, save_weights
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
)

__all__ = [
    "PREPROCESSINGS",
    "Preprocessing",
    "WeightsError",
    "get_preprocessing",
    "load_weights",
    "read_weights",
    "save_weights",
]
