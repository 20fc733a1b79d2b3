"""Masks, label pictures and panoptic segments, painted over an image; boxes are in visualize.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from detectron2.structures import Instances

from resnet_backbone.detection.data.panoptic import BACKGROUND
from resnet_backbone.detection.inference.visualize import (
    Colour,
    Mark,
    class_colour,
    class_name,
    draw_detections,
    draw_marks,
)

OPACITY = 0.5
LEAST_SHARE = 0.002  # regions of less than this part of the image get no name


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
        return draw_panoptic(image, ids.cpu().numpy(), segments, class_names, label_names)
    if "instances" in output:
        instances = output["instances"].to("cpu")
        if instances.has("pred_masks"):
            image = paint_masks(image, instances[instances.scores >= threshold])
        return draw_detections(image, instances, class_names, threshold)
    hidden = list(label_names).index(BACKGROUND) if BACKGROUND in label_names else -1
    labels = output["sem_seg"].argmax(0).cpu().numpy()
    return draw_label_picture(image, labels, label_names, hidden)


def paint_masks(image: np.ndarray, instances: Instances) -> np.ndarray:
    """A copy of the image with each instance's mask in its class's colour.

    Args:
        instances: with ``pred_masks``, bool (N, H, W); lower scores are painted first.
    """
    painted = image.copy()
    for index in instances.scores.argsort().tolist():
        mask = instances.pred_masks[index].numpy().astype(bool)
        painted = paint(painted, mask, class_colour(int(instances.pred_classes[index])))
    return painted


def draw_label_picture(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str] = (), hidden: int = -1
) -> np.ndarray:
    """Every class of a label picture in its colour, its largest region named.

    Args:
        image: RGB, uint8, (H, W, 3).
        labels: class numbers, (H, W).
        hidden: a label that stays unpainted, such as background.

    Returns:
        A new RGB uint8 picture, enlarged as by :func:`draw_detections`.
    """
    regions = [(labels == label, int(label)) for label in np.unique(labels) if label != hidden]
    return _draw(image, [(m, class_name(class_names, i), class_colour(i)) for m, i in regions])


def draw_panoptic(
    image: np.ndarray,
    ids: np.ndarray,
    segments: Iterable[dict],
    thing_names: Sequence[str] = (),
    stuff_names: Sequence[str] = (),
) -> np.ndarray:
    """Every segment in its class's colour; stuff takes the colours from the palette's far end.

    Args:
        ids: segment ids, (H, W); 0 is void.
        segments: with id, isthing, category_id, and score for things, as Panoptic FPN gives them.
    """
    regions = []
    for segment in segments:
        index, is_thing = segment["category_id"], segment["isthing"]
        text = class_name(thing_names if is_thing else stuff_names, index)
        text += f" {segment['score']:.2f}" if "score" in segment else ""
        colour = class_colour(index if is_thing else 1000 + index)
        regions.append((ids == segment["id"], text, colour))
    return _draw(image, regions)


def paint(image: np.ndarray, mask: np.ndarray, colour: Colour) -> np.ndarray:
    """A copy of the image with a half transparent mask and its outline."""
    painted = image.copy()
    painted[mask] = ((1 - OPACITY) * image[mask] + OPACITY * np.array(colour)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(painted, outlines, -1, colour, 1)


def _draw(image: np.ndarray, regions: Sequence[tuple[np.ndarray, str, Colour]]) -> np.ndarray:
    marks = []
    for mask, text, colour in regions:
        image = paint(image, mask, colour)
        if mask.mean() >= LEAST_SHARE:
            x, y = _centre(mask)
            marks.append(Mark((x, y, x, y), text, colour))
    return draw_marks(image, marks, frames=False)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """The point of a mask that lies furthest from its edge."""
    padded = np.pad(mask.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(x) - 1, float(y) - 1
