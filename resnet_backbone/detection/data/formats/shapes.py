"""Boxes of objects, and masks in COCO's format: polygons, and run-length encoded images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pycocotools import mask as mask_util

from resnet_backbone.detection.data.problems import DataReport


def fit_box(
    report: DataReport,
    file: str,
    name: str,
    box: Sequence[float],
    size: tuple[int, int],
    origin: int = 0,
) -> tuple[float, ...] | None:
    """Returns a box clipped to its image, or None after adding a problem to the report.

    Args:
        name: the class, for messages.
        box: (xmin, ymin, xmax, ymax) in pixels.
        size: (width, height) of the image.
        origin: coordinate of the image's left and upper edge, 0 (COCO) or 1 (VOC).
    """
    x0, y0, x1, y1 = box
    if origin <= x0 < x1 <= size[0] and origin <= y0 < y1 <= size[1]:
        return tuple(box)
    text = f"{name} box ({', '.join(f'{side:g}' for side in box)})"
    inside = (max(x0, origin), max(y0, origin), min(x1, size[0]), min(y1, size[1]))
    problem = ""
    if not all(math.isfinite(side) for side in box):
        problem = "is not finite"
    elif box[2] <= box[0] or box[3] <= box[1]:
        problem = "has zero or negative size"
    elif inside[2] <= inside[0] or inside[3] <= inside[1]:
        problem = f"lies outside the {size[0]}x{size[1]} image"
    if problem:
        report.add("bad-box", file, f"{text} {problem}")
        return None
    if all(abs(new - old) <= 1 for new, old in zip(inside, box, strict=True)):
        return tuple(box)  # within a pixel: tools round differently
    report.clipped.append(f"{file}: {text} runs past the edge of the {size[0]}x{size[1]} image")
    return inside


def read_mask(value: Any, size: tuple[int | None, int | None]) -> list | dict | None:
    """Returns polygons of three or more points, or compressed run lengths, else None."""
    if isinstance(value, dict):
        try:
            counts, (height, width) = value["counts"], value["size"]
            if size not in ((height, width), (None, None)):
                return None
            if not isinstance(counts, list):
                return {"size": [height, width], "counts": counts} if counts else None
            fits = min(counts) >= 0 and sum(counts) == height * width
            return mask_util.frPyObjects(value, height, width) if fits else None
        except Exception:  # pycocotools raises many types
            return None
    if not isinstance(value, list):
        return None
    if value and all(isinstance(number, (int, float)) for number in value):
        value = [value]  # a polygon that is not in a list
    good = [one for one in value if _is_polygon(one)]
    return good or None


def mask_area(mask: list | dict) -> float:
    """Returns the area of polygons, which should not overlap, or of compressed run lengths."""
    if isinstance(mask, dict):
        return float(mask_util.area(mask))
    corners = ([*zip(polygon[::2], polygon[1::2], strict=True)] for polygon in mask)
    edges = ([*zip(points, points[1:] + points[:1], strict=True)] for points in corners)
    return sum(abs(sum(x * v - u * y for (x, y), (u, v) in one)) / 2 for one in edges)


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    try:
        if math.isfinite(sum(value)):  # much faster than checking each
            return True
        return all(map(math.isfinite, value))  # the sum of finite numbers may overflow
    except (OverflowError, TypeError):
        return False
