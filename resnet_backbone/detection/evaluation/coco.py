"""COCO evaluation inside Detectron2: the official twelve numbers, and AP per class.

They are computed by hotcoco where it is installed, else by pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from resnet_backbone.detection.evaluation.results import warn_if_empty
from resnet_backbone.runtime.files import write_json

try:
    import hotcoco
except ImportError:
    hotcoco = None

logger = logging.getLogger(__name__)

RESULT_FILE = "coco_instances_results.json"
TASKS = ("bbox", "segm")
SIZES = {"s": 1, "m": 2, "l": 3}  # end of a number's name -> place in COCOeval's arrays; 0 is all


class PerClassCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with all twelve numbers, fast, for users' own JSON files too.

    Keypoints are left to Detectron2. Annotations without area and iscrowd get them, as many users'
    files need. A model that found nothing has AP 0 where there was something to find; numbers are
    nan only where there is no ground truth, and a warning says so.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dataset = self._coco_api.dataset
        dataset.setdefault("info", {})
        for annotation in dataset.get("annotations", ()):
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    def _eval_predictions(self, predictions, img_ids=None):
        results = [result for image in predictions for result in image["instances"]]
        tasks = self._tasks or self._tasks_from_predictions(results)
        if not set(tasks) <= set(TASKS):
            return super()._eval_predictions(predictions, img_ids)
        name, dataset = self._metadata.name, self._coco_api.dataset
        self._to_dataset_ids(results)
        if self._output_dir:
            write_json(os.path.join(self._output_dir, RESULT_FILE), results, indent=None)
        if not self._do_evaluation:
            logger.info("%s has no annotations: detections are written, not scored", name)
            return
        warn_if_empty(logger, name, bool(results), bool(dataset["annotations"]))
        classes = {one["id"]: one["name"] for one in dataset["categories"]}
        limits = self._max_dets_per_image
        for task in sorted(tasks):
            found = evaluate_coco(dataset, results, task, max_detections=limits, image_ids=img_ids)
            summary = {key: 100 * value for key, value in found.summary.items()}
            per_class = {classes[key]: 100 * value for key, value in found.classes.items()}
            table = tabulate([summary.values()], [*summary], floatfmt=".2f")
            table += "\n" + tabulate(per_class.items(), ["class", "AP"], floatfmt=".2f")
            logger.info("COCO results of %s, %s (%%):\n%s", name, task, table)
            self._results[task] = summary | {f"AP-{key}": ap for key, ap in per_class.items()}

    def _to_dataset_ids(self, results: Sequence[dict[str, Any]]) -> None:
        """Puts the file's category ids in place of contiguous ones."""
        contiguous: Mapping[int, int] = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            return
        ids = {value: key for key, value in contiguous.items()}
        unknown = {result["category_id"] for result in results} - ids.keys()
        if unknown:
            raise ValueError(
                f"the model found class {min(unknown)}, {self._metadata.name} has {len(ids)} "
                "classes: is NUM_CLASSES that of the data?"
            )
        for result in results:
            result["category_id"] = ids[result["category_id"]]


def build_coco_evaluator(dataset_name: str, output_dir: str | None = None) -> COCOEvaluator:
    """COCO AP as by pycocotools' official implementation, against the JSON file as it is.

    Args:
        dataset_name: a registered data set whose metadata has json_file.
        output_dir: gets `coco_instances_results.json` and `instances_predictions.pth`.

    Returns:
        An evaluator giving {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10",
        "AR100", "ARs", "ARm", "ARl", "AP-<class>"}} in percent.
    """
    return PerClassCOCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=False)


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
    engine: Callable | None = None,
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
    run = engine or (run_hotcoco if hotcoco else run_pycocotools)
    precision, recall = run(dataset, list(results), task, list(max_detections), image_ids)
    summary = {"AP": _mean(precision[:, :, :, 0, -1])}
    summary |= {"AP50": _mean(precision[0, :, :, 0, -1]), "AP75": _mean(precision[5, :, :, 0, -1])}
    summary |= {f"AP{end}": _mean(precision[..., area, -1]) for end, area in SIZES.items()}
    summary |= {f"AR{n}": _mean(recall[:, :, 0, i]) for i, n in enumerate(max_detections)}
    summary |= {f"AR{end}": _mean(recall[..., area, -1]) for end, area in SIZES.items()}
    ids = sorted(category["id"] for category in dataset["categories"])
    classes = {one: _mean(precision[:, :, place, 0, -1]) for place, one in enumerate(ids)}
    return CocoNumbers(summary, classes, precision)


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")


def run_hotcoco(dataset, results, task, max_detections, image_ids) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's precision and recall arrays, as pycocotools' and a hundred times faster."""
    truth = hotcoco.COCO(dict(dataset))
    evaluation = hotcoco.COCOeval(truth, truth.loadRes(results), task)
    return _arrays(evaluation, max_detections, image_ids)


def run_pycocotools(
    dataset, results, task, max_detections, image_ids
) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's precision and recall arrays, by the reference implementation."""
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
