"""Drawing of predictions, reading and atomic writing of pictures and videos, contact sheets."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import font_manager
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

from resnet_backbone.detection.data.panoptic import BACKGROUND
from resnet_backbone.detection.data.problems import read_image
from resnet_backbone.runtime.files import whole_file

MIN_SIDE = 480  # smaller images are enlarged until their short side has this many pixels ...
MAX_SIDE = 1920  # ... or their long side this many
TEXT_SCALE = 1.6  # relative to Detectron2's small text
LEAST_SHARE = 0.002  # regions that cover less of the image get no name
GAP = 10  # pixels between pictures on a sheet and around them

PERSON = MetadataCatalog.get("keypoints_coco_2017_val")  # names and lines of the keypoints

Color = tuple[float, float, float]  # RGB, 0..1
Box = Sequence[float]  # x0, y0, x1, y1 in pixels


class Canvas(Visualizer):
    """Detectron2's Visualizer, with small images enlarged.

    Boxes are visible on any background. Labels are larger, stay inside the picture, and do not
    overlap where there is room.
    """

    def __init__(self, image: np.ndarray):
        super().__init__(image, scale=enlargement(*image.shape[:2]))
        if self.output.scale > 1:
            self.output.ax.images[0].set_interpolation("bicubic")
        self.places: list[Bbox] = []  # of labels

    def draw_box(self, box_coord, alpha=1.0, edge_color="g", line_style="-"):
        (x0, y0, x1, y1), dark = box_coord, withStroke(linewidth=4, foreground="black")
        style = dict(linewidth=2, edgecolor=edge_color, path_effects=[dark])
        self.output.ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
        return self.output

    def draw_text(self, text, position, *, font_size=None, **options):
        size = TEXT_SCALE * (font_size or self._default_font_size)
        super().draw_text(text, position, font_size=size, **options)
        label, (width, height) = self.output.ax.texts[-1], self.output.fig.bbox.size
        box = label.get_window_extent(self.output.canvas.get_renderer()).padded(2)
        x = min(max(box.x0, 0), max(width - box.width, 0))
        rows = [box.y0 + step * (box.height + 1) for step in sorted(range(-6, 7), key=abs)]
        rows = [min(max(y, 0), max(height - box.height, 0)) for y in rows]
        places = [Bbox.from_bounds(x, y, box.width, box.height) for y in rows]
        place = min(places, key=lambda one: one.count_overlaps(self.places))
        self.places.append(place)
        to_image = self.output.ax.transData.inverted().transform
        label.set_position(position + to_image(place.min) - to_image(box.min))
        return self.output

    def draw_regions(self, regions: Iterable[tuple[np.ndarray, str | None, Color]]) -> None:
        """Draws translucent masks (H, W), each with its name, if any, unless it is very small."""
        for mask, text, color in regions:
            shown = text if mask.mean() >= LEAST_SHARE else None
            self.draw_binary_mask(mask, color, text=shown, area_threshold=0)


def enlargement(height: int, width: int) -> float:
    """Returns the factor >= 1 by which an image is enlarged to make text on it legible."""
    return max(1.0, min(MIN_SIDE / min(height, width), MAX_SIDE / max(height, width)))


def class_name(class_names: Sequence[str], index: int) -> str:
    """Returns the name of a class, or "class 7" if it is unknown."""
    return class_names[index] if 0 <= index < len(class_names) else f"class {index}"


def class_color(index: int) -> Color:
    """Returns a class's color, the same in every picture; hues are spaced by the golden ratio."""
    return colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.65 + 0.1 * (index % 4), 0.95)


def draw_output(
    image: np.ndarray,
    output: dict,
    class_names: Sequence[str] = (),
    label_names: Sequence[str] = (),
    threshold: float = 0.5,
) -> np.ndarray:
    """Draws a model's output: panoptic segments, else instances, else semantic labels.

    Args:
        image: RGB, uint8, (H, W, 3); not modified. Small images are drawn enlarged.
        output: a Detectron2 model's output for this image, at its size.
        class_names, label_names: for boxes and masks; for semantic labels. The label named
            "background" is not painted.
        threshold: instances with a lower score, 0..1, are omitted.
    """
    canvas = Canvas(image)
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        ids, names = ids.cpu().numpy(), (label_names, class_names)
        for segment in segments:
            index, is_thing = segment["category_id"], segment["isthing"]
            text = class_name(names[is_thing], index)
            text += f" {segment['score']:.2f}" if "score" in segment else ""
            color = class_color(index if is_thing else 1000 + index)
            canvas.draw_regions([(ids == segment["id"], text, color)])
    elif "instances" in output:
        found = output["instances"].to("cpu")
        _draw_instances(canvas, found[found.scores >= threshold], class_names)
    else:
        labels = output["sem_seg"].argmax(0).cpu().numpy()
        for index in np.unique(labels).tolist():
            text = class_name(label_names, index)
            if text != BACKGROUND:
                canvas.draw_regions([(labels == index, text, class_color(index))])
    return canvas.output.get_image()


def _draw_instances(canvas: Canvas, found: Instances, class_names: Sequence[str]) -> None:
    found = found[found.scores.argsort()]  # best mask on top
    classes, scores = found.pred_classes.tolist(), found.scores.tolist()
    colors = [class_color(index) for index in classes]
    if found.has("pred_masks"):
        masks = found.pred_masks.numpy()
        canvas.draw_regions(zip(masks, [None] * len(masks), colors, strict=True))
    pairs = zip(classes, scores, strict=True)
    texts = [f"{class_name(class_names, index)} {score:.2f}" for index, score in pairs]
    boxes = found.pred_boxes.tensor.float().numpy()
    points = found.pred_keypoints.numpy() if found.has("pred_keypoints") else None
    if points is not None and points.shape[1] == len(PERSON.keypoint_names):
        canvas.metadata = PERSON  # else keypoints have no lines
    options = dict(keypoints=points, assigned_colors=colors)
    canvas.overlay_instances(boxes=boxes, labels=texts, **options)


def draw_boxes(
    image: np.ndarray, boxes: Sequence[Box], texts: Sequence[str], colors: Sequence[Color]
) -> np.ndarray:
    """Draws labeled boxes, in pixels of `image`; image and result as in :func:`draw_output`."""
    canvas = Canvas(image)
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    canvas.overlay_instances(boxes=boxes, labels=list(texts), assigned_colors=list(colors))
    return canvas.output.get_image()


def draw_ground_truth(
    image: np.ndarray, boxes: Sequence[Box], classes: Sequence[int], class_names: Sequence[str] = ()
) -> np.ndarray:
    """Draws annotated boxes in the colors of detections, with their class names."""
    texts = [class_name(class_names, index) for index in classes]
    return draw_boxes(image, boxes, texts, [class_color(index) for index in classes])


class UnreadableError(ValueError):
    """An image or video cannot be read; the message names it."""


def read_bgr(path: Path) -> np.ndarray:
    """Reads an image as BGR uint8 (H, W, 3), rotated by its EXIF tag; raises UnreadableError."""
    try:
        return read_image(str(path), "BGR")
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error})") from error


def read_video(path: Path) -> tuple[float, int, Iterator[np.ndarray]]:
    """Returns frames per second, the file's stated number of frames, and the BGR uint8 frames."""
    capture = cv2.VideoCapture(str(path))
    _, first = capture.read()
    if first is None:
        raise UnreadableError(f"{path}: cannot be read as a video (OpenCV finds no frame)")

    def frames() -> Iterator[np.ndarray]:
        frame = first
        while frame is not None:
            yield frame
            _, frame = capture.read()
        capture.release()

    rate, count = (capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
    return rate if rate > 0 else 25.0, max(1, int(count)), frames()


def save_image(path: Path, picture: np.ndarray) -> None:
    """Writes an RGB uint8 picture in the format of the suffix."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    lossy = {"quality": 92} if kind in ("JPEG", "WEBP") else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        Image.fromarray(picture).save(temporary, kind, **lossy)


@contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends RGB uint8 frames, all of one size, to an .mp4 file."""
    writer = cv2.VideoWriter()

    def write(picture: np.ndarray) -> None:
        if not writer.isOpened():
            size, codec = picture.shape[1::-1], cv2.VideoWriter_fourcc(*"mp4v")
            if not writer.open(str(part), codec, rate, size):
                raise OSError(f"{path}: this OpenCV cannot write mp4; use opencv-python-headless")
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        part = temporary.with_suffix(".mp4")  # OpenCV takes the format from the suffix
        try:
            yield write
            writer.release()
            part.rename(temporary)
        finally:
            writer.release()
            part.unlink(missing_ok=True)


def contact_sheet(
    images: Sequence[np.ndarray],
    columns: int = 4,
    captions: Sequence[str] | None = None,
    tile: int = 480,
) -> np.ndarray:
    """Arranges pictures row by row on one white RGB uint8 sheet.

    Args:
        images: RGB, uint8, (H, W, 3), of any sizes; `columns` per row.
        captions: a line under each picture; long ones are shortened in the middle.
        tile: larger pictures are reduced to fit a square of this side, in pixels.

    Raises:
        ValueError: no images, fewer than one column, or not one caption per image.
    """
    if not len(images) or columns < 1:
        raise ValueError("a contact sheet needs an image and columns >= 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: give one for each")
    tiles = [Image.fromarray(image) for image in images]
    for picture in tiles:
        picture.thumbnail((tile, tile), Image.LANCZOS, reducing_gap=None)
    # DejaVu Sans comes with matplotlib and covers most alphabets
    size = max(12, min(tile, 640) // 27)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    text_height = 0 if captions is None else math.ceil(1.25 * font.size) + 6
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    ys = [GAP, *(max(picture.height for picture in row) + text_height + GAP for row in rows)]
    xs = [GAP, *(max(one.width for one in tiles[i::columns]) + GAP for i in range(len(rows[0])))]
    ys, xs = np.cumsum(ys).tolist(), np.cumsum(xs).tolist()
    sheet = Image.new("RGB", (xs[-1], ys[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = xs[column], ys[row]
        sheet.paste(picture, (x, y))
        if captions is not None:
            text = _shorten(captions[number], font, xs[column + 1] - x - GAP)
            pen.text((x, y + picture.height + 3), text, font=font, fill="black")
    return np.asarray(sheet)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Drops the middle of a text that is wider than `width` pixels."""
    shown = text
    for kept in range(len(text) - 1, 0, -1):
        if font.getlength(shown) <= width:
            break
        shown = f"{text[: kept // 2]}…{text[kept // 2 - kept :]}"
    return shown
