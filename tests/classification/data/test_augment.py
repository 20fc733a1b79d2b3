"""The paper's augmentation, Inception's with RandAugment, the color noise, and mixed batches."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from resnet_backbone.classification.config import DataConfig
from resnet_backbone.classification.data.augment import (
    AXES,
    COLOR_NOISES,
    SCALINGS,
    BatchMixer,
    CenterCrop,
    InceptionAugmentation,
    PaperAugmentation,
    color_shift,
)
from resnet_backbone.classification.data.crops import EncodedImage, draw_inception_crop
from resnet_backbone.classification.data.stream import sample_rng
from resnet_backbone.runtime.errors import DataError


def pixels(height, width, seed=0, coarse=12) -> np.ndarray:
    """Smooth random pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def image_of(array) -> EncodedImage:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "BMP")
    return EncodedImage(stream.getvalue())


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    return pixels(300, 400)


@pytest.fixture(scope="module")
def image(array) -> EncodedImage:
    return image_of(array)


def test_flip_is_a_mirror_image_and_half_of_all(image):
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
    quiet = replace(PaperAugmentation(), color_noise="none")
    assert quiet(image_of(pixels(260, 260)), sample_rng(0, 0, 0)).shift is None


@pytest.mark.parametrize(
    "name, expected", [("cuda_convnet", (12.2, 3.7, 2.0)), ("fb_resnet_torch", (5.5, 0.48, 0.11))]
)
def test_noise_has_the_published_standard_deviations(name, expected):
    rng = np.random.default_rng(0)
    shifts = np.stack([color_shift(name, rng) for _ in range(4000)])
    along = shifts @ AXES  # the axes are orthonormal
    np.testing.assert_allclose(along.std(0), expected, rtol=0.1)
    assert np.abs(along.mean(0)).max() < 0.5


def test_axes_are_orthonormal_and_the_scalings_differ_by_a_square_root():
    np.testing.assert_allclose(AXES.T @ AXES, np.eye(3), atol=2e-3)
    roots = np.sqrt(np.array(SCALINGS["fb_resnet_torch"]) / 255) * 255
    np.testing.assert_allclose(roots, SCALINGS["cuda_convnet"], rtol=0.15)


@pytest.mark.parametrize("height, width", [(10, 13), (64, 400), (399, 65), (74, 74), (151, 230)])
def test_center_crop_equals_torchvision(height, width):
    array = pixels(height, width)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    reference = v2.Compose([v2.Resize(74, antialias=True), v2.CenterCrop(65)])(tensor)
    assert torch.equal(CenterCrop(65, 74)(image_of(array)).image, reference)


def test_crop_is_torchvisions_of_the_same_box(array, image):
    rng = np.random.default_rng(3)
    top, left, bottom, right = draw_inception_crop(300, 400, np.random.default_rng(3))
    augmented = InceptionAugmentation(flip=0.0)(image, rng)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = v2.functional.resized_crop(
        tensor, top, left, bottom - top, right - left, [224, 224], antialias=True
    )
    assert torch.equal(augmented.image, expected)


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


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def test_a_mix_is_a_function_of_seed_and_iteration(batch):
    mixer = BatchMixer(5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    images, labels = mixer(*batch, 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(4)
    again, _ = BatchMixer(5)(*batch, 7)
    assert torch.equal(images, again)
    assert not torch.equal(images, mixer(*batch, 8)[0])
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
    mixer, pasted = BatchMixer(5), []
    for iteration in range(20):
        mixed, _ = mixer(*batch, iteration)
        pasted.append(bool(((mixed == batch[0]) | (mixed == batch[0].roll(1, 0))).all()))
    assert 3 < sum(pasted) < 17


def test_a_batch_of_one_is_not_mixed():
    images, labels = torch.randn(1, 3, 8, 8), torch.tensor([2])
    mixed, soft = BatchMixer(5)(images, labels, 0)
    assert torch.equal(mixed, images) and soft.tolist() == [[0, 0, 1, 0, 0]]


@pytest.mark.parametrize("options", [{"mixup": 0, "cutmix": 0}, {"mixup": -1}])
def test_nothing_to_mix_is_refused(options):
    with pytest.raises(DataError, match="alphas"):
        BatchMixer(5, **options)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (PaperAugmentation, {"color_noise": "alexnet"}, "cuda_convnet, fb_resnet_torch, none"),
        (PaperAugmentation, {"short_side": (200, 480)}, "no crop of 224"),
        (PaperAugmentation, {"short_side": (480, 256)}, "first <= last"),
        (InceptionAugmentation, {"area": (0.0, 1.0)}, "area"),
        (InceptionAugmentation, {"ratio": (2.0, 1.0)}, "ratio"),
        (InceptionAugmentation, {"randaugment": 31}, "0..30"),
        (InceptionAugmentation, {"color_noise": "pca"}, "color noise"),
    ],
)
def test_impossible_augmentations_are_refused(kind, options, message):
    with pytest.raises(DataError, match=message):
        kind(**options)


def test_the_config_offers_the_noises_that_there_are():
    assert DataConfig.__dataclass_fields__["color_noise"].metadata["choices"] == COLOR_NOISES
