"""3x3 convolutions whose backward pass computes only cells that have a gradient, on CPUs.

The losses of a detector are computed from sampled anchors and regions, so the gradient is zero in
most cells of the finest maps. A dense backward pass multiplies these zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_backbone.fast.optimize import conv_dtype, in_graph

CELLS_AT_ONCE = 8192  # cells whose patches are held at a time
DENSE_FROM = 0.25  # share of cells with a gradient from which the dense pass is faster
SAMPLED = 4  # every fourth cell in each direction estimates that share
PLAIN = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def can_be_sparse(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv` is a 3x3 convolution as below, about to be recorded on a CPU for x."""
    if in_graph(x) or not (x.is_cpu and torch.is_grad_enabled()):
        return False
    is_plain = tuple(getattr(conv, name) for name in SETTINGS) == PLAIN
    has_norm = getattr(conv, "norm", None) is not None
    same = conv_dtype(x) == conv_dtype(conv.weight)
    return is_plain and conv.bias is not None and not has_norm and same


def inputs_of(conv: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Returns x (N, I, H, W), weight (O, I, 3, 3) and bias (O,) in the convolution's precision."""
    return [one.to(conv_dtype(one)) for one in (x, conv.weight, conv.bias)]


def cells_with_gradient(grad: Tensor) -> Tensor:
    """Returns the indices in (N, H, W), flattened, of the nonzero cells of (N, C, H, W)."""
    return (grad != 0).any(1).flatten().nonzero().squeeze(1)


def rows_of(x: Tensor) -> Tensor:
    """Returns the cells of (N, C, H, W) as rows, (N H W, C); a view of channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def neighbors(cells: Tensor, height: int, width: int) -> Tensor:
    """Returns the indices (P, 9) of the 3x3 cells around each cell, row by row; -1 is outside."""
    steps = torch.arange(-1, 2, device=cells.device)
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
    x: Tensor, weight: Tensor, cells: Tensor, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns the gradients of input, weight and bias of a 3x3 convolution with padding 1.

    Args:
        x: input (N, I, H, W).
        weight: (O, I, 3, 3), of the input's precision.
        cells: indices (P,) of output cells.
        grad: their gradient (P, O); that of all other cells is zero.
        wanted: whether the gradients of input and weight are computed, or else None.
    """
    near, of_x, of_weight = neighbors(cells, *x.shape[2:]), None, None
    if wanted[0]:
        of_x = _gradient_of_input(x, weight, cells, near, grad)
    if wanted[1]:
        precision = torch.promote_types(x.dtype, torch.float32)
        of_weight = weight.new_zeros(len(weight), weight[0].numel(), dtype=precision)
        rows = rows_of(x)
        for some, part in zip(near.split(CELLS_AT_ONCE), grad.split(CELLS_AT_ONCE), strict=True):
            of_weight += part.t() @ gather(rows, some)
        of_weight = of_weight.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2).to(weight.dtype)
    return of_x, of_weight, grad.sum(0)


def _gradient_of_input(
    x: Tensor, weight: Tensor, cells: Tensor, near: Tensor, grad: Tensor
) -> Tensor:
    """Convolves the gradient with the turned kernel, at all neighbors (P, 9) of the P cells."""
    rows = rows_of(x)
    place = cells.new_full((len(rows) + 1,), -1)  # of each cell in `grad`; the last one is for -1
    place[cells] = torch.arange(len(cells), device=cells.device)
    is_reached = torch.zeros_like(place, dtype=torch.bool)
    is_reached[near.flatten()] = True
    kernel, of_rows = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2), torch.zeros_like(rows)
    for some in is_reached[:-1].nonzero().squeeze(1).split(CELLS_AT_ONCE):
        of_rows[some] = gather(grad, place[neighbors(some, *x.shape[2:])]) @ kernel
    return of_rows.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class Conv3x3(torch.autograd.Function):
    """A 3x3 convolution with padding 1 and a bias: (N, I, H, W) to (N, O, H, W).

    Its gradients can be differentiated; they are dense then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        sample = grad[:, :, ::SAMPLED, ::SAMPLED]
        few = len(cells_with_gradient(sample)) < DENSE_FROM * sample[:, 0].numel()
        if torch.is_grad_enabled() or not few:
            setting = [len(weight)], (1, 1), (1, 1), (1, 1), False, (0, 0), 1
            return torch.ops.aten.convolution_backward(grad, x, weight, *setting, [*wanted])
        with torch.autocast("cpu", enabled=False):
            cells = cells_with_gradient(grad)
            return gradients_of_cells(x, weight, cells, rows_of(grad)[cells], wanted)


class ProposalHead(torch.autograd.Function):
    """A 3x3 convolution with padding 1, ReLU, and a 1x1 convolution in its weights' precision.

    Maps (N, I, H, W) to (N, K, H, W), given a kernel (O, I, 3, 3) and bias (O,) of the input's
    precision, and the last layer's (K, O, 1, 1) and (K,). The backward pass recomputes the hidden
    cells that it needs; none are kept. Its gradients can be differentiated; they are dense then.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return ProposalHead.dense(*inputs)

    @staticmethod
    def dense(x: Tensor, weight: Tensor, bias: Tensor, last: Tensor, last_bias: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            hidden = F.conv2d(x, weight, bias, padding=1).relu_()
            return F.conv2d(hidden.to(last.dtype), last, last_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad
        cells, again = cells_with_gradient(grad), torch.is_grad_enabled()
        if again or len(cells) > CELLS_AT_ONCE:
            with torch.enable_grad():
                outputs = ProposalHead.dense(*inputs)
            trained = [one for one, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
            found = iter(torch.autograd.grad(outputs, trained, grad, create_graph=again))
            return tuple(next(found) if is_wanted else None for is_wanted in wanted)
        x, weight, bias, last, _ = inputs
        with torch.autocast("cpu", enabled=False):
            part = rows_of(grad)[cells]
            hidden = convolve_cells(x, weight, bias, cells).relu_()
            of_hidden = (part @ last.flatten(1)).to(hidden.dtype).masked_fill(hidden <= 0, 0)
            of_last = (part.t() @ hidden.to(part.dtype))[:, :, None, None]
            first = gradients_of_cells(x, weight, cells, of_hidden, wanted)
            return *first, of_last, part.sum(0)
