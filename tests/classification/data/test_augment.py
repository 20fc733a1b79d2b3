"""Crops as Pillow and torchvision make them, the augmentations, the color noise, mixed batches."""

import numpy as np
import pytest
import torch
from drawn_images import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from resnet_backbone.classification.config import DataConfig
from resnet_backbone.classification.data import augment as module
from resnet_backbone.classification.data.augment import BatchMixer, draw_crop, resize_crop
from resnet_backbone.classification.data.sources import sample_rng
from resnet_backbone.runtime.images import EncodedImage

# Published standard deviations of the noise; the boxes of images with extreme shapes.
STDS = {"cuda_convnet": (12.2, 3.7, 2.0), "fb_resnet_torch": (5.5, 0.48, 0.11)}
CENTERS = {(1, 400): (0, 199, 1, 200), (400, 1): (199, 0, 200, 1), (1, 1): (0, 0, 1, 1)}


def pixels(height, width, seed=0, coarse=12) -> np.ndarray:
    return np.array(picture(height, width, "RGB", seed, coarse))


def image_of(array) -> EncodedImage:
    return EncodedImage(encoded(Image.fromarray(array), "BMP"))


def tensor_of(array) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


def by_pillow(array, crop, size) -> np.ndarray:
    left, top, right, bottom = crop.box(size)
    box = left, top, min(right, array.shape[1]), min(bottom, array.shape[0])  # rounding errors
    return np.array(Image.fromarray(array).resize((size, size), Image.BILINEAR, box=box))


def difference(ours, reference) -> np.ndarray:
    return np.abs(ours.numpy().transpose(1, 2, 0).astype(int) - reference)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 480))
@settings(max_examples=80, deadline=None)
def test_resizing_is_torchvisions(height, width, size):
    if max(height, width) / min(height, width) > 60:
        return
    tensor = tensor_of(pixels(height, width))
    expected = v2.functional.resize(tensor, [size], antialias=True)
    assert module.resized_shape(height, width, size) == tuple(expected.shape[1:])
    assert torch.equal(module.resize_short_side(tensor, size), expected)


@given(st.integers(3, 900), st.integers(3, 900), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
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
    for span in (module.Span(0, 0, scale), module.Span(int(short_side - 225 * scale), 1, scale)):
        crop = module.Crop(span, span)
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


@pytest.mark.data
def test_geometry_on_real_images(data_root):
    paths = sorted((data_root / "VOCdevkit/VOC2007/JPEGImages").glob("*.jpg"))[::64]
    found = []
    for index, path in enumerate(paths):
        image = EncodedImage(path.read_bytes())
        crop = draw_crop(image.height, image.width, sample_rng(0, 0, index))
        reference = by_pillow(np.array(Image.open(path).convert("RGB")), crop, 224)
        found.append(difference(resize_crop(image, crop), reference))
    assert found and np.max(found) <= 3 and np.mean(found) <= 0.05


def test_areas_and_shapes_are_those_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([module.draw_inception_crop(300, 400, rng) for _ in range(3000)])
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = heights * widths / 120_000, widths / heights
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 400
    assert 0.075 < areas.min() < 0.1 and areas.max() > 0.9
    assert 0.72 < ratios.min() < 0.78 and 1.3 < ratios.max() < 1.38


@pytest.mark.parametrize("size, box", CENTERS.items())
def test_extreme_shapes_fall_back_to_the_center(size, box):
    assert tuple(module.draw_inception_crop(*size, np.random.default_rng(0))) == box


ARRAY = pixels(300, 400)


@pytest.fixture(scope="module")
def image() -> EncodedImage:
    return image_of(ARRAY)


def test_flip_is_a_mirror_image_and_half_of_all(image):
    flips = 0
    for index in range(60):
        augments = (module.PaperAugmentation(flip=share) for share in (0.0, 0.5, 1.0))
        never, half, always = (made(image, sample_rng(1, 0, index)).image for made in augments)
        assert torch.equal(never.flip(2), always) and not torch.equal(never, always)
        flips += torch.equal(half, always)
    assert 15 < flips < 45


def test_the_result_is_ready_to_be_sent(image):
    pixels, shift = module.PaperAugmentation()(image, sample_rng(0, 0, 0))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert shift.shape == (3,) and shift.dtype == np.float32
    assert module.PaperAugmentation(color_noise="none")(image, sample_rng(0, 0, 0)).shift is None


@pytest.mark.parametrize("name, expected", STDS.items())
def test_noise_has_the_published_standard_deviations(name, expected):
    rng = np.random.default_rng(0)
    shifts = np.stack([module.color_shift(name, rng) for _ in range(4000)])
    along = shifts @ module.AXES  # the axes are orthonormal
    np.testing.assert_allclose(along.std(0), expected, rtol=0.1)
    assert np.abs(along.mean(0)).max() < 0.5


def test_axes_are_orthonormal_and_the_scalings_differ_by_a_square_root():
    choices = DataConfig.__dataclass_fields__["color_noise"].metadata["choices"]
    assert choices == (*module.SCALINGS, "none")
    np.testing.assert_allclose(module.AXES.T @ module.AXES, np.eye(3), atol=2e-3)
    roots = np.sqrt(np.array(module.SCALINGS["fb_resnet_torch"]) / 255) * 255
    np.testing.assert_allclose(roots, module.SCALINGS["cuda_convnet"], rtol=0.15)


@pytest.mark.parametrize("height, width", [(10, 13), (64, 400), (399, 65), (74, 74), (151, 230)])
def test_center_crop_equals_torchvision(height, width):
    array, theirs = pixels(height, width), [v2.Resize(74, antialias=True), v2.CenterCrop(65)]
    found = module.CenterCrop(65, 74)(image_of(array)).image
    assert torch.equal(found, v2.Compose(theirs)(tensor_of(array)))


def test_crop_is_torchvisions_of_the_same_box(image):
    top, left, bottom, right = module.draw_inception_crop(300, 400, np.random.default_rng(3))
    box = top, left, bottom - top, right - left
    expected = v2.functional.resized_crop(tensor_of(ARRAY), *box, [224, 224], antialias=True)
    augmented = module.InceptionAugmentation(flip=0.0)(image, np.random.default_rng(3))
    assert torch.equal(augmented.image, expected)


def test_randaugment_is_a_function_of_the_sample_and_leaves_torchs_generator_alone(image):
    augment, state = module.InceptionAugmentation(randaugment=15), torch.get_rng_state()
    made = [augment(image, sample_rng(0, 0, i)).image for i in range(5)]
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(made[3], augment(image, sample_rng(0, 0, 3)).image)
    without = [module.InceptionAugmentation()(image, sample_rng(0, 0, i)).image for i in range(5)]
    assert sum(not torch.equal(a, b) for a, b in zip(made, without, strict=True)) >= 3
    assert not any(torch.equal(made[0], other) for other in made[1:])
    assert made[0].shape == (3, 224, 224) and made[0].dtype == torch.uint8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def test_a_mix_is_a_function_of_seed_and_iteration(batch):
    state = torch.get_rng_state()
    images, labels = BatchMixer(5)(*batch, 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(4)
    assert torch.equal(images, BatchMixer(5)(*batch, 7)[0])
    assert not torch.equal(images, BatchMixer(5)(*batch, 8)[0])
    assert not torch.equal(images, BatchMixer(5, seed=1)(*batch, 7)[0])
    assert labels.shape == (6, 5) and images.shape == batch[0].shape


def test_labels_follow_the_images_of_mixup(batch):
    images, labels = batch
    mixed, soft = BatchMixer(5, mixup=1.0, cutmix=0)(images, labels, 0)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    share = soft[1, 1]  # image 1 is mixed with image 0
    assert 0 < share < 1 and torch.isclose(soft[1, 0], 1 - share)
    torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[0])


def test_labels_follow_the_area_of_cutmix(batch):
    images, labels = batch
    for iteration in range(5):
        mixed, soft = BatchMixer(5, mixup=0, cutmix=1.0)(images, labels, iteration)
        kept = (mixed[2] == images[2]).all(0).float().mean()
        pasted = (mixed[2] == images[1]).all(0).float().mean()
        assert kept + pasted == 1
        assert torch.isclose(soft[2, 2], kept, atol=1e-6)


def test_both_are_used(batch):
    mixed = [BatchMixer(5)(*batch, iteration)[0] for iteration in range(20)]
    pasted = [((one == batch[0]) | (one == batch[0].roll(1, 0))).all() for one in mixed]
    assert 3 < sum(pasted) < 17
    alone = [part[2:3] for part in batch]  # is not mixed
    mixed, soft = BatchMixer(5)(*alone, 0)
    assert torch.equal(mixed, alone[0]) and soft.tolist() == [[0, 0, 1, 0, 0]]
