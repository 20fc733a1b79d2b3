"""3x3 convolutions whose backward pass computes only cells that have a gradient, on CPUs.

The losses of a detector are of sampled anchors and regions, so the gradient is zero in most cells
of the finest maps. A dense backward pass multiplies these zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnet_backbone.fast.optimize import conv_dtype, in_graph

CELLS_AT_ONCE = 8192  # whose 3x3 patches are in memory
DENSE_FROM = 0.25  # share of cells with a gradient from which the dense pass is faster
SAMPLED = 4  # every fourth cell in each direction estimates that share


def can_be_sparse(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the operations below can replace that of `conv`, recorded for a backward pass."""
    if in_graph(x):
        return False
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
    same = all(getattr(conv, name) == getattr(plain, name) for name in plain.__constants__)
    is_plain = same and conv.bias is not None and getattr(conv, "norm", None) is None
    on_cpu = x.is_cpu and x.is_floating_point() and torch.is_grad_enabled()
    return on_cpu and is_plain


def inputs_of(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """Yields x, weight and bias in the precision of the convolution."""
    yield from (one.to(conv_dtype(one)) for one in (x, conv.weight, conv.bias))


def cells_with_gradient(grad: Tensor) -> Tensor:
    """Returns the indices in (N, H, W), flattened, of the nonzero cells of (N, C, H, W)."""
    return (grad != 0).any(1).flatten().nonzero().squeeze(1)


def rows_of(x: Tensor) -> Tensor:
    """Returns the cells of (N, C, H, W) as rows, (N H W, C); a view of channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def neighbors(cells: Tensor, height: int, width: int) -> Tensor:
    """Returns the indices (P, 9) of the 3x3 cells around each cell, row by row; -1 is outside."""
    steps = torch.arange(-1, 2)
    y = (cells // width % height)[:, None] + steps
    x = (cells % width)[:, None] + steps
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    near = cells[:, None, None] + steps[:, None] * width + steps
    return torch.where(inside, near, -1).flatten(1)


def gather(rows: Tensor, near: Tensor) -> Tensor:
    """Concatenates the rows (R, C) of indices (P, K) to (P, K C); index -1 gives zeros."""
    found = rows[near.clamp(min=0)]
    found[near < 0] = 0
    return found.flatten(1)


def convolve_cells(x: Tensor, weight: Tensor, bias: Tensor, cells: Tensor) -> Tensor:
    """Returns P cells, (P, O), of a 3x3 convolution of (N, I, H, W) with padding 1."""
    patches = gather(rows_of(x), neighbors(cells, *x.shape[2:]))
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)


def gradients_of_cells(
    x: Tensor, weight: Tensor, cells: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of input, weight and bias of a 3x3 convolution with padding 1.

    Args:
        x: input (N, I, H, W).
        weight: (O, I, 3, 3), of the input's precision.
        cells: indices (P,) of output cells.
        grad: their gradient (P, O); that of all other cells is zero.
    """
    rows, shape, near = rows_of(x), x.shape[2:], neighbors(cells, *x.shape[2:])
    precision = torch.promote_types(x.dtype, torch.float32)
    of_weight = torch.zeros(len(weight), weight[0].numel(), dtype=precision)
    for some, part in zip(near.split(CELLS_AT_ONCE), grad.split(CELLS_AT_ONCE), strict=True):
        of_weight += part.t() @ gather(rows, some)
    place = torch.full((len(rows) + 1,), -1)  # of each cell in `grad`; the last one is that of -1
    place[cells] = torch.arange(len(cells))
    is_reached = torch.zeros(len(place), dtype=torch.bool)
    is_reached[near.flatten()] = True
    kernel, of_rows = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2), torch.zeros_like(rows)
    for some in is_reached[:-1].nonzero().squeeze(1).split(CELLS_AT_ONCE):
        of_rows[some] = gather(grad, place[neighbors(some, *shape)]) @ kernel
    of_x = of_rows.view(len(x), *shape, -1).permute(0, 3, 1, 2)
    of_weight = of_weight.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
    return of_x, of_weight.to(weight.dtype), grad.sum(0)


class Conv3x3(torch.autograd.Function):
    """A 3x3 convolution with padding 1 and a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        sample = grad[:, :, ::SAMPLED, ::SAMPLED]
        if len(cells_with_gradient(sample)) >= DENSE_FROM * sample[:, 0].numel():
            setting = [len(weight)], (1, 1), (1, 1), (1, 1), False, (0, 0), 1
            return torch.ops.aten.convolution_backward(grad, x, weight, *setting, [True] * 3)
        cells = cells_with_gradient(grad)
        return gradients_of_cells(x, weight, cells, rows_of(grad)[cells])


class ProposalHead(torch.autograd.Function):
    """A 3x3 convolution, ReLU, and a 1x1 convolution in the precision of its weights.

    The backward pass computes the hidden cells that it needs again; none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, last: Tensor, last_bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, last)
        with torch.autocast("cpu", enabled=False):
            hidden = F.conv2d(x, weight, bias, padding=1).relu_()
            return F.conv2d(hidden.to(last.dtype), last, last_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, last = ctx.saved_tensors
        cells = cells_with_gradient(grad)
        found = rows_of(grad)[cells]
        hidden = convolve_cells(x, weight, bias, cells).relu_()
        of_hidden = (found @ last.flatten(1)).to(hidden.dtype) * (hidden > 0)
        of_last = (found.t() @ hidden.to(found.dtype))[:, :, None, None]
        return *gradients_of_cells(x, weight, cells, of_hidden), of_last, found.sum(0)
