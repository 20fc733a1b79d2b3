"""InputNormalizer against arithmetic written out, for every published convention."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_backbone
from resnet_backbone.weights import PREPROCESSINGS, InputNormalizer, Preprocessing, WeightsError


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
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    images = images.to(torch.uint8)
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
    for noise in (None, shift):
        scale = 255 / value_range
        expected = by_hand(images, preprocessing, noise, mean=image)
        found = normalizer(images, noise).double()
        if value_range == 255:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        else:  # mean and std of the 0..1 range, used on 0..255
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)
    other = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    torch.testing.assert_close(
        normalizer(other).double(), by_hand(other, preprocessing), rtol=1e-5, atol=1e-4
    )


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
