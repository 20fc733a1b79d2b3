"""Reading image files: every kind that data sets are known to hold, and every way to be bad."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from resnet_backbone.classification.data.decode import BadImage, decode, is_plain_jpeg, read_rgb

RNG = np.random.default_rng(0)


def picture(height=48, width=64, mode="RGB") -> Image.Image:
    """A smooth picture, so that JPEG keeps it."""
    coarse = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC).convert(mode)


def encoded(image, kind="JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(data) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["RGB", "L"]),
    st.booleans(),
    st.sampled_from([0, 1, 2]),
    st.integers(20, 100),
)
@settings(max_examples=60, deadline=None)
def test_plain_jpegs_equal_pillow(height, width, mode, progressive, subsampling, quality):
    options = {"progressive": progressive, "quality": quality}
    if mode == "RGB":
        options["subsampling"] = subsampling
    data = encoded(picture(height, width, mode), **options)
    assert is_plain_jpeg(data)
    decoded = decode(data)
    assert decoded.note == ""
    np.testing.assert_array_equal(decoded.pixels, by_pillow(data))


@pytest.mark.parametrize(
    "mode, kind, note",
    [
        ("CMYK", "JPEG", "CMYK"),
        ("P", "PNG", "palette"),
        ("RGBA", "PNG", "RGBA"),
        ("LA", "PNG", "gray with alpha"),
        ("1", "PNG", "bitmap"),
        ("RGB", "PNG", ""),
        ("L", "PNG", ""),
        ("RGB", "BMP", ""),
        ("RGB", "WEBP", ""),
        ("P", "GIF", "palette"),
        ("CMYK", "TIFF", "CMYK"),
    ],
)
def test_other_modes_equal_pillow_and_are_noted(mode, kind, note):
    data = encoded(picture(mode=mode), kind)
    decoded = decode(data)
    assert decoded.note == note
    assert decoded.pixels.dtype == np.uint8 and decoded.pixels.shape == (48, 64, 3)
    np.testing.assert_array_equal(decoded.pixels, by_pillow(data))


def test_adobe_cmyk_is_not_read_as_a_negative():
    white = Image.fromarray(np.full((16, 16, 3), 250, np.uint8)).convert("CMYK")
    data = encoded(white)
    assert b"Adobe" in data and not is_plain_jpeg(data)
    assert decode(data).pixels.min() > 230


def test_16_bit_gray_keeps_the_high_byte():
    levels = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    decoded = decode(encoded(Image.fromarray(levels), "PNG"))
    assert decoded.note == "16-bit gray"
    np.testing.assert_array_equal(decoded.pixels, np.repeat(levels[..., None] >> 8, 3, axis=2))


def test_16_bit_color_keeps_the_high_byte():
    levels = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
    np.testing.assert_array_equal(decode(data).pixels, levels >> 8)


@pytest.mark.parametrize("value", [70000, -1])
def test_32_bit_pixels_have_no_known_range(value):
    levels = np.full((4, 4), value, np.int32)
    with pytest.raises(BadImage, match="32-bit pixels"):
        decode(encoded(Image.fromarray(levels), "TIFF"))


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadImage, match="floating-point"):
        decode(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_noted(orientation):
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif, quality=95)
    decoded = decode(data)
    assert is_plain_jpeg(data) == (orientation == 1)
    assert decoded.note == ("" if orientation == 1 else f"EXIF orientation {orientation}")
    assert decoded.pixels.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    np.testing.assert_array_equal(decoded.pixels, by_pillow(data))


def test_orientation_in_xmp_is_applied_like_pillow():
    packet = (
        b"http://ns.adobe.com/xap/1.0/\0"
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
        b'22-rdf-syntax-ns#"><rdf:Description tiff:Orientation="6" xmlns:tiff='
        b'"http://ns.adobe.com/tiff/1.0/"/></rdf:RDF></x:xmpmeta>'
    )
    plain = encoded(picture())
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + plain[2:]
    np.testing.assert_array_equal(decode(data).pixels, by_pillow(data))


def test_exif_without_orientation_keeps_the_short_way():
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    assert is_plain_jpeg(encoded(picture(), exif=exif))


@given(st.floats(0.0, 0.99))
@settings(max_examples=40, deadline=None)
def test_a_truncated_jpeg_is_bad(part):
    data = encoded(picture(300, 200), quality=90)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * part)])


def test_missing_scan_lines_are_bad_although_pillow_reads_them():
    data = encoded(picture(300, 200), quality=90)
    cut = data[: len(data) // 2] + b"\xff\xd9"
    Image.open(io.BytesIO(cut)).load()  # fills the rest with gray
    with pytest.raises(BadImage, match="truncated or damaged"):
        decode(cut)


def test_padding_between_segments_is_harmless():
    data = encoded(picture())
    padded = data[:-2] + b"\0" * 7 + data[-2:]
    np.testing.assert_array_equal(decode(padded).pixels, by_pillow(padded))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image"),
        (b"GIF89a", "."),
    ],
)
def test_bad_files_say_why_and_where(tmp_path, content, reason):
    path = tmp_path / "x.JPEG"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=reason) as caught:
        read_rgb(path)
    assert caught.value.path == str(path) and "\n" not in str(caught.value)


def test_missing_file_and_folder_are_bad_images(tmp_path):
    for path in (tmp_path / "nothing.jpg", tmp_path):
        with pytest.raises(BadImage):
            read_rgb(path)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_other_error_comes_out(noise, after_header):
    data = encoded(picture(20, 20))
    data = data[:30] + noise + data[30 + len(noise) :] if after_header else noise
    try:
        pixels = decode(data).pixels
    except BadImage:
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.data
def test_real_images_equal_pillow(data_root):
    paths = sorted((data_root / "VOCdevkit/VOC2007/JPEGImages").glob("*.jpg"))[::80]
    if not paths:
        pytest.skip("no VOC images")
    for path in paths:
        np.testing.assert_array_equal(read_rgb(path), by_pillow(path.read_bytes()))
