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
# Layers among these with rows per class of what is detected (things), and per label (stuff).
OF_THINGS = re.compile(
    r"roi_heads\.box_predictor\.(\d+\.)?(cls_score|bbox_pred)\.(weight|bias)"
    r"|roi_heads\.mask_head\.predictor\.(weight|bias)"
    r"|head\.cls_score\.(weight|bias)"  # RetinaNet
)
OF_STUFF = re.compile(r"sem_seg_head\.predictor\.(weight|bias)")
SCORES = re.compile(r"roi_heads\.box_predictor\.(0\.)?cls_score\.weight")
# PointRend's, which also take the scores of all classes as input.
BY_ORDER = re.compile(
    r"roi_heads\.mask_head\.(coarse_head\.prediction|point_head)\."
    r"|sem_seg_head\.(coarse_sem_seg_head\.predictor|point_head)\."
)
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

    Rows of scores, boxes, masks and labels of shared classes, matched by name or by the VOC and
    COCO spellings, come from the checkpoint, as does the background. Other classes keep their rows
    of `own`. Layers with other input features and class-agnostic layers are not adapted.
    PointRend's are left out if the classes differ. The log lists the classes.

    Args:
        own: state dict of the detector, freshly initialized.
        theirs, ours: class names of the checkpoint and of the detector, in order; of Panoptic FPN
            first the things.
    """
    groups = [*zip(_split(theirs, tensors), _split(ours, own), strict=True)]
    carried, pairs, new = {}, [], []
    if list(theirs) != list(ours):
        tensors = {key: value for key, value in tensors.items() if not BY_ORDER.match(key)}
    for (theirs, ours), rows in zip(groups, (OF_THINGS, OF_STUFF), strict=True):
        places = {SYNONYMS.get(name, name): index for index, name in enumerate(theirs)}
        shared = {i: places.get(SYNONYMS.get(name, name)) for i, name in enumerate(ours)}
        shared = {target: source for target, source in shared.items() if source is not None}
        adapted = {}
        for key in (key for key in own if rows.fullmatch(key) and key in tensors):
            target = own[key].clone(memory_format=torch.contiguous_format)
            source = _by_class(key, tensors[key], len(theirs))
            goal = _by_class(key, target, len(ours))
            if source is None or goal is None or source.shape[::2] != goal.shape[::2]:
                continue
            for index, place in shared.items():
                goal[:, index] = source[:, place]
            if goal.shape[1] > len(ours):
                goal[:, -1] = source[:, -1]
            adapted[key] = target
        if adapted:
            carried |= adapted
            pairs += [(name, theirs[shared[i]]) for i, name in enumerate(ours) if i in shared]
            new += [name for i, name in enumerate(ours) if i not in shared]
    if carried:
        logger.info(
            "%s: %d of %d classes are carried over by name: %s; at random: %s",
            where,
            len(pairs),
            len(pairs) + len(new),
            ", ".join(a if a == b else f"{a} from {b}" for a, b in pairs) or "none",
            ", ".join(new) or "none",
        )
    return {**tensors, **carried}


def _split(
    names: Sequence[str], tensors: Mapping[str, Tensor]
) -> tuple[Sequence[str], Sequence[str]]:
    """Splits class names into those of things and of stuff, as the tensors have them."""
    scores = next((value for key, value in tensors.items() if SCORES.fullmatch(key)), None)
    things = len(names) if scores is None else len(scores) - 1
    if scores is None and any(key.startswith("sem_seg_head.") for key in tensors):
        things = 0
    return names[:things], names[things:]


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
