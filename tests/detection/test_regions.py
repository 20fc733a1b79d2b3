"""Convolutions of regions: the same function, gradients and optimized forms."""

import pytest
import torch

pytest.importorskip("detectron2")

from resnet_backbone import optimize_for_inference
from resnet_backbone.detection.regions import RegionConvNorm, RegionConvNormAct, for_regions
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
