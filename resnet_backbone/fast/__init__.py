"""Networks made fast for inference, and exported to other runtimes."""

from resnet_backbone.fast.optimize import InferenceNetwork, fold_bn, optimize_for_inference

__all__ = ["InferenceNetwork", "fold_bn", "optimize_for_inference"]
