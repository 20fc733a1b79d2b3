"""Parts of images: decoded to the pixels of the whole, resized as Pillow and torchvision do it."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from resnet_backbone.classification.data import crops
from resnet_backbone.classification.data.crops import (
    Crop,
    EncodedImage,
    Span,
    draw_crop,
    draw_inception_crop,
    partial_decoding,
    resize_crop,
    resize_short_side,
    resized_shape,
)
from resnet_backbone.classification.data.decode import BadImage, decode
from resnet_backbone.classification.data.stream import sample_rng

needs_partial = pytest.mark.skipif(
    not partial_decoding(), reason="nvidia-nvimgcodec is not installed"
)


def jpeg(height=120, width=150, mode="RGB", **options) -> bytes:
    coarse = np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "JPEG", **{"quality": 90, **options})
    return stream.getvalue()


@pytest.fixture
def whole_decodes(monkeypatch):
    """Counts the images that are decoded whole."""
    calls = []
    monkeypatch.setattr(crops, "decode", lambda *args: calls.append(args) or decode(*args))
    return calls


@given(
    st.integers(1, 90),
    st.integers(1, 140),
    st.sampled_from(["RGB", "L"]),
    st.booleans(),
    st.sampled_from([0, 1, 2]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_region_equals_the_whole(height, width, mode, progressive, subsampling, data):
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    content = jpeg(height, width, mode, progressive=progressive, **options)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom = data.draw(st.integers(top + 1, height))
    right = data.draw(st.integers(left + 1, width))
    image = EncodedImage(content)
    assert (image.height, image.width) == (height, width)
    found = image.region(top, left, bottom, right)
    np.testing.assert_array_equal(found, decode(content).pixels[top:bottom, left:right])


@needs_partial
def test_plain_jpegs_are_decoded_in_part(whole_decodes):
    EncodedImage(jpeg()).region(10, 10, 60, 60)
    assert not whole_decodes
    EncodedImage(jpeg(), partial=False).region(10, 10, 60, 60)
    assert len(whole_decodes) == 1


def test_unusual_images_are_decoded_whole_and_once(whole_decodes):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = EncodedImage(jpeg(exif=exif))
    assert (image.height, image.width, image.note) == (150, 120, "EXIF orientation 6")
    image.region(0, 0, 10, 10)
    image.region(5, 5, 10, 10)
    assert len(whole_decodes) == 1
    assert EncodedImage(jpeg(mode="CMYK")).note == "CMYK"


@pytest.mark.parametrize("part", [0.3, 0.6, 0.99])
def test_a_truncated_jpeg_is_bad_wherever_one_looks(part):
    content = jpeg()
    with pytest.raises(BadImage):
        EncodedImage(content[: int(len(content) * part)]).region(0, 0, 8, 8)


def test_a_file_that_ends_in_the_middle_but_has_an_end_marker_is_bad_when_decoded_whole():
    content = jpeg()
    with pytest.raises(BadImage):
        EncodedImage(content[: len(content) // 2] + b"\xff\xd9", partial=False)


@needs_partial
@pytest.mark.parametrize("height, width", [(375, 500), (33, 97), (17, 40)])
def test_random_regions_of_real_sizes_equal_the_whole(height, width):
    content = jpeg(height, width)
    whole, rng = decode(content).pixels, np.random.default_rng(0)
    for _ in range(60):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        bottom, right = int(rng.integers(top, height)) + 1, int(rng.integers(left, width)) + 1
        found = EncodedImage(content).region(top, left, bottom, right)
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])


def test_the_decoder_works_in_a_forked_process():
    content = jpeg()
    expected = EncodedImage(content).region(7, 9, 80, 90).tobytes()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        found = EncodedImage(content).region(7, 9, 80, 90).tobytes()
        os.write(writer, b"same" if found == expected else b"else")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 4) == b"same"


def test_nothing_is_written_to_standard_error(capfd):
    crops._make_decoder.cache_clear()
    EncodedImage(jpeg()).region(0, 0, 8, 8)
    with pytest.raises(BadImage):
        EncodedImage(jpeg()[:500]).region(0, 0, 8, 8)
    assert capfd.readouterr().err == ""


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


def test_areas_and_shapes_are_those_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_inception_crop(300, 400, rng) for _ in range(3000)])
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = heights * widths / 120_000, widths / heights
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 400
    assert 0.075 < areas.min() < 0.1 and areas.max() > 0.9
    assert 0.72 < ratios.min() < 0.78 and 1.3 < ratios.max() < 1.38


@pytest.mark.parametrize("height, width", [(1, 400), (400, 1), (2, 2), (1, 1)])
def test_extreme_shapes_fall_back_to_the_center(height, width):
    top, left, bottom, right = draw_inception_crop(height, width, np.random.default_rng(0))
    assert 0 <= top < bottom <= height and 0 <= left < right <= width
