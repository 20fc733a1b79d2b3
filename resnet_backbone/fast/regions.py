"""Fast detection regions on CPUs: RoIAlign as weighted sums of whole rows, of all bins or every
second one, and res5 whose first 1x1 convolutions are computed before the pooling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from resnet_backbone.fast.engines import InferenceNetwork
from resnet_backbone.fast.optimize import FoldingConvNorm, conv_dtype, in_graph, is_watched
from resnet_backbone.models.resnet import BottleneckBlock


class ProjectedStage(nn.Module):
    """What is left of a stage whose first ``conv1`` and ``shortcut`` are computed on the map.

    RoIAlign and a 1x1 convolution can change places. Only the bias is added after the pooling,
    because samples outside the map are zero. 1,000 regions of an 800x1216 image have 13 times as
    many bins as its map has cells.
    """

    def __init__(self, stage: nn.Sequential):
        super().__init__()
        self.stage = stage

    def of_map(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, width + out_channels, H, W), both convolutions without the bias."""
        block, precision = self.stage[0], x.dtype
        weight = torch.cat([conv.folded()[0] for conv in (block.conv1, block.shortcut)])
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        return F.conv2d(x, weight).to(precision)

    def forward(self, bins: Tensor) -> Tensor:
        """Maps bins (R, width + out_channels, h, w) of :meth:`of_map` to the stage's output."""
        block, width = self.stage[0], self.stage[0].conv1.out_channels
        biases = [conv.folded()[1] for conv in (block.conv1, block.shortcut)]
        bins = bins + torch.cat(biases).to(bins.dtype)[:, None, None]
        y = block.conv3(block.conv2(block.conv1.activation(bins[:, :width])))
        y += bins[:, width:]
        y = block.activation(y)
        for block in self.stage[1:]:
            y = block(y)
        return y


def project_on_map(stage: nn.Module, maps: Tensor, bins: int) -> nn.Module | None:
    """Returns a stage's :class:`ProjectedStage` if that is equivalent and faster, else None.

    It is not faster in an engine, nor in training in half precision.

    Args:
        stage: also one that PyTorch runs as an :class:`InferenceNetwork`.
        maps: (N, C, H, W).
        bins: number of bins to be pooled.
    """
    is_optimized = isinstance(stage, InferenceNetwork)
    network = stage.network if is_optimized else stage
    if is_watched(stage) or is_watched(network) or bins <= maps[:, 0].numel():
        return None
    is_slow = torch.is_grad_enabled() and conv_dtype(maps).itemsize < 4
    if is_slow or (is_optimized and stage.engine != "eager"):
        return None
    block = network[0] if isinstance(network, nn.Sequential) else None
    if type(block) is not BottleneckBlock or block.gate is not None or is_watched(block):
        return None
    for conv in (block.conv1, block.shortcut):
        is_plain = isinstance(conv, FoldingConvNorm) and conv.stride == (1, 1)
        if not is_plain or is_watched(conv) or not conv.can_fold():
            return None
    rest = ProjectedStage(network)
    return InferenceNetwork(rest, stage.dtype) if is_optimized else rest


class RegionAlign(nn.Module):
    """RoIAlign (arXiv 1703.06870) that computes only every ``stride``-th bin.

    Matches ``torchvision.ops.roi_align(...)[:, :, ::stride, ::stride]`` and its gradient up to
    rounding. On a CPU each bin is a weighted sum of the cells around its samples, read as whole
    rows of a channels_last map (``F.embedding_bag``). torchvision's kernel reads one channel at a
    time, and its backward pass is single-threaded. Coordinates and sums have at least single
    precision; Detectron2's ``ROIAlign`` rounds the corners to the map's precision.

    Args:
        output_size: bins (rows, columns) of a region before the stride.
        spatial_scale: 1 / stride of the backbone.
        sampling_ratio: samples per bin along each axis; 0 for one per cell, rounded up.
        aligned: shifts regions by half a pixel up and left (``ROIAlignV2``).
        stride: step between the computed bins along each axis.
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
        """Pools (N, C, H, W) in regions (image, x0, y0, x1, y1), (R, 5): (R, C, rows, columns)."""
        if not self.sums_rows(maps) or not len(regions):
            grid = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
            bins = roi_align(maps, regions.to(maps.dtype), *grid)
            return bins[:, :, :: self.stride, :: self.stride]
        precision = torch.promote_types(maps.dtype, torch.float32)
        cells = maps.to(precision).permute(0, 2, 3, 1)
        with torch.no_grad():
            entries, offsets, weights = self._bags(cells.shape, regions.to(precision))
        rows = cells.flatten(0, 2)
        sums = F.embedding_bag(entries, rows, offsets, mode="sum", per_sample_weights=weights)
        bins = [-(-size // self.stride) for size in self.output_size]
        return sums.view(len(regions), *bins, -1).permute(0, 3, 1, 2).to(maps.dtype)

    @property
    def bins(self) -> int:
        """Number of computed bins per region."""
        return math.prod(-(-size // self.stride) for size in self.output_size)

    @staticmethod
    def sums_rows(maps: Tensor) -> bool:
        """Whether the sum of rows is used; traced graphs keep the single operator."""
        if in_graph(maps):
            return False
        return maps.device.type == "cpu" and maps.is_floating_point()

    def _bags(self, shape: torch.Size, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
        grid = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        return f"{grid}, stride={self.stride}"


class StridedPool(nn.Module):
    """Pools regions and keeps every ``stride``-th bin in each direction.

    Both inputs are promoted to the higher precision, since torchvision's kernels need a common one.
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
    reach: Tensor  # (R,): number of cells per bin


def axis_weights(start: Tensor, width: Tensor, bins: Tensor, samples: Tensor, size: int) -> Axis:
    """Writes the mean over each bin's samples as a sum over cells, by linear interpolation.

    RoIAlign's rules (arXiv 1703.06870): samples are evenly spaced within a bin. Samples more than
    one cell outside the map count as zero, others beyond the last cell's center take its value.

    Args:
        start: (R,) start of the first bin, in cells; 0 is the center of the first cell.
        width: (R,) width of a bin, in cells.
        bins: (K,) indices of the bins to compute.
        samples: (R,) number of samples per bin, integral; below 1 the bin is zero.
        size: number of cells along the axis.
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


def outer_product(y: Axis, x: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the cells of all bins (y + x), each bin's offset into them, and weights (y * x).

    Bins are in the order region, row, column. A bin has ``y.reach`` lines of ``x.reach`` cells.
    """
    rows, columns = y.cells.shape[1], x.cells.shape[1]
    lines = y.reach.repeat_interleave(rows * columns)  # of each bin
    bag = torch.arange(len(lines)).repeat_interleave(lines)  # bin of each line
    place = torch.arange(len(bag)) - take(lines.cumsum(0) - lines, bag)  # of a line in its bin
    entry_y = bag.div(columns, rounding_mode="floor") * y.cells.shape[2] + place
    region = bag.div(rows * columns, rounding_mode="floor")
    reach = take(x.reach, region)
    shift = (region * columns + bag % columns) * x.cells.shape[2] - (reach.cumsum(0) - reach)
    line = torch.repeat_interleave(reach)  # line of each cell
    entry_x = take(shift, line) + torch.arange(len(line))
    cells = take(take(y.cells, entry_y), line) + take(x.cells, entry_x)
    weights = take(take(y.weights, entry_y), line) * take(x.weights, entry_x)
    lengths = (y.reach * x.reach).repeat_interleave(rows * columns)
    return cells, lengths.cumsum(0) - lengths, weights


def take(values: Tensor, places: Tensor) -> Tensor:
    """``values.flatten()[places]`` for 1-D places, which ``index_select`` computes faster."""
    return values.flatten().index_select(0, places)
