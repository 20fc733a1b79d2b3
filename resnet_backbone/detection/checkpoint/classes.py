"""Class-dependent layers of detectors, and transfer of their rows to other data."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch
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
# Layers among these with rows per class of what is detected.
BY_ROWS = re.compile(
    r"roi_heads\.box_predictor\.(\d+\.)?(cls_score|bbox_pred)\.(weight|bias)"
    r"|roi_heads\.mask_head\.predictor\.(weight|bias)"
    r"|head\.cls_score\.(weight|bias)"  # RetinaNet
)
# PointRend's, which also take the scores of all classes as input.
BY_ORDER = re.compile(r"roi_heads\.mask_head\.(coarse_head\.prediction|point_head)\.")
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

    Score, box and mask rows of shared classes, matched by name or by the VOC and COCO spellings,
    come from the checkpoint, as does the background. Other classes keep their rows of `own`. Layers
    with other input features and class-agnostic layers are not adapted. PointRend's are left out if
    the classes differ. The log lists the classes.

    Args:
        own: state dict of the detector, freshly initialized.
        theirs, ours: class names of the checkpoint and of the detector, in order.
    """
    places = {SYNONYMS.get(name, name): index for index, name in enumerate(theirs)}
    shared = {i: places.get(SYNONYMS.get(name, name)) for i, name in enumerate(ours)}
    shared = {target: source for target, source in shared.items() if source is not None}
    carried = {}
    if list(theirs) != list(ours):
        tensors = {key: value for key, value in tensors.items() if not BY_ORDER.match(key)}
    for key in filter(BY_ROWS.fullmatch, own):
        if key not in tensors:
            continue
        target = own[key].clone(memory_format=torch.contiguous_format)
        source, goal = _by_class(key, tensors[key], len(theirs)), _by_class(key, target, len(ours))
        if source is None or goal is None or source.shape[::2] != goal.shape[::2]:
            continue
        for index, place in shared.items():
            goal[:, index] = source[:, place]
        if goal.shape[1] > len(ours):
            goal[:, -1] = source[:, -1]
        carried[key] = target
    if carried:
        pairs = [(name, theirs[shared[i]]) for i, name in enumerate(ours) if i in shared]
        new = [name for i, name in enumerate(ours) if i not in shared]
        logger.info(
            "%s: %d of %d classes are carried over by name: %s; at random: %s",
            where,
            len(pairs),
            len(ours),
            ", ".join(a if a == b else f"{a} from {b}" for a, b in pairs) or "none",
            ", ".join(new) or "none",
        )
    return {**tensors, **carried}


def _by_class(key: str, tensor: Tensor, count: int) -> Tensor | None:
    """Returns a class layer's tensor as a view (groups, classes, numbers), or None.

    The background is one more class of Faster R-CNN's scores. RetinaNet has a group for each
    anchor. Boxes and masks of a single class may be class-agnostic, and are None.
    """
    rows, is_box = len(tensor), "box_predictor" in key
    if is_box and "cls_score" in key:
        fits, shape = rows == count + 1, (1, count + 1, -1)
    elif key.startswith("head."):
        fits, shape = rows % count == 0, (rows // count, count, -1)
    else:
        fits, shape = 1 < count == rows // (4 if is_box else 1), (1, count, -1)
    return tensor.contiguous().view(shape) if fits else None
