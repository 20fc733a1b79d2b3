"""Two checkpoints on the same pictures, and which mistake makes them differ."""

import sys
from dataclasses import replace

import pytest
import torch
from drawn_networks import random_checkpoint

from resnet_backbone.runtime.builtin import load_photograph
from resnet_backbone.weights import WeightsError, get_preprocessing
from resnet_backbone.weights import compare as module
from resnet_backbone.weights.compare import compare, difference, sample_images
from resnet_backbone.weights.convert import convert_input, fold_bn, to_dtype
from resnet_backbone.weights.load import build_network

TURNED_MEAN = (123.68, 116.779, 103.939)

# What is stated wrongly about the paper's ResNet-50 -> words of the explanation.
MISTAKES = {
    "stride": (dict(stride_in_1x1=False), ["stride_in_1x1 True in place of False"]),
    "channel order": (dict(channel_order="RGB"), ["channel order BGR in place of RGB"]),
    "channel order and mean": (
        dict(channel_order="RGB", mean=TURNED_MEAN),
        ["channel order BGR in place of RGB, mean and std reversed with it"],
    ),
    "mean in the wrong order": (
        dict(mean=TURNED_MEAN),
        ["mean 123.68 116.779 103.939 (A's) in place of 103.939 116.779 123.68"],
    ),
    "no mean": (dict(mean=(0, 0, 0)), ["mean 123.68 116.779 103.939 (A's) in place of 0 0 0"]),
    "nearly the same mean": (dict(mean=(103.53, 116.28, 123.675)), ["mean 123.68 116.779"]),
    "range": (dict(value_range=1.0), ["pixels of 0..255 in place of 0..1"]),
    "std": (dict(std=(57.375, 57.12, 58.395)), ["std 1 1 1 (A's) in place of 58.395 57.12"]),
    "BN eps": (dict(bn_eps=1e-3), ["BN eps 1e-05 in place of 0.001"]),
}


@pytest.fixture(scope="module")
def images(pictures):
    return pictures[:2, :, 80:144, 80:144]


def assert_explained(checkpoint, facts, words, images):
    found = compare(checkpoint, checkpoint.restated(**facts), images)
    assert not found.equal
    assert len(found.explanation) == len(words), found
    for word, text in zip(words, found.explanation, strict=True):
        assert text.startswith(word), found
    assert found.explained.relative < 1e-5


@pytest.mark.data
@pytest.mark.parametrize("facts, words", MISTAKES.values(), ids=list(MISTAKES))
def test_each_mistake_is_named(facts, words, msra, images):
    assert_explained(msra, facts, words, images)


@pytest.mark.data
def test_two_mistakes_of_a_network_without_head(vgg_convolutions, pictures):
    facts = dict(channel_order="RGB", std=(58.0, 58.0, 58.0))
    words = ["channel order BGR", "std 1 1 1"]
    assert_explained(vgg_convolutions, facts, words, pictures[:1, :, 80:112, 80:112])


@pytest.mark.data
def test_everything_wrong_at_once(pictures):
    """Weights turned to RGB, in a library's preprocessing, against the raw ones misnamed."""
    raw = random_checkpoint("cifar_resnet20", "msra")
    right = convert_input(raw, channel_order="RGB", value_range=1.0)
    wrong = replace(raw, preprocessing=get_preprocessing("torchvision"))
    found = compare(right, wrong, pictures[:2, :, :32, :32])
    assert not found.equal
    assert len(found.explanation) == 1
    assert "A's preprocessing in the other channel order (BGR" in found.explanation[0]


@pytest.mark.data
def test_pooling(pictures):
    right = random_checkpoint("resnet18", "msra", caffe_pool=True)
    wrong = random_checkpoint("resnet18", "msra")
    found = compare(right, wrong, pictures[:1, :, :64, :64])
    assert found.explanation == ("caffe_pool True in place of False",)


@pytest.mark.data
def test_equal_ones_are_equal(msra, images):
    found = compare(msra, fold_bn(convert_input(msra, channel_order="RGB")), images)
    assert found.equal and found.difference.same_top1 == 2
    assert found.explanation == () and found.num_tried == 0


def test_other_weights_have_no_explanation():
    a = random_checkpoint("cifar_resnet20")
    kernel = a.tensors["res3.0.conv1.weight"]
    b = replace(a, tensors={**a.tensors, "res3.0.conv1.weight": kernel.flip(0)})
    found, singles = compare(a, b, sample_images(32).images), module.single_hypotheses(a, b)
    assert not found.equal and not found.explanation
    assert found.num_tried == len([*singles, *module.double_hypotheses(singles)]) + 5
    assert found.difference.relative > 1e-3


def test_half_precision_differs_by_its_rounding():
    a = random_checkpoint("cifar_resnet20")
    images = sample_images(32).images
    for dtype, limit in (("fp16", 1e-2), ("bf16", 5e-2)):
        found = compare(a, to_dtype(a, dtype), images, limit)
        assert found.equal and 1e-5 < found.difference.relative


def test_mean_image_is_found():
    plain = random_checkpoint("cifar_resnet20")
    with_image = plain.restated(mean_image=torch.rand(3, 32, 32))
    found = compare(with_image, plain, sample_images(32).images)
    assert found.explanation == ("A's mean image in place of channel means",)


def test_networks_that_cannot_be_compared():
    images = sample_images(32).images
    first = random_checkpoint("cifar_resnet20")
    with pytest.raises(WeightsError, match="cifar_resnet20 and B is resnet18"):
        compare(first, random_checkpoint("resnet18"), images)
    with pytest.raises(WeightsError, match="10 classes and B 5"):
        compare(first, random_checkpoint("cifar_resnet20", num_classes=5), images)
    broken = replace(first, tensors={k: v for k, v in first.tensors.items() if "res3.1" not in k})
    with pytest.raises(WeightsError, match="B: .* missing, the first is res3.1.conv1.weight"):
        compare(first, broken, images)


def test_one_without_head_is_compared_by_its_last_common_stage():
    whole = random_checkpoint("cifar_resnet20")
    tensors = {k: v for k, v in whole.tensors.items() if not k.startswith(("res4", "linear"))}
    spec = replace(whole.model, num_classes=None)
    found = compare(whole, replace(whole, tensors=tensors, model=spec), sample_images(32).images)
    assert found.equal
    assert found.difference.output == "res3" and found.difference.same_top1 is None


def test_built_network_is_a_copy_in_fp32():
    checkpoint = to_dtype(random_checkpoint("cifar_resnet20"), "fp16")
    network = build_network(checkpoint)
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    bias = checkpoint.tensors["linear.bias"].clone()
    with torch.no_grad():
        network.linear.bias.add_(1)
    assert torch.equal(checkpoint.tensors["linear.bias"], bias)
    network.train()(torch.rand(2, 3, 32, 32)).sum().backward()  # nothing is left on meta


def test_outputs_that_are_no_numbers_are_not_equal():
    found = difference(torch.ones(1, 2), torch.tensor([[1.0, float("nan")]]), "")
    assert found.relative == float("inf")


def test_sample_images_are_photographs_or_noise_without_scikit_image(monkeypatch):
    pytest.importorskip("skimage")
    images, text = sample_images(40)
    assert images.shape == (4, 3, 40, 40) and "photographs" in text
    assert (images.float().mean((2, 3)).std(1) > 5).sum() >= 3  # in color
    load_photograph.cache_clear()
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    images, text = sample_images(40)
    assert images.shape == (4, 3, 40, 40) and images.dtype == torch.uint8
    assert "noise" in text and "--images" in text
