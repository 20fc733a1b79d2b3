"""Pictures of detections: where the boxes are, colors, enlargement, sheets, whole files."""

import numpy as np
import pytest

pytest.importorskip("detectron2")  # resnet_backbone.detection cannot be imported without it

import cv2  # noqa: E402
import torch  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from PIL import Image  # noqa: E402

from resnet_backbone.detection.inference import draw, media  # noqa: E402
from resnet_backbone.detection.inference.media import (  # noqa: E402
    UnreadableError,
    read_bgr,
    read_video,
)

GRAY = np.full((500, 700, 3), 90, np.uint8)
BOX = (300.0, 200.0, 450.0, 380.0)


def instances(boxes, scores, classes, size=(500, 700)) -> Instances:
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def where(picture: np.ndarray, color) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of all pixels of a color."""
    rows, columns = np.nonzero((picture == np.array(color, np.uint8)).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_a_box_is_drawn_where_it_is_and_the_image_is_left_alone():
    before = GRAY.copy()
    picture = draw.draw_detections(GRAY, instances([BOX], [0.9], [3]), [], 0.5)
    assert (GRAY == before).all()
    assert picture.shape == GRAY.shape and picture.dtype == np.uint8
    x0, y0, x1, y1 = where(picture, draw.class_color(3))
    assert (x0, x1, y1) == (300, 450, 380)
    assert 160 < y0 < 200  # the label above
    assert (picture[:150] == 90).all() and (picture[390:] == 90).all()
    assert (picture[230:350, 330:420] == 90).all()  # nothing inside


def test_threshold():
    found = instances([BOX, (10, 50, 90, 120)], [0.9, 0.4], [0, 1])
    picture = draw.draw_detections(GRAY, found, ["a", "b"], 0.5)
    assert (picture[:150, :200] == 90).all()
    assert (draw.draw_detections(GRAY, found, ["a", "b"], 0.95) == 90).all()
    both = draw.draw_detections(GRAY, found, ["a", "b"], 0.4 - 1e-6)
    assert where(both, draw.class_color(1))[0] == 10


def test_no_detections():
    assert (draw.draw_detections(GRAY, instances([], [], []), []) == GRAY).all()


def test_ground_truth_has_the_colors_of_detections():
    truth = draw.draw_ground_truth(GRAY, [BOX], [3], ["a", "b", "c", "Straßenbahn"])
    assert where(truth, draw.class_color(3))[2:] == (450, 380)


@pytest.mark.parametrize("box", [(-50, -9, 800, 900), (650, 0, 699, 5), (5, 495, 5, 495)])
def test_labels_stay_in_the_picture(box):
    """A box at the border, beyond it, of no size: its label is drawn whole inside."""
    text = draw.draw_ground_truth(GRAY, [box], [7], ["w" * 9] * 8)
    color = draw.class_color(7)
    x0, y0, x1, y1 = where(text, color)
    assert x1 - x0 >= 125 and y1 - y0 >= 15


def test_labels_do_not_hide_one_another():
    boxes = [BOX, (302, 202, 448, 378), (304, 204, 440, 370)]
    size, taken = (90, 22), []
    for box in boxes:
        taken.append(draw.place_label(box, size, (700, 500), taken))
    pairs = [(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert not any(draw.overlap(a, b) for a, b in pairs)


def test_class_names_and_colors():
    assert draw.class_name(["cat"], 0) == "cat"
    assert draw.class_name(["cat"], 1) == "class 1"
    colors = [draw.class_color(index) for index in range(80)]
    assert len(set(colors)) == 80
    assert all(0 <= value <= 255 for color in colors for value in color)


@pytest.mark.parametrize(
    "size, drawn",
    [
        ((160, 160), (480, 480)),
        ((332, 500), (480, 723)),
        ((600, 800), (600, 800)),
        ((20, 960), (40, 1920)),
        ((20, 3000), (20, 3000)),
    ],
)
def test_small_images_are_enlarged(size, drawn):
    height, width = size
    box = (0.25 * width, 0.5 * height, 0.75 * width, height - 1)
    picture = draw.draw_ground_truth(np.zeros((*size, 3), np.uint8), [box], [1], ["a", "b"])
    assert picture.shape == (*drawn, 3)
    x0, _, x1, _ = where(picture, draw.class_color(1))
    assert abs(x0 - 0.25 * drawn[1]) <= 1 and abs(x1 - 0.75 * drawn[1]) <= 1


def test_contact_sheet_places_pictures_row_by_row():
    shades = [np.full((100, 200, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = media.contact_sheet(shades, columns=2, gap=10)
    assert sheet.shape == (3 * 110 + 10, 2 * 210 + 10, 3)
    for i, shade in enumerate(shades):
        top, left = 10 + 110 * (i // 2), 10 + 210 * (i % 2)
        assert (sheet[top : top + 100, left : left + 200] == shade).all()
    assert (sheet[-110:, -210:] == 255).all()  # no sixth


def test_contact_sheet_reduces_and_writes_captions():
    tall, wide = np.zeros((900, 300, 3), np.uint8), np.zeros((100, 900, 3), np.uint8)
    plain = media.contact_sheet([tall, wide], columns=9, tile=300)
    assert plain.shape == (300 + 20, 100 + 300 + 30, 3)
    captions = ["short", "a caption that is far too long for its picture " * 3]
    captioned = media.contact_sheet([tall, wide], columns=9, tile=300, captions=captions)
    assert captioned.shape[0] > plain.shape[0] + 12
    assert (captioned[:, -10:] == 255).all()  # cut to the picture's width
    below_wide = captioned[45:70, 120:420]
    assert (below_wide < 100).any()


@pytest.mark.parametrize("arguments", [{"images": []}, {"images": [GRAY], "columns": 0}])
def test_contact_sheet_of_nothing(arguments):
    with pytest.raises(ValueError, match="needs an image"):
        media.contact_sheet(**arguments)


def test_contact_sheet_counts_captions():
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        media.contact_sheet([GRAY, GRAY], captions=["one"])


def test_images_are_written_whole(tmp_path):
    path = tmp_path / "new" / "a.png"
    media.save_image(path, GRAY)
    assert (np.asarray(Image.open(path)) == GRAY).all()
    with pytest.raises(RuntimeError), media.written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (np.asarray(Image.open(path)) == GRAY).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_read_bgr_is_upright_and_in_bgr(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0, 0] = 1, 2, 3
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert read_bgr(tmp_path / "a.png")[3, 7].tolist() == [3, 2, 1]


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0half a JPEG"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for read in (read_bgr, read_video):
        with pytest.raises(UnreadableError, match="broken.jpg: cannot be read") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_video_round_trip(tmp_path):
    path = tmp_path / "a.mp4"
    colors = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    with media.video_writer(path, 12.5) as write:
        for color in colors:
            write(np.full((48, 64, 3), color, np.uint8))
    rate, count, frames = read_video(path)
    frames = list(frames)
    assert (rate, count, len(frames)) == (12.5, 3, 3)
    for frame, color in zip(frames, colors, strict=True):
        assert frame.shape == (48, 64, 3)
        assert frame.mean(axis=(0, 1)).argmax() == 2 - np.argmax(color)  # BGR
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    class Closed:
        def __init__(self, *args):
            pass

        def isOpened(self):
            return False

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *letters: 0, raising=False)
    with pytest.raises(OSError, match="a.mp4: this OpenCV cannot write mp4"):
        with media.video_writer(tmp_path / "a.mp4", 25) as write:
            write(GRAY)
    assert not list(tmp_path.iterdir())
