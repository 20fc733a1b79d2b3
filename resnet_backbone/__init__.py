"""Residual backbones for detection and segmentation, faithful to arXiv 1512.03385."""

from resnet_backbone.fast import optimize_for_inference
from resnet_backbone.models import build_model, list_models
from resnet_backbone.weights import load_weights

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "build_model",
    "list_models",
    "load_weights",
    "optimize_for_inference",
]
