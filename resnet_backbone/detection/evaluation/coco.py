"""COCO evaluation inside Detectron2."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from tabulate import tabulate

from resnet_backbone.detection.evaluation.coco_ap import TASKS, CocoNumbers, evaluate_coco
from resnet_backbone.detection.evaluation.warnings import warn_if_empty
from resnet_backbone.runtime.files import write_json

logger = logging.getLogger(__name__)

RESULT_FILE = "coco_instances_results.json"


class PerClassCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with all twelve numbers, fast, for users' own JSON files too.

    The numbers are those of the official implementation (see :mod:`.coco_ap`); keypoints are left
    to Detectron2. Annotations without area and iscrowd get them, as many users' files need. A
    model that found nothing has AP 0 where there was something to find; numbers are nan only for
    want of ground truth, and a warning says so.
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
        self._to_dataset_ids(results)
        if self._output_dir:
            write_results(os.path.join(self._output_dir, RESULT_FILE), results)
        if not self._do_evaluation:
            logger.info("%s has no annotations: detections are written, not scored", self._name)
            return
        annotated = bool(self._coco_api.dataset["annotations"])
        warn_if_empty(logger, self._name, bool(results), annotated)
        for task in sorted(tasks):
            numbers = evaluate_coco(
                self._coco_api.dataset,
                results,
                task,
                max_detections=self._max_dets_per_image,
                image_ids=img_ids,
            )
            logger.info("COCO results of %s, %s (%%):\n%s", self._name, task, self._table(numbers))
            names = self._class_names()
            self._results[task] = {key: 100 * value for key, value in numbers.summary.items()} | {
                f"AP-{names[key]}": 100 * value for key, value in numbers.classes.items()
            }

    @property
    def _name(self) -> str:
        return self._metadata.name

    def _to_dataset_ids(self, results: Sequence[dict[str, Any]]) -> None:
        """Puts the file's category ids in place of contiguous ones."""
        contiguous: Mapping[int, int] = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            return
        ids = {value: key for key, value in contiguous.items()}
        unknown = {result["category_id"] for result in results} - ids.keys()
        if unknown:
            raise ValueError(
                f"the model found class {min(unknown)}, {self._name} has {len(ids)} classes: is "
                "NUM_CLASSES that of the data?"
            )
        for result in results:
            result["category_id"] = ids[result["category_id"]]

    def _class_names(self) -> dict[int, str]:
        return {one["id"]: one["name"] for one in self._coco_api.dataset["categories"]}

    def _table(self, numbers: CocoNumbers) -> str:
        values = [100 * value for value in numbers.summary.values()]
        summary = tabulate([values], [*numbers.summary], floatfmt=".2f")
        names = self._class_names()
        rows = [(names[key], 100 * value) for key, value in numbers.classes.items()]
        return f"{summary}\n{tabulate(rows, ['class', 'AP'], floatfmt='.2f')}"


def write_results(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes detections in COCO's result format: complete, or the file stays as it was."""
    write_json(path, results, indent=None)


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
