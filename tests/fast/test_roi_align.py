"""RoIAlign as weighted sums of rows: Detectron2's own, of all bins and of every second one."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.layers import ROIAlign

from resnet_backbone.fast.roi_align import RegionAlign

SCALE = 1 / 16
MAP = (2, 5, 11, 17)
ODD_BOXES = [
    [5, 5, 5, 5],  # empty
    [40, 40, 30, 50],  # upside down
    [7, 7, 7.5, 7.5],  # far smaller than a cell
    [-500, -500, -400, -400],  # beyond the map
    [-20, -30, 4, 2],  # partly so
    [0, 0, 272, 176],  # the whole map
    [-1000, -1000, 10000, 9000],  # more than that
    [16, 16, 48, 64],  # corners on borders of cells
    [0, 50, 272, 58],  # flat
]


@pytest.fixture
def regions():
    """300 random boxes of 0.4 to 400 pixels, and those that are special, of two images."""
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(300, 2, generator=generator) * torch.tensor([300.0, 200.0]) - 10
    half = torch.exp(torch.rand(300, 2, generator=generator) * 7 - 1.6)
    boxes = torch.cat([torch.cat([center - half, center + half], 1), torch.tensor(ODD_BOXES)])
    image = torch.randint(0, 2, (len(boxes), 1), generator=generator)
    return torch.cat([image, boxes], 1).double()


def pool_and_gradient(pool, features, regions):
    features = features.clone().requires_grad_()
    bins = pool(features, regions)
    weights = torch.linspace(-1, 1, bins.numel(), dtype=bins.dtype).view(bins.shape)
    (bins * weights).sum().backward()
    return bins.detach(), features.grad


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(14, 14), (7, 5)])
def test_equals_detectron2(regions, aligned, samples, stride, size):
    torch.manual_seed(0)
    features = torch.randn(MAP, dtype=torch.float64)
    theirs = ROIAlign(size, SCALE, samples, aligned)
    ours = RegionAlign(size, SCALE, samples, aligned, stride)
    expected, gradient = pool_and_gradient(
        lambda *inputs: theirs(*inputs)[:, :, ::stride, ::stride], features, regions
    )
    found, own = pool_and_gradient(ours, features, regions)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(own, gradient, rtol=0, atol=1e-12 * len(regions))


def test_single_precision_and_memory_formats(regions):
    features = torch.randn(MAP)
    expected = ROIAlign((14, 14), SCALE, 0)(features, regions)
    for form in (torch.contiguous_format, torch.channels_last):
        found = RegionAlign((14, 14), SCALE, 0)(features.to(memory_format=form), regions)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_no_regions():
    assert RegionAlign((14, 14), SCALE, 0, stride=2)(torch.rand(MAP), torch.zeros(0, 5)).shape == (
        (0, 5, 7, 7)
    )


def test_bf16_keeps_the_corners():
    """Detectron2's layer rounds 1001.3 to 1000 in bf16; only the map may be rounded."""
    features = torch.arange(80.0).expand(1, 3, 40, 80)  # whole numbers below 256: exact in bf16
    regions = torch.tensor([[0, 1001.3, 30, 1101.3, 90]])
    expected = ROIAlign((2, 2), SCALE, 0)(features, regions)
    found = RegionAlign((2, 2), SCALE, 0)(features.bfloat16(), regions)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ROIAlign((2, 2), SCALE, 0)(features.bfloat16(), regions)
    assert not torch.equal(rounded, expected.bfloat16())


def test_traced_graphs_keep_the_operator(regions):
    features, regions = torch.randn(MAP), regions.float()
    traced = torch.jit.trace(RegionAlign((14, 14), SCALE, 0, stride=2), (features, regions[:9]))
    expected = ROIAlign((14, 14), SCALE, 0)(features, regions)[:, :, ::2, ::2]
    torch.testing.assert_close(traced(features, regions), expected)
