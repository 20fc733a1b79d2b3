"""COCO's evaluations: the official twelve numbers, AP per class, and panoptic quality.

The first two are computed by hotcoco if it is installed, else by pycocotools. Detectron2's
COCOPanopticEvaluator needs panopticapi, which is not on the package index.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from resnet_backbone.detection.data.formats.coco import clean_coco, number_from_one, read_coco
from resnet_backbone.detection.data.panoptic import decode_ids, read_panoptic
from resnet_backbone.detection.data.scans import registered_scan
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import write_json

try:
    import hotcoco
except ImportError:
    hotcoco = None

logger = logging.getLogger(__name__)

RESULT_FILE = "coco_instances_results.json"
LIMITS = (1, 10, 100)  # maximum numbers of detections per image, of AR1, AR10 and AR100
GROUPS = (("all", "", (True, False)), ("things", "_th", (True,)), ("stuff", "_st", (False,)))
SIZES = {"s": 1, "m": 2, "l": 3}  # suffix of a metric -> area index in COCOeval's arrays; 0: all


def warn_if_empty(logger: logging.Logger, name: str, detected: bool, annotated: bool) -> None:
    """Warns why AP is 0 or nan if there are no detections or no ground truth."""
    if not detected:
        text = "is it trained, and does MODEL.ROI_HEADS.SCORE_THRESH_TEST let anything through?"
        logger.warning("%s: the model detected nothing at all, so AP is 0; %s", name, text)
    if not annotated:
        logger.warning("%s has no ground truth boxes: AP is nan", name)


class PerClassCOCOEvaluator(COCOEvaluator):
    """COCO AP as in pycocotools' official implementation, on the metadata's json_file.

    Returns {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs",
    "ARm", "ARl", "AP-<class>"}} in percent, and writes `coco_instances_results.json` and
    `instances_predictions.pth` to `output_dir`. The latter counts the images from 1. Keypoints are
    scored by Detectron2, with `sigmas` in place of COCO's. The ground truth is the same as in our
    loader. Without detections AP is 0. Numbers are nan only without ground truth. In both cases a
    warning is logged.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, sigmas: Sequence[float] = ()
    ):
        metadata, dataset = MetadataCatalog.get(dataset_name), registered_scan(dataset_name)
        if dataset is None:
            categories, images, boxes, annotated = read_coco(metadata.json_file)[:4]
        else:
            records, report = dataset.scan()
            categories = dict(zip(report.category_ids, report.boxes, strict=True))
            images = {record["image_id"]: record for record in records}
            boxes, annotated = {}, report.annotated
            for number, record in images.items():
                boxes[number] = record.pop("annotations")
                for entry in boxes[number]:
                    entry["category_id"] = report.category_ids[entry["category_id"]]
        self._ids = list(images), list(categories)
        self._clean = clean_coco(categories, images, boxes, annotated)
        with tempfile.TemporaryDirectory() as folder:
            file, name = os.path.join(folder, "clean.json"), f"{dataset_name} (clean)"
            write_json(file, self._clean, indent=None)
            numbers = {place + 1: place for place in range(len(categories))}
            private = MetadataCatalog.get(name)
            private.set(json_file=file, thing_dataset_id_to_contiguous_id=numbers)
            options = dict(use_fast_impl=False, kpt_oks_sigmas=tuple(sigmas))
            super().__init__(name, output_dir=output_dir, **options)  # it keeps `private`
            MetadataCatalog.remove(name)
        self._name = dataset_name
        self._numbers = number_from_one(images)

    def process(self, inputs, outputs):
        numbers = self._numbers
        inputs = [{**one, "image_id": numbers[one["image_id"]]} for one in inputs]
        super().process(inputs, outputs)

    def _eval_predictions(self, predictions, img_ids=None):
        results = [result for image in predictions for result in image["instances"]]
        tasks = self._tasks_from_predictions(results)
        content, (image_ids, category_ids) = self._clean, self._ids
        img_ids = img_ids and [self._numbers[one] for one in img_ids]
        for result in results:
            if result["category_id"] >= len(category_ids):
                raise ValueError(
                    f"the model found class {result['category_id']}, {self._name} has "
                    f"{len(category_ids)} classes: is NUM_CLASSES that of the data?"
                )
        if self._output_dir:
            theirs = [
                {
                    **result,
                    "image_id": image_ids[result["image_id"] - 1],
                    "category_id": category_ids[result["category_id"]],
                }
                for result in results
            ]
            write_json(os.path.join(self._output_dir, RESULT_FILE), theirs, indent=None)
        if "keypoints" in tasks:
            folder, self._output_dir = self._output_dir, None  # its file would have our numbers
            try:
                return super()._eval_predictions(predictions, img_ids)
            finally:
                self._output_dir = folder
        results = [{**result, "category_id": result["category_id"] + 1} for result in results]
        if not self._do_evaluation:
            text = "%s has no annotations: detections are written, not scored"
            logger.info(text, self._name)
            return
        warn_if_empty(logger, self._name, bool(results), bool(content["annotations"]))
        classes = {one["id"]: one["name"] for one in content["categories"]}
        for task in tasks:
            summary, per_class = score_coco(content, results, task, img_ids)
            summary = {key: 100 * value for key, value in summary.items()}
            per_class = {classes[key]: 100 * value for key, value in per_class.items()}
            table = tabulate([summary.values()], [*summary], floatfmt=".2f")
            table += "\n" + tabulate(per_class.items(), ["class", "AP"], floatfmt=".2f")
            logger.info("COCO results of %s, %s (%%):\n%s", self._name, task, table)
            self._results[task] = summary | {f"AP-{key}": ap for key, ap in per_class.items()}


def score_coco(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    task: str = "bbox",
    image_ids: Sequence[Any] | None = None,
    engine: Callable | None = None,
) -> tuple[dict[str, float], dict[Any, float]]:
    """Returns the twelve numbers of the official COCO evaluation, and AP by category.

    They are fractions; nan without ground truth.

    Args:
        dataset: the content of an instances JSON file that fully conforms to COCO's format; see
            :func:`clean_coco`.
        results: in COCO's result format; may be empty.
        task: "bbox" or "segm".
        image_ids: images to evaluate on; None for all.
        engine: :func:`run_hotcoco` or :func:`run_pycocotools`; None for the first available.
    """
    truth = dataset["annotations"]
    if task == "segm":  # otherwise the area would be the box's
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        truth = [one for one in truth if "segmentation" in one]
    else:
        truth = [{k: v for k, v in one.items() if k != "segmentation"} for one in truth]
    run = engine or _run_any
    precision, recall = run({**dataset, "annotations": truth}, list(results), task, image_ids)
    summary = {"AP": _mean(precision[:, :, :, 0, -1])}
    summary |= {"AP50": _mean(precision[0, :, :, 0, -1]), "AP75": _mean(precision[5, :, :, 0, -1])}
    summary |= {f"AP{end}": _mean(precision[..., area, -1]) for end, area in SIZES.items()}
    summary |= {f"AR{n}": _mean(recall[:, :, 0, i]) for i, n in enumerate(LIMITS)}
    summary |= {f"AR{end}": _mean(recall[..., area, -1]) for end, area in SIZES.items()}
    ids = sorted(category["id"] for category in dataset["categories"])
    classes = {one: _mean(precision[:, :, place, 0, -1]) for place, one in enumerate(ids)}
    return summary, classes


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")


def _run_any(*arguments) -> tuple[np.ndarray, np.ndarray]:
    """Runs hotcoco, or pycocotools with a warning if hotcoco fails."""
    if hotcoco:
        try:
            return run_hotcoco(*arguments)
        except Exception as error:
            logger.warning("hotcoco cannot evaluate this (%s): pycocotools does", error)
    return run_pycocotools(*arguments)


def run_hotcoco(dataset, results, task, image_ids=None) -> tuple[np.ndarray, np.ndarray]:
    """Returns pycocotools' precision and recall arrays, computed a hundred times faster."""
    truth = hotcoco.COCO(dict(dataset))
    return _arrays(hotcoco.COCOeval(truth, truth.loadRes(results), task), image_ids)


def run_pycocotools(dataset, results, task, image_ids=None) -> tuple[np.ndarray, np.ndarray]:
    """Returns COCOeval's precision and recall arrays from the reference implementation."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **dataset}
        truth.createIndex()
        if results:
            found = truth.loadRes([dict(result) for result in results])
        else:  # loadRes cannot read an empty list
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        return _arrays(COCOeval(truth, found, task), image_ids)


def _arrays(evaluation, image_ids) -> tuple[np.ndarray, np.ndarray]:
    evaluation.params.maxDets = list(LIMITS)
    if image_ids is not None:
        evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    return tuple(np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))


class PanopticEvaluator(DatasetEvaluator):
    """Returns {"panoptic_seg": {"PQ", "SQ", "RQ", and each with "_th", "_st"}} in percent.

    The metadata must have panoptic_json, panoptic_root, thing_dataset_id_to_contiguous_id and
    stuff_dataset_id_to_contiguous_id.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        self.file, self.root = metadata.panoptic_json, metadata.panoptic_root
        content = read_panoptic(self.file)
        self.truth = {entry["image_id"]: entry for entry in content["annotations"]}
        self.is_thing = {entry["id"]: bool(entry["isthing"]) for entry in content["categories"]}
        things = metadata.thing_dataset_id_to_contiguous_id
        stuff = metadata.stuff_dataset_id_to_contiguous_id
        self.category = {(True, index): category for category, index in things.items()}
        self.category |= {(False, index): category for category, index in stuff.items()}

    def reset(self) -> None:
        self.counts: list[dict[int, Counter]] = []  # one per image

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            truth = self.truth.get(given["image_id"])
            if truth is None:
                absent = f"image id {given['image_id']}"
                raise DataError(f"{absent} is not in annotations of {self.file}")
            with Image.open(os.path.join(self.root, truth["file_name"])) as picture:
                true_ids = decode_ids(np.asarray(picture.convert("RGB")))
            ids, segments = output["panoptic_seg"]
            classes = {s["id"]: self.category[s["isthing"], s["category_id"]] for s in segments}
            found = match_segments(true_ids, truth["segments_info"], ids.cpu().numpy(), classes)
            self.counts.append(found)

    def evaluate(self) -> dict | None:
        gathered = comm.gather(self.counts)
        if not comm.is_main_process():
            return None
        total: dict[int, Counter] = defaultdict(Counter)
        for image in chain(*gathered):
            for category, count in image.items():
                total[category].update(count)
        result, rows = {}, []
        for label, suffix, kinds in GROUPS:
            counts = [n for category, n in total.items() if self.is_thing[category] in kinds]
            quality = panoptic_quality(counts)
            result |= {f"{key}{suffix}": 100 * value for key, value in quality.items()}
            rows.append([label, *(100 * value for value in quality.values()), len(counts)])
        head = ("", "PQ", "SQ", "RQ", "classes")
        logger.info("panoptic quality:\n%s", tabulate(rows, head, floatfmt=".3f"))
        return {"panoptic_seg": result}


def match_segments(
    true_ids: np.ndarray, truth: Iterable[dict], ids: np.ndarray, classes: Mapping[int, int]
) -> dict[int, Counter]:
    """Matches predicted and true segments of one image (IoU over .5, same class).

    Args:
        true_ids, ids: segment ids (H, W); 0 is void (no label, no prediction).
        truth: ``segments_info`` with id, category_id, iscrowd. Crowds match nothing. A prediction
            that lies mostly on void and on crowds of its class is no false positive.
        classes: category id of each predicted segment.

    Returns:
        Category id -> "iou" (sum over matches), "tp", "fp", "fn".
    """
    truth = {segment["id"]: segment for segment in truth}
    pairs, areas = np.unique(
        np.stack([true_ids.ravel(), ids.ravel()]).astype(np.int64), axis=1, return_counts=True
    )
    overlap = {(a, b): n for (a, b), n in zip(pairs.T.tolist(), areas.tolist(), strict=True)}
    area, true_area = Counter(), Counter()
    for (a, b), n in overlap.items():
        true_area[a] += n
        area[b] += n
    counts: dict[int, Counter] = defaultdict(Counter)
    matched = set()
    for (a, b), n in overlap.items():
        if a not in truth or b not in classes or truth[a].get("iscrowd"):
            continue
        category = truth[a]["category_id"]
        iou = n / (true_area[a] + area[b] - n - overlap.get((0, b), 0))
        if category == classes[b] and iou > 0.5:
            counts[category].update(iou=iou, tp=1)
            matched |= {("true", a), ("found", b)}
    crowds = defaultdict(list)
    for number, segment in truth.items():
        if segment.get("iscrowd"):
            crowds[segment["category_id"]].append(number)
        elif ("true", number) not in matched:
            counts[segment["category_id"]]["fn"] += 1
    for number, category in classes.items():
        excused = sum(overlap.get((a, number), 0) for a in (0, *crowds[category]))
        if ("found", number) not in matched and excused <= 0.5 * area[number]:
            counts[category]["fp"] += 1
    return counts


def panoptic_quality(counts: Iterable[Mapping]) -> dict[str, float]:
    """Returns PQ, SQ (mean IoU of matches) and RQ (F1), 0..1, as means over classes, or NaN."""
    rows = []
    for count in counts:
        tp = count["tp"]
        weight = tp + 0.5 * count["fp"] + 0.5 * count["fn"]
        if weight:
            rows.append((count["iou"] / weight, count["iou"] / tp if tp else 0.0, tp / weight))
    means = np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 3
    return dict(zip(("PQ", "SQ", "RQ"), means, strict=True))
