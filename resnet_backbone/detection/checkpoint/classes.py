"""Class-dependent layers of detectors, and transfer of their rows to other data."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

logger = logging.getLogger(__name__)
# Layers of Detectron2's detectors whose size depends on the number of classes.
CLASS_LAYERS = re.compile(
    r"roi_heads\.box_predictor\."
    r"|roi_heads\.mask_head\.(predictor|coarse_head\.prediction|point_head)\."
    r"|roi_heads\.keypoint_head\.score_lowres\."
    r"|head\.cls_score\."
    r"|sem_seg_head\.(predictor|coarse_sem_seg_head\.predictor|point_head)\."
)
# Layers among these with contiguous rows per class, and the background last in cls_score.
BY_ROWS = re.compile(r"roi_heads\.box_predictor\.(\d+\.)?(cls_score|bbox_pred)\.(weight|bias)")
# PASCAL VOC's class names -> COCO's, where they differ.
SYNONYMS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def carry_over_classes(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    theirs: Sequence[str],
    ours: Sequence[str],
    where: str,
) -> dict[str, Tensor]:
    """Returns a checkpoint's tensors with its class layers adapted to a detector's classes.

    Score and box rows of shared classes, matched by name or by the VOC and COCO spellings, come
    from the checkpoint, as does the background. Other classes keep their rows of `own`. Layers with
    other input features and class-agnostic boxes are not adapted. The log lists the classes.

    Args:
        own: state dict of the detector, freshly initialized.
        theirs, ours: class names of the checkpoint and of the detector, in order.
    """
    places = {SYNONYMS.get(name, name): index for index, name in enumerate(theirs)}
    shared = {i: places.get(SYNONYMS.get(name, name)) for i, name in enumerate(ours)}
    shared = {target: source for target, source in shared.items() if source is not None}
    carried = {}
    for key in filter(BY_ROWS.fullmatch, own):
        scores = "cls_score" in key
        sizes = [len(names) + 1 if scores else 4 * len(names) for names in (theirs, ours)]
        value, target = tensors.get(key), own[key].clone()
        if value is None or [len(value), len(target)] != sizes or value[0].shape != target[0].shape:
            continue
        rows = 1 if scores else 4
        for index, source in shared.items():
            target[index * rows : (index + 1) * rows] = value[source * rows : (source + 1) * rows]
        if scores:
            target[-1] = value[-1]
        carried[key] = target
    if carried:
        pairs = [(name, theirs[shared[i]]) for i, name in enumerate(ours) if i in shared]
        new = [name for i, name in enumerate(ours) if i not in shared]
        logger.info(
            "%s: scores and boxes of %d of %d classes are carried over by name: %s; at random: %s",
            where,
            len(pairs),
            len(ours),
            ", ".join(a if a == b else f"{a} from {b}" for a, b in pairs) or "none",
            ", ".join(new) or "none",
        )
    return {**tensors, **carried}
