"""Reading image files, whole and in part: every kind that data sets hold, every way to be bad."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from drawn_images import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from resnet_backbone.detection.data.problems import files_below
from resnet_backbone.runtime import images as module
from resnet_backbone.runtime.images import BadImage, EncodedImage, decode, is_plain_jpeg


def by_pillow(data) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@given(
    st.integers(1, 240),
    st.integers(1, 320),
    st.sampled_from(["RGB", "L"]),
    st.booleans(),
    st.sampled_from([0, 1, 2]),
    st.integers(20, 100),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_plain_jpegs_and_any_region_equal_pillow(
    height, width, mode, progressive, subsampling, quality, draw
):
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    image = picture(height, width, mode)
    data = encoded(image, progressive=progressive, quality=quality, **options)
    whole, note = decode(data)
    assert is_plain_jpeg(data) and note == ""
    np.testing.assert_array_equal(whole, by_pillow(data))
    top, left = draw.draw(st.integers(0, height - 1)), draw.draw(st.integers(0, width - 1))
    bottom = draw.draw(st.integers(top + 1, height))
    right = draw.draw(st.integers(left + 1, width))
    image = EncodedImage(data)
    assert (image.height, image.width) == (height, width)
    found = image.region(top, left, bottom, right)
    np.testing.assert_array_equal(found, whole[top:bottom, left:right])


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
    pixels, found = decode(data)
    assert (found, pixels.dtype, pixels.shape) == (note, np.uint8, (48, 64, 3))
    np.testing.assert_array_equal(pixels, by_pillow(data))


def test_adobe_cmyk_is_not_read_as_a_negative():
    white = Image.fromarray(np.full((16, 16, 3), 250, np.uint8)).convert("CMYK")
    data = encoded(white)
    assert b"Adobe" in data and not is_plain_jpeg(data)
    assert decode(data).pixels.min() > 230


def test_16_bit_gray_keeps_the_high_byte():
    levels = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    pixels, note = decode(encoded(Image.fromarray(levels), "PNG"))
    assert note == "16-bit gray" and (pixels == levels[..., None] >> 8).all()


def test_16_bit_color_keeps_the_high_byte():
    levels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
    np.testing.assert_array_equal(decode(data).pixels, levels >> 8)


@pytest.mark.parametrize("whole", [1, 255, 65535])
def test_floating_point_gray_is_read_by_its_range(whole):
    levels = np.linspace(0, whole, 48 * 64, dtype=np.float32).reshape(48, 64)
    pixels = decode(encoded(Image.fromarray(levels), "TIFF")).pixels
    wanted = np.floor(levels.astype(np.float64) * (255 if whole == 1 else 256 / (whole + 1)))
    np.testing.assert_allclose(pixels[..., 0], wanted, atol=1)
    assert pixels.max() == 255 and pixels.min() == 0


def test_12_bit_gray_keeps_the_high_byte():
    levels = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)  # up to 3071 of 4095
    packed = np.unpackbits(levels.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    strip = np.packbits(packed).tobytes()
    entries = [(256, 3, 64), (257, 3, 48), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 134)]
    entries += [(277, 3, 1), (278, 3, 48), (279, 4, len(strip)), (339, 3, 1)]
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0)
    np.testing.assert_array_equal(decode(head + strip).pixels[..., 0], levels >> 4)


@pytest.mark.parametrize(
    "pixel", [np.int32(70000), np.int32(-1), np.float32(-0.5), np.float32(1e6)]
)
def test_pixels_without_a_known_range_are_refused(pixel):
    with pytest.raises(BadImage, match="have no known range"):
        decode(encoded(Image.fromarray(np.full((4, 4), pixel)), "TIFF"))


def with_exif(image, tag, value):
    exif = Image.Exif()
    exif[tag] = value
    return encoded(image, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_noted(orientation):
    data = with_exif(picture(), 0x0112, orientation)
    pixels, note = decode(data)
    assert is_plain_jpeg(data) == (orientation == 1)
    assert note == ("" if orientation == 1 else f"EXIF orientation {orientation}")
    assert pixels.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    np.testing.assert_array_equal(pixels, by_pillow(data))


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
    assert not is_plain_jpeg(data) and is_plain_jpeg(with_exif(picture(), 0x010F, "a camera"))


@given(st.floats(0.0, 0.99))
@settings(max_examples=40, deadline=None)
def test_a_truncated_jpeg_is_bad(part):
    data = encoded(picture(300, 200), quality=90)
    cut = data[: int(len(data) * part)]
    for read in (decode, lambda cut: EncodedImage(cut).region(0, 0, 8, 8)):
        with pytest.raises(BadImage):
            read(cut)


def test_missing_scan_lines_are_bad_although_pillow_reads_them():
    data = encoded(picture(300, 200), quality=90)
    cut = data[: len(data) // 2] + b"\xff\xd9"
    Image.open(io.BytesIO(cut)).load()  # fills the rest with gray
    for read in (decode, lambda cut: EncodedImage(cut, partial=False)):
        with pytest.raises(BadImage, match="truncated or damaged"):
            read(cut)


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
        (None, "No such file"),
    ],
)
def test_bad_files_say_why_and_where(tmp_path, content, reason):
    path = tmp_path / "x.JPEG"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage, match=reason) as caught:
        module.read_rgb(path)
    assert caught.value.path == str(path) and "\n" not in str(caught.value)
    with pytest.raises(BadImage, match="directory"):
        module.read_rgb(tmp_path)


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
    assert paths
    for path in paths:
        np.testing.assert_array_equal(module.read_rgb(path), by_pillow(path.read_bytes()))


JPEG = encoded(picture(120, 150), quality=90)


@pytest.fixture
def whole_decodes(monkeypatch):
    """Counts the images that are decoded whole."""
    calls = []
    monkeypatch.setattr(module, "decode", lambda *args: calls.append(args) or decode(*args))
    return calls


@pytest.mark.skipif(not module.partial_decoding(), reason="nvidia-nvimgcodec is not installed")
def test_plain_jpegs_are_decoded_in_part(whole_decodes):
    EncodedImage(JPEG).region(10, 10, 60, 60)
    assert not whole_decodes
    EncodedImage(JPEG, partial=False).region(10, 10, 60, 60)
    assert len(whole_decodes) == 1


def test_unusual_images_are_decoded_whole_and_once(whole_decodes):
    image = EncodedImage(with_exif(picture(120, 150), 0x0112, 6))
    assert (image.height, image.width, image.note) == (150, 120, "EXIF orientation 6")
    image.region(0, 0, 10, 10)
    image.region(5, 5, 10, 10)
    assert len(whole_decodes) == 1
    assert EncodedImage(encoded(picture(mode="CMYK"))).note == "CMYK"


def test_the_decoder_works_in_a_forked_process():
    expected = EncodedImage(JPEG).region(7, 9, 80, 90).tobytes()
    child = os.fork()
    if child == 0:
        os._exit(EncodedImage(JPEG).region(7, 9, 80, 90).tobytes() != expected)
    assert os.waitpid(child, 0)[1] == 0


def test_nothing_is_written_to_standard_error(capfd):
    module._decoder.cache_clear()
    EncodedImage(JPEG).region(0, 0, 8, 8)
    with pytest.raises(BadImage):
        EncodedImage(JPEG[:500]).region(0, 0, 8, 8)
    assert capfd.readouterr().err == ""


def test_a_folders_images_are_the_same_for_every_reader(tmp_path):
    """Prediction, calibration, training, and own data list them by one function each."""
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("b.JPG", "a/c.png", ".hidden.jpg", ".ipynb_checkpoints/b.jpg", "notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "folder.jpg").mkdir()
    elsewhere.mkdir()
    (elsewhere / "d.avif").touch()
    (folder / "linked").symlink_to(elsewhere)
    expected = ["a/c.png", "b.JPG", "linked/d.avif"]
    assert module.list_images(folder) == expected
    assert module.find_pictures([folder]) == [folder / name for name in expected]
    assert sorted(files_below(folder, *module.EXTENSIONS)) == [folder / name for name in expected]
