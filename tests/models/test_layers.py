"""Blocks, shortcuts, norms and initialisation against computations by hand."""

import math
from functools import partial

import pytest
import torch
from drawn_networks import on_meta
from torch import nn
from torch.nn import functional as F

from resnet_backbone.models import build_model, list_models
from resnet_backbone.models.layers import ConvNorm, FrozenBatchNorm2d
from resnet_backbone.models.resnet import BasicBlock, BottleneckBlock, ResidualBlock, Stem

build_on_meta = partial(on_meta, build_model)


@pytest.mark.parametrize("size", [6, 7])
def test_block_with_shortcut_a_by_hand(size):
    block = BasicBlock(3, 5, stride=2, shortcut="A", norm="").double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    y = F.relu(F.conv2d(x, block.conv1.weight, block.conv1.bias, stride=2, padding=1))
    y = F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1)
    y[:, :3] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), F.relu(y))


@pytest.mark.parametrize("in_channels, stride", [(8, 1), (4, 2)])
def test_highway_by_hand(in_channels, stride):
    """T * F(x) + (1 - T) * shortcut(x), then the activation."""
    block = BottleneckBlock(in_channels, 8, stride=stride, shortcut="highway", norm="").double()
    x = torch.randn(2, in_channels, 6, 6, dtype=torch.float64)
    gate = 1 / (1 + torch.exp(-F.conv2d(x, block.gate.weight, block.gate.bias, stride)))
    y = F.relu(F.conv2d(x, block.conv1.weight, block.conv1.bias, stride))  # stride in 1x1
    y = F.relu(F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1))
    y = F.conv2d(y, block.conv3.weight, block.conv3.bias)
    carried = x
    if stride == 2:
        carried = F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride)
    torch.testing.assert_close(block(x), F.relu(gate * y + (1 - gate) * carried))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20"])
def test_highway_gates_start_nearly_closed(name):
    model = build_model(name, shortcut="highway")
    gates = [module.gate for module in model.modules() if isinstance(module, ResidualBlock)]
    assert gates and all(bool((gate.bias == -3).all()) for gate in gates)


@pytest.mark.parametrize(
    "name, counts",
    [
        ("resnet18", {"A": 0, "B": 3, "C": 8, "highway": 3}),
        ("resnet34", {"A": 0, "B": 3, "C": 16, "none": 0}),
        ("resnet50", {"A": 0, "B": 4, "C": 16}),
        ("cifar_resnet20", {"A": 0, "B": 2, "C": 9}),
    ],
)
def test_number_of_projections(name, counts):
    for option, expected in counts.items():
        model = build_on_meta(name, shortcut=option)
        blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
        projections = [b.shortcut for b in blocks if isinstance(b.shortcut, ConvNorm)]
        assert len(projections) == expected, option
        assert all(conv.kernel_size == (1, 1) and conv.norm for conv in projections)


def test_plain_blocks_have_no_shortcut():
    model = build_model("cifar_plain20").eval()
    assert not any("shortcut" in key for key in model.state_dict())
    x = torch.rand(1, 16, 8, 8)
    block = model.res2[1]
    assert torch.equal(block(x), F.relu(block.conv2(block.conv1(x))))


@pytest.mark.parametrize("name", [name for name in list_models() if "1202" not in name])
def test_no_bias_before_a_norm_and_no_dropout(name):
    model = build_on_meta(name)
    for module in model.modules():
        if isinstance(module, ConvNorm):
            assert (module.bias is None) == (module.norm is not None)
        if not name.startswith(("vgg", "prelu_net")):
            assert "dropout" not in type(module).__name__.lower()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    has_norms = "bn" in name or not name.startswith(("vgg", "prelu_net"))
    assert norms == (convs if has_norms else 0)


@pytest.mark.parametrize("activation, gain", [("relu", 2), ("prelu", 2 / (1 + 0.25**2))])
def test_he_initialisation(activation, gain):
    torch.manual_seed(0)
    model = build_model("resnet18", activation=activation)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            weight, std = module.weight.detach(), math.sqrt(gain / fan_out)
            error = 4 / math.sqrt(2 * weight.numel())  # four standard errors of the std
            assert abs(weight.std() / std - 1) < error, name
            assert abs(weight.mean()) < 4 * std / math.sqrt(weight.numel()), name
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all() and (module.bias == 0).all())
    assert abs(model.linear.weight.std() / 0.01 - 1) < 0.01
    assert not model.linear.bias.any()


def test_the_first_loss_without_norms():
    """On pixels minus their mean; without the small last layer it is above 15, and VGG diverges."""
    torch.manual_seed(0)
    model, pixels = build_model("vgg11", dropout=0.0), 70 * torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        loss = F.cross_entropy(model(pixels), torch.tensor([3, 5]))
    assert loss < 10


@pytest.mark.parametrize("norm", ["BN", "GN", "FrozenBN"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual(name, norm):
    """Every block starts as its shortcut."""
    model = build_model(name, norm=norm, zero_init_residual=True).eval()
    block = model.res3[1]
    x = torch.randn(1, 128 * block.expansion, 4, 4)
    assert torch.equal(block(x), F.relu(x))
    assert bool((block.conv1.norm.weight == 1).all())
    weights = [value for key, value in model.state_dict().items() if "norm.weight" in key]
    assert sum(not value.any() for value in weights) == (8 if name == "resnet18" else 16)


def test_prelu_by_hand():
    block = BasicBlock(4, 4, norm="", activation="prelu").double()
    slopes = [m.weight for m in block.modules() if isinstance(m, nn.PReLU)]
    assert [tuple(slope.shape) for slope in slopes] == [(4,), (4,)]
    assert all(bool((slope == 0.25).all()) for slope in slopes)
    nn.init.uniform_(block.conv1.activation.weight, 0.1, 0.5)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)
    y = torch.where(y > 0, y, y * block.conv1.activation.weight[:, None, None])
    y = F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1) + x
    torch.testing.assert_close(block(x), torch.where(y > 0, y, 0.25 * y))


@pytest.mark.parametrize("name", "vgg11 cifar_resnet20 resnet50 prelu_net_a bn_inception".split())
def test_prelu_is_everywhere(name):
    model = build_on_meta(name, activation="prelu")
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())


@pytest.mark.parametrize(
    "norm, layer",
    [
        ("BN", nn.BatchNorm2d),
        ("FrozenBN", FrozenBatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("GN", nn.GroupNorm),
        (lambda channels: nn.InstanceNorm2d(channels, affine=True), nn.InstanceNorm2d),
        ("", type(None)),
        (None, type(None)),
    ],
)
def test_norms(norm, layer):
    model = build_model("resnet18", norm=norm, num_classes=3).eval()
    layers = [module.norm for module in model.modules() if isinstance(module, ConvNorm)]
    assert len(layers) == 20 and all(type(module) is layer for module in layers)
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_frozen_norm_by_hand():
    norm, x = FrozenBatchNorm2d(6).double(), torch.randn(2, 6, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x, rtol=1e-6, atol=1e-6)  # it starts as the identity
    for value in norm.buffers():
        nn.init.uniform_(value, 0.5, 1.5)
    values = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias, mean, var = (value.view(6, 1, 1) for value in values)
    expected = (x - mean) / torch.sqrt(var + norm.eps) * weight + bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-12)
    assert not list(norm.parameters())
    conv = ConvNorm(6, 6, 1, norm=lambda _: norm).double()
    torch.testing.assert_close(conv(x), norm(F.conv2d(x, conv.weight)), rtol=0, atol=0)


def test_a_norm_in_the_weights_that_the_network_has_not():
    source, target = build_model("cifar_resnet8"), build_model("cifar_resnet8", norm="")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="stem.norm, .*build the network with their norm"):
            target.load_state_dict(source.state_dict(), strict=strict)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("caffe_pool", [False, True])
def test_stem_pool_by_hand(size, caffe_pool):
    """Windows from -1 with padding, from 0 and cut at the border without it."""
    pool = Stem(3, 4, "", "relu", caffe_pool).pool
    x = torch.randn(1, 2, size, size)
    first = 0 if caffe_pool else -1
    starts = [s for s in range(first, size, 2) if s + (2 if caffe_pool else 1) <= size]
    starts = starts[: (size // 2 if caffe_pool else (size + 1) // 2)]
    cuts = [slice(max(start, 0), start + 3) for start in starts]
    rows = [torch.stack([x[:, :, i, j].amax((2, 3)) for j in cuts], dim=-1) for i in cuts]
    assert torch.equal(pool(x), torch.stack(rows, dim=-2))


class Float32Norm(nn.GroupNorm):
    """A norm that leaves reduced precision, as autocast's own do on a GPU."""

    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize("shortcut", ["A", "B", "highway", "none"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "", lambda channels: Float32Norm(8, channels)])
def test_bf16_autocast(shortcut, norm):
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", shortcut=shortcut, norm=norm)
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    logits.float().sum().backward()
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
