"""RoIAlign on CPUs as weighted sums of whole rows, of all bins or of every second one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align


class RegionAlign(nn.Module):
    """RoIAlign (arXiv 1703.06870), of whose bins every ``stride``-th is computed.

    Equal to ``torchvision.ops.roi_align(...)[:, :, ::stride, ::stride]`` to rounding, and so is the
    gradient. On a CPU each bin is a weighted sum of the cells around its samples, taken as whole
    rows of a channels_last map (``F.embedding_bag``), and the result is channels_last:
    torchvision's kernel reads one channel after the other, and its backward pass has one thread.
    Coordinates and sums have at least single precision; Detectron2's ``ROIAlign`` rounds the
    corners to the map's precision, in bf16 by up to two pixels in 1,000.

    Args:
        output_size: bins (rows, columns) of a region before the stride.
        spatial_scale: of the map, 1 / stride of the backbone.
        sampling_ratio: samples of a bin along each axis; 0: one per cell, rounded up.
        aligned: ROIAlignV2, half a pixel further up and left.
        stride: of the bins.
    """

    def __init__(
        self,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
        stride: int = 1,
    ):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned, self.stride = sampling_ratio, aligned, stride

    def forward(self, maps: Tensor, regions: Tensor) -> Tensor:
        """(N, C, H, W), (R, 5) of (image, x0, y0, x1, y1) -> (R, C, rows, columns)."""
        if not self.sums_rows(maps) or not len(regions):
            grid = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
            bins = roi_align(maps, regions.to(maps.dtype), *grid)
            return bins[:, :, :: self.stride, :: self.stride]
        precision = torch.promote_types(maps.dtype, torch.float32)
        cells = maps.to(precision).permute(0, 2, 3, 1)
        with torch.no_grad():
            bags = self._bags(cells.shape, regions.to(precision))
        rows = cells.flatten(0, 2)
        sums = F.embedding_bag(
            bags.cells, rows, bags.offsets, mode="sum", per_sample_weights=bags.weights
        )
        sums = sums.view(len(regions), *bags.shape, -1).permute(0, 3, 1, 2)
        return sums.to(maps.dtype)

    @property
    def bins(self) -> int:
        """Bins of a region that are computed."""
        return math.prod(-(-size // self.stride) for size in self.output_size)

    @staticmethod
    def sums_rows(maps: Tensor) -> bool:
        """Whether bags are the faster way here; graphs that are traced keep the one operator."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting():
            return False
        return maps.device.type == "cpu" and maps.is_floating_point()

    def _bags(self, shape: torch.Size, regions: Tensor) -> Bags:
        _, height, width, _ = shape
        corners = regions[:, 1:] * self.spatial_scale - (0.5 if self.aligned else 0.0)
        rows, columns = self.output_size
        left, top, right, bottom = corners.unbind(1)
        y = self._axis(top, bottom, rows, height)
        x = self._axis(left, right, columns, width)
        image = regions[:, 0].long() * height
        y = y._replace(cells=(y.cells + image[:, None, None]) * width)
        return outer_product(y, x)

    def _axis(self, start: Tensor, end: Tensor, bins: int, size: int) -> Axis:
        extent = end - start
        if not self.aligned:
            extent = extent.clamp(min=1)
        if self.sampling_ratio > 0:
            samples = torch.full_like(extent, self.sampling_ratio)
        else:
            samples = (extent / bins).ceil()
        chosen = torch.arange(0, bins, self.stride).to(extent)
        return axis_weights(start, extent / bins, chosen, samples, size)

    def extra_repr(self) -> str:
        return (
            f"{self.output_size}, scale={self.spatial_scale}, samples={self.sampling_ratio}, "
            f"aligned={self.aligned}, stride={self.stride}"
        )


class StridedPool(nn.Module):
    """Pools regions and keeps every ``stride``-th bin in each direction.

    Maps of half precision are pooled in single precision: torchvision's kernels need one precision
    for maps and regions, and see to it by themselves under a GPU's autocast alone.
    """

    def __init__(self, pool: nn.Module, stride: int):
        super().__init__()
        self.pool = pool
        self.stride = stride

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        precision = torch.promote_types(features.dtype, regions.dtype)
        bins = self.pool(features.to(precision), regions.to(precision))
        return bins[:, :, :: self.stride, :: self.stride].to(features.dtype)


class Axis(NamedTuple):
    """Bins of R regions along one axis as weighted cells of the map."""

    cells: Tensor  # (R, bins, J): index of each cell
    weights: Tensor  # (R, bins, J); zero from `reach` on
    reach: Tensor  # (R,): cells of each bin of a region


class Bags(NamedTuple):
    """Bins as weighted sums of rows; arguments of ``F.embedding_bag``."""

    cells: Tensor
    weights: Tensor
    offsets: Tensor
    shape: tuple[int, int]  # bins of a region


def axis_weights(start: Tensor, width: Tensor, bins: Tensor, samples: Tensor, size: int) -> Axis:
    """The mean over the samples of each bin as a sum over cells, by linear interpolation.

    RoIAlign's rules (arXiv 1703.06870): samples are spaced evenly in a bin, those more than one
    cell beyond the map count as zero, those beyond the center of its last cell take its value.

    Args:
        start: (R,) where the first bin begins, in cells; 0 is the center of the first cell.
        width: (R,) of a bin.
        bins: (K,) numbers of the bins wanted.
        samples: (R,) whole numbers, for each bin; below 1: the bin is zero.
        size: cells of the map.
    """
    samples, width, start = (value[:, None, None] for value in (samples, width, start))
    steps = torch.arange(max(1, int(samples.max()))).to(start)
    at = start + bins[:, None] * width + (steps + 0.5) * width / samples.clamp(min=1)
    counts = (steps < samples) & (at >= -1) & (at <= size)
    at = torch.where(counts, at.clamp(0, size - 1), -1)
    low = at.floor()
    first = torch.where(counts, low, size).amin(2, keepdim=True).clamp(max=size - 1)
    reach = (low.amax(2, keepdim=True) - first + 2).clamp(min=1).amax((1, 2)).long()
    offset = torch.where(counts, low - first, 0).long()
    share = counts / samples.clamp(min=1)
    upper = torch.where(counts, at - low, 0) * share
    weights = upper.new_zeros(*upper.shape[:2], int(reach.max()) + 1)
    weights.scatter_add_(2, offset, share - upper).scatter_add_(2, offset + 1, upper)
    cells = first.long() + torch.arange(int(reach.max()))
    return Axis(cells.clamp(max=size - 1), weights[:, :, :-1], reach)


def outer_product(y: Axis, x: Axis) -> Bags:
    """Bags of all bins of all regions: cells ``y.cells + x.cells``, products of the weights."""
    regions, rows, columns = len(y.cells), y.cells.shape[1], x.cells.shape[1]
    lengths = (y.reach * x.reach).repeat_interleave(rows * columns)
    offsets = lengths.cumsum(0) - lengths
    bag = torch.arange(len(lengths)).repeat_interleave(lengths)
    within = torch.arange(len(bag)) - offsets[bag]
    reach = x.reach.repeat_interleave(rows * columns)[bag]
    step_y = torch.div(within, reach, rounding_mode="floor")
    number = torch.arange(regions * rows).view(regions, rows, 1).expand(-1, -1, columns)
    entry_y = number.flatten()[bag] * y.cells.shape[2] + step_y
    number = torch.arange(regions * columns).view(regions, 1, columns).expand(-1, rows, -1)
    entry_x = number.flatten()[bag] * x.cells.shape[2] + within - step_y * reach
    cells = y.cells.flatten()[entry_y] + x.cells.flatten()[entry_x]
    weights = y.weights.flatten()[entry_y] * x.weights.flatten()[entry_x]
    return Bags(cells, weights, offsets, (rows, columns))
