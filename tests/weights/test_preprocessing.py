"""Inputs as text, as numbers, as libraries state them, and normalized as by hand."""

import json

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_backbone
from resnet_backbone.weights import PREPROCESSINGS, InputNormalizer, Preprocessing, WeightsError
from resnet_backbone.weights.keymaps import torchvision as keymap
from resnet_backbone.weights.keymaps.huggingface import hugging_face_preprocessing
from resnet_backbone.weights.preprocessing import get_preprocessing, same_mean, same_std

MSRA = PREPROCESSINGS["msra"]


def by_hand(images, preprocessing, shift=None, mean=None):
    """float64, one channel after the other."""
    planes = []
    for place, channel in enumerate(preprocessing.channel_order):
        index = "RGB".index(channel)
        plane = images[:, index].double()
        if shift is not None:
            plane = plane + shift[:, index, None, None].double()
        scale = 255 / preprocessing.value_range
        level = preprocessing.mean[place] if mean is None else mean[place].double()
        planes.append((plane / scale - level) / preprocessing.std[place])
    return torch.stack(planes, dim=1)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(PREPROCESSINGS)),
    st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)),
    st.booleans(),
    st.booleans(),
)
def test_every_convention(name, shape, with_shift, channels_last):
    count, height, width = shape
    generator = torch.Generator().manual_seed(count * 100 + height * 10 + width)
    size, options = (count, 3, height, width), dict(dtype=torch.uint8, generator=generator)
    images = torch.randint(0, 256, size, **options)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    shift = torch.randn(count, 3, generator=generator) * 20 if with_shift else None
    before = images.clone()
    found = InputNormalizer(PREPROCESSINGS[name])(images, shift)
    expected = by_hand(images, PREPROCESSINGS[name], shift)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("value_range", [1.0, 255.0])
def test_mean_image_at_its_own_size_only(order, value_range):
    image = torch.rand(3, 6, 5) * value_range
    mean = tuple(image.mean((1, 2)).tolist())
    preprocessing = Preprocessing(order, value_range, mean, (2.0, 3.0, 4.0), mean_image=image)
    normalizer = InputNormalizer(preprocessing)
    images = torch.randint(0, 256, (2, 3, 6, 5), dtype=torch.uint8)
    shift = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 9.0]])
    other = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    pairs = [
        (normalizer(images, noise), by_hand(images, preprocessing, noise, mean=image))
        for noise in (None, shift)
    ]
    for found, expected in [*pairs, (normalizer(other), by_hand(other, preprocessing))]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_network_with_weights_in_one_call(tmp_path):
    theirs = torchvision.models.resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / "r50.pth")
    source = dict(weights=tmp_path / "r50.pth", preprocessing="torchvision")
    ours = resnet_backbone.build_model("resnet50", **source).eval()
    normalize = resnet_backbone.InputNormalizer(ours.preprocessing)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    transforms = torchvision.models.ResNet50_Weights.DEFAULT.transforms
    with torch.no_grad():
        wanted = theirs(transforms(crop_size=64, resize_size=64)(image))
        torch.testing.assert_close(ours(normalize(image)), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(WeightsError, match="stride_in_1x1"):
        resnet_backbone.build_model("resnet50", stride_in_1x1=True, **source)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), torch.zeros(1, 3, 8, 8).double()])
def test_only_bytes_are_normalized(images):
    with pytest.raises(TypeError, match="expected images as bytes"):
        InputNormalizer(MSRA)(images)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8, 3), (1, 4, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected RGB images .N, 3, H, W., not "):
        InputNormalizer(MSRA)(torch.zeros(shape, dtype=torch.uint8))


def test_preprocessing_survives_json():
    for preprocessing in PREPROCESSINGS.values():
        assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    for text in ("", "[]", "{}", '{"channel_order": "RGB", "colour": 1}'):
        with pytest.raises(WeightsError, match="unreadable preprocessing"):
            Preprocessing.from_json(text)
    changes = [("mean", [1, 2]), ("mean", [float("nan"), 0, 0]), ("std", [1, 0, 1])]
    changes += [("value_range", 0.0), ("bn_eps", -1e-5), ("stride_in_1x1", "yes")]
    changes += [("crop_size", 224.5), ("interpolation", "lanczos"), ("source", None)]
    for key, value in changes:
        with pytest.raises(WeightsError, match="preprocessing: "):
            Preprocessing.from_json(json.dumps({**json.loads(MSRA.to_json()), key: value}))
    with pytest.raises(WeightsError, match="channel_order must be RGB or BGR, not 'rgb'"):
        Preprocessing("rgb", 1.0, (0, 0, 0), (1, 1, 1))
    with pytest.raises(WeightsError, match="'tv': use one of msra, caffe_vgg, torchvision"):
        get_preprocessing("tv")


def test_values_in_pixels():
    torchvision = PREPROCESSINGS["torchvision"]
    assert torchvision.pixel_mean_255() == pytest.approx((123.675, 116.28, 103.53))
    assert torchvision.pixel_std_255() == pytest.approx((58.395, 57.12, 57.375))
    assert MSRA.pixel_mean_255() == MSRA.mean
    assert same_mean((103.53, 116.28, 123.675), MSRA.mean)
    assert not same_mean((123.675, 116.28, 103.53), MSRA.mean)
    assert not same_mean((103.53, 116.28), MSRA.mean)
    assert not same_std((57.375, 57.12, 58.395), MSRA.std)


VGG = torchvision.models.VGG16_Weights
ENTRIES = [torchvision.models.ResNet50_Weights.IMAGENET1K_V2]
ENTRIES += [VGG.IMAGENET1K_V1, VGG.IMAGENET1K_FEATURES]


@pytest.mark.parametrize("weights", ENTRIES, ids=str)
def test_torchvisions_own_transform(weights):
    """Each entry says it itself: one of them has another mean and std."""
    found, transform = keymap.torchvision_preprocessing(weights), weights.transforms()
    image = torch.randint(0, 256, (3, found.crop_size, found.crop_size), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (found.mean, found.std))
    transform.resize_size = [found.crop_size]  # the image has that size
    torch.testing.assert_close(transform(image), (image / 255 * found.value_range - mean) / std)
    assert found.resize_size == weights.transforms().resize_size[0]


@pytest.mark.parametrize("name", timm.list_pretrained(["resnet18.*", "resnet34.*", "vgg16*"]))
def test_timms_own_transform(name):
    config = timm.get_pretrained_cfg(name)
    found = keymap.timm_preprocessing(config.to_dict(), "")
    expected = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    assert (found.mean, found.std) == (expected["mean"], expected["std"])
    assert found.interpolation == expected["interpolation"]
    transform = timm.data.create_transform(**expected)
    assert transform.transforms[0].size == found.resize_size
    assert tuple(transform.transforms[1].size) == (found.crop_size,) * 2


PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "size": 224, "resample": 3}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, dict(value_range=1.0, mean=(0.1, 0.2, 0.3), interpolation="bicubic")),
        ({"do_rescale": False}, dict(value_range=255.0)),
        ({"rescale_factor": 1 / 127.5}, dict(value_range=2.0)),
        ({"do_normalize": False}, dict(mean=(0, 0, 0), std=(1, 1, 1))),
        ({"do_flip_channel_order": True}, dict(channel_order="BGR")),
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875},
         dict(resize_size=256, crop_size=224)),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
         dict(resize_size=None, crop_size=None)),
        ({"size": {"height": 224, "width": 224}}, dict(resize_size=None, crop_size=None)),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "resample": 2,
          "crop_size": {"height": 224, "width": 224}},
         dict(resize_size=256, crop_size=224, interpolation="bilinear")),
    ],
)  # fmt: skip
def test_kinds_of_preprocessor(change, expected):
    found = hugging_face_preprocessing(PROCESSOR | change, None)
    assert {key: getattr(found, key) for key in expected} == expected
