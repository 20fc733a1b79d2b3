"""What a model found, drawn over the image: boxes, masks, label pictures, panoptic segments.

Detectron2's Visualizer draws a small image at its own size and sets its text over whatever lies
there. These enlarge small images first, keep every label inside the picture and apart from the
others where there is room, and give a class the same color in every picture.
"""

from __future__ import annotations

import colorsys
import functools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageColor, ImageDraw, ImageFont

from resnet_backbone.detection.data.panoptic import BACKGROUND

MIN_SIDE = 480  # smaller images are enlarged until their short side has so many pixels ...
MAX_SIDE = 1920  # ... or their long side would exceed this
OPACITY = 0.5  # of masks
LEAST_SHARE = 0.002  # regions of less than this part of the image get no name
PALETTE = (  # as far apart from each other, and visible on dark and on light, as twenty can be
    "#e6194b #3cb44b #ffe119 #4363d8 #f58231 #b04be0 #42d4f4 #f032e6 #bfef45 #fabed4 "
    "#17a398 #dcbeff #d98a4b #fffac8 #ff4058 #aaffc3 #9a9a1f #ffb27f #5566cc #a9a9a9"
).split()

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """One box to draw: corners x0, y0, x1, y1 in pixels, its label and its color."""

    box: Box
    text: str
    color: Color


def class_name(class_names: Sequence[str], index: int) -> str:
    """The name of a class; "class 7" where the names are not known."""
    return class_names[index] if 0 <= index < len(class_names) else f"class {index}"


def class_color(index: int) -> Color:
    """RGB of a class, the same in every picture; past the palette, hues by the golden ratio."""
    if index < len(PALETTE):
        return ImageColor.getrgb(PALETTE[index])
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.55 + 0.15 * (index % 4), 0.95)
    return tuple(round(255 * value) for value in rgb)


def draw_output(
    image: np.ndarray,
    output: dict,
    class_names: Sequence[str] = (),
    label_names: Sequence[str] = (),
    threshold: float = 0.5,
) -> np.ndarray:
    """Whatever a model found: panoptic segments, else instances with or without masks, else labels.

    Args:
        image: RGB, uint8, (H, W, 3).
        output: of a Detectron2 model for this image, in its size.
        class_names, label_names: of boxes and masks; of label pictures. The label that is named
            "background" stays unpainted.
        threshold: instances with a lower score, 0..1, are left out.

    Returns:
        A new RGB uint8 picture, larger than a small `image`.
    """
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        return _draw_panoptic(image, ids.cpu().numpy(), segments, class_names, label_names)
    if "instances" in output:
        found = output["instances"].to("cpu")
        if found.has("pred_masks"):
            for index in found.scores.argsort().tolist():  # the best on top
                if found.scores[index] >= threshold:
                    color = class_color(int(found.pred_classes[index]))
                    image = paint(image, found.pred_masks[index].numpy().astype(bool), color)
        return draw_detections(image, found, class_names, threshold)
    labels = output["sem_seg"].argmax(0).cpu().numpy()
    named = [(int(label), class_name(label_names, int(label))) for label in np.unique(labels)]
    return _draw_regions(
        image, [(labels == i, text, class_color(i)) for i, text in named if text != BACKGROUND]
    )


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
        threshold: boxes with a lower score, 0..1, are left out.

    Returns:
        A new RGB uint8 picture, larger than a small `image`.
    """
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor.float().tolist()
    found = zip(instances.scores.tolist(), instances.pred_classes.tolist(), boxes, strict=True)
    marks = [
        Mark(tuple(box), f"{class_name(class_names, index)} {score:.2f}", class_color(index))
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
        Mark(tuple(map(float, box)), class_name(class_names, int(index)), class_color(int(index)))
        for box, index in zip(boxes, classes, strict=True)
    ]
    return draw_marks(image, marks)


def _draw_panoptic(
    image: np.ndarray,
    ids: np.ndarray,
    segments: Iterable[dict],
    thing_names: Sequence[str],
    stuff_names: Sequence[str],
) -> np.ndarray:
    """Every segment of Panoptic FPN; stuff takes the colors from the palette's far end."""
    regions = []
    for segment in segments:
        index, is_thing = segment["category_id"], segment["isthing"]
        text = class_name(thing_names if is_thing else stuff_names, index)
        text += f" {segment['score']:.2f}" if "score" in segment else ""
        color = class_color(index if is_thing else 1000 + index)
        regions.append((ids == segment["id"], text, color))
    return _draw_regions(image, regions)


def _draw_regions(
    image: np.ndarray, regions: Iterable[tuple[np.ndarray, str, Color]]
) -> np.ndarray:
    """Masks in their colors, each with its name at the point that lies furthest from its edge."""
    marks = []
    for mask, text, color in regions:
        image = paint(image, mask, color)
        if mask.mean() >= LEAST_SHARE:
            distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)
            y, x = (float(n) - 1 for n in np.unravel_index(distance.argmax(), distance.shape))
            marks.append(Mark((x, y, x, y), text, color))
    return draw_marks(image, marks, frames=False)


def paint(image: np.ndarray, mask: np.ndarray, color: Color) -> np.ndarray:
    """A copy of the image with a half transparent mask and its outline."""
    painted = image.copy()
    painted[mask] = ((1 - OPACITY) * image[mask] + OPACITY * np.array(color)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(painted, outlines, -1, color, 1)


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
    font = label_font(max(12, round(side / (34 if len(marks) <= 12 else 42))))
    boxes = [_clip([scale * value for value in mark.box], picture.size) for mark in marks]
    for box, mark in reversed(list(zip(boxes, marks, strict=True)) if frames else []):
        around = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        pen.rectangle(around, outline="black", width=line + 2)  # seen on ground of its own color
        pen.rectangle(box, outline=mark.color, width=line)
    taken: list[Box] = []
    pad = font.size // 5
    for box, mark in zip(boxes, marks, strict=True):
        size = math.ceil(font.getlength(mark.text)) + 2 * pad, font.size + 2 * pad
        taken.append(place_label(box, size, picture.size, taken))
    for place, mark in reversed(list(zip(taken, marks, strict=True))):
        red, green, blue = mark.color
        text_color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 130 else "black"
        pen.rectangle((*place[:2], place[2] - 1, place[3] - 1), fill=mark.color)
        start = place[0] + pad, (place[1] + place[3]) / 2
        pen.text(start, mark.text, font=font, fill=text_color, anchor="lm")
    return np.asarray(picture)


def enlargement(height: int, width: int) -> float:
    """Factor >= 1 by which an image is enlarged before drawing, so that text on it is legible."""
    return max(1.0, min(MIN_SIDE / min(height, width), MAX_SIDE / max(height, width)))


@functools.cache
def label_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has most alphabets; `size` in pixels."""
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def _clip(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The box inside the picture, its corners in order."""
    x0, y0, x1, y1 = (
        min(max(round(value), 0), size[axis % 2] - 1) for axis, value in enumerate(box)
    )
    return x0, y0, max(x0, x1), max(y0, y1)


def place_label(
    box: Box, size: tuple[int, int], picture: tuple[int, int], taken: Iterable[Box]
) -> Box:
    """The first place at a corner of the box, inside the picture, that hides no other label.

    Where each hides one, the place that hides least and is moved least.

    Args:
        size, picture: width and height in pixels, of the label and the picture.
        taken: places of other labels.
    """
    x0, y0, x1, y1 = box
    width, height = size
    left, right, above, below = x0, x1 - width + 1, y0 - height + 1, y1 - height + 1
    corners = [(left, above), (left, y0), (right, above), (right, y0)]
    corners += [(left, y1), (left, below), (right, y1), (right, below)]
    places = []
    for x, y in corners:
        inside = max(0, min(x, picture[0] - width)), max(0, min(y, picture[1] - height))
        place = (*inside, inside[0] + width, inside[1] + height)
        hidden = sum(overlap(place, other) for other in taken)
        moved = abs(inside[0] - x) * height / 4 + abs(inside[1] - y) * width
        places.append((hidden + moved, len(places), place))
    return min(places)[2]


def overlap(first: Box, second: Box) -> float:
    """The area that two boxes share, in pixels."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)
