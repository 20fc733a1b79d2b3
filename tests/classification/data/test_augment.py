"""The paper's crop against Pillow, resizing against torchvision, the noise against its sources."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from resnet_backbone.classification.data.augment import (
    CentreCrop,
    Crop,
    PaperAugmentation,
    Span,
    draw_crop,
    resize_crop,
    resize_short_side,
    resized_shape,
)
from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.color import AXES, SCALINGS, colour_shift
from resnet_backbone.classification.data.region import EncodedImage
from resnet_backbone.classification.data.stream import sample_rng


def pixels(height, width, seed=0, coarse=12) -> np.ndarray:
    """Smooth random pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def image_of(array) -> EncodedImage:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "BMP")
    return EncodedImage(stream.getvalue())


def by_pillow(array, crop, size) -> np.ndarray:
    left, top, right, bottom = crop.box(size)
    box = left, top, min(right, array.shape[1]), min(bottom, array.shape[0])  # rounding errors
    return np.array(Image.fromarray(array).resize((size, size), Image.BILINEAR, box=box))


def difference(ours, reference) -> np.ndarray:
    return np.abs(ours.numpy().transpose(1, 2, 0).astype(int) - reference)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 480))
@settings(max_examples=80, deadline=None)
def test_resized_shape_is_torchvisions(height, width, size):
    if max(height, width) / min(height, width) > 60:
        return
    array = np.zeros((height, width, 3), np.uint8)
    expected = v2.functional.resize(torch.from_numpy(array).permute(2, 0, 1), [size])
    assert resized_shape(height, width, size) == tuple(expected.shape[1:])


@given(st.integers(20, 300), st.integers(20, 300), st.integers(20, 300))
@settings(max_examples=30, deadline=None)
def test_resize_short_side_equals_torchvision(height, width, size):
    array = pixels(height, width)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = v2.functional.resize(tensor, [size], antialias=True).numpy()
    np.testing.assert_array_equal(resize_short_side(tensor, size).numpy(), expected)
    np.testing.assert_array_equal(resize_short_side(array, size).transpose(2, 0, 1), expected)
    pillow = Image.fromarray(array).resize(expected.shape[:0:-1], Image.BILINEAR)
    assert np.abs(expected.transpose(1, 2, 0).astype(int) - np.array(pillow)).max() <= 2


@given(st.integers(3, 900), st.integers(3, 900), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_crops_equal_pillows_at_the_same_box(height, width, seed):
    if max(height, width) / min(height, width) > 20:
        return
    array = pixels(height, width, seed)
    crop = draw_crop(height, width, np.random.default_rng(seed), 64, (72, 140))
    found = difference(resize_crop(image_of(array), crop, 64), by_pillow(array, crop, 64))
    assert found.max() <= 2


@pytest.mark.parametrize("short_side", [254, 255, 256, 257, 258])
def test_a_region_as_long_as_its_result_is_resized_all_the_same(short_side):
    """torch leaves out the resizing of an axis whose length stays the same."""
    array = pixels(short_side, short_side + 30, coarse=80)
    scale = short_side / 256
    for span in (Span(0, 0, scale), Span(int(short_side - 225 * scale), 1, scale)):
        crop = Crop(span, span)
        found = difference(resize_crop(image_of(array), crop), by_pillow(array, crop, 224))
        assert found.max() <= 2, span


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_drawn_crops_lie_in_the_image(height, width, seed):
    crop = draw_crop(height, width, np.random.default_rng(seed))
    left, top, right, bottom = crop.box(224)
    assert left >= 0 and top >= 0 and right <= width + 1e-3 and bottom <= height + 1e-3


def test_short_sides_and_places_are_uniform():
    rng = np.random.default_rng(0)
    crops = [draw_crop(375, 500, rng) for _ in range(6000)]
    sides = np.array([round(375 / crop.y.scale) for crop in crops])
    assert sides.min() == 256 and sides.max() == 480
    counts = np.bincount(sides - 256, minlength=225)
    assert counts.min() > 5 and abs(sides.mean() - 368) < 3
    room = np.array([500 - 224 * crop.x.scale for crop in crops])
    places = np.array([crop.box(224)[0] for crop in crops]) / room
    assert np.abs(np.histogram(places, 10, (0, 1))[0] / 6000 - 0.1).max() < 0.02
    assert (places == 0).any() and places.max() > 0.99


def test_flip_is_a_mirror_image_and_half_of_all():
    image = image_of(pixels(300, 400))
    never, always = PaperAugmentation(flip=0.0), PaperAugmentation(flip=1.0)
    a, b = (augment(image, sample_rng(0, 0, 5)).image for augment in (never, always))
    assert torch.equal(a.flip(2), b) and not torch.equal(a, b)
    flips = 0
    for index in range(60):
        half = PaperAugmentation()(image, sample_rng(1, 0, index)).image
        flips += not torch.equal(half, never(image, sample_rng(1, 0, index)).image)
    assert 15 < flips < 45


def test_the_result_is_ready_to_be_sent():
    image, shift = PaperAugmentation()(image_of(pixels(260, 260)), sample_rng(0, 0, 0))
    assert image.shape == (3, 224, 224) and image.dtype == torch.uint8 and image.is_contiguous()
    assert shift.shape == (3,) and shift.dtype == np.float32
    quiet = replace(PaperAugmentation(), colour_noise="none")
    assert quiet(image_of(pixels(260, 260)), sample_rng(0, 0, 0)).shift is None


@pytest.mark.parametrize(
    "name, expected", [("cuda_convnet", (12.2, 3.7, 2.0)), ("fb_resnet_torch", (5.5, 0.48, 0.11))]
)
def test_noise_has_the_published_standard_deviations(name, expected):
    rng = np.random.default_rng(0)
    shifts = np.stack([colour_shift(name, rng) for _ in range(4000)])
    along = shifts @ AXES  # the axes are orthonormal
    np.testing.assert_allclose(along.std(0), expected, rtol=0.1)
    assert np.abs(along.mean(0)).max() < 0.5


def test_axes_are_orthonormal_and_the_scalings_differ_by_a_square_root():
    np.testing.assert_allclose(AXES.T @ AXES, np.eye(3), atol=2e-3)
    roots = np.sqrt(np.array(SCALINGS["fb_resnet_torch"]) / 255) * 255
    np.testing.assert_allclose(roots, SCALINGS["cuda_convnet"], rtol=0.15)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"colour_noise": "alexnet"}, "cuda_convnet, fb_resnet_torch, none"),
        ({"short_side": (200, 480)}, "no crop of 224"),
        ({"short_side": (480, 256)}, "first <= last"),
    ],
)
def test_impossible_augmentations_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        PaperAugmentation(**options)


@given(st.integers(10, 400), st.integers(10, 400))
@settings(max_examples=20, deadline=None)
def test_centre_crop_equals_torchvision(height, width):
    array = pixels(height, width)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    reference = v2.Compose([v2.Resize(74, antialias=True), v2.CenterCrop(65)])(tensor)
    assert torch.equal(CentreCrop(65, 74)(image_of(array)).image, reference)


@pytest.mark.data
def test_geometry_on_real_images(data_root):
    paths = sorted((data_root / "VOCdevkit/VOC2007/JPEGImages").glob("*.jpg"))[::64]
    if not paths:
        pytest.skip("no VOC images")
    means = []
    for index, path in enumerate(paths):
        image = EncodedImage(path.read_bytes())
        crop = draw_crop(image.height, image.width, sample_rng(0, 0, index))
        reference = by_pillow(np.array(Image.open(path).convert("RGB")), crop, 224)
        found = difference(resize_crop(image, crop), reference)
        assert found.max() <= 3
        means.append(found.mean())
    assert np.mean(means) <= 0.05
