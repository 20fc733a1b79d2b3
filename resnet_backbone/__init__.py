"""Residual backbones for detection and segmentation, faithful to arXiv 1512.03385."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_backbone.fast import optimize_for_inference
    from resnet_backbone.models import list_models
    from resnet_backbone.weights import InputNormalizer, build_model, load_weights

__version__ = "0.1.0"
__all__ = [
    "InputNormalizer",
    "__version__",
    "build_model",
    "list_models",
    "load_weights",
    "optimize_for_inference",
]

_PLACES = {
    "InputNormalizer": "weights",
    "build_model": "weights",
    "list_models": "models",
    "load_weights": "weights",
    "optimize_for_inference": "fast",
}


def __getattr__(name: str) -> Any:
    """Imports a function when it is first used: ``resnet-backbone --help`` needs no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
