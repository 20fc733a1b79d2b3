"""Pictures of detections and of ground truth: drawn with Pillow, put on sheets, written.

Detectron2's Visualizer draws a small image at its own size and sets its text over whatever lies
there; these enlarge small images first, keep every label inside the picture and apart from the
others where there is room, and give a class the same colour in every picture.
"""

from __future__ import annotations

import colorsys
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 480  # smaller images are enlarged until their short side has so many pixels ...
MAX_SIDE = 1920  # ... or their long side would exceed this
PALETTE = (  # as far apart from each other, and visible on dark and on light, as twenty can be
    "#e6194b #3cb44b #ffe119 #4363d8 #f58231 #b04be0 #42d4f4 #f032e6 #bfef45 #fabed4 "
    "#17a398 #dcbeff #d98a4b #fffac8 #ff4058 #aaffc3 #9a9a1f #ffb27f #5566cc #a9a9a9"
).split()

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """One box to draw: corners x0, y0, x1, y1 in pixels, its label and its colour."""

    box: Box
    text: str
    colour: Colour


def class_name(class_names: Sequence[str], index: int) -> str:
    """The name of a class; "class 7" where the names are not known."""
    return class_names[index] if 0 <= index < len(class_names) else f"class {index}"


def class_colour(index: int) -> Colour:
    """RGB of a class, the same in every picture; past the palette, hues by the golden ratio."""
    if index < len(PALETTE):
        code = PALETTE[index]
        return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.55 + 0.15 * (index % 4), 0.95)
    return tuple(round(255 * value) for value in rgb)


def draw_detections(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str] = (),
    threshold: float = 0.5,
) -> np.ndarray:
    """Draws a detector's boxes, each with its class and score.

    Args:
        image: RGB, uint8, (H, W, 3).
        instances: fields ``pred_boxes`` (xyxy in pixels of `image`), ``scores``, ``pred_classes``.
        class_names: by class number; numbers are written for classes without a name.
        threshold: detections with a lower score, 0..1, are left out.

    Returns:
        A new RGB uint8 picture. It is larger than a small `image`: see :func:`enlargement`.
    """
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor.float().tolist()
    found = zip(instances.scores.tolist(), instances.pred_classes.tolist(), boxes, strict=True)
    marks = [
        Mark(tuple(box), f"{class_name(class_names, index)} {score:.2f}", class_colour(index))
        for score, index, box in sorted(found, key=lambda entry: -entry[0])
        if score >= threshold
    ]
    return draw_marks(image, marks)


def draw_ground_truth(
    image: np.ndarray,
    boxes: Iterable[Box],
    classes: Iterable[int],
    class_names: Sequence[str] = (),
) -> np.ndarray:
    """Draws annotated boxes with their classes; arguments and result as :func:`draw_detections`.

    Args:
        boxes: x0, y0, x1, y1 in pixels of `image`.
        classes: class number of each box.
    """
    marks = [
        Mark(tuple(map(float, box)), class_name(class_names, int(index)), class_colour(int(index)))
        for box, index in zip(boxes, classes, strict=True)
    ]
    return draw_marks(image, marks)


def enlargement(height: int, width: int) -> float:
    """Factor >= 1 by which an image is enlarged before drawing, so that text on it is legible."""
    return max(1.0, min(MIN_SIDE / min(height, width), MAX_SIDE / max(height, width)))


def contact_sheet(
    images: Sequence[np.ndarray],
    columns: int = 4,
    captions: Sequence[str] | None = None,
    tile: int = 480,
    gap: int = 10,
) -> np.ndarray:
    """Many pictures on one white sheet, row by row.

    For ground truth beside detections, give them in turn with ``columns=2``.

    Args:
        images: RGB, uint8, (H, W, 3), of any sizes.
        columns: pictures in a row.
        captions: a line under each picture; too long ones lose their middle.
        tile: pictures larger than a square of this side, in pixels, are reduced to fit it.
        gap: white space between pictures and around them, in pixels.

    Returns:
        RGB uint8 sheet.

    Raises:
        ValueError: no images, fewer than one column, or not as many captions as images.
    """
    if not len(images) or columns < 1:
        raise ValueError("a contact sheet needs an image and columns >= 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: give one for each")
    columns = min(columns, len(images))
    tiles = [_fit(image, tile) for image in images]
    font = _font(max(12, tile // 27))
    text_height = 0 if captions is None else math.ceil(1.25 * font.size) + 6
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(picture.height for picture in row) + text_height + gap for row in rows]
    widths = [max(row[i].width for row in rows if i < len(row)) + gap for i in range(columns)]
    sheet = Image.new("RGB", (sum(widths) + gap, sum(heights) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = gap + sum(widths[:column]), gap + sum(heights[:row])
        sheet.paste(picture, (x, y))
        if captions is not None:
            text = _shorten(captions[number], font, widths[column] - gap)
            pen.text((x, y + picture.height + 3), text, font=font, fill="black")
    return np.asarray(sheet)


def _fit(image: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(image)
    scale = min(1.0, side / max(picture.size))
    size = tuple(max(1, round(scale * length)) for length in picture.size)
    return picture.resize(size, Image.LANCZOS) if scale < 1 else picture


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = kept // 2
        candidate = f"{text[:head]}…{text[head - kept :]}"
        if font.getlength(candidate) <= width:
            return candidate
    return ""


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def draw_marks(image: np.ndarray, marks: Sequence[Mark], frames: bool = True) -> np.ndarray:
    """Boxes, the first mark's on top, then labels, the first mark's at the best place.

    With ``frames=False``, labels alone.
    """
    picture = Image.fromarray(image).convert("RGB")
    scale = enlargement(picture.height, picture.width)
    if scale > 1:
        picture = picture.resize(tuple(round(scale * n) for n in picture.size), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    side = math.sqrt(picture.width * picture.height)
    line = max(2, round(side / 190))
    font = _font(max(12, round(side / (34 if len(marks) <= 12 else 42))))
    boxes = [_clip([scale * value for value in mark.box], picture.size) for mark in marks]
    for box, mark in reversed(list(zip(boxes, marks, strict=True)) if frames else []):
        around = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        pen.rectangle(around, outline="black", width=line + 2)  # seen on ground of its own colour
        pen.rectangle(box, outline=mark.colour, width=line)
    taken: list[Box] = []
    for box, mark in zip(boxes, marks, strict=True):
        taken.append(_place_label(box, _label_size(font, mark.text), picture.size, taken))
    for place, mark in reversed(list(zip(taken, marks, strict=True))):
        _draw_label(pen, place, mark, font)
    return np.asarray(picture)


def _clip(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The box inside the picture, its corners in order."""
    x0, y0, x1, y1 = (
        min(max(round(value), 0), size[axis % 2] - 1) for axis, value in enumerate(box)
    )
    return x0, y0, max(x0, x1), max(y0, y1)


def _label_size(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    pad = font.size // 5
    return math.ceil(font.getlength(text)) + 2 * pad, font.size + 2 * pad


def _place_label(box: Box, size: tuple[int, int], picture: tuple[int, int], taken) -> Box:
    """The first place at the box, inside the picture, that hides no other label; else the best."""
    x0, y0, x1, y1 = box
    width, height = size
    corners = [
        (x0, y0 - height + 1),
        (x0, y0),
        (x1 - width + 1, y0 - height + 1),
        (x1 - width + 1, y0),
        (x0, y1),
        (x0, y1 - height + 1),
        (x1 - width + 1, y1),
        (x1 - width + 1, y1 - height + 1),
    ]
    places = []
    for left, top in corners:
        inside = max(0, min(left, picture[0] - width)), max(0, min(top, picture[1] - height))
        place = (*inside, inside[0] + width, inside[1] + height)
        hidden = sum(_overlap(place, other) for other in taken)
        moved = abs(inside[0] - left) * height / 4 + abs(inside[1] - top) * width
        places.append((hidden + moved, len(places), place))
    return min(places)[2]


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)


def _draw_label(pen: ImageDraw.ImageDraw, place: Box, mark: Mark, font) -> None:
    red, green, blue = mark.colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 130
    pen.rectangle((*place[:2], place[2] - 1, place[3] - 1), fill=mark.colour)
    pad = font.size // 5
    start = place[0] + pad, (place[1] + place[3]) / 2
    pen.text(start, mark.text, font=font, fill="white" if dark else "black", anchor="lm")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; that file takes its place if nothing goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_image(path: Path, picture: np.ndarray) -> None:
    """Writes an RGB uint8 picture; the suffix tells the format."""
    lossy = path.suffix.lower() in (".jpg", ".jpeg", ".webp")
    with written_whole(path) as temporary:
        Image.fromarray(picture).save(temporary, **({"quality": 92} if lossy else {}))


@contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that appends an RGB uint8 frame to an .mp4 file; all have the first's size.

    Raises:
        OSError: this OpenCV cannot write such files.
    """
    writer = None

    def write(picture: np.ndarray) -> None:
        nonlocal writer
        if writer is None:
            size, codec = picture.shape[1::-1], cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(temporary), codec, rate, size)
            if not writer.isOpened():
                raise OSError(f"{path}: this OpenCV cannot write mp4; use opencv-python-headless")
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    with written_whole(path) as temporary:
        try:
            yield write
        finally:
            if writer is not None:
                writer.release()
