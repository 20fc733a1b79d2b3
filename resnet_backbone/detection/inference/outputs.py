"""What a model found in one image, as numbers for JSON."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from pycocotools import mask as mask_util


def describe_output(
    output: dict, class_names: Sequence[str] = (), label_names: Sequence[str] = ()
) -> list[dict]:
    """Instances, or for a purely semantic model its classes.

    Args:
        output: of a Detectron2 model for one image.
        class_names, label_names: of boxes and masks, and of label pictures; numbers without.

    Returns:
        For an instance: class, score, box (x0, y0, x1, y1 in pixels) and, if it has one, mask
        (COCO's compressed run-length encoding). For a class of a label picture: class and share
        of the pixels, 0..1, largest first.
    """
    if "instances" in output:
        return _describe_instances(output["instances"].to("cpu"), class_names)
    labels, counts = np.unique(output["sem_seg"].argmax(0).cpu().numpy(), return_counts=True)
    shares = counts / counts.sum()
    return [
        {"class": _name(label_names, int(labels[i])), "share": round(float(shares[i]), 5)}
        for i in np.argsort(-shares)
    ]


def _describe_instances(found: Instances, class_names: Sequence[str]) -> list[dict]:
    entries = []
    for i, box in enumerate(found.pred_boxes.tensor.float().tolist()):
        entry = {
            "class": _name(class_names, int(found.pred_classes[i])),
            "score": round(float(found.scores[i]), 5),
            "box": [round(value, 2) for value in box],
        }
        if found.has("pred_masks"):
            pixels = np.asfortranarray(found.pred_masks[i].numpy().astype(np.uint8))
            encoded = mask_util.encode(pixels)
            entry["mask"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        entries.append(entry)
    return entries


def _name(names: Sequence[str], index: int) -> str | int:
    return names[index] if names else index
