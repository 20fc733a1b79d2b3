"""Whole networks: the table of names, sizes, feature tables, freezing, errors."""

import copy
import math
import pickle
from functools import lru_cache, partial

import pytest
import torch
import torchvision
from drawn_networks import on_meta, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from resnet_backbone.models import VGG, PReLUNet, build_model, count_parameters
from resnet_backbone.models import list_models as list_names
from resnet_backbone.models.layers import FrozenBatchNorm2d
from resnet_backbone.models.resnet import CifarResNet, ResNet, resnet_stage

build_on_meta = partial(on_meta, build_model)
cached = lru_cache(build_on_meta)
KINDS = "resnet18 resnet50 vgg11_bn cifar_resnet20 prelu_net_b bn_inception"


def conv_channels(model):
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


# arXiv 1502.01852, Table 3: layers of a stage, widths of conv1 and the three stages.
PRELU_NETS = {
    "prelu_net_a": (5, (96, 256, 512, 512)),
    "prelu_net_b": (6, (96, 256, 512, 512)),
    "prelu_net_c": (6, (96, 384, 768, 896)),
}
# arXiv 1502.03167, Figure 5: inputs, 1x1, 3x3 reduced, 3x3, double 3x3 reduced, double 3x3, pool
INCEPTION_BLOCKS = (
    (192, 64, 64, 64, 64, 96, 32),
    (256, 64, 64, 96, 64, 96, 64),
    (320, 0, 128, 160, 64, 96, 0),
    (576, 224, 64, 96, 96, 128, 128),
    (576, 192, 96, 128, 96, 128, 128),
    (576, 160, 128, 160, 128, 160, 128),
    (608, 96, 128, 192, 160, 192, 128),
    (608, 0, 128, 192, 192, 256, 0),
    (1056, 352, 192, 320, 160, 224, 128),
    (1024, 352, 192, 320, 192, 224, 128),
)


def prelu_net_parameters(name):
    """A kernel's weights, and per output a bias and, but for the last layer, a slope."""
    layers, (stem, *widths) = PRELU_NETS[name]
    total, channels = (49 * 3 + 2) * stem, stem
    for width in widths:
        total += (9 * channels + 2) * width + (layers - 1) * (9 * width + 2) * width
        channels = width
    bins = 7 * 7 + 3 * 3 + 2 * 2 + 1
    return total + (bins * channels + 2) * 4096 + (4096 + 2) * 4096 + (4096 + 1) * 1000


def bn_inception_parameters():
    """A kernel's weights, and per output a scale and a shift."""
    total = (49 * 3 + 2) * 64 + (64 + 2) * 64 + (9 * 64 + 2) * 192
    for inputs, one, reduced, three, reduced_twice, double, pool in INCEPTION_BLOCKS:
        total += (inputs + 2) * (one + reduced + reduced_twice + pool)
        total += (9 * reduced + 2) * three
        total += (9 * reduced_twice + 2) * double + (9 * double + 2) * double
    return total + (1024 + 1) * 1000


@pytest.mark.parametrize("name", sorted({*list_names(), "cifar_resnet8", "cifar_plain26"}))
def test_parameter_counts(name):
    """Sums by hand, or torchvision's less plain networks' projections and biases before a norm."""
    model = cached(name)
    if name.startswith("cifar"):  # 6n + 2 layers
        layers = int(name.removeprefix("cifar_resnet").removeprefix("cifar_plain"))
        expected = 97_216 * (layers - 2) // 6 - 21_926
        weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(weighted) == layers
    elif name in PRELU_NETS:
        expected = prelu_net_parameters(name)
    elif name == "bn_inception":  # others' have biases before the norms
        expected = bn_inception_parameters()
        assert expected + conv_channels(model) == 11_295_240
    else:
        theirs = on_meta(torchvision.models.get_model, name.replace("plain", "resnet"))
        expected = count_parameters(theirs) - (173_824 if "plain" in name else 0)
        expected -= conv_channels(model) if name.endswith("_bn") else 0
    assert count_parameters(model) == expected


def test_names_and_classes():
    assert len(list_names()) == len(set(list_names())) == 30
    assert type(build_on_meta("plain18")) is ResNet
    assert type(build_on_meta("cifar_plain8")) is CifarResNet
    assert type(build_on_meta("vgg11")) is VGG
    for name, classes in (("resnet18", 1000), ("cifar_resnet20", 10), ("vgg11", 1000)):
        assert build_on_meta(name).linear.out_features == classes
        assert build_on_meta(name, 7).linear.out_features == 7


SIZED = {
    "resnet18": {"norm": ""},
    "resnet50": {"norm": "", "dilations": (1, 1, 2, 4), "multi_grid": (1, 2, 4)},
    "plain18": {"norm": "", "dilations": (1, 1, 1, 2)},
    "cifar_resnet8": {"norm": ""},
    "vgg11": {},
    "prelu_net_a": {},
    "bn_inception": {"norm": ""},
}
# Stages whose sizes are rounded up, where not all are.
ROUNDED_UP = {
    "vgg11": (),
    "prelu_net_a": ("conv1",),
    "bn_inception": ("conv1", "inception4", "inception5"),
}


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(SIZED)), height=st.integers(33, 150), width=st.integers(33, 150))
def test_feature_table_is_true(name, height, width):
    """Channels and strides as announced; sizes rounded up where convolutions halve, else down."""
    model = cached(name, **SIZED[name])
    maps = model.forward_features(torch.empty(2, 3, height, width, device="meta"))
    assert list(maps) == list(model.features) == list(model.stage_names)
    sides, before = (height, width), 1
    for stage, (channels, stride) in model.features.items():
        rounding = math.ceil if stage in ROUNDED_UP.get(name, model.features) else math.floor
        sides, before = tuple(rounding(side * before / stride) for side in sides), stride
        assert maps[stage].shape == (2, channels, *sides), stage


@pytest.mark.parametrize("name", KINDS.split())
def test_out_features_prune_later_stages(name):
    stages = build_on_meta(name).stage_names
    for last, stage in enumerate(stages):
        model = build_on_meta(name, out_features=[stage, stages[0]], norm="")
        built = [child for child, _ in model.named_children()]
        assert built == list(stages[: last + 1]) == list(model.features)
        assert not model.is_classifier
    assert set(model(torch.empty(1, 3, 64, 64, device="meta"))) == {stages[0], stages[-1]}


def test_backbone_and_classifier_compute_the_same():
    torch.manual_seed(0)
    classifier = build_model("resnet18", 5).eval()
    backbone = build_model("resnet18", out_features=["res2", "res5"]).eval()
    state = {k: v for k, v in classifier.state_dict().items() if not k.startswith("linear")}
    backbone.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 50, 70)
    maps, expected = backbone(images), classifier.forward_features(images)
    assert list(maps) == ["res2", "res5"] and list(expected) == list(classifier.stage_names)
    assert all(torch.equal(maps[name], expected[name]) for name in maps)
    assert torch.equal(classifier(images), classifier.forward_head(expected["res5"]))
    logits = F.linear(expected["res5"].mean((2, 3)), classifier.linear.weight)
    torch.testing.assert_close(classifier(images), logits)


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "cifar_resnet8", "bn_inception"])
def test_freeze(name, freeze_at):
    """Frozen stages have no gradients and constant statistics, in training mode as well."""
    model = build_model(name, out_features=cached(name).stage_names[-1:], freeze_at=freeze_at)
    before = copy.deepcopy(model.state_dict())
    frozen = model.stage_names[:freeze_at]
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    model.train()(x)[model.stage_names[-1]].sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key.split(".")[0] not in frozen), key
        assert (parameter.grad is not None) == parameter.requires_grad
    for key, module in model.named_modules():
        if hasattr(module, "running_mean"):
            is_frozen = key.split(".")[0] in frozen
            assert isinstance(module, FrozenBatchNorm2d) == is_frozen, key
            assert torch.equal(module.running_mean, before[f"{key}.running_mean"]) == is_frozen


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_freezing_keeps_the_function(norm):
    torch.manual_seed(0)
    model = randomize(build_model("resnet18", out_features=["res3"], norm=norm).double())
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model(images)["res3"]
    assert model.freeze(5) is model
    torch.testing.assert_close(model.train()(images)["res3"], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet51", {}, "unknown model 'resnet51': did you mean 'resnet50'"),
        ("zzz", {}, "unknown model 'zzz': list_models"),
        ("cifar_resnet21", {}, "depth 21 is not 6n\\+2"),
        ("cifar_plain2", {}, "depth 2 is not 6n\\+2"),
        ("resnet18", {"out_features": ["res6"]}, "unknown out_features .'res6'.: .* stem, res2"),
        ("vgg16", {"out_features": ["res2"]}, "unknown out_features .'res2'.: .* conv1, conv2"),
        ("resnet50", {"multi_grid": (1, 2)}, "multi_grid \\(1, 2\\) needs 3 positive rates"),
        ("resnet18", {"multi_grid": (1, 0)}, "multi_grid \\(1, 0\\) needs 2 positive rates"),
        ("resnet18", {"dilations": (1, 1, 2)}, "dilations \\(1, 1, 2\\): give four"),
        ("resnet18", {"dilations": (1, 1, 1, 0)}, "dilations \\(1, 1, 1, 0\\): give four"),
        ("resnet18", {"shortcut": "b"}, "unknown shortcut 'b': use one of A, B, C, highway, none"),
        ("resnet18", {"activation": "gelu"}, "unknown activation 'gelu': use one of relu, prelu"),
        ("resnet18", {"norm": "LN2"}, "unknown norm 'LN2': use one of BN, FrozenBN, SyncBN, GN"),
        ("resnet18", {"freeze_at": 6}, "from 0 to 5, not 6"),
        ("vgg11", {"freeze_at": -1}, "from 0 to 5, not -1"),
        ("plain18", {"zero_init_residual": True}, "zero_init_residual needs shortcuts"),
        ("resnet18", {"norm": "", "zero_init_residual": True}, "needs a norm with a weight"),
        ("cifar_resnet20", {"norm": "GN"}, "multiple of 32 channels, not 16"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_on_meta(name, **options)


def test_more_errors():
    for network in (ResNet, VGG):
        with pytest.raises(ValueError, match="unknown depth 20: use one of 1[18]"):
            network(20)
    with pytest.raises(ValueError, match="unknown PReLU-net 'D': use one of A, B, C"):
        PReLUNet("D")
    model = cached("resnet18")
    with pytest.raises(ValueError, match="expected images of shape .*, got \\(3, 32, 32\\)"):
        model(torch.empty(3, 32, 32, device="meta"))
    with pytest.raises(ValueError, match="no stage .'res7'.: this network has stem, res2"):
        model.forward_features(torch.empty(1, 3, 32, 32, device="meta"), ["res7"])


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11", "cifar_resnet8", "prelu_net_a", "bn_inception"]
)
def test_in_channels(name):
    model = build_on_meta(name, in_channels=5, out_features=cached(name).stage_names[1:2])
    model(torch.empty(1, 5, 32, 32, device="meta"))
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 5


class OwnNorm(nn.BatchNorm2d):
    """Updates its mean by itself, as Detectron2's NaiveSyncBatchNorm does."""

    def forward(self, x):
        self.running_mean += self.momentum * (x.detach().mean((0, 2, 3)) - self.running_mean)
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet50", dict(freeze_at=2)),
        ("resnet18", dict(norm="FrozenBN", out_features=("res2", "res5"))),
        ("cifar_resnet8", dict(norm=OwnNorm)),
        ("vgg11_bn", dict(out_features=("conv3", "conv5"))),
        ("bn_inception", {}),
    ],
)
def test_gradient_checkpointing_changes_memory_alone(name, options):
    """Bit for bit the maps, the gradients, and the statistics, which a second update would move."""
    torch.manual_seed(0)
    images, models, kept = torch.rand(2, 3, 64, 64), [build_model(name, **options)], []
    models.append(copy.deepcopy(models[0]).set_grad_checkpointing())
    for model in models:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, sizes=sizes: sizes.append(value.numel()) or value, lambda value: value
        ):
            outputs = model.train()(images)
        maps = outputs.values() if options.get("out_features") else [outputs]
        sum(one.square().mean() for one in maps).backward()
        kept.append((sum(sizes), list(maps)))
    (most, expected), (least, found) = kept
    assert least < most / 4
    assert all(map(torch.equal, expected, found))
    pairs = list(zip(*(model.named_parameters() for model in models), strict=True))
    assert sum(first.grad is not None for (_, first), _ in pairs) > 4
    for (key, first), (_, second) in pairs:
        assert (first.grad is None) == (second.grad is None), key
        assert first.grad is None or torch.equal(first.grad, second.grad), key
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(norm.momentum == 0 for norm in models[1].modules() if hasattr(norm, "momentum"))


def test_gradient_checkpointing_compiles():
    torch.manual_seed(0)
    images, eager = torch.rand(2, 3, 32, 32), build_model("cifar_resnet8").train()
    model = copy.deepcopy(eager).set_grad_checkpointing()
    for one in (eager, torch.compile(model, backend="aot_eager")):
        one(images).square().mean().backward()
    for (key, first), second in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=key)
    for first, second in zip(eager.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("depth, channels", [(18, 512), (34, 512), (50, 2048)])
def test_stage_on_its_own_is_the_networks(depth, channels):
    stage, out_channels = on_meta(resnet_stage, depth, 5, stride=2, stride_in_1x1=True)
    assert out_channels == channels
    assert str(stage) == str(cached(f"resnet{depth}").res5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn"])
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(name, training):
    stage = cached(name).stage_names[-1]
    model = build_model(name, out_features=[stage], norm="FrozenBN").train(training)
    y = model(torch.empty(0, 3, 64, 64))[stage]
    assert y.shape == (0, model.features[stage].channels, 2, 2)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_resnet_1202_learns():
    torch.manual_seed(0)
    model = build_model("cifar_resnet1202")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.res2[0].conv1.weight.detach().clone()
    loss = F.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.res2[0].conv1.weight, before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", lambda channels: nn.GroupNorm(4, channels)])
def test_deepcopy_and_pickle(copier, norm):
    model = build_model("cifar_resnet8", norm=norm, shortcut="highway", freeze_at=1).eval()
    twin = copier(model)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(twin(images), model(images)) and twin.features == model.features
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(next(twin.parameters()), next(model.parameters()))
