"""Convolutions of regions: the same function, gradients and optimized forms."""

import pytest
import torch

from resnet_backbone import optimize_for_inference
from resnet_backbone.fast.regions import (
    RegionConvNorm,
    RegionConvNormAct,
    for_regions,
    projections_on_map,
)
from resnet_backbone.fast.roi_align import RegionAlign
from resnet_backbone.models.layers import ConvNorm
from resnet_backbone.models.resnet import resnet_stage


def stages(**options):
    """A plain stage of 64 -> 128 channels with random norms, and its twin for regions."""
    torch.manual_seed(0)
    plain = resnet_stage(50, 3, in_channels=64, **options)[0]
    for module in plain.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    twin = resnet_stage(50, 3, in_channels=64, **options)[0]
    twin.load_state_dict(plain.state_dict())
    return plain, for_regions(twin)


@pytest.mark.parametrize(
    "options",
    [
        dict(norm="FrozenBN"),
        dict(norm="BN", stride=2),
        dict(norm="GN", stride=2, stride_in_1x1=False),
        dict(norm="", dilation=2, shortcut="highway"),
        dict(norm="FrozenBN", shortcut="A", stride=2, activation="prelu"),
    ],
)
def test_same_function_and_gradients(options):
    plain, twin = (stage.double() for stage in stages(**options))
    assert any(type(module) is RegionConvNormAct for module in twin.modules())
    x = torch.randn(3, 64, 7, 6, dtype=torch.float64)
    found = []
    for stage in (plain, twin):
        regions = x.clone().requires_grad_()
        y = stage(regions)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        gradients = [p.grad for p in stage.parameters() if p.grad is not None]
        found.append([y, regions.grad, *gradients])
        with torch.no_grad():
            found[-1].append(stage.eval()(x))
    assert len(found[0]) > 10
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recorded", [True, False])
def test_bf16_autocast_stays_near_single_precision(recorded):
    plain, twin = stages(norm="FrozenBN")
    x = torch.randn(3, 64, 7, 7)
    with torch.set_grad_enabled(recorded):
        expected = plain(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = twin(x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_optimized(dtype, bound):
    plain, twin = stages(norm="FrozenBN")
    x = torch.randn(3, 64, 7, 7)
    with torch.no_grad():
        expected = plain(x)
        found = optimize_for_inference(twin, dtype=dtype)(x)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < bound * expected.abs().max()


def test_only_convolutions_of_this_package_change():
    stage = resnet_stage(50, 3, norm="BN")[0]
    keys = list(stage.state_dict())
    kinds = {name: type(module) for name, module in stage.named_modules()}
    for_regions(stage)
    assert list(stage.state_dict()) == keys
    for name, module in stage.named_modules():
        if issubclass(kinds[name], ConvNorm):
            assert isinstance(module, RegionConvNorm) and isinstance(module, kinds[name])
        else:
            assert type(module) is kinds[name]


# Projections of pooled bins, or bins pooled from projections: the same to rounding.
# 7x7 bins each, a map of 60 cells: two regions have more bins than the map has cells.
POOL = RegionAlign((14, 14), 1 / 16, 0, stride=2)
REGIONS = torch.tensor([[0, 5, 9, 130, 90], [0, -40, -40, 30, 200], [0, 70, 60, 75, 66.0]])


@pytest.mark.parametrize(
    "options",
    [dict(norm="FrozenBN"), dict(norm=""), dict(norm="FrozenBN", activation="prelu")],
)
def test_projections_are_the_same_function(options):
    _, stage = (stage.double() for stage in stages(**options))
    maps = torch.randn(1, 64, 6, 10, dtype=torch.float64)
    found = []
    for on_map in (False, True):
        leaf = maps.clone().requires_grad_()
        if on_map:
            projections = projections_on_map(stage, leaf, len(REGIONS) * POOL.bins)
            y = projections.stage_of(POOL(projections.of_map(leaf), REGIONS.double()))
        else:
            y = stage(POOL(leaf, REGIONS.double()))
        stage.zero_grad()
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        gradients = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
        found.append([y, leaf.grad, *gradients])
    assert found[0][0].shape == (3, 512, 7, 7) and len(found[0]) > 10
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_projections_only_where_they_are_the_same_and_pay():
    maps = torch.randn(1, 64, 6, 10)

    def chosen(stage, bins=61):
        return projections_on_map(stage, maps, bins) is not None

    frozen = stages(norm="FrozenBN")[1]
    assert chosen(frozen) and not chosen(frozen, bins=60)
    for options in (
        dict(norm="GN"),
        dict(norm="FrozenBN", shortcut="A"),
        dict(norm="FrozenBN", shortcut="none"),
        dict(norm="FrozenBN", shortcut="highway"),
        dict(norm="FrozenBN", stride=2),
        dict(norm="FrozenBN", stride=2, stride_in_1x1=False),
    ):
        assert not chosen(stages(**options)[1]), options
    trained = stages(norm="BN")[1]
    assert not chosen(trained)
    with torch.no_grad():
        assert not chosen(trained) and chosen(trained.eval())
    assert not chosen(trained)  # with gradients, its affine parameters learn as they are
    basic = for_regions(resnet_stage(18, 3, in_channels=64, norm="FrozenBN")[0])
    assert not chosen(basic)
    for module in (frozen, frozen[0], frozen[0].conv1, frozen[0].shortcut.norm):
        handle = module.register_forward_hook(lambda *_: None)
        assert not chosen(frozen)
        handle.remove()
    assert chosen(frozen)
