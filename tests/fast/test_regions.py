"""RoIAlign as sums of rows, and projections before the pooling: the same function."""

import copy

import pytest
import torch
from drawn_networks import assert_close, randomize
from torchvision.ops import roi_align

from resnet_backbone.fast import InferenceNetwork, fold_bn, fold_each_call
from resnet_backbone.fast.regions import RegionAlign, project_on_map
from resnet_backbone.models.resnet import resnet_stage


def folding_stage(**options):
    """A stage of 64 -> 128 channels with random norms."""
    torch.manual_seed(0)
    return fold_each_call(randomize(resnet_stage(50, 3, in_channels=64, **options)[0]).train())


def outputs_and_gradients(function, x, module=None):
    """The output of x, and the gradients of its weighted sum by x and by a module's parameters."""
    x = x.clone().requires_grad_()
    y = function(x)
    parameters = [p for p in module.parameters() if p.requires_grad] if module else []
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


OPTIONS = [dict(norm="FrozenBN"), dict(norm=""), dict(norm="FrozenBN", activation="prelu")]
# Projections of pooled bins, or bins pooled from projections: the same to rounding.
# 7x7 bins each, a map of 60 cells: two regions have more bins than the map has cells.
POOL = RegionAlign((14, 14), 1 / 16, 0, stride=2)
REGIONS = torch.tensor([[0, 5, 9, 130, 90], [0, -40, -40, 30, 200], [0, 70, 60, 75, 66.0]])


@pytest.mark.parametrize("options", OPTIONS)
def test_projections_are_the_same_function(options):
    stage = folding_stage(**options).double()
    maps = torch.randn(1, 64, 6, 10, dtype=torch.float64)

    def on_map(leaf):
        projected = project_on_map(stage, leaf, len(REGIONS) * POOL.bins)
        return projected(POOL(projected.of_map(leaf), REGIONS.double()))

    expected = outputs_and_gradients(lambda x: stage(POOL(x, REGIONS.double())), maps, stage)
    found = outputs_and_gradients(on_map, maps, stage)
    assert expected[0].shape == (3, 512, 7, 7) and len(expected) > 10
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_projections_only_where_they_are_the_same_and_pay():
    maps = torch.randn(1, 64, 6, 10)

    def chosen(stage, bins=61):
        return project_on_map(stage, maps, bins) is not None

    frozen = folding_stage(norm="FrozenBN")
    assert chosen(frozen) and not chosen(frozen, bins=60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not chosen(frozen)
        with torch.no_grad():
            assert chosen(frozen)
    others = [dict(shortcut=shortcut) for shortcut in ("A", "none", "highway")]
    others += [dict(stride=2), dict(stride=2, stride_in_1x1=False), dict(norm="GN")]
    for options in others:
        assert not chosen(folding_stage(**{"norm": "FrozenBN", **options})), options
    trained = folding_stage(norm="BN")
    assert not chosen(trained)
    with torch.no_grad():
        assert not chosen(trained) and chosen(trained.eval())
    assert not chosen(trained)  # with gradients, its affine parameters learn as they are
    basic = fold_each_call(resnet_stage(18, 3, in_channels=64, norm="FrozenBN")[0])
    assert not chosen(basic)
    for module in (frozen, frozen[0], frozen[0].conv1, frozen[0].shortcut.norm):
        handle = module.register_forward_hook(lambda *_: None)
        assert not chosen(frozen)
        handle.remove()
    assert chosen(frozen)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_optimized_stages_are_projected(dtype, bound):
    stage = fold_bn(folding_stage(norm="FrozenBN").eval()).requires_grad_(False)
    whole = InferenceNetwork(copy.deepcopy(stage), dtype)
    maps, count = torch.randn(1, 64, 6, 10), len(REGIONS) * POOL.bins
    with torch.no_grad():
        rest = project_on_map(whole, maps, count)
        bins = POOL(rest.of_map(maps), REGIONS)
        found = rest(bins)
    assert bins.dtype == found.dtype == torch.float32 and rest.dtype == dtype
    assert_close(found, stage(POOL(maps, REGIONS)), bound)


def test_engines_run_whole_stages():
    stage = fold_bn(folding_stage(norm="FrozenBN").eval())
    for dtype, engine in ((torch.float32, "openvino"), (torch.int8, "openvino")):
        whole = InferenceNetwork(copy.deepcopy(stage), dtype, engine)
        assert project_on_map(whole, torch.randn(1, 64, 6, 10), 61) is None


# RoIAlign

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


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(14, 14), (7, 5)])
def test_equals_torchvision(regions, aligned, samples, stride, size):
    torch.manual_seed(0)
    features = torch.randn(MAP, dtype=torch.float64)
    ours = RegionAlign(size, SCALE, samples, aligned, stride)

    def theirs(maps):
        return roi_align(maps, regions, size, SCALE, samples, aligned)[:, :, ::stride, ::stride]

    expected, gradient = outputs_and_gradients(theirs, features)
    found, own = outputs_and_gradients(lambda maps: ours(maps, regions), features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(own, gradient, rtol=0, atol=1e-12 * len(regions))


def test_single_precision_and_memory_formats(regions):
    features = torch.randn(MAP)
    expected = roi_align(features, regions.float(), (14, 14), SCALE, 0, True)
    for form in (torch.contiguous_format, torch.channels_last):
        found = RegionAlign((14, 14), SCALE, 0)(features.to(memory_format=form), regions)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last)
    pool = RegionAlign((14, 14), SCALE, 0, stride=2)
    assert pool(features, torch.zeros(0, 5)).shape == (0, 5, 7, 7)


def test_bf16_keeps_the_corners():
    """Detectron2's layer rounds 1001.3 to 1000 in bf16; only the map may be rounded."""
    ROIAlign = pytest.importorskip("detectron2.layers").ROIAlign
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
    expected = roi_align(features, regions, (14, 14), SCALE, 0, True)[:, :, ::2, ::2]
    torch.testing.assert_close(traced(features, regions), expected)
