"""Inception's crop and RandAugment."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.modern import InceptionAugmentation, draw_inception_crop
from resnet_backbone.classification.data.region import EncodedImage
from resnet_backbone.classification.data.stream import sample_rng


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((400, 300), Image.BICUBIC))


@pytest.fixture(scope="module")
def image(array) -> EncodedImage:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return EncodedImage(stream.getvalue())


def test_crop_is_torchvisions_of_the_same_box(array, image):
    rng = np.random.default_rng(3)
    top, left, bottom, right = draw_inception_crop(300, 400, np.random.default_rng(3))
    augmented = InceptionAugmentation(flip=0.0)(image, rng)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = v2.functional.resized_crop(
        tensor, top, left, bottom - top, right - left, [224, 224], antialias=True
    )
    assert torch.equal(augmented.image, expected)


def test_areas_and_shapes_are_those_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_inception_crop(300, 400, rng) for _ in range(3000)])
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = heights * widths / 120_000, widths / heights
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 400
    assert 0.075 < areas.min() < 0.1 and areas.max() > 0.9
    assert 0.72 < ratios.min() < 0.78 and 1.3 < ratios.max() < 1.38


@pytest.mark.parametrize("height, width", [(1, 400), (400, 1), (2, 2), (1, 1)])
def test_extreme_shapes_fall_back_to_the_centre(height, width):
    top, left, bottom, right = draw_inception_crop(height, width, np.random.default_rng(0))
    assert 0 <= top < bottom <= height and 0 <= left < right <= width


def test_randaugment_is_a_function_of_the_sample(image):
    augment = InceptionAugmentation(randaugment=9)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = augment(image, sample_rng(0, 2, 7)).image
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(first, augment(image, sample_rng(0, 2, 7)).image)
    others = [augment(image, sample_rng(0, 2, i)).image for i in range(4)]
    assert not any(torch.equal(first, other) for other in others)
    torch.set_rng_state(state)


def test_randaugment_changes_pixels_and_leaves_torchs_generator_alone(image):
    state = torch.get_rng_state()
    with_it = [InceptionAugmentation(randaugment=15)(image, sample_rng(0, 0, i)) for i in range(5)]
    without = [InceptionAugmentation()(image, sample_rng(0, 0, i)) for i in range(5)]
    changed = [not torch.equal(a.image, b.image) for a, b in zip(with_it, without, strict=True)]
    assert sum(changed) >= 3
    assert torch.equal(state, torch.get_rng_state())
    assert with_it[0].image.shape == (3, 224, 224) and with_it[0].image.dtype == torch.uint8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"area": (0.0, 1.0)}, "area"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"randaugment": 31}, "0..30"),
        ({"colour_noise": "pca"}, "colour noise"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        InceptionAugmentation(**options)
