"""Pictures of detections: where the boxes are, colors, enlargement, sheets, whole files."""

from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from resnet_backbone.detection.inference import pictures

GRAY = np.full((500, 700, 3), 90, np.uint8)
BOX = (300.0, 200.0, 450.0, 380.0)


def where(picture: np.ndarray, index: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of all pixels in the color of a class."""
    color = 255 * np.array(pictures.class_color(index))
    rows, columns = np.nonzero((abs(picture - color) < 40).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_detections_are_drawn_where_they_are():
    """Those above the threshold; the image is left alone."""
    found = Instances((500, 700), scores=torch.tensor([0.9, 0.4]))
    found.pred_boxes = Boxes(torch.tensor([BOX, (10.0, 20.0, 250.0, 140.0)]))
    found.pred_classes = torch.tensor([3, 1])
    output, before = {"instances": found}, GRAY.copy()
    picture = pictures.draw_output(GRAY, output, [], threshold=0.5)
    assert (GRAY == before).all()
    assert picture.shape == GRAY.shape and picture.dtype == np.uint8
    assert where(picture, 3) == pytest.approx(BOX, abs=3)
    assert (picture[:150] == 90).all() and (picture[390:] == 90).all()
    assert (picture[230:350, 330:420] == 90).all()  # nothing inside
    assert (pictures.draw_output(GRAY, output, threshold=0.95) == 90).all()
    both = pictures.draw_output(GRAY, output, threshold=0.4 - 1e-6)
    assert where(both, 1) == pytest.approx((10, 20, 250, 140), abs=3)


def test_ground_truth_has_the_colors_of_detections():
    truth = pictures.draw_ground_truth(GRAY, [BOX], [3], ["a", "b", "c", "Straßenbahn"])
    assert where(truth, 3) == pytest.approx(BOX, abs=3)
    assert (pictures.draw_ground_truth(GRAY, [], []) == GRAY).all()


@pytest.mark.parametrize("corner", [(-50, -9), (650, 0), (5, 495), (690, 490)])
def test_labels_stay_in_the_picture(corner):
    canvas = pictures.Canvas(GRAY)
    canvas.draw_text("w" * 9, corner, horizontal_alignment="left")
    (label,) = canvas.output.ax.texts
    drawn = label.get_window_extent(canvas.output.canvas.get_renderer())
    assert 0 <= drawn.x0 < drawn.x1 <= 700 and 0 <= drawn.y0 < drawn.y1 <= 500
    assert drawn.width >= 60 and drawn.height >= 10


def test_labels_do_not_hide_one_another():
    canvas = pictures.Canvas(GRAY)
    for x in (300, 302, 304, 320):
        canvas.draw_text("a label", (x, 490))
    boxes = [text.get_window_extent() for text in canvas.output.ax.texts]
    assert [box.count_overlaps(boxes) for box in boxes] == [1] * 4  # itself alone


def test_class_names_and_colors():
    assert pictures.class_name(["cat"], 0) == "cat"
    assert pictures.class_name(["cat"], 1) == "class 1"
    colors = {pictures.class_color(index) for index in range(80)}
    assert len(colors) == 80 and all(0 <= value <= 1 for color in colors for value in color)


DRAWN = {(160, 160): (480, 480), (332, 500): (480, 722), (600, 800): (600, 800)}
DRAWN |= {(20, 960): (40, 1920), (20, 3000): (20, 3000)}


@pytest.mark.parametrize("size, drawn", DRAWN.items())
def test_small_images_are_enlarged(size, drawn):
    height, width = size
    box = (0.25 * width, 0.5 * height, 0.75 * width, height - 1)
    picture = pictures.draw_ground_truth(np.zeros((*size, 3), np.uint8), [box], [1], ["a", "b"])
    assert picture.shape == (*drawn, 3)
    x0, _, x1, _ = where(picture, 1)
    assert abs(x0 - 0.25 * drawn[1]) <= 3 and abs(x1 - 0.75 * drawn[1]) <= 3


def test_contact_sheet_places_pictures_row_by_row():
    shades = [np.full((100, 200, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = pictures.contact_sheet(shades, columns=2)
    assert sheet.shape == (3 * 110 + 10, 2 * 210 + 10, 3)
    for i, shade in enumerate(shades):
        top, left = 10 + 110 * (i // 2), 10 + 210 * (i % 2)
        assert (sheet[top : top + 100, left : left + 200] == shade).all()
    assert (sheet[-110:, -210:] == 255).all()  # no sixth


def test_contact_sheet_reduces_and_writes_captions():
    tall, wide = np.zeros((900, 300, 3), np.uint8), np.zeros((100, 900, 3), np.uint8)
    plain = pictures.contact_sheet([tall, wide], columns=9, tile=300)
    assert plain.shape == (300 + 20, 100 + 300 + 30, 3)
    captions = ["short", "a caption that is far too long for its picture " * 3]
    captioned = pictures.contact_sheet([tall, wide], columns=9, tile=300, captions=captions)
    assert captioned.shape[0] > plain.shape[0] + 12
    assert (captioned[:, -10:] == 255).all()  # cut to the picture's width
    below_wide = captioned[45:70, 120:420]
    assert (below_wide < 100).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": []}, "needs an image"),
        ({"images": [GRAY], "columns": 0}, "needs an image"),
        ({"images": [GRAY, GRAY], "captions": ["one"]}, "1 captions for 2 images"),
    ],
)
def test_contact_sheets_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        pictures.contact_sheet(**arguments)


def test_images_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    pictures.save_image(path, GRAY)
    monkeypatch.setattr(Image.Image, "save", lambda self, file, kind: file.write_text("half") / 0)
    with pytest.raises(ZeroDivisionError):
        pictures.save_image(path, GRAY + 1)
    assert (np.asarray(Image.open(path)) == GRAY).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_read_bgr_is_upright_and_in_bgr(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0, 0] = 1, 2, 3
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert pictures.read_bgr(tmp_path / "a.png")[3, 7].tolist() == [3, 2, 1]


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0half a JPEG"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for read in (pictures.read_bgr, pictures.read_video):
        with pytest.raises(pictures.UnreadableError, match="broken.jpg: cannot be read") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_video_round_trip(tmp_path):
    path = tmp_path / "a.mp4"
    colors = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    with pictures.video_writer(path, 12.5) as write:
        for color in colors:
            write(np.full((48, 64, 3), color, np.uint8))
    rate, count, frames = pictures.read_video(path)
    frames = list(frames)
    assert (rate, count, len(frames)) == (12.5, 3, 3)
    for frame, color in zip(frames, colors, strict=True):
        assert frame.shape == (48, 64, 3)
        assert frame.mean(axis=(0, 1)).argmax() == 2 - np.argmax(color)  # BGR
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    closed = MagicMock()
    closed.isOpened.return_value = closed.open.return_value = False
    monkeypatch.setattr(cv2, "VideoWriter", lambda: closed)
    with pytest.raises(OSError, match="a.mp4: this OpenCV cannot write mp4"):
        with pictures.video_writer(tmp_path / "a.mp4", 25) as write:
            write(GRAY)
    assert not list(tmp_path.iterdir())
