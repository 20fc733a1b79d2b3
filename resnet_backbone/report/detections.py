"""Detections compared with the ground truth: curves, intervals, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from resnet_backbone.detection.data.problems import read_image
from resnet_backbone.detection.evaluation import voc_ap
from resnet_backbone.detection.evaluation.voc import TO_VOC
from resnet_backbone.detection.inference.pictures import contact_sheet, draw_boxes, enlargement
from resnet_backbone.report.boxes import RunDetections, Table, Truth, load_detections, load_truth
from resnet_backbone.report.gain import DetectorGroup
from resnet_backbone.report.runs import ELEVEN_POINT

RECALL_LEVELS = 101
DRAWS, DRAWS_SEED = 1000, 0  # resampled test sets
DRAWS_AT_ONCE = 250  # limits memory

GREEN = 60, 220, 60
ORANGE, BLUE = (0.9, 0.47, 0.08), (0.16, 0.51, 0.86)
TILE = 400  # largest side of a picture, in pixels
COLUMNS = 4
RULE = """\
A run finds an object if a detection of its class, with a score of at least {score:g}, overlaps it \
with an IoU above {iou:g}, and overlaps no other object of this class more. The candidates are \
the objects that count, that {finder} finds in more than half of its runs, and that {other} finds \
in none. For each class, the object with the largest gap is shown: the mean score of {finder}'s \
best detection minus the largest score of {other}'s. The largest gaps come first, each image only \
once."""


def interpolated_precision(numbers: Mapping[str, Any], levels: int = RECALL_LEVELS) -> np.ndarray:
    """Returns VOC's interpolated precision at R recall levels: the largest at or above the level.

    Returns:
        (classes, R), 0..1: 0 beyond the highest recall, nan for a class without ground truth.
    """
    grid = np.linspace(0.0, 1.0, levels)
    rows = []
    for recall, precision, objects in zip(
        numbers["recall"], numbers["precision"], numbers["num_ground_truth"], strict=True
    ):
        best = np.append(voc_ap.precision_envelope(precision), 0.0)
        row = best[np.searchsorted(recall, grid, side="left")]
        rows.append(row if objects else np.full(levels, np.nan))
    return np.array(rows)


def draw_images(images: int, draws: int = DRAWS) -> np.ndarray:
    """Draws test sets of equal size with replacement: (draws, images) counts of each image."""
    rng = np.random.default_rng(DRAWS_SEED)
    drawn = [rng.integers(0, images, images) for _ in range(draws)]
    return np.array([np.bincount(one, minlength=images) for one in drawn])


def resample(run: RunDetections, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Computes a run's AP, AP50, AP75 and AP50-11pt on resampled test sets.

    Boxes are matched within their images only once. An image that was drawn k times counts like k
    different images.

    Args:
        counts: (R, images), from :func:`draw_images`.

    Returns:
        Metric -> (R,), in percent, mean over the classes with objects.
    """
    at50, at75 = (voc_ap.COCO_IOU_THRESHOLDS.index(iou) for iou in (0.5, 0.75))
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(counts), DRAWS_AT_ONCE):
        part = counts[start : start + DRAWS_AT_ONCE]
        by_class = [_resample_class(run, c, part) for c in range(len(run.numbers["recall"]))]
        area, eleven = map(np.array, zip(*by_class, strict=True))  # (C, T, R), (C, R)
        columns = {"AP": area.mean(axis=1), "AP50": area[:, at50], "AP75": area[:, at75]}
        for key, values in (columns | {ELEVEN_POINT: eleven}).items():
            parts.setdefault(key, []).append(100 * np.nanmean(values, axis=0))
    return {key: np.concatenate(values) for key, values in parts.items()}


def _resample_class(
    run: RunDetections, class_id: int, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a class's area under the envelope (T, R) and 11-point AP (R,); nan if no objects."""
    truth, found = run.truth, run.found
    weights = counts.T.astype(np.float64)  # (images, R)
    mine = (truth["classes"] == class_id) & ~truth["difficult"]
    objects = weights[truth["image"][mine]].sum(axis=0)
    rows = np.flatnonzero(found["classes"] == class_id)
    rows = rows[np.argsort(-found["scores"][rows], kind="stable")]
    iou, match, hard = (found[key][rows] for key in ("iou", "match", "difficult"))
    of_image = weights[found["image"][rows]]
    so_far = of_image.cumsum(axis=0)  # detections, (rows, R)
    area, eleven = [], None
    for threshold in voc_ap.COCO_IOU_THRESHOLDS:
        over = iou > threshold
        counted, ignored = np.flatnonzero(over & ~hard), np.flatnonzero(over & hard)
        right = np.sort(counted[np.unique(match[counted], return_index=True)[1]])
        skipped = np.pad(of_image[ignored].cumsum(axis=0), ((1, 0), (0, 0)))
        total = so_far[right] - skipped[np.searchsorted(ignored, right)]
        reached = of_image[right].cumsum(axis=0)
        precision = reached / np.maximum(total, np.finfo(np.float64).eps)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (of_image[right] * envelope).sum(axis=0) / objects
            area.append(np.where(objects > 0, mean, np.nan))
            if threshold == voc_ap.CURVE_IOU:
                eleven = _eleven_points(reached / objects, envelope)
    return np.array(area), np.where(objects > 0, eleven, np.nan)


def _eleven_points(recall: np.ndarray, envelope: np.ndarray) -> np.ndarray:
    """Returns the mean (R,) of the envelope (P, R) at recall 0, .1, ... 1; recall is (P, R)."""
    padded = np.append(envelope, np.zeros((1, envelope.shape[1])), axis=0)
    columns = np.arange(envelope.shape[1])
    points = [padded[(recall < r).sum(axis=0), columns] for r in np.arange(0.0, 1.1, 0.1)]
    return np.sum(points, axis=0) / 11.0


def load_all(
    groups: Sequence[DetectorGroup], given: Mapping[str, str | None]
) -> tuple[Truth, dict[str, list[RunDetections]]]:
    """Reads the test set of some groups, and by each group's label its runs' detections.

    Also sets :attr:`~.gain.DetectorGroup.draws`, with the same resampled test sets for all groups.
    """
    truth = load_truth(groups[0].first, given)
    detections = {
        group.label: [load_detections(run, truth)._replace(label=group.label) for run in group.runs]
        for group in groups
    }
    counts = draw_images(len(truth.images))
    for group in tqdm(groups, "intervals", unit="detector"):
        found = [resample(run, counts) for run in detections[group.label]]
        group.draws = {key: np.mean([one[key] for one in found], axis=0) for key in found[0]}
    return truth, detections


def object_scores(run: RunDetections) -> np.ndarray:
    """Returns for each object (objects,) the score of its best detection; 0 without one.

    A detection belongs to the object of its class with the highest IoU, if that is above .5.
    """
    found = run.found
    scores = np.zeros(len(run.truth["classes"]))
    over = found["iou"] > voc_ap.CURVE_IOU
    np.maximum.at(scores, found["match"][over], found["scores"][over])
    return scores


def find_misses(
    finder: Sequence[RunDetections], other: Sequence[RunDetections], score: float
) -> np.ndarray:
    """Returns the score gap of each object (objects,); nan if :data:`RULE` excludes it."""
    mine, theirs = (np.array([object_scores(e) for e in runs]) for runs in (finder, other))
    most = 2 * (mine >= score).sum(axis=0) > len(mine)
    chosen = most & (theirs < score).all(axis=0) & ~finder[0].truth["difficult"]
    return np.where(chosen, mine.mean(axis=0) - theirs.max(axis=0), np.nan)


def select_misses(
    finder: Sequence[RunDetections], other: Sequence[RunDetections], count: int, score: float
) -> list[tuple[int, RunDetections]]:
    """Selects at most `count` objects by :data:`RULE`, one per class and image, by falling gap.

    Returns:
        For each its row in the ground truth's table, and the finder's first run that finds it.
    """
    truth, gaps = finder[0].truth, find_misses(finder, other, score)
    rows = np.flatnonzero(~np.isnan(gaps))
    selected: list[tuple[int, RunDetections]] = []
    classes, images = set(), set()
    for row in rows[np.argsort(-gaps[rows], kind="stable")].tolist():
        class_id, image = int(truth["classes"][row]), int(truth["image"][row])
        if class_id in classes or image in images or len(selected) == count:
            continue
        classes.add(class_id)
        images.add(image)
        first = next(run for run in finder if object_scores(run)[row] >= score)
        selected.append((row, first))
    return selected


def make_sheet(
    pairs: Sequence[tuple[int, RunDetections, RunDetections]], truth: Truth, score: float
) -> Image.Image:
    """Draws each object's image twice, with two runs' detections in orange and in blue.

    The object has a thick green box, the other annotated objects of the image a thin one.
    Detections below the score, 0..1, are omitted.
    """
    pictures, captions = [], []
    for row, left, right in pairs:
        table = left.truth
        number = int(table["image"][row])
        name = truth.classes[int(table["classes"][row])]
        photo = Image.fromarray(read_image(truth.images[number]["file_name"], "RGB"))
        scale = enlargement(photo.height, photo.width)
        photo = photo.resize([round(scale * side) for side in photo.size], Image.BICUBIC)
        _draw_objects(photo, table, row, scale)
        for run, color in ((left, ORANGE), (right, BLUE)):
            boxes, texts = _marks(run, number, truth, score)
            colors = [color] * len(texts)
            pictures.append(draw_boxes(np.asarray(photo), scale * boxes, texts, colors))
            seed = "" if run.run.seed is None else f", seed {run.run.seed}"
            captions.append(f"{run.label}{seed}: {_outcome(run, row, score, name)}")
    return Image.fromarray(contact_sheet(pictures, COLUMNS, captions, TILE))


def _outcome(run: RunDetections, row: int, score: float, name: str) -> str:
    found = run.found
    on = (found["match"] == row) & (found["iou"] > voc_ap.CURVE_IOU) & (found["scores"] >= score)
    return f"{name} {found['scores'][on].max():.2f}" if on.any() else f"{name} missed"


def _draw_objects(photo: Image.Image, table: Table, row: int, scale: float) -> None:
    pen = ImageDraw.Draw(photo)
    line = max(2, round(min(photo.size) / 160))
    mine = np.flatnonzero(table["image"] == table["image"][row])
    for other in [*mine[mine != row], row]:
        width = 3 * line if other == row else line
        box = scale * (table["boxes"][other] - TO_VOC)
        pen.rectangle([*(box[:2] - width / 2), *(box[2:] + width / 2)], outline=GREEN, width=width)


def _marks(run: RunDetections, image: int, truth, score: float) -> tuple[np.ndarray, list[str]]:
    found = run.found
    shown = np.flatnonzero((found["image"] == image) & (found["scores"] >= score))
    names = [truth.classes[index] for index in found["classes"][shown]]
    pairs = zip(names, found["scores"][shown], strict=True)
    return found["boxes"][shown] - TO_VOC, [f"{name} {value:.2f}" for name, value in pairs]
