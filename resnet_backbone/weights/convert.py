"""Exact conversions of a checkpoint: the same function of the same image, in another form.

Channel order, value range and powers of two are bit-exact; other factors round once to fp32. Two
conversions do not exist. Moving the stride changes the function. Another mean cannot become a bias,
because convolutions pad with zeros, which stand for a mean pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from resnet_backbone.models.layers import ConvNormAct, scale_and_shift
from resnet_backbone.weights.architecture import first_key
from resnet_backbone.weights.checkpoint import Checkpoint
from resnet_backbone.weights.keymaps.table import NORM_TENSORS, norm_layers
from resnet_backbone.weights.load import build_network
from resnet_backbone.weights.preprocessing import InputNormalizer, Preprocessing, WeightsError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def first_convolution(tensors: Mapping[str, Tensor]) -> str:
    """Returns the key of the first convolution, of shape (out_channels, 3, height, width).

    Raises:
        ValueError: there is none; WeightsError: it does not have three input channels.
    """
    key = first_key(tensors)
    if tensors[key].dim() != 4 or tensors[key].shape[1] != 3:
        shape = tuple(tensors[key].shape)
        raise WeightsError(f"{key} has shape {shape}: only color images are converted")
    return key


def convert_input(
    checkpoint: Checkpoint,
    *,
    channel_order: str = "",
    value_range: float | None = None,
    std: Sequence[float] | None = None,
) -> Checkpoint:
    """Converts a network to another form of input; omitted arguments keep the current form.

    Args:
        channel_order: "RGB" or "BGR".
        value_range: 1.0 or 255.0.
        std: in the new order and range; the ratio is folded into the first convolution.

    Returns:
        A new checkpoint, which shares unchanged tensors with the old one.

    Raises:
        WeightsError: another range, or a std that is not positive.
    """
    if channel_order and channel_order != checkpoint.preprocessing.channel_order:
        key = first_convolution(checkpoint.tensors)
        tensors = {**checkpoint.tensors, key: checkpoint.tensors[key].flip(1)}
        new = checkpoint.preprocessing.reversed_channels()
        checkpoint = replace(checkpoint, tensors=tensors, preprocessing=new)
    if value_range not in (None, 1.0, 255.0):
        raise WeightsError(f"value_range must be 1.0 or 255.0, not {value_range}")
    if value_range not in (None, checkpoint.preprocessing.value_range):
        new = checkpoint.preprocessing.with_range(value_range)
        checkpoint = replace(checkpoint, preprocessing=new)
    if std is not None:
        checkpoint = _with_std(checkpoint, std)
    return checkpoint


def _with_std(checkpoint: Checkpoint, std: Sequence[float]) -> Checkpoint:
    old = checkpoint.preprocessing.std
    std = tuple(float(value) for value in std)
    if len(std) != 3 or not all(math.isfinite(value) and value > 0 for value in std):
        raise WeightsError(f"std must be three positive numbers, not {list(std)}")
    if std == old:
        return checkpoint
    key = first_convolution(checkpoint.tensors)
    ratios = [new / own for new, own in zip(std, old, strict=True)]
    factors = torch.tensor(ratios, dtype=torch.float64)[:, None, None]
    kernel = (checkpoint.tensors[key].double() * factors).float()
    tensors = {**checkpoint.tensors, key: kernel}
    return replace(checkpoint, tensors=tensors).restated(std=std)


def use_channel_means(checkpoint: Checkpoint) -> Checkpoint:
    """Replaces the per-pixel mean image by the channel means, which is not exact."""
    return checkpoint.restated(mean_image=None)


def fold_bn(checkpoint: Checkpoint) -> Checkpoint:
    """Folds every batch norm into the weight and bias of the convolution before it.

    The function in evaluation mode is the same. The batch norms can no longer be trained or
    restored. Folded tensors are fp32, whatever the convolutions were.

    Raises:
        WeightsError: nothing to fold, or a norm that depends on the image (GN).
    """
    tensors = checkpoint.tensors
    if not norm_layers(tensors):
        raise WeightsError("no batch norms to fold: the network has none, or they are folded")
    folded = {}
    for key, value in tensors.items():
        layer, _, name = key.rpartition(".")
        if name == "weight" and f"{layer}.norm.weight" in tensors:
            kernel, bias = _folded(tensors, layer, checkpoint.preprocessing.bn_eps)
            folded |= {key: kernel, f"{layer}.bias": bias}
        elif not layer.endswith(".norm"):
            folded[key] = value
    model = checkpoint.model
    options = {**model.options, "norm": ""}
    if model.name.endswith("_bn"):  # vgg16_bn without its norms is vgg16
        options.pop("norm")
    model = replace(model, name=model.name.removesuffix("_bn"), options=options)
    return replace(checkpoint, tensors=folded, model=model)


def _folded(tensors: dict[str, Tensor], layer: str, eps: float) -> tuple[Tensor, Tensor]:
    """Returns kernel and bias, in fp32, of a convolution with its batch norm folded in."""
    if f"{layer}.norm.running_var" not in tensors:
        raise WeightsError(f"{layer}.norm has no running statistics: only batch norms are folded")
    values = {name: tensors[f"{layer}.norm.{name}"].double() for name in NORM_TENSORS}
    scale, shift = scale_and_shift(SimpleNamespace(eps=eps, **values))
    kernel = tensors[f"{layer}.weight"].double() * scale[:, None, None, None]
    return kernel.float(), shift.float()


def to_unit_responses(checkpoint: Checkpoint, images: Tensor) -> Checkpoint:
    """Rescales a VGG without norms to a standard deviation of 1 after each ReLU.

    Each layer's output is divided by one number, its standard deviation before. If the checkpoint
    has fc6, it absorbs the last factor, and the logits stay the same. Accuracy does not change, but
    one learning rate suits all layers (arXiv 1511.06856, section 3).

    Args:
        images: uint8 (N, 3, H, W), RGB, over which standard deviations are taken.

    Raises:
        WeightsError: not a VGG without norms; a layer whose output is always zero.
    """
    if not checkpoint.model.name.startswith("vgg") or norm_layers(checkpoint.tensors):
        raise WeightsError(
            f"only a VGG without norms can be rescaled, not {checkpoint.model.name}: norms "
            "level the responses of the others"
        )
    scales = _response_scales(build_network(checkpoint), checkpoint.preprocessing, images)
    tensors, before = dict(checkpoint.tensors), 1.0
    for layer, scale in scales.items():
        if not scale > 0:
            raise WeightsError(f"{layer} responds to none of the images: give other images")
        tensors[f"{layer}.weight"] = (tensors[f"{layer}.weight"].double() * before / scale).float()
        tensors[f"{layer}.bias"] = (tensors[f"{layer}.bias"].double() / scale).float()
        before = scale
    if "fc6.weight" in tensors:
        tensors["fc6.weight"] = (tensors["fc6.weight"].double() * before).float()
    return replace(checkpoint, tensors=tensors)


@torch.inference_mode()
def _response_scales(network, preprocessing: Preprocessing, images: Tensor) -> dict[str, float]:
    """Returns layer -> standard deviation of its output over the images, in forward order."""
    sums: dict[str, list[float]] = {}

    def add(name, module, inputs, output):
        count, first, second = sums.setdefault(name, [0, 0.0, 0.0])
        values = output.double()
        sums[name] = [count + values.numel(), first + values.sum(), second + (values**2).sum()]

    for name, module in network.named_modules():
        if isinstance(module, ConvNormAct):
            module.register_forward_hook(partial(add, name))
    normalize = InputNormalizer(preprocessing)
    for image in images.split(1):
        network(normalize(image))
    return {
        name: float((second / count - (first / count) ** 2).sqrt())
        for name, (count, first, second) in sums.items()
    }


def to_bn_eps(checkpoint: Checkpoint, eps: float) -> Checkpoint:
    """Changes the epsilon of the batch norms, and compensates for it in their weights.

    Exact in evaluation, up to one rounding to fp32. Training normalizes with the variances of its
    batches and the new epsilon.
    """
    old = checkpoint.preprocessing.bn_eps
    tensors = dict(checkpoint.tensors)
    for layer in norm_layers(tensors):
        if f"{layer}.norm.running_var" in tensors:
            var = tensors[f"{layer}.norm.running_var"].double()
            gamma = tensors[f"{layer}.norm.weight"].double() * ((var + eps) / (var + old)).sqrt()
            tensors[f"{layer}.norm.weight"] = gamma.float()
    return replace(checkpoint, tensors=tensors).restated(bn_eps=eps)


def to_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Converts kernels and matrices to "fp32", "fp16" or "bf16".

    Vectors (norms, biases, slopes) stay fp32: they are small, and the variances of batch norms can
    exceed fp16, up to 83,600 in the MSRA ResNet-50. Networks run in fp32 whatever the file has.

    Raises:
        WeightsError: an unknown dtype, or a value beyond fp16's largest, 65504.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    tensors = {}
    for key, value in checkpoint.tensors.items():
        tensors[key] = value.to(DTYPES[dtype] if value.dim() > 1 else torch.float32)
        if not torch.isfinite(tensors[key]).all():
            raise WeightsError(
                f"{key} has values up to {value.abs().max():.3g}, too large for {dtype}: use bf16"
            )
    return replace(checkpoint, tensors=tensors)
