"""Objects that one detector finds and another misses: chosen by a rule, and drawn on a sheet."""

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
from resnet_backbone.detection.inference.pictures import contact_sheet, draw_boxes, enlargement
from resnet_backbone.report.detections import RunDetections, Truth

GREEN = 60, 220, 60
ORANGE, BLUE = (0.9, 0.47, 0.08), (0.16, 0.51, 0.86)
MAX_BYTES = 600_000
TILE = 400, 320  # largest width and height of a picture, in pixels
COLUMNS = 4
SCORE = 0.5  # from which on a detection counts
RULE = """\
A run finds an object if a detection of its class, with a score of at least {score:g}, overlaps it \
by an IoU above {iou:g}, and no other object of that class more. Looked at are the objects, \
difficult ones left out, that {finder} finds in more than half of its runs and {other} in none. \
Shown is for each class the object with the largest gap: mean score of {finder}'s best detection \
on it less the largest score of {other}'s. The largest gaps come first, an image only once."""


class Miss(NamedTuple):
    """An object that one detector finds and the other misses.

    Attributes:
        row: of the object in the table of the ground truth.
        gap: of the scores, 0..1.
        run: the finder's first run that finds it.
    """

    row: int
    gap: float
    run: int


def object_scores(run: RunDetections) -> np.ndarray:
    """For each object of the ground truth the score of the best detection on it, 0 without one.

    A detection is on the object of its class with the highest IoU, if that is above .5.

    Returns:
        (objects,), 0..1.
    """
    found = run.found
    scores = np.zeros(len(run.truth["classes"]))
    over = found["iou"] > CURVE_IOU
    np.maximum.at(scores, found["match"][over], found["scores"][over])
    return scores


def find_misses(
    finder: Sequence[RunDetections], other: Sequence[RunDetections], score: float = SCORE
) -> np.ndarray:
    """Objects found by most runs of one detector and by none of the other, see :data:`RULE`.

    Returns:
        (objects,) the gap of the scores; nan where the object is none of them.
    """
    mine, theirs = (np.array([object_scores(e) for e in runs]) for runs in (finder, other))
    most = 2 * (mine >= score).sum(axis=0) > len(mine)
    chosen = most & (theirs < score).all(axis=0) & ~finder[0].truth["difficult"]
    return np.where(chosen, mine.mean(axis=0) - theirs.max(axis=0), np.nan)


def select_misses(
    finder: Sequence[RunDetections],
    other: Sequence[RunDetections],
    count: int,
    score: float = SCORE,
) -> list[Miss]:
    """At most `count` objects by :data:`RULE`: one of a class and of an image, largest gap first.

    Args:
        finder, other: runs of the two detectors, of the same ground truth.
        count: most objects.
        score: from which on an object counts as found, 0..1.
    """
    truth, gaps = finder[0].truth, find_misses(finder, other, score)
    rows = np.flatnonzero(~np.isnan(gaps))
    rows = rows[np.argsort(-gaps[rows], kind="stable")]
    selected: list[Miss] = []
    classes, images = set(), set()
    for row in rows.tolist():
        class_id, image = int(truth["classes"][row]), int(truth["image"][row])
        if class_id in classes or image in images or len(selected) == count:
            continue
        classes.add(class_id)
        images.add(image)
        first = next(i for i, run in enumerate(finder) if object_scores(run)[row] >= score)
        selected.append(Miss(row, float(gaps[row]), first))
    return selected


class Pair(NamedTuple):
    """An object, and the runs of two detectors whose boxes are shown.

    Attributes:
        row: of the object in the table of the ground truth.
        left, right: the runs; their detections are orange and blue.
    """

    row: int
    left: RunDetections
    right: RunDetections


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
    for run, color in ((pair.left, ORANGE), (pair.right, BLUE)):
        boxes, texts = _marks(run, int(table["image"][pair.row]), truth, score)
        colors = [color] * len(texts)
        pictures.append(draw_boxes(np.asarray(photo), scale * boxes, texts, colors))
        seed = "" if run.run.seed is None else f", seed {run.run.seed}"
        captions.append(f"{run.run.title}{seed}: {_outcome(run, pair.row, score, name)}")
    return pictures, captions


def _outcome(run: RunDetections, row: int, score: float, name: str) -> str:
    found = run.found
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


def _marks(run: RunDetections, image: int, truth, score: float) -> tuple[np.ndarray, list[str]]:
    """Boxes of a run's detections in an image, and their labels."""
    found = run.found
    shown = np.flatnonzero((found["image"] == image) & (found["scores"] >= score))
    names = [truth.classes[index] for index in found["classes"][shown]]
    pairs = zip(names, found["scores"][shown], strict=True)
    return found["boxes"][shown] - TO_VOC, [f"{name} {value:.2f}" for name, value in pairs]


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
