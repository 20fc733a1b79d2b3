"""COCO's twelve numbers and AP per class, by hotcoco where it is installed, else by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

AREAS = {"": 0, "s": 1, "m": 2, "l": 3}  # end of a number's name -> place in COCOeval's arrays
TASKS = ("bbox", "segm")


class CocoNumbers(NamedTuple):
    """Fractions; nan where there is no ground truth to find.

    Attributes:
        summary: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; the middle three
            AR are named after the limits of detections per image.
        classes: category id -> AP.
        precision: (10 IoU .5:.95, 101 recalls 0:1, classes, 4 areas, 3 limits of detections),
            -1 where there is no ground truth.
    """

    summary: dict[str, float]
    classes: dict[int, float]
    precision: np.ndarray


def evaluate_coco(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    task: str = "bbox",
    *,
    max_detections: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[int] | None = None,
    engine: Callable = None,
) -> CocoNumbers:
    """Scores detections as the official COCO evaluation does.

    Args:
        dataset: the content of an instances JSON file, with area and iscrowd in each annotation.
        results: in COCO's result format, with the file's own category ids; may be empty.
        task: "bbox" or "segm".
        max_detections: three limits of detections per image, ascending.
        image_ids: of the images to evaluate on; None for all.
        engine: :func:`run_hotcoco` or :func:`run_pycocotools`; None takes the first that is there.
    """
    if task == "segm":  # else the box's area would stand for the mask's
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    run = engine or best_engine()
    precision, recall = run(dataset, list(results), task, list(max_detections), image_ids)
    summary = {"AP": _mean(precision[:, :, :, 0, -1])}
    summary |= {"AP50": _mean(precision[0, :, :, 0, -1]), "AP75": _mean(precision[5, :, :, 0, -1])}
    sizes = {end: place for end, place in AREAS.items() if end}
    summary |= {f"AP{end}": _mean(precision[..., place, -1]) for end, place in sizes.items()}
    limits = enumerate(max_detections)
    summary |= {f"AR{limit}": _mean(recall[:, :, 0, place]) for place, limit in limits}
    summary |= {f"AR{end}": _mean(recall[..., place, -1]) for end, place in sizes.items()}
    ids = sorted(category["id"] for category in dataset["categories"])
    classes = {one: _mean(precision[:, :, place, 0, -1]) for place, one in enumerate(ids)}
    return CocoNumbers(summary, classes, precision)


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")


def best_engine() -> Callable:
    """hotcoco gives the same arrays as pycocotools, a hundred times faster."""
    try:
        import hotcoco  # noqa: F401
    except ImportError:
        return run_pycocotools
    return run_hotcoco


def run_hotcoco(dataset, results, task, max_detections, image_ids) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's precision and recall arrays."""
    from hotcoco import COCO, COCOeval

    truth = COCO(dict(dataset))
    evaluation = COCOeval(truth, truth.loadRes(results), task)
    return _arrays(evaluation, max_detections, image_ids)


def run_pycocotools(
    dataset, results, task, max_detections, image_ids
) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's precision and recall arrays, by the reference implementation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **dataset}
        truth.createIndex()
        if results:
            found = truth.loadRes([dict(result) for result in results])
        else:  # which it cannot read
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        return _arrays(COCOeval(truth, found, task), max_detections, image_ids)


def _arrays(evaluation, max_detections, image_ids) -> tuple[np.ndarray, np.ndarray]:
    evaluation.params.maxDets = max_detections
    if image_ids is not None:
        evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    return tuple(np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
