"""What makes a checkpoint safe to use: its preprocessing travels with it and is checked."""

from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec, Origin
from resnet_backbone.weights.files import (
    load_weights,
    read_checkpoint,
    read_weights,
    save_weights,
    write_checkpoint,
)
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
)

__all__ = [
    "PREPROCESSINGS",
    "Checkpoint",
    "ModelSpec",
    "Origin",
    "Preprocessing",
    "WeightsError",
    "get_preprocessing",
    "load_weights",
    "read_checkpoint",
    "read_weights",
    "save_weights",
    "write_checkpoint",
]
