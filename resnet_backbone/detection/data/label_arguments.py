"""What masks and label pictures add to setting up a run: arguments, data sets, classes, crops."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data.segmentation import register_panoptic, register_semantic


def detects_objects(cfg: CfgNode) -> bool:
    """Whether the model finds boxes: every one but the purely semantic."""
    return cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor"


def labels_pixels(cfg: CfgNode) -> bool:
    """Whether the model learns from label pictures."""
    return cfg.MODEL.META_ARCHITECTURE in ("SemanticSegmentor", "PanopticFPN")


def add_label_arguments(data: argparse._ArgumentGroup) -> None:
    """Options that name label pictures and panoptic annotations by path."""
    pair = dict(nargs=2, metavar=("TRAIN", "TEST"))
    data.add_argument("--sem-seg", **pair, help="folders of label pictures, with classes.txt")
    data.add_argument("--panoptic-json", **pair, help="panoptic JSON files, beside --coco-json")
    data.add_argument(
        "--panoptic-root", **pair, help="their pictures (default: the JSON's name without .json)"
    )


def register_label_paths(cfg: CfgNode, args: argparse.Namespace, roots: Sequence[str]) -> None:
    """Registers ``--sem-seg`` folders, alone or with ``--coco-json`` and ``--panoptic-json``.

    Args:
        cfg: gets the names under ``DATASETS``, in place.
        roots: image folders for training and test.
    """
    if not labels_pixels(cfg):
        raise UsageError(
            f"--sem-seg: {cfg.MODEL.META_ARCHITECTURE} has no use for label pictures; take "
            "a semantic or panoptic config of configs/segmentation"
        )
    panoptic = detects_objects(cfg)
    if panoptic and not (args.coco_json and args.panoptic_json):
        raise UsageError("Panoptic FPN needs --coco-json, --panoptic-json and --sem-seg")
    kind = "panoptic" if panoptic else "sem_seg"
    names = f"train:{kind}", f"test:{kind}"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    panoptic_roots = args.panoptic_root or ("", "")
    shared = roots[0] == roots[1] and args.sem_seg[0] != args.sem_seg[1]
    for i, name in enumerate(names):
        checks = dict(on_bad=args.bad_data, decode=i == 1)
        if panoptic:
            files = args.sem_seg[i], args.panoptic_json[i], panoptic_roots[i]
            register_panoptic(name, args.coco_json[i], roots[i], *files, **checks)
        else:
            register_semantic(name, roots[i], args.sem_seg[i], shared_images=shared, **checks)


def check_annotations(cfg: CfgNode, name: str, images: Sequence[dict]) -> None:
    """Refuses training data without the boxes, masks or label pictures that the model learns from.

    Raises:
        UsageError: what is missing, and what to give.
    """
    if labels_pixels(cfg) and not all("sem_seg_file_name" in image for image in images):
        raise UsageError(
            f"data set {name} has no label pictures, which {cfg.MODEL.META_ARCHITECTURE} needs: "
            "give --sem-seg TRAIN TEST (tools/make_segmentation_labels.py makes them from masks)"
        )
    if not detects_objects(cfg):
        return
    boxes = (a for image in images for a in image.get("annotations", ()))
    objects = [entry for entry in boxes if not entry.get("iscrowd", 0)]
    if not objects:
        raise UsageError(f"data set {name} has no boxes to learn from: train on an annotated one")
    if not cfg.MODEL.MASK_ON:
        return
    bare = sum(not entry.get("segmentation") for entry in objects)
    if bare:
        raise UsageError(
            f"data set {name}: {bare} of {len(objects)} boxes have no mask, which MODEL.MASK_ON "
            "needs: give --coco-json with segmentations, or set MODEL.MASK_ON False"
        )
    encoded = sum(isinstance(entry["segmentation"], dict) for entry in objects)
    if encoded and cfg.INPUT.MASK_FORMAT == "polygon":
        raise UsageError(
            f"data set {name}: {encoded} of {len(objects)} masks are run-length encoded: set "
            "INPUT.MASK_FORMAT bitmask"
        )


def set_class_counts(cfg: CfgNode, things: Sequence[str], labels: Sequence[str]) -> None:
    """Writes names and numbers of classes into the config, in place.

    Args:
        things: classes of boxes and masks; empty for a purely semantic model.
        labels: classes of label pictures; empty for a detector.
    """
    cfg.RESNET_BACKBONE.CLASS_NAMES = list(things)
    cfg.RESNET_BACKBONE.STUFF_CLASS_NAMES = list(labels)
    if things:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(things)
    if labels:
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(labels)
    if "POINT_HEAD" in cfg.MODEL:
        cfg.MODEL.POINT_HEAD.NUM_CLASSES = len(things or labels)


def mapper_options(cfg: CfgNode) -> dict:
    """Arguments of the training ``DatasetMapper`` that differ from Detectron2's default.

    A purely semantic model with ``INPUT.CROP.ENABLED`` crops after resizing, as Detectron2's
    DeepLab does, and pads smaller images to the crop, whose size its pooling is built for.
    """
    if detects_objects(cfg) or not cfg.INPUT.CROP.ENABLED:
        return {}
    crop, ignore = cfg.INPUT.CROP, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    largest_share = crop.get("SINGLE_CATEGORY_MAX_AREA", 1.0)
    cropping = T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, largest_share, ignore)
    resizing, *flipping = build_augmentation(cfg, is_train=True)
    augmentations = [resizing, cropping, *flipping]
    if crop.TYPE == "absolute":
        augmentations.append(T.FixedSizeCrop(tuple(crop.SIZE), pad=True, seg_pad_value=ignore))
    return {"augmentations": augmentations}
