"""Masks of objects in COCO's format: polygons, and run-length encoded images."""

from __future__ import annotations

import math
from typing import Any

from pycocotools import mask as mask_util


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
