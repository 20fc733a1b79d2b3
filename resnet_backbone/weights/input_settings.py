"""The entry of a detector's state dict that says which input its backbone was trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError

INPUT_SETTINGS = "input_settings"  # the end of its key
_ORDERS = ("RGB", "BGR")


def to_tensor(stated: Preprocessing) -> Tensor:
    """float32 (8,): 0 for RGB or 1 for BGR, mean and std in 0..255, stride (-1: not known)."""
    stride = -1.0 if stated.stride_in_1x1 is None else float(stated.stride_in_1x1)
    order = float(_ORDERS.index(stated.channel_order))
    return torch.tensor([order, *stated.pixel_mean_255(), *stated.pixel_std_255(), stride])


def from_tensor(values: Tensor) -> Preprocessing:
    """What :func:`to_tensor` wrote, also if it was rounded to half precision since.

    Raises:
        WeightsError: any other tensor.
    """
    order, *numbers, stride = values.float().tolist() if values.shape == (8,) else (-1.0, -1.0)
    strides = {-1.0: None, 0.0: False, 1.0: True}
    if order not in (0.0, 1.0) or stride not in strides or not all(map(math.isfinite, numbers)):
        raise WeightsError(f"a checkpoint's {INPUT_SETTINGS} is not what this package writes")
    return Preprocessing(
        _ORDERS[int(order)],
        255.0,
        tuple(numbers[:3]),
        tuple(numbers[3:]),
        stride_in_1x1=strides[stride],
        source="a detector's checkpoint",
    )
