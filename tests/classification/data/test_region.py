"""Decoding a part of an image gives the pixels of the whole."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_backbone.classification.data import region
from resnet_backbone.classification.data.decode import BadImage, decode
from resnet_backbone.classification.data.region import EncodedImage, partial_decoding

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
    monkeypatch.setattr(region, "decode", lambda *args: calls.append(args) or decode(*args))
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
    region._make_decoder.cache_clear()
    EncodedImage(jpeg()).region(0, 0, 8, 8)
    with pytest.raises(BadImage):
        EncodedImage(jpeg()[:500]).region(0, 0, 8, 8)
    assert capfd.readouterr().err == ""
