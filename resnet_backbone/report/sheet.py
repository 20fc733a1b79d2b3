"""A sheet of pictures: what one detector finds and the other misses."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from resnet_backbone.detection.evaluation.voc import TO_VOC
from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU
from resnet_backbone.detection.inference.visualize import (
    Mark,
    contact_sheet,
    draw_marks,
    enlargement,
)
from resnet_backbone.report.evidence import Evidence, Truth
from resnet_backbone.report.misses import SCORE

GREEN, ORANGE, BLUE = (60, 220, 60), (230, 120, 20), (40, 130, 220)
MAX_BYTES = 600_000
TILE = 400, 320  # largest width and height of a picture, in pixels
COLUMNS = 4


class Pair(NamedTuple):
    """An object, and the runs of two detectors whose boxes are shown.

    Attributes:
        row: of the object in the table of the ground truth.
        left, right: the runs; their detections are orange and blue.
    """

    row: int
    left: Evidence
    right: Evidence


class Section(NamedTuple):
    """Pairs below a heading."""

    heading: str
    pairs: list[Pair]


def draw_pair(pair: Pair, truth: Truth, score: float = SCORE) -> tuple[list[np.ndarray], list[str]]:
    """Two pictures of one image, with each detector's detections, and their captions.

    The object is green with a thick line, the other annotated objects of the image with a thin one.

    Args:
        pair: what to draw.
        truth: with the image's file.
        score: detections below it are left out, 0..1.

    Returns:
        RGB uint8 pictures, left and right, and a caption for each.
    """
    table = pair.left.truth
    image = truth.images[int(table["image"][pair.row])]
    name = truth.classes[int(table["classes"][pair.row])]
    with Image.open(image["file_name"]) as file:
        photo = file.convert("RGB")
    scale = enlargement(photo.height, photo.width)
    photo = photo.resize([round(scale * side) for side in photo.size], Image.BICUBIC)
    _draw_objects(photo, table, pair.row, scale)
    pictures, captions = [], []
    for evidence, colour in ((pair.left, ORANGE), (pair.right, BLUE)):
        marks = _marks(evidence, int(table["image"][pair.row]), truth, score, scale, colour)
        pictures.append(draw_marks(np.asarray(photo), marks))
        seed = "" if evidence.run.seed is None else f", seed {evidence.run.seed}"
        captions.append(f"{evidence.run.title}{seed}: {_outcome(evidence, pair.row, score, name)}")
    return pictures, captions


def _outcome(evidence: Evidence, row: int, score: float, name: str) -> str:
    found = evidence.found
    on = (found["match"] == row) & (found["iou"] > CURVE_IOU) & (found["scores"] >= score)
    return f"{name} {found['scores'][on].max():.2f}" if on.any() else f"{name} missed"


def _draw_objects(photo: Image.Image, table, row: int, scale: float) -> None:
    pen = ImageDraw.Draw(photo)
    line = max(2, round(min(photo.size) / 160))
    mine = np.flatnonzero(table["image"] == table["image"][row])
    for other in [*mine[mine != row], row]:
        width = 3 * line if other == row else line
        box = scale * (table["boxes"][other] - TO_VOC)
        pen.rectangle([*(box[:2] - width / 2), *(box[2:] + width / 2)], outline=GREEN, width=width)


def _marks(evidence: Evidence, image: int, truth, score: float, scale: float, colour) -> list[Mark]:
    found = evidence.found
    shown = np.flatnonzero((found["image"] == image) & (found["scores"] >= score))
    shown = shown[np.argsort(-found["scores"][shown], kind="stable")]
    return [
        Mark(
            tuple(scale * (found["boxes"][i] - TO_VOC)),
            f"{truth.classes[int(found['classes'][i])]} {found['scores'][i]:.2f}",
            colour,
        )
        for i in shown
    ]


def make_sheet(sections: Sequence[Section], truth: Truth, score: float = SCORE) -> bytes:
    """A JPEG of all pairs, two in a row, below :data:`MAX_BYTES`.

    Args:
        sections: each with at least one pair.
        truth, score: as for :func:`draw_pair`.
    """
    parts = []
    for section in sections:
        drawn = [draw_pair(pair, truth, score) for pair in section.pairs]
        pictures = [_fit(picture) for pair, _ in drawn for picture in pair]
        captions = [caption for _, pair in drawn for caption in pair]
        sheet = contact_sheet(pictures, COLUMNS, captions, tile=max(TILE))
        parts += [_heading(section.heading, sheet.shape[1]), sheet]
    return _compress(_stack(parts))


def _fit(picture: np.ndarray) -> np.ndarray:
    """The picture reduced to a tile's size, on white of a tile's width."""
    image = Image.fromarray(picture)
    image.thumbnail(TILE, Image.LANCZOS)
    tile = Image.new("RGB", (TILE[0], image.height), "white")
    tile.paste(image, (0, 0))
    return np.asarray(tile)


def _heading(text: str, width: int) -> np.ndarray:
    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    font = ImageFont.truetype(os.path.join(fonts, "DejaVuSans-Bold.ttf"), 16)
    band = Image.new("RGB", (max(width, round(font.getlength(text)) + 20), 34), "white")
    ImageDraw.Draw(band).text((10, 8), text, font=font, fill="black")
    return np.asarray(band)


def _stack(parts: Sequence[np.ndarray]) -> Image.Image:
    sheet = Image.new("RGB", (max(p.shape[1] for p in parts), sum(p.shape[0] for p in parts)))
    sheet.paste("white", (0, 0, *sheet.size))
    top = 0
    for part in parts:
        sheet.paste(Image.fromarray(part), (0, top))
        top += part.shape[0]
    return sheet


def _compress(sheet: Image.Image) -> bytes:
    """A JPEG below the limit: first the quality goes down, then the size."""
    while True:
        for quality in range(90, 50, -10):
            file = io.BytesIO()
            sheet.save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() < MAX_BYTES:
                return file.getvalue()
        sheet = sheet.resize([round(0.85 * side) for side in sheet.size], Image.LANCZOS)
