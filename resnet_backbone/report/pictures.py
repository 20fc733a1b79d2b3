"""Objects that one detector finds and another misses: chosen by a rule, and drawn on a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from resnet_backbone.detection.evaluation.voc import TO_VOC
from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU
from resnet_backbone.detection.inference.pictures import contact_sheet, draw_boxes, enlargement
from resnet_backbone.report.detections import RunDetections, Truth

GREEN = 60, 220, 60
ORANGE, BLUE = (0.9, 0.47, 0.08), (0.16, 0.51, 0.86)
TILE = 400  # largest side of a picture, in pixels
COLUMNS = 4
RULE = """\
A run finds an object if a detection of its class, with a score of at least {score:g}, overlaps it \
by an IoU above {iou:g}, and no other object of that class more. Looked at are the objects, \
difficult ones left out, that {finder} finds in more than half of its runs and {other} in none. \
Shown is for each class the object with the largest gap: mean score of {finder}'s best detection \
on it less the largest score of {other}'s. The largest gaps come first, an image only once."""


class Miss(NamedTuple):
    """An object that one detector finds and the other misses."""

    row: int  # of the object in the table of the ground truth
    gap: float  # of the scores, 0..1
    run: int  # the finder's first run that finds it


def object_scores(run: RunDetections) -> np.ndarray:
    """For each object (objects,) the score of the best detection on it, 0 without one.

    A detection is on the object of its class with the highest IoU, if that is above .5.
    """
    found = run.found
    scores = np.zeros(len(run.truth["classes"]))
    over = found["iou"] > CURVE_IOU
    np.maximum.at(scores, found["match"][over], found["scores"][over])
    return scores


def find_misses(
    finder: Sequence[RunDetections], other: Sequence[RunDetections], score: float
) -> np.ndarray:
    """For each object (objects,) the gap of the scores, nan where :data:`RULE` leaves it out."""
    mine, theirs = (np.array([object_scores(e) for e in runs]) for runs in (finder, other))
    most = 2 * (mine >= score).sum(axis=0) > len(mine)
    chosen = most & (theirs < score).all(axis=0) & ~finder[0].truth["difficult"]
    return np.where(chosen, mine.mean(axis=0) - theirs.max(axis=0), np.nan)


def select_misses(
    finder: Sequence[RunDetections], other: Sequence[RunDetections], count: int, score: float
) -> list[Miss]:
    """At most `count` objects by :data:`RULE`: one a class and an image, largest gap first."""
    truth, gaps = finder[0].truth, find_misses(finder, other, score)
    rows = np.flatnonzero(~np.isnan(gaps))
    selected: list[Miss] = []
    classes, images = set(), set()
    for row in rows[np.argsort(-gaps[rows], kind="stable")].tolist():
        class_id, image = int(truth["classes"][row]), int(truth["image"][row])
        if class_id in classes or image in images or len(selected) == count:
            continue
        classes.add(class_id)
        images.add(image)
        first = next(i for i, run in enumerate(finder) if object_scores(run)[row] >= score)
        selected.append(Miss(row, float(gaps[row]), first))
    return selected


class Pair(NamedTuple):
    """An object, and the runs of two detectors whose boxes are shown, in orange and in blue."""

    row: int  # of the object in the table of the ground truth
    left: RunDetections
    right: RunDetections


def make_sheet(pairs: Sequence[Pair], truth: Truth, score: float) -> Image.Image:
    """Two pictures of each pair's image, with each detector's detections and captions.

    The object is green with a thick line, the other annotated objects of the image with a thin one.
    Detections below the score, 0..1, are left out.
    """
    pictures, captions = [], []
    for pair in pairs:
        table = pair.left.truth
        number = int(table["image"][pair.row])
        name = truth.classes[int(table["classes"][pair.row])]
        with Image.open(truth.images[number]["file_name"]) as file:
            photo = file.convert("RGB")
        scale = enlargement(photo.height, photo.width)
        photo = photo.resize([round(scale * side) for side in photo.size], Image.BICUBIC)
        _draw_objects(photo, table, pair.row, scale)
        for run, color in ((pair.left, ORANGE), (pair.right, BLUE)):
            boxes, texts = _marks(run, number, truth, score)
            colors = [color] * len(texts)
            pictures.append(draw_boxes(np.asarray(photo), scale * boxes, texts, colors))
            seed = "" if run.run.seed is None else f", seed {run.run.seed}"
            captions.append(f"{run.run.title}{seed}: {_outcome(run, pair.row, score, name)}")
    return Image.fromarray(contact_sheet(pictures, COLUMNS, captions, TILE))


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
