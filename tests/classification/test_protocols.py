"""Test protocols: geometry against torchvision, dense testing against loops over positions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import squeezenet1_1

from resnet_backbone.classification import protocols as module
from resnet_backbone.classification.protocols import Center, Dense, Full, Member, TenCrop
from resnet_backbone.models import build_model, vgg
from resnet_backbone.weights import Preprocessing
from resnet_backbone.weights.preprocessing import InputNormalizer

GREY = Preprocessing("RGB", 255.0, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def member(model, preprocessing=GREY, **options):
    return Member(model.eval(), InputNormalizer(preprocessing), **options)


class Probe(nn.Module):
    """Logits are the four corner pixels' red, so scores show which crops were seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        red = x[:, 0]
        return torch.stack([red[:, 0, 0], red[:, 0, -1], red[:, -1, 0], red[:, -1, -1]], 1)


@given(st.integers(8, 17), st.integers(8, 17))
def test_the_center_is_that_of_torchvision(height, width):
    image = images(3, height, width)
    assert torch.equal(module.center_crop(image, 8), transforms.CenterCrop(8)(image))


def test_ten_crop_averages_softmax_scores():
    batch, probe = images(3, 3, 12, 9), member(Probe())
    scores = TenCrop(None, 7).score(probe, [batch])
    crops = transforms.TenCrop(7)(batch)
    torch.testing.assert_close(scores, sum(probe(crop).softmax(1) for crop in crops) / 10)
    logits_first = sum(map(probe, crops)).div(10).softmax(1)
    assert (scores - logits_first).abs().max() > 1e-3


@pytest.mark.parametrize("protocol", [Full(), Center(None, 8), TenCrop(None, 8)])
def test_images_of_different_sizes_keep_their_order(protocol):
    sizes = [(9, 12), (11, 9), (9, 12), (8, 8), (11, 9)]
    parts = [images(3, *size, seed=seed) for seed, size in enumerate(sizes)]
    probe = member(Probe())
    together = protocol.score(probe, [parts])
    one_by_one = torch.cat([protocol.score(probe, [image[None]]) for image in parts])
    assert len(set(map(tuple, together.tolist()))) == 5
    assert torch.equal(together, one_by_one) and together.dtype == torch.float64


def test_prepare_does_not_change_the_center_score():
    batch = images(2, 3, 20, 15)
    probe, protocol = member(Probe()), Center(None, 8)
    prepared = torch.stack([protocol.prepare(image) for image in batch])
    assert prepared.shape == (2, 3, 8, 8)
    assert torch.equal(protocol.score(probe, [prepared]), protocol.score(probe, [batch]))


def test_mean_image_is_subtracted_at_its_own_size_only():
    """The dilemma of the paper's per-pixel mean: it has no form at other sizes."""
    mean_image = images(3, 8, 8, seed=5).float()
    with_image = Preprocessing("RGB", 255.0, (1.0, 2.0, 3.0), (1, 1, 1), mean_image=mean_image)
    batch = images(1, 3, 9, 9)
    probe = member(Probe(), with_image)
    Center(None, 8).score(probe, [batch])
    assert torch.equal(probe.model.seen[-1][0], batch[0, :, :8, :8].float() - mean_image)
    Full().score(probe, [batch])
    channel = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert torch.equal(probe.model.seen[-1][0], batch[0].float() - channel)


# Dense testing, by hand: loops over positions, with the network's own layers


def lively(model, size):
    """Float64, and logits that differ enough between positions to see where a softmax is."""
    model = model.double().eval()
    with torch.no_grad():
        logits = model(images(4, 3, size, size, seed=9).double() - 128)
        model.linear.weight.mul_(3 / logits.std())
    return model


def tiny_resnet(monkeypatch):
    torch.manual_seed(0)
    return lively(build_model("cifar_resnet8"), 32), 32, 8


def tiny_vgg(monkeypatch):
    """VGG-11 with 4 maps a stage and fc layers of 16: a thousandth of the work."""
    monkeypatch.setattr(vgg, "STAGE_WIDTHS", (4,) * 5)
    torch.manual_seed(0)
    model = vgg.VGG(11, out_features=["pool5"])
    model.out_features = model.left_out = ()
    model.fc6, model.fc7 = nn.Linear(4 * 49, 16), nn.Linear(16, 16)
    model.linear, model.dropout = nn.Linear(16, 6), nn.Dropout(0.5)
    return lively(model, 224), 224, 7


class DoubleNormalizer(InputNormalizer):
    def __call__(self, batch, shift=None):
        return super().__call__(batch, shift).double()


def logits_by_hand(model, inputs, pooling, window):
    """List of logits (N, C), one for each position."""
    if pooling == "global_pool":
        return [model(inputs)]
    last = model.stage_names[-1]
    maps = model.forward_features(inputs, [last])[last]
    rows, columns = maps.shape[2] - window + 1, maps.shape[3] - window + 1
    found = []
    for top, left in itertools.product(range(rows), range(columns)):
        cell = maps[:, :, top : top + window, left : left + window]
        found.append(model.forward_head(cell))  # at the training size: exactly the network's head
    return found


def dense_by_hand(model, normalizer, scaled, protocol):
    views = []
    for batch in scaled:
        for flipped in [False, True] if protocol.flip else [False]:
            inputs = normalizer(batch.flip(-1) if flipped else batch)
            views.append(logits_by_hand(model, inputs, protocol.pooling, protocol.window))
    if protocol.softmax == "per_position":
        return sum(sum(z.softmax(1) for z in view) / len(view) for view in views) / len(views)
    means = [sum(view) / len(view) for view in views]
    if protocol.softmax == "per_view":
        return sum(mean.softmax(1) for mean in means) / len(means)
    return (sum(means) / len(means)).softmax(1)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vgg])
def test_dense_equals_loops_over_positions(make, monkeypatch):
    (model, size, window), normalizer = make(monkeypatch), DoubleNormalizer(GREY)
    larger = size * 5 // 4
    scaled = [images(2, 3, size, larger, seed=1), images(2, 3, larger, larger + 3, seed=2)]
    results = {}
    with torch.no_grad():
        choices = itertools.product(module.POOLINGS, module.SOFTMAXES, [False, True])
        for pooling, softmax, flip in choices:
            protocol = Dense((size, larger), flip, pooling, softmax, window)
            scores = protocol.score(Member(model, normalizer), scaled)
            expected = dense_by_hand(model, normalizer, scaled, protocol)
            torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(scores.sum(1), torch.ones(2, dtype=torch.float64))
            results[pooling, softmax, flip] = scores
    # every choice matters, but for the softmax of the one position that global_pool has
    distinct = [key for key in results if key[:2] != ("global_pool", "per_position")]
    for one, other in itertools.combinations(distinct, 2):
        assert (results[one] - results[other]).abs().max() > 1e-6, (one, other)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Center(200, 224), "crop of 224 does not fit into a short side of 200"),
        (lambda: TenCrop(200, 224), "crop of 224 does not fit into a short side of 200"),
        (lambda: Dense(()), "give positive ones"),
        (lambda: Dense(pooling="max"), "has no option 'max': use sliding, global_pool"),
        (
            lambda: Dense(softmax="never"),
            "has no option 'never': use per_position, per_view, at_end",
        ),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SMALL = build_model("cifar_resnet8")
with torch.device("meta"):
    PRELU_NET = build_model("prelu_net_a")
SMALL_BACKBONE = build_model("cifar_resnet8", out_features=["res4"])


@pytest.mark.parametrize(
    "protocol, model, size, message",
    [
        (Center(None, 8), Probe(), (6, 9), "6x9 has no 8x8 crop"),
        (Dense((8,)), Probe(), (8, 8), "Probe needs pooling global_pool"),
        (Dense((64,)), PRELU_NET, (64, 64), "PReLUNet needs pooling global_pool"),
        (Dense((28,), window=8), SMALL, (28, 36), "window, but the last map is 7x9: use larger"),
        (Full(), SMALL_BACKBONE, (32, 32), "CifarResNet returns dict, not logits"),
        (Full(), nn.Identity(), (4, 4), r"Identity returns \(1, 3, 4, 4\), not logits"),
    ],
)
def test_what_cannot_be_scored(protocol, model, size, message):
    with pytest.raises(ValueError, match=message):
        protocol.score(member(model), [images(1, 3, *size)])


def test_any_network():
    """torchvision's and timm's classifiers go through the protocols that need no convolution."""
    probe, batch = member(Probe()), images(1, 3, 8, 8)
    scores = Dense((8,), flip=False, pooling="global_pool").score(probe, [batch])
    torch.testing.assert_close(scores, Full().score(probe, [batch]))
    timm = pytest.importorskip("timm", reason="timm is missing")
    batch = images(2, 3, 36, 40)
    others = squeezenet1_1(num_classes=7), timm.create_model("test_resnet", num_classes=7)
    protocols = Full(), Center(None, 32), TenCrop(None, 32)
    for model, protocol in itertools.product(others, protocols):
        with torch.inference_mode():
            scores = protocol.score(member(model), [batch])
        assert scores.shape == (2, 7)
        torch.testing.assert_close(scores.sum(1), torch.ones(2, dtype=torch.float64))


def test_members_run_as_they_are_told():
    class Spy(nn.Module):
        def forward(self, x):
            self.format = x.is_contiguous(memory_format=torch.channels_last)
            self.output = F.conv2d(x, torch.ones(4, 3, 1, 1)).mean((2, 3))
            return self.output

    batch, spy = images(2, 3, 8, 8), Spy()
    member(spy)(batch)
    assert spy.format and spy.output.dtype == torch.float32
    assert member(spy, autocast=torch.bfloat16, channels_last=False)(batch).dtype == torch.float64
    assert not spy.format and spy.output.dtype == torch.bfloat16


def test_settings_name_every_choice():
    assert set(module.PROTOCOLS) == {"full", "center", "ten_crop", "dense"}
    expected = {"resize": 256, "crop": 224, "interpolation": "bilinear"}
    assert Center().settings() == {"name": "center", **expected}
    assert Center().short_sides == TenCrop().short_sides == (256,)
    assert Full().short_sides == (None,)
    sizes = (224, 256, 384, 480, 640)
    settings = {"sizes": sizes, "flip": True, "pooling": "sliding", "softmax": "per_view"}
    assert Dense().settings() == {"name": "dense", **settings, "window": 7}
