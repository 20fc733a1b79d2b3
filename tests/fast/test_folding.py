"""Folded batch norms: the function and gradients of convolution and norm, never stale weights."""

import copy

import pytest
import torch
from drawn_networks import assert_close, network, unfolded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_backbone import models
from resnet_backbone.fast import fold_bn, fold_each_call, optimize_for_inference
from resnet_backbone.fast.optimize import FoldingConvNorm, FoldingConvNormAct
from resnet_backbone.models import FrozenBatchNorm2d
from resnet_backbone.models.layers import ConvNorm, ConvNormAct

NAMES = ("resnet18", "resnet50", "cifar_resnet20", "vgg11_bn")


def test_only_the_classes_of_our_convolutions_change():
    """Parameters, buffers, hooks and keys are the same objects; the paper's network is plain."""
    plain, seen = models.build_model("cifar_resnet8", norm="FrozenBN").eval(), []
    assert not any(isinstance(module, FoldingConvNorm) for module in plain.modules())
    plain.res2[0].conv1.register_forward_hook(lambda *args: seen.append(args))
    state, kinds = plain.state_dict(keep_vars=True), {n: type(m) for n, m in plain.named_modules()}
    model = fold_each_call(plain)
    assert model is plain and list(model.state_dict()) == list(state)
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is state[key]
    folding = {ConvNorm: FoldingConvNorm, ConvNormAct: FoldingConvNormAct}
    for name, module in model.named_modules():
        assert type(module) is folding.get(kinds[name], kinds[name]), name
    model(torch.ones(1, 3, 16, 16))
    assert len(seen) == 1
    assert type(fold_each_call(ConvNorm(3, 4, 1))) is FoldingConvNorm


@pytest.fixture
def norm_calls(monkeypatch):
    """A list with one entry for each batch norm that ran."""
    calls, original = [], nn.BatchNorm2d.forward

    def forward(self, x):
        calls.append(self)
        return original(self, x)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", forward)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_folding_changes_nothing(name, norm_calls):
    model, images = network(name, num_classes=5), torch.randn(4, 3, 96, 64)
    expected = unfolded(model, images)
    ran = len(norm_calls)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close(model(images), expected)
    assert ran and len(norm_calls) < 3 * ran, "no layer was folded"


def test_only_constant_norms_with_small_kernels_are_folded(norm_calls):
    model, images = network(), torch.randn(16, 3, 32, 32)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def count(x=images) -> int:
        norm_calls.clear()
        model(x)
        return len(norm_calls)

    assert count() == len(norms), "gradients are recorded"
    with torch.no_grad():
        assert count() == 0
        assert count(images[:1, :, :5, :5]) == len(norms), "kernels larger than the maps"
        handle = norms[0].register_forward_hook(lambda *args: None)
        assert count() == 1, "the hook must see the map"
        handle.remove()
        norms[1].train()
        assert count() == 1, "batch statistics are no constants"
        model.train()
        assert count() == len(norms)


class LikeDetectron2s(nn.Module):
    """A frozen batch norm as Detectron2 and torchvision have it, a class of its own."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-3
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        statistics, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        return nn.functional.batch_norm(x, *statistics, *affine, eps=self.eps)


class Clamped(LikeDetectron2s):
    """Not a linear map, with the same attributes."""

    def forward(self, x):
        return super().forward(x).clamp(max=6)


KINDS = {
    "no affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "no statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "own class": type("Other", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * x}),
    "own frozen class": type("Twice", (FrozenBatchNorm2d,), {"forward": lambda self, x: 2 * x}),
    "same class": type("Same", (nn.BatchNorm2d,), {}),
    "sync": nn.SyncBatchNorm,
    "frozen": FrozenBatchNorm2d,
    "foreign": LikeDetectron2s,
    "clamped": Clamped,
    "group": lambda channels: nn.GroupNorm(4, channels),
}
LEFT = {"no statistics", "own class", "own frozen class", "clamped", "group"}  # by fold_bn


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_every_kind(kind, monkeypatch):
    images, model = torch.randn(16, 3, 32, 32), network(norm=KINDS[kind])
    expected = unfolded(model, images)
    with torch.no_grad(), monkeypatch.context() as patch:
        if kind == "sync":
            patch.setattr(nn.SyncBatchNorm, "forward", None)  # it is folded at each call
        assert_close(model(images), expected)
    folded = fold_bn(copy.deepcopy(model))
    assert_close(unfolded(folded, images), expected)
    assert (folded.stem.norm is not None) == (kind in LEFT)


def test_fold_bn_of_other_libraries():
    """Their own classes, and through their own conversion."""
    ops = pytest.importorskip("torchvision.ops")
    layers = pytest.importorskip("detectron2.layers")
    images, converted = torch.randn(4, 3, 32, 32), network()
    converted = layers.FrozenBatchNorm2d.convert_frozen_batchnorm(converted)
    assert isinstance(converted.stem.norm, layers.FrozenBatchNorm2d)
    kinds = (ops.FrozenBatchNorm2d, lambda c: layers.get_norm("naiveSyncBN", c))
    for model in (converted, *(network(norm=norm) for norm in kinds)):
        expected = unfolded(model, images)
        assert_close(unfolded(fold_bn(model), images), expected)
        assert model.stem.norm is None


def test_fold_bn_leaves_a_norm_with_hooks():
    model, seen = network(), []
    model.stem.norm.register_forward_hook(lambda *args: seen.append(args))
    fast = optimize_for_inference(model, engine="eager")
    assert fast.stem.norm is not None and fast.res2[0].conv1.norm is None
    assert_close(fast(torch.ones(1, 3, 32, 32)), unfolded(model, torch.ones(1, 3, 32, 32)))
    assert len(seen) == 2


CHANGES = {
    "in place": lambda m: m.res2[0].conv1.weight.mul_(1.5),
    "data": lambda m: m.stem.weight.data.mul_(0.5),
    "data assigned": lambda m: setattr(m.stem.weight, "data", m.stem.weight.data * 1.25),
    "gamma": lambda m: m.stem.norm.weight.data.add_(0.1),
    "statistics": lambda m: m.res3[0].conv1.norm.running_var.mul_(2),
    "training step": lambda m: (m.train()(torch.randn(4, 3, 32, 32)), m.eval()),
    "load": lambda m: m.load_state_dict(network(seed=1).state_dict()),
    "assign": lambda m: m.load_state_dict(network(seed=2).state_dict(), assign=True),
    "double and back": lambda m: m.double().float(),
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),
    "parameter": lambda m: setattr(m.stem, "weight", nn.Parameter(m.stem.weight.flip(0))),
}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=4))
def test_changed_weights_always_count(changes):
    model, images = network(), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        model(images)
        for change in changes:
            CHANGES[change](model)
            assert_close(model(images), unfolded(model, images))


def test_tracing_keeps_the_norms():
    """So that a graph's own optimizer folds them, and shapes stay free."""
    model = network(out_features=("res2", "res4"))
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(4, 3, 32, 32), strict=False)
        assert "batch_norm" in str(traced.inlined_graph)
        images = torch.randn(2, 3, 16, 40)
        assert_close(traced(images), unfolded(model, images))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float64, 1e-12)])
def test_folding_in_other_precisions(dtype, bound):
    model, images = network().double(), torch.randn(8, 3, 32, 32)
    expected = unfolded(model, images.double()).to(dtype)
    with torch.no_grad():
        assert_close(model.to(dtype)(images.to(dtype)), expected, bound)


def folding_conv(*args, **options):
    conv = fold_each_call(ConvNorm(*args, norm="FrozenBN", **options).double())
    for value in conv.norm.buffers():
        nn.init.uniform_(value, 0.5, 1.5)
    return conv


@pytest.mark.parametrize("stride, kernel_size", [(1, 3), (2, 1)])
def test_a_frozen_norm_has_the_same_values_and_gradients(stride, kernel_size):
    conv = folding_conv(3, 6, kernel_size, stride=stride)
    image, results = torch.randn(2, 3, 7, 7, dtype=torch.float64), []
    for folded in (True, False):
        x = image.clone().requires_grad_()
        y = conv(x) if folded else ConvNorm.forward(conv, x)
        grads = torch.autograd.grad(y.square().sum(), [x, conv.weight], create_graph=True)
        second = torch.autograd.grad(grads[0].square().sum(), [x, conv.weight])
        results.append((y, *grads, *second))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("half", [False, True])
def test_no_second_kernel_is_kept_for_the_backward_pass(half):
    """Only parameters and maps are kept; under autocast maps are in half precision."""
    conv, kept = folding_conv(3, 6, 3).float(), []
    known = [value.data_ptr() for value in (conv.weight, *conv.buffers())]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x),
    ):
        y = conv(torch.randn(2, 3, 7, 7, requires_grad=True))
    new = [value for value in kept if value.data_ptr() not in known]
    assert {value.shape for value in new} <= {(2, 3, 7, 7), (6,)}
    dtype = torch.bfloat16 if half else torch.float32
    assert y.dtype == dtype and {value.dtype for value in new if value.dim() == 4} == {dtype}


def test_transforms_of_torch_func_see_plain_operations():
    conv, x = folding_conv(3, 6, 3), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = torch.autograd.grad(conv(x).square().sum(), conv.weight)[0]
    state = {"weight": conv.weight.detach()}

    def loss(state):
        return torch.func.functional_call(conv, state, (x,)).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(state)["weight"], expected)


def test_an_image_of_another_precision_is_refused_as_by_a_convolution():
    conv = folding_conv(3, 6, 3).float()
    for image in (torch.rand(1, 3, 5, 5).double(), torch.ones(1, 3, 5, 5, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="same|type"):
            conv(image)
    assert conv.to("meta")(torch.ones(1, 3, 5, 5, device="meta")).shape == (1, 6, 5, 5)


def test_gradients_under_autocast():
    """Those of the norm after the convolution differ by the rounding of the map between them."""
    conv, x, found = folding_conv(8, 16, 3).float(), torch.randn(2, 8, 12, 12), []
    for call in (conv, lambda x: ConvNorm.forward(conv, x)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).float().square().sum()
        found.append(torch.autograd.grad(loss, conv.weight)[0])
    assert found[0].dtype == torch.float32
    assert_close(*found, 0.02)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_frozen_norm_with_hooks_is_called(kind, everywhere):
    conv, seen = folding_conv(3, 6, 3), []
    register = getattr(conv.norm, f"register_{kind}")
    if everywhere:
        register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: seen.append(module) if module is conv.norm else None)
    for _ in range(2):
        conv(torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)).sum().backward()
        handle.remove()
    assert seen == [conv.norm]


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "GN", ""])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11"])
def test_fold_bn_in_double_precision(name, norm):
    model = network(name, norm=norm, num_classes=3).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = unfolded(model, images)
    before = len(model.state_dict())
    assert_close(unfolded(fold_bn(model), images), expected, 1e-12)
    left = [m.norm for m in model.modules() if isinstance(m, ConvNorm) and m.norm is not None]
    assert bool(left) == (norm == "GN")
    assert (len(model.state_dict()) == before) == (norm in ("GN", ""))
