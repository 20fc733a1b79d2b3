"""Layer responses (paper, Fig. 7): how strongly the layers of a network change their signal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from resnet_backbone.models.layers import ConvNorm, ConvNormAct
from resnet_backbone.report.paper import Network
from resnet_backbone.report.picture import assign_colors, save_png


class _Spread:
    """Standard deviation of all the numbers that it is shown, over any number of batches."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        self.count += values.numel()
        self.total += values.sum().item()
        self.squares += values.square().sum().item()

    @property
    def std(self) -> float:
        mean = self.total / self.count
        return math.sqrt(max(0.0, self.squares / self.count - mean**2))


def layer_responses(
    model: nn.Module, images: Tensor, batch_size: int = 100
) -> list[tuple[str, float]]:
    """Standard deviation of the response of each 3x3 layer (paper, Fig. 7 and section 4.2).

    A layer's response is the output of its BN, before the nonlinearity and before the addition of
    the shortcut; in ResNets it is so the strength of the residual functions. The standard
    deviation is one number over images, channels and positions. Every 3x3 convolution counts: two
    in each basic block, one in each bottleneck, and the first layer of the CIFAR networks, so
    that those of 6n+2 layers have 6n+1.

    Args:
        model: a network of this package; it runs in evaluation mode, on the true statistics of
            its BN, and is left in the mode that it was in.
        images: normalised, (N, 3, H, W), on the model's device.
        batch_size: images at once; it does not change the result.

    Returns:
        (layer name, such as "res2.0.conv1"; standard deviation), in the order of the layers.

    Raises:
        ValueError: no images, or a network without 3x3 convolutions of this package.
    """
    if not len(images):
        raise ValueError("no images to compute responses of: give one or more")
    spreads: dict[str, _Spread] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, ConvNorm) and layer.kernel_size == (3, 3):
            spreads[name] = _Spread()
            handles.append(_watch(layer, spreads[name]))
    if not spreads:
        raise ValueError(
            f"{type(model).__name__} has no 3x3 layers of this package's networks: responses are "
            "computed for them (resnet_backbone.list_models()), not for other libraries'"
        )
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in images.split(batch_size):
                model(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [(name, spread.std) for name, spread in spreads.items()]


def _watch(layer: ConvNorm, spread: _Spread):
    """Shows ``spread`` what the layer computes before its nonlinearity."""
    if isinstance(layer, ConvNormAct):
        return layer.activation.register_forward_pre_hook(lambda _, inputs: spread.add(inputs[0]))
    return layer.register_forward_hook(lambda _, inputs, output: spread.add(output))


class Responses(NamedTuple):
    """One network's curve."""

    label: str
    network: Network
    stds: Sequence[float]  # in the order of the layers


def plot_responses(curves: Sequence[Responses], output_png: str | os.PathLike) -> None:
    """Draws the two panels of Fig. 7: layers in their order, and sorted by magnitude.

    Networks of one depth share a colour; plain ones are dashed.

    Raises:
        ValueError: nothing to draw.
    """
    if not curves:
        raise ValueError("no responses to draw; give the weights of at least one network")
    save_png(_draw(curves), output_png)


def _draw(curves: Sequence[Responses]) -> Figure:
    keys = [curve.network.depth or curve.label for curve in curves]
    twins = {(key, curve.network.family) for key, curve in zip(keys, curves, strict=True)}
    if len(twins) < len(curves):  # several seeds or shortcuts of one depth
        keys = list(range(len(curves)))
    colors = assign_colors(keys)
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    ordered, ranked = figure.subplots(2, 1, sharey=True)
    for key, curve in zip(keys, curves, strict=True):
        style = dict(
            color=colors[key],
            linestyle="--" if curve.network.family == "plain" else "-",
            linewidth=1.2,
            label=curve.label,
        )
        index = range(1, len(curve.stds) + 1)
        ordered.plot(index, curve.stds, **style)
        ranked.plot(index, sorted(curve.stds, reverse=True), **style)
    ordered.set_xlabel("layer index (original)")
    ranked.set_xlabel("layer index (sorted by magnitude)")
    for axes in (ordered, ranked):
        axes.set_ylabel("std")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    ordered.legend(fontsize="small")
    return figure


def responses_table(responses: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """One line per network: number of layers, mean and largest standard deviation."""
    lines = [f"{'network':20s} {'3x3 layers':>10s} {'mean std':>9s} {'largest':>8s}"]
    for label, rows in responses.items():
        stds = [std for _, std in rows]
        lines.append(f"{label:20s} {len(stds):10d} {sum(stds) / len(stds):9.3f} {max(stds):8.3f}")
    return "\n".join(lines)
