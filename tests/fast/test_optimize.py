"""The fast form, by default and by optimize_for_inference: the same outputs, never stale ones."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_backbone import build_model, optimize_for_inference
from resnet_backbone.fast import InferenceNetwork, fold_bn
from resnet_backbone.fast.export import NormalisedNetwork
from resnet_backbone.models import FrozenBatchNorm2d, StagedNetwork
from resnet_backbone.models.layers import ConvNorm
from resnet_backbone.weights import get_preprocessing, load_weights, save_weights

NAMES = ("resnet18", "resnet50", "cifar_resnet20", "vgg11_bn")
LAST = torch.channels_last


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Norms that are not the identity, so that a misplaced one shows."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                module.weight.uniform_(0.4, 0.8)
                module.bias.normal_(0, 0.2)
    return model


def network(name="cifar_resnet8", seed=0, **options) -> StagedNetwork:
    torch.manual_seed(seed)
    if name.startswith("vgg"):  # its classifier is large and has no convolutions
        options = {"out_features": ("conv5",), **options}
        options.pop("num_classes", None)
    return randomize(build_model(name, **options)).eval()


def unfolded(model: nn.Module, images):
    """The outputs by convolution, then norm: what is computed while gradients are recorded."""
    with torch.enable_grad():
        found = model(images)
    if isinstance(found, dict):
        return {name: value.detach() for name, value in found.items()}
    return found.detach()


def assert_close(found, expected, bound=1e-4):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_close(found[name], expected[name], bound)
        return
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.fixture
def norm_calls(monkeypatch):
    """A list with one entry for each batch norm that ran."""
    calls, original = [], nn.BatchNorm2d.forward

    def forward(self, x):
        calls.append(self)
        return original(self, x)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", forward)
    return calls


# The form in which networks are built


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_channels_last(name):
    model = network(name)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kernels = [p for p in copied.parameters() if p.dim() == 4]
        assert kernels and all(p.is_contiguous(memory_format=LAST) for p in kernels)


def test_maps_are_channels_last_whatever_the_input():
    model = network("resnet18", out_features=("res2", "res5"))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = model(images), model(images.to(memory_format=LAST))
    assert_close(*found, bound=1e-6)
    for maps in found:
        assert all(value.is_contiguous(memory_format=LAST) for value in maps.values())


def test_files_are_as_before(tmp_path):
    """Values, keys and strides in a file do not show the form in memory."""
    model, path = network(), tmp_path / "w.safetensors"
    save_weights(model, path, get_preprocessing("torchvision"))
    from safetensors.torch import load_file

    tensors = load_file(path)
    assert tensors.keys() == model.state_dict().keys()
    assert all(value.is_contiguous() for value in tensors.values())
    other = build_model("cifar_resnet8")
    load_weights(other, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unfolded(model, images), unfolded(other.eval(), images))
    plain = {key: value.contiguous() for key, value in model.state_dict().items()}
    other.load_state_dict(plain)
    assert other.res2[0].conv1.weight.is_contiguous(memory_format=LAST)


# Folding at each call


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
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class Clamped(LikeDetectron2s):
    """Not a linear map, with the same attributes."""

    def forward(self, x):
        return super().forward(x).clamp(max=6)


KINDS = {
    "no affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "no statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "own class": type("Other", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * x}),
    "same class": type("Same", (nn.BatchNorm2d,), {}),
    "sync": nn.SyncBatchNorm,
    "frozen": FrozenBatchNorm2d,
    "foreign": LikeDetectron2s,
    "clamped": Clamped,
    "group": lambda channels: nn.GroupNorm(4, channels),
}
LEFT = {"no statistics", "own class", "clamped", "group"}  # by fold_bn


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_every_kind(kind):
    images, model = torch.randn(4, 3, 32, 32), network(norm=KINDS[kind])
    expected = unfolded(model, images)
    with torch.no_grad():
        assert_close(model(images), expected)
    folded = fold_bn(copy.deepcopy(model))
    assert_close(unfolded(folded, images), expected)
    assert (folded.stem.norm is not None) == (kind in LEFT)


def test_a_synchronised_norm_is_folded_at_each_call(monkeypatch):
    model, images = network(norm="SyncBN"), torch.randn(16, 3, 32, 32)
    expected = unfolded(model, images)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", None)
    with torch.no_grad():
        assert_close(model(images), expected)


def test_fold_bn_of_other_libraries():
    """Their own classes, and through their own conversion."""
    ops = pytest.importorskip("torchvision.ops")
    layers = pytest.importorskip("detectron2.layers")
    images, original = torch.randn(4, 3, 32, 32), network()
    converted = layers.FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(original))
    assert isinstance(converted.stem.norm, layers.FrozenBatchNorm2d)
    models = [converted]
    for norm in (ops.FrozenBatchNorm2d, lambda c: layers.get_norm("naiveSyncBN", c)):
        models.append(network(norm=norm))
    for model in models:
        expected = unfolded(model, images)
        assert_close(unfolded(fold_bn(model), images), expected)
        assert model.stem.norm is None


def test_fold_bn_leaves_a_norm_with_hooks():
    model, seen = network(), []
    model.stem.norm.register_forward_hook(lambda *args: seen.append(args))
    fast = optimize_for_inference(model)
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
    "average": lambda m: torch._foreach_lerp_(
        list(m.parameters()), list(network(seed=3).parameters()), 0.3
    ),
    "parameter": lambda m: setattr(
        m.stem, "weight", nn.Parameter(torch.randn_like(m.stem.weight) / 5)
    ),
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
    model, images = network(), torch.randn(8, 3, 32, 32)
    expected = unfolded(model.double(), images.double())
    with torch.no_grad():
        found = model.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    assert_close(found.double(), expected, bound)


# fold_bn and optimize_for_inference


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


def test_a_norm_of_batch_statistics_is_not_folded():
    model = network(norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    images = torch.randn(4, 3, 32, 32)
    expected = unfolded(model, images)
    assert_close(unfolded(fold_bn(model), images), expected, 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_optimized_classifier(name, norm):
    model = network(name, norm=norm, num_classes=5).train()
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 96, 64)
    fast = optimize_for_inference(model)
    assert type(fast) is type(model) and not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert_close(fast(images), unfolded(model.eval(), images))
    assert_close(fast(images.to(memory_format=LAST)), unfolded(model, images))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), "the original has changed"
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_optimized_backbone(dtype, bound):
    model = network("resnet18", out_features=("res3", "res5"))
    images = torch.randn(2, 3, 96, 64)
    fast = optimize_for_inference(model, dtype=dtype)
    assert fast.features == model.features and fast.out_features == ("res3", "res5")
    for x in (images, images.to(memory_format=LAST), images.double().float()):
        assert_close(fast(x), unfolded(model, images), bound)
    assert next(fast.parameters()).dtype == dtype
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_close(copied(images), fast(images), 0)


def fused_calls(call) -> int:
    """How many convolutions did their ReLU themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name for event in profile.events()]
    return sum(name.startswith("mkldnn::_convolution_pointwise") for name in names)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("shortcut", ["A", "B", "C", "highway", "none"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_optimized_convolutions_do_sum_and_relu(name, shortcut):
    model = network(name, shortcut=shortcut, out_features=("stem", "res2", "res3"))
    images = torch.randn(2, 3, 64, 96)
    fast = optimize_for_inference(model)
    convolutions = sum(isinstance(module, ConvNorm) for module in fast.modules())
    projections = {"C": len(fast.res2) + len(fast.res3), "A": 0, "none": 0}.get(
        shortcut, 1 if name == "resnet18" else 2
    )
    plain_sums = len(fast.res2) + len(fast.res3) if shortcut in ("highway", "none") else 0
    assert fused_calls(lambda: fast(images)) == convolutions - projections - plain_sums
    assert_close(fast(images), unfolded(model, images), 1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_operators_stay_single_where_they_must():
    model = network("resnet18", out_features=("res2",))
    fast, images = optimize_for_inference(model), torch.randn(1, 3, 64, 64)
    expected, everything = unfolded(model, images), 5
    assert fused_calls(lambda: fast(images)) == everything

    seen = []
    for module in (fast.res2[0].conv2, fast.res2[0].activation):
        handle = module.register_forward_hook(lambda *args: seen.append(args))
        assert fused_calls(lambda: fast(images)) == everything - 1
        handle.remove()
    assert len(seen) == 2, "hooks see what they are registered for"

    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(lambda: fast(images)) == 0
    assert fused_calls(lambda: copy.deepcopy(fast).double()(images.double())) == 0
    with torch.backends.mkldnn.flags(enabled=False):
        assert fused_calls(lambda: fast(images)) == 0
        assert_close(fast(images), expected)

    wanting = images.clone().requires_grad_()
    assert fused_calls(lambda: fast(wanting)["res2"].sum().backward()) == 0
    assert wanting.grad.abs().sum() > 0
    for parameter in (fast.res2[0].conv1.weight, fast.res2[0].conv1.bias):
        parameter.requires_grad_()
        assert fused_calls(lambda: fast(images)["res2"].sum().backward()) == 1, "the stem only"
        assert parameter.grad.abs().sum() > 0
        parameter.requires_grad_(False)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("change", ["activation", "subclass", "norm", "conv", "gate"])
def test_layers_changed_after_optimizing_count(change):
    fast, images = (
        optimize_for_inference(network("resnet18", shortcut="C")),
        torch.randn(1, 64, 16, 16),
    )
    block = fast.res2[0]
    if change == "activation":
        block.activation = block.conv1.activation = nn.Identity()
    elif change == "subclass":
        own = type("Own", (nn.ReLU,), {"forward": lambda self, x: x.abs()})
        block.activation = block.conv1.activation = own()
    elif change == "norm":
        block.conv1.norm = block.conv2.norm = randomize(nn.BatchNorm2d(64)).eval()
    elif change == "conv":
        block.conv2 = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Tanh())
    else:
        block.gate = nn.Conv2d(64, 64, 1)
    plain = copy.deepcopy(block)
    plain.fused = plain.conv1.fused = False
    with torch.no_grad():
        assert_close(block(images), plain(images), 1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_modes_and_tensors_that_the_operators_do_not_know(monkeypatch):
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    model = network("resnet18", out_features=("res2",))
    fast, images = optimize_for_inference(model), torch.randn(1, 3, 64, 64)

    def run(x, of=None):
        return (of or fast)(x)["res2"]

    for of in (model, fast):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(images, of)
        assert counter.get_total_flops() > 5e7, "the operators are counted"
    direction = torch.randn_like(images)
    found, expected = (
        torch.func.jvp(lambda x, of=of: run(x, of), (images,), (direction,))[1]
        for of in (fast, model)
    )
    assert_close(found, expected.detach())
    assert "mkldnn" not in str(make_fx(lambda x: run(x))(images).graph)
    assert "mkldnn" not in str(torch.export.export(fast, (images,)).graph)
    assert "mkldnn" not in str(torch.jit.trace(fast, images, strict=False).inlined_graph)
    assert run(images.to("meta"), copy.deepcopy(fast).to("meta")).device.type == "meta"
    other = type("Other", (torch.Tensor,), {})
    assert type(run(images.as_subclass(other))) is other
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fused_calls(lambda: run(images)) == 0


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float64, 1e-5)])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_optimized_then_moved_to_another_precision(first, dtype, bound):
    model = network("resnet18", out_features=("res3",))
    images = torch.randn(2, 3, 64, 64)
    moved = optimize_for_inference(model, dtype=first).to(dtype)
    if first == torch.bfloat16:
        assert moved.dtype == dtype, "images take the parameters' precision"
        assert_close(moved(images), unfolded(model, images), 0.03)
    else:
        assert_close(
            moved(images.to(dtype))["res3"].float(), unfolded(model, images)["res3"], bound
        )


class Pyramid(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.lateral = body, nn.Conv2d(512, 8, 1)
        self.out_channels = 8

    def forward(self, x):
        return {"p5": self.lateral(self.body(x)["res5"])}


class Detection(nn.Module):
    """As Detectron2's and torchvision's: a child ``backbone``, and heads in float32."""

    def __init__(self):
        super().__init__()
        self.backbone = Pyramid(network("resnet18", out_features=["res5"]))
        self.res5 = nn.Sequential(*network("resnet18", out_features=["res5"]).res5)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images):
        maps = self.backbone(images)["p5"]
        return {"boxes": self.head(maps), "regions": self.res5(images.new_ones(2, 256, 7, 7))}


def test_optimized_detector():
    torch.manual_seed(0)
    detector, images = Detection().eval(), torch.randn(1, 3, 96, 64)
    expected = unfolded(detector, images)
    plain = optimize_for_inference(detector)
    assert type(plain) is Detection
    assert_close(plain(images), expected)
    fast = optimize_for_inference(detector, dtype=torch.bfloat16)
    assert isinstance(fast.backbone, InferenceNetwork) and isinstance(fast.res5, InferenceNetwork)
    assert fast.backbone.out_channels == 8, "attributes are the backbone's"
    assert fast.backbone.lateral.weight.dtype == torch.bfloat16
    assert fast.head.weight.dtype == torch.float32
    assert_close(fast(images), expected, 0.03)


@pytest.mark.parametrize("convention", ["msra", "torchvision"])
def test_optimized_network_with_its_preprocessing(convention):
    """Pixels are normalised in float32; the network alone is in bfloat16."""
    model = NormalisedNetwork(network("resnet18", num_classes=5), get_preprocessing(convention))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = unfolded(model.eval(), pixels)
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    assert fast.mean.dtype == torch.float32 and isinstance(fast.network, InferenceNetwork)
    for images in (pixels, pixels.float()):
        assert_close(fast(images), expected, 0.03)
    whole = InferenceNetwork(copy.deepcopy(model), torch.bfloat16, False)
    assert_close(whole(pixels), expected, 0.03)


def test_only_tensors_are_images():
    fast = optimize_for_inference(network(), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="a tensor of images, not a list"):
        fast([torch.randn(3, 32, 32)])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_into_an_optimized_model(dtype, strict):
    """Those of another optimized model only: folded ones."""
    model, other = network(), network(seed=1)
    fast, images = optimize_for_inference(model, dtype=dtype), torch.randn(2, 3, 32, 32)
    prefix = "" if dtype == torch.float32 else "network."
    state = {prefix + key: value for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="load into the original and optimize that"):
        fast.load_state_dict(state, strict=strict)
    assert_close(fast(images), unfolded(model, images), 0.03)
    fast.load_state_dict(optimize_for_inference(other, dtype=dtype).state_dict(), strict=strict)
    assert_close(fast(images), unfolded(other, images), 0.03)


def test_compiled_code_takes_no_weights():
    detector = optimize_for_inference(Detection().eval(), compile=True)
    before = copy.deepcopy(detector.state_dict())
    state = {key: value + 1 for key, value in before.items() if "backbone" in key}
    with pytest.raises(RuntimeError, match="constants of its code"):
        detector.load_state_dict(state, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_a_feature_pyramid_of_detectron2_takes_the_precision_as_a_whole():
    pytest.importorskip("detectron2")
    from resnet_backbone.detection.config_file import load_config
    from resnet_backbone.detection.engine.trainer import Trainer

    pyramid = Trainer.build_model(load_config("coco/faster_rcnn_R_18_FPN", [])).backbone.eval()
    fast = optimize_for_inference(pyramid, dtype=torch.bfloat16)
    assert isinstance(fast, InferenceNetwork) and fast.size_divisibility == 32
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    images = torch.randn(1, 3, 64, 96)
    assert_close(fast(images), unfolded(pyramid, images), 0.05)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (network, {"dtype": torch.int8}, "torch.int8 is not one of"),
        (lambda: nn.Conv2d(3, 4, 1), {}, "Conv2d contains none of our networks"),
        (
            lambda: optimize_for_inference(network(), dtype=torch.bfloat16),
            {},
            "optimized before",
        ),
    ],
)
def test_refusals(make, options, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(make(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_compiled(dtype, bound):
    import torch._inductor.config as inductor

    model = network(out_features=("res2", "res4"))
    fast = optimize_for_inference(model, dtype=dtype, compile=True)
    for size in ((2, 3, 32, 32), (2, 3, 48, 32), (3, 3, 40, 64)):
        images = torch.randn(size)
        assert_close(fast(images), unfolded(model, images), bound)
    assert not inductor.freezing, "other compiled models must not be frozen"


@pytest.mark.slow
def test_compiled_then_moved_to_another_precision():
    """Back in float32 the weights are rounded, also those of code that was compiled before."""
    model, images = network(out_features=("res2",)), torch.randn(2, 3, 32, 32)
    fast, eager = optimize_for_inference(model, compile=True), optimize_for_inference(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        fast, eager = fast.to(dtype), eager.to(dtype)
        expected = {name: value.float() for name, value in eager(images.to(dtype)).items()}
        assert_close(fast(images), expected, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.slow
def test_weights_are_constants_of_compiled_code():
    from torch._inductor.utils import run_and_get_code

    fast = optimize_for_inference(network(), compile=True)
    _, code = run_and_get_code(fast, torch.randn(2, 3, 32, 32))
    assert "_frozen_param" in "".join(code)
