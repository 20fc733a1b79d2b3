"""Evaluation of label pictures, and panoptic quality (arXiv 1801.00868) as panopticapi computes it.

Detectron2's COCOPanopticEvaluator needs panopticapi, which is not on the package index.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from resnet_backbone.detection.data.panoptic import decode_ids, read_panoptic
from resnet_backbone.detection.evaluation.coco import build_coco_evaluator
from resnet_backbone.runtime.errors import DataError

logger = logging.getLogger(__name__)

GROUPS = (("all", "", (True, False)), ("things", "_th", (True,)), ("stuff", "_st", (False,)))


def read_labels(path: str, dtype=int) -> np.ndarray:
    """A label picture as a new array (H, W); Detectron2's own reader fails with NumPy 2."""
    with Image.open(path) as picture:
        return np.array(picture, dtype=dtype)


def build_semantic_evaluator(dataset_name: str, output_dir: str | None = None) -> SemSegEvaluator:
    """Mean IoU and pixel accuracy over the classes that occur, with ``ignore_label`` left out.

    Returns:
        An evaluator giving {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", ...}}
        in percent.
    """
    return SemSegEvaluator(dataset_name, output_dir=output_dir, sem_seg_loading_fn=read_labels)


def build_panoptic_evaluators(
    dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluators:
    """COCO AP of boxes and masks, mean IoU of the labels, and panoptic quality."""
    parts: list[DatasetEvaluator] = [
        build_coco_evaluator(dataset_name, output_dir),
        build_semantic_evaluator(dataset_name, output_dir),
        PanopticEvaluator(dataset_name),
    ]
    return DatasetEvaluators(parts)


class PanopticEvaluator(DatasetEvaluator):
    """Gives {"panoptic_seg": {"PQ", "SQ", "RQ", and each "_th", "_st"}} in percent.

    Args:
        dataset_name: its metadata has panoptic_json, panoptic_root, and
            thing_dataset_id_to_contiguous_id and stuff_dataset_id_to_contiguous_id.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        self.file, self.root = metadata.panoptic_json, metadata.panoptic_root
        content = read_panoptic(self.file)
        self.truth = {entry["image_id"]: entry for entry in content["annotations"]}
        self.is_thing = {entry["id"]: bool(entry["isthing"]) for entry in content["categories"]}
        self.category = {
            is_thing: {index: category for category, index in ids.items()}
            for is_thing, ids in (
                (True, metadata.thing_dataset_id_to_contiguous_id),
                (False, metadata.stuff_dataset_id_to_contiguous_id),
            )
        }

    def reset(self) -> None:
        self.counts: dict[int, Counter] = defaultdict(Counter)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            truth = self.truth.get(given["image_id"])
            if truth is None:
                raise DataError(
                    f"image id {given['image_id']} is not in annotations of {self.file}"
                )
            with Image.open(os.path.join(self.root, truth["file_name"])) as picture:
                true_ids = decode_ids(np.asarray(picture.convert("RGB")))
            ids, segments = output["panoptic_seg"]
            classes = {s["id"]: self.category[s["isthing"]][s["category_id"]] for s in segments}
            found = match_segments(true_ids, truth["segments_info"], ids.cpu().numpy(), classes)
            for category, count in found.items():
                self.counts[category].update(count)

    def evaluate(self) -> dict | None:
        gathered = comm.gather(dict(self.counts))
        if not comm.is_main_process():
            return None
        total: dict[int, Counter] = defaultdict(Counter)
        for part in gathered:
            for category, count in part.items():
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
        truth: ``segments_info`` with id, category_id, iscrowd. Crowds match nothing, and a
            prediction that lies mostly on void and on crowds of its class counts for nothing.
        classes: category id of each predicted segment.

    Returns:
        By category id: "iou" (sum over matches), "tp", "fp", "fn".
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
    """PQ, SQ (mean IoU of matches) and RQ (F1) in 0..1, averaged over classes; NaN of none."""
    rows = []
    for count in counts:
        tp = count["tp"]
        weight = tp + 0.5 * count["fp"] + 0.5 * count["fn"]
        if weight:
            rows.append((count["iou"] / weight, count["iou"] / tp if tp else 0.0, tp / weight))
    means = np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 3
    return dict(zip(("PQ", "SQ", "RQ"), means, strict=True))
