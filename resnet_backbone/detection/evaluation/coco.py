"""COCO evaluation inside Detectron2."""

from __future__ import annotations

from detectron2.evaluation import COCOEvaluator


class PerClassCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, for users' own JSON files too.

    The official implementation reads area and iscrowd of every annotation, and (pycocotools
    2.0.10) the file's info; COCO's own files have them, many others do not.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dataset = self._coco_api.dataset
        dataset.setdefault("info", {})
        for annotation in dataset.get("annotations", ()):
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])


def build_coco_evaluator(dataset_name: str, output_dir: str | None = None) -> COCOEvaluator:
    """COCO AP by pycocotools' official implementation, against the JSON file as it is.

    Detectron2's fast implementation is unofficial and needs its compiled extension, which an
    installation without a C++ compiler does not have.

    Args:
        dataset_name: a registered data set whose metadata has json_file.
        output_dir: gets `coco_instances_results.json` and `instances_predictions.pth`.

    Returns:
        An evaluator giving {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-<class>"}}
        in percent.
    """
    return PerClassCOCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=False)
