"""Images and videos: read, written whole, and put together on sheets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from resnet_backbone.detection.inference.draw import label_font
from resnet_backbone.runtime.files import put_in_place


class UnreadableError(ValueError):
    """An image or a video that cannot be read; the message names it."""


def read_bgr(path: Path) -> np.ndarray:
    """An image as BGR uint8 (H, W, 3), upright as its EXIF data says.

    Raises:
        UnreadableError: broken, or not an image.
    """
    try:
        return np.ascontiguousarray(read_image(str(path), format="BGR"))
    except Exception as error:  # Pillow's decoders raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):  # it names Pillow's own file object
            reason = "no image that Pillow can read"
        raise UnreadableError(f"{path}: cannot be read ({reason})") from error


def read_video(path: Path) -> tuple[float, int, Iterator[np.ndarray]]:
    """Frames per second, the number of frames that the file states, and the BGR uint8 frames.

    Raises:
        UnreadableError: OpenCV finds no frame in it.
    """
    capture = cv2.VideoCapture(str(path))
    is_frame, first = capture.read()
    if not is_frame:
        raise UnreadableError(f"{path}: cannot be read as a video (OpenCV finds no frame)")

    def frames() -> Iterator[np.ndarray]:
        going, frame = is_frame, first
        while going:
            yield frame
            going, frame = capture.read()
        capture.release()

    rate, count = (capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
    return rate if rate > 0 else 25.0, max(1, int(count)), frames()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; that file takes its place if nothing goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        put_in_place(temporary, path)
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
    tiles = [Image.fromarray(image) for image in images]
    for picture in tiles:
        picture.thumbnail((tile, tile), Image.LANCZOS, reducing_gap=None)
    font = label_font(max(12, tile // 27))
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


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text without its middle where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = kept // 2
        candidate = f"{text[:head]}…{text[head - kept :]}"
        if font.getlength(candidate) <= width:
            return candidate
    return ""
