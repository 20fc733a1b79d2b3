"""Faster networks: batch norm folding, inference engines, regions on CPUs, and export."""

from resnet_backbone.fast.engines import InferenceNetwork
from resnet_backbone.fast.optimize import (
    build_model,
    fold_bn,
    fold_each_call,
    optimize_for_inference,
)

__all__ = ["InferenceNetwork", "build_model", "fold_bn", "fold_each_call", "optimize_for_inference"]
