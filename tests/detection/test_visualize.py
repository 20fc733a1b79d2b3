"""Pictures of detections: where the boxes are, colours, enlargement, sheets, whole files."""

import numpy as np
import pytest

pytest.importorskip("detectron2")  # resnet_backbone.detection cannot be imported without it

import cv2  # noqa: E402
import torch  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from PIL import Image  # noqa: E402

from resnet_backbone.detection.inference import visualize  # noqa: E402
from resnet_backbone.detection.inference.predictor import UnreadableError, read_bgr, read_video  # noqa: E402

GREY = np.full((500, 700, 3), 90, np.uint8)
BOX = (300.0, 200.0, 450.0, 380.0)


def instances(boxes, scores, classes, size=(500, 700)) -> Instances:
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def where(picture: np.ndarray, colour) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of all pixels of a colour."""
    rows, columns = np.nonzero((picture == np.array(colour, np.uint8)).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_a_box_is_drawn_where_it_is_and_the_image_is_left_alone():
    before = GREY.copy()
    picture = visualize.draw_detections(GREY, instances([BOX], [0.9], [3]), [], 0.5)
    assert (GREY == before).all()
    assert picture.shape == GREY.shape and picture.dtype == np.uint8
    x0, y0, x1, y1 = where(picture, visualize.class_colour(3))
    assert (x0, x1, y1) == (300, 450, 380)
    assert 160 < y0 < 200  # the label above
    assert (picture[:150] == 90).all() and (picture[390:] == 90).all()
    assert (picture[230:350, 330:420] == 90).all()  # nothing inside


def test_threshold():
    found = instances([BOX, (10, 50, 90, 120)], [0.9, 0.4], [0, 1])
    picture = visualize.draw_detections(GREY, found, ["a", "b"], 0.5)
    assert (picture[:150, :200] == 90).all()
    assert (visualize.draw_detections(GREY, found, ["a", "b"], 0.95) == 90).all()
    both = visualize.draw_detections(GREY, found, ["a", "b"], 0.4 - 1e-6)
    assert where(both, visualize.class_colour(1))[0] == 10


def test_no_detections():
    assert (visualize.draw_detections(GREY, instances([], [], []), []) == GREY).all()


def test_ground_truth_has_the_colours_of_detections():
    truth = visualize.draw_ground_truth(GREY, [BOX], [3], ["a", "b", "c", "Straßenbahn"])
    assert where(truth, visualize.class_colour(3))[2:] == (450, 380)


@pytest.mark.parametrize("box", [(-50, -9, 800, 900), (650, 0, 699, 5), (5, 495, 5, 495)])
def test_labels_stay_in_the_picture(box):
    """A box at the border, beyond it, of no size: its label is drawn whole inside."""
    text = visualize.draw_ground_truth(GREY, [box], [7], ["w" * 9] * 8)
    colour = visualize.class_colour(7)
    x0, y0, x1, y1 = where(text, colour)
    assert x1 - x0 >= 125 and y1 - y0 >= 15


def test_labels_do_not_hide_one_another():
    boxes = [BOX, (302, 202, 448, 378), (304, 204, 440, 370)]
    size, taken = (90, 22), []
    for box in boxes:
        taken.append(visualize._place_label(box, size, (700, 500), taken))
    pairs = [(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert not any(visualize._overlap(a, b) for a, b in pairs)


def test_class_names_and_colours():
    assert visualize.class_name(["cat"], 0) == "cat"
    assert visualize.class_name(["cat"], 1) == "class 1"
    colours = [visualize.class_colour(index) for index in range(80)]
    assert len(set(colours)) == 80
    assert all(0 <= value <= 255 for colour in colours for value in colour)


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
    picture = visualize.draw_ground_truth(np.zeros((*size, 3), np.uint8), [box], [1], ["a", "b"])
    assert picture.shape == (*drawn, 3)
    x0, _, x1, _ = where(picture, visualize.class_colour(1))
    assert abs(x0 - 0.25 * drawn[1]) <= 1 and abs(x1 - 0.75 * drawn[1]) <= 1


def test_contact_sheet_places_pictures_row_by_row():
    shades = [np.full((100, 200, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = visualize.contact_sheet(shades, columns=2, gap=10)
    assert sheet.shape == (3 * 110 + 10, 2 * 210 + 10, 3)
    for i, shade in enumerate(shades):
        top, left = 10 + 110 * (i // 2), 10 + 210 * (i % 2)
        assert (sheet[top : top + 100, left : left + 200] == shade).all()
    assert (sheet[-110:, -210:] == 255).all()  # no sixth


def test_contact_sheet_reduces_and_writes_captions():
    tall, wide = np.zeros((900, 300, 3), np.uint8), np.zeros((100, 900, 3), np.uint8)
    plain = visualize.contact_sheet([tall, wide], columns=9, tile=300)
    assert plain.shape == (300 + 20, 100 + 300 + 30, 3)
    captions = ["short", "a caption that is far too long for its picture " * 3]
    captioned = visualize.contact_sheet([tall, wide], columns=9, tile=300, captions=captions)
    assert captioned.shape[0] > plain.shape[0] + 12
    assert (captioned[:, -10:] == 255).all()  # cut to the picture's width
    below_wide = captioned[45:70, 120:420]
    assert (below_wide < 100).any()


@pytest.mark.parametrize("arguments", [{"images": []}, {"images": [GREY], "columns": 0}])
def test_contact_sheet_of_nothing(arguments):
    with pytest.raises(ValueError, match="needs an image"):
        visualize.contact_sheet(**arguments)


def test_contact_sheet_counts_captions():
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        visualize.contact_sheet([GREY, GREY], captions=["one"])


def test_images_are_written_whole(tmp_path):
    path = tmp_path / "new" / "a.png"
    visualize.save_image(path, GREY)
    assert (np.asarray(Image.open(path)) == GREY).all()
    with pytest.raises(RuntimeError), visualize.written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (np.asarray(Image.open(path)) == GREY).all()
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
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    with visualize.video_writer(path, 12.5) as write:
        for colour in colours:
            write(np.full((48, 64, 3), colour, np.uint8))
    rate, count, frames = read_video(path)
    frames = list(frames)
    assert (rate, count, len(frames)) == (12.5, 3, 3)
    for frame, colour in zip(frames, colours, strict=True):
        assert frame.shape == (48, 64, 3)
        assert frame.mean(axis=(0, 1)).argmax() == 2 - np.argmax(colour)  # BGR
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
        with visualize.video_writer(tmp_path / "a.mp4", 25) as write:
            write(GREY)
    assert not list(tmp_path.iterdir())
