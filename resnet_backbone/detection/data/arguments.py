"""Command-line options that name data sets by path, and their effect on a config."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)

from resnet_backbone.detection.config import UsageError, backbone_node
from resnet_backbone.detection.data.coco import register_coco
from resnet_backbone.detection.data.formats.coco import first_images
from resnet_backbone.detection.data.formats.voc import find_voc_dir, read_split
from resnet_backbone.detection.data.records import BOX_COLUMNS, RUN_LENGTHS, Records
from resnet_backbone.detection.data.scans import dataset_records, first_process_first
from resnet_backbone.detection.data.segmentation import register_panoptic, register_semantic
from resnet_backbone.detection.data.voc import VOC_CLASSES, find_voc_classes, register_voc
from resnet_backbone.runtime.errors import DataError

logger = logging.getLogger(__name__)

VOC_2012_TEST = "voc_2012_test"


def detects_objects(cfg: CfgNode) -> bool:
    """Whether the model predicts boxes: all but purely semantic ones do."""
    return cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor"


def labels_pixels(cfg: CfgNode) -> bool:
    """Whether the model is trained on label images."""
    return cfg.MODEL.META_ARCHITECTURE in ("SemanticSegmentor", "PanopticFPN")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a data set by path."""
    about = "Give paths, or registered names with DATASETS.TRAIN and DATASETS.TEST."
    data = parser.add_argument_group("data", about)
    data.add_argument("--voc-root", metavar="DIR", help="folder with Annotations/ and JPEGImages/")
    data.add_argument("--train-set", metavar="NAME", help="split in ImageSets/Main, e.g. trainval")
    data.add_argument("--test-set", metavar="NAME", help="split in ImageSets/Main, e.g. test")
    pair = dict(nargs=2, metavar=("TRAIN", "TEST"))
    data.add_argument("--coco-json", **pair, help="COCO instances to train and to evaluate on")
    roots = "image folder of both sets, or one folder for each"
    data.add_argument("--image-root", nargs="+", metavar="DIR", help=roots)
    data.add_argument("--sem-seg", **pair, help="folders of label images, with classes.txt")
    text = "COCO panoptic files, in addition to --coco-json"
    data.add_argument("--panoptic-json", **pair, help=text)
    pictures = "their segment images (default: the JSON file's name without .json)"
    data.add_argument("--panoptic-root", **pair, help=pictures)
    policies = "leave out missing or broken files and boxes, or stop (default: drop)"
    data.add_argument("--bad-data", choices=("drop", "refuse"), default="drop", help=policies)


def check_data_arguments(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuses wrong options that can be detected before anything is downloaded or scanned.

    Raises:
        UsageError: options contradict each other or are missing, or a name is unknown.
        DataError: a folder, file or split does not exist.
    """
    if args.voc_root and args.coco_json:
        raise UsageError("give either --voc-root or --coco-json")
    if args.voc_root:
        splits, folder = _voc_splits(args), find_voc_dir(args.voc_root)
        for split in splits:
            read_split(folder, split)
    elif args.sem_seg or args.coco_json:
        given = [args.coco_json, args.sem_seg, args.panoptic_json, args.panoptic_root]
        roots = _image_roots(args)
        for path in (path for paths in (*given, roots) for path in paths or ()):
            if not os.path.exists(path):
                raise DataError(f"{path} does not exist")
        for path, root in zip(args.coco_json or (), roots, strict=False):
            names = first_images(path)
            if names and not any(os.path.isfile(os.path.join(root, name)) for name in names):
                raise DataError(
                    f"--image-root {root} has none of the first {len(names)} images of {path}, "
                    f"such as {names[0]}: give the folder that these names are relative to"
                )
    else:
        known = [*DatasetCatalog.list(), VOC_2012_TEST]
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            if name not in known:
                if ":" in name:  # a name given by register_paths
                    raise UsageError(
                        "the run's data are not registered: give --voc-root, or --coco-json and "
                        "--image-root, as in training (results.json has the command)"
                    )
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"no data set is registered as {name!r}{hint}")
        if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
            raise UsageError(
                "no data: give --voc-root DIR --train-set NAME --test-set NAME, or --coco-json "
                "TRAIN TEST --image-root DIR, or DATASETS.TRAIN and DATASETS.TEST"
            )


def set_up_data(cfg: CfgNode, args: argparse.Namespace) -> int:
    """Registers the data sets, checks them, and writes their names and classes into the config.

    Returns:
        The number of usable training images.

    Raises:
        UsageError, DataError: see :func:`check_data_arguments` and :func:`apply_policy`.
    """
    check_data_arguments(cfg, args)
    with first_process_first() as shared:
        if args.voc_root and not cfg.RESNET_BACKBONE.CLASS_NAMES:
            if "classes" not in shared:
                shared["classes"] = find_voc_classes(args.voc_root, _voc_splits(args))
            cfg.RESNET_BACKBONE.CLASS_NAMES = shared["classes"]
        if args.voc_root or args.sem_seg or args.coco_json:
            register_paths(cfg, args)
        else:
            for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
                _adopt(name, cfg, args.bad_data)
        names = sorted({*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST})
        found = {name: dataset_records(name) for name in names}
    num_training = 0
    for name, records in found.items():
        boxes = len(records.box_column("image"))
        logger.info("data set %s: %d images, %d boxes", name, len(records), boxes)
        if name in cfg.DATASETS.TRAIN and not args.eval_only:
            check_annotations(cfg, name, records)
            num_training += cfg.DATASETS.TRAIN.count(name) * len(usable_records(cfg, name, records))
        if cfg.MODEL.KEYPOINT_ON:
            name_keypoints(cfg, name)
    things, labels = [], []
    given = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    if detects_objects(cfg):
        things = _common_classes(cfg, "CLASS_NAMES", "thing_classes")
    if labels_pixels(cfg):
        labels = _common_classes(cfg, "STUFF_CLASS_NAMES", "stuff_classes")
    set_class_counts(cfg, things, labels)
    for key in ("ROI_HEADS", "RETINANET", "SEM_SEG_HEAD"):
        count, wanted = cfg.MODEL[key].NUM_CLASSES, given.get(f"MODEL.{key}.NUM_CLASSES")
        if wanted is not None and str(count) != wanted:
            raise UsageError(
                f"MODEL.{key}.NUM_CLASSES {wanted}, but the data have {count} classes: omit it"
            )
    return num_training


def name_keypoints(cfg: CfgNode, name: str) -> None:
    """Gives a data set COCO's names of a person's 17 keypoints, which Detectron2 requires."""
    metadata, count = MetadataCatalog.get(name), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if metadata.get("keypoint_names") is None:
        if count != len(COCO_PERSON_KEYPOINT_NAMES):
            raise UsageError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {count}: {name} does not name keypoints, "
                "so they must be COCO's 17 of a person. Register your own data set with "
                "keypoint_names and keypoint_flip_map in its metadata"
            )
        flips = COCO_PERSON_KEYPOINT_FLIP_MAP
        metadata.set(keypoint_names=COCO_PERSON_KEYPOINT_NAMES, keypoint_flip_map=flips)


def usable_records(cfg: CfgNode, name: str, records: Records) -> Records:
    """Returns the records to train on, without images and masks that Detectron2 would drop.

    Raises:
        UsageError: nothing is left.
    """
    is_used, annotated = np.ones(len(records), bool), records.image_column("has_annotations").all()
    filters = annotated and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    if filters:
        is_used &= records.per_image(records.box_column("crowd") == 0) > 0
    if annotated and cfg.MODEL.KEYPOINT_ON:
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        is_used &= records.per_image(records.box_column("points")) >= least
    if cfg.MODEL.MASK_ON:
        has_mask = records.store.boxes[:, BOX_COLUMNS.index("mask")] > 0
        records = records.select(boxes=has_mask)
        if filters:
            is_used &= records.per_image(records.box_column("mask") > 0) > 0
    if not is_used.any():
        raise UsageError(
            f"data set {name}: none of its {len(records)} images can be used for training"
        )
    return records.select(images=is_used)


def _common_classes(cfg: CfgNode, key: str, kind: str) -> list[str]:
    """Returns the class names shared by all data sets and by the config key, if it is set."""
    classes, source = list(cfg.RESNET_BACKBONE[key]), f"RESNET_BACKBONE.{key}"
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        found = list(MetadataCatalog.get(name).get(kind, []))
        if classes and found != classes:
            raise UsageError(
                f"data set {name} has the classes {found}, but {source} has {classes}: both need "
                "the same names in the same order (in COCO's format, that of the category ids)"
            )
        classes, source = found, f"data set {name}"
    return classes


def _voc_splits(args: argparse.Namespace) -> tuple[str, str]:
    train_set = args.train_set or (args.test_set if args.eval_only else None)
    if not train_set or not args.test_set:
        raise UsageError("--voc-root needs --train-set NAME and --test-set NAME")
    return train_set, args.test_set


def _image_roots(args: argparse.Namespace) -> list[str]:
    if not args.image_root or len(args.image_root) > 2:
        option, got = "--coco-json" if args.coco_json else "--sem-seg", args.image_root or ["none"]
        raise UsageError(
            f"{option} TRAIN TEST needs --image-root DIR, or one for each file; got {' '.join(got)}"
        )
    return (args.image_root * 2)[:2]


def register_paths(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Registers the data sets given by path, and writes their names into the config, in place."""
    if args.voc_root:
        kinds = splits = _voc_splits(args)
        classes = list(cfg.RESNET_BACKBONE.CLASS_NAMES) or None
    else:
        kinds, roots = [_kind(cfg, args)] * 2, _image_roots(args)
        if backbone_node(cfg).TRAIN_ON_DIFFICULT:
            raise UsageError(
                "RESNET_BACKBONE.TRAIN_ON_DIFFICULT needs --voc-root: COCO's format does not know "
                "difficult boxes, prepare-data writes them as crowds"
            )
    names = f"train:{kinds[0]}", f"test:{kinds[1]}"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    for i, name in enumerate(names):
        checks = dict(on_bad=args.bad_data, decode=i == 1)
        if args.voc_root:
            difficult = i == 1 or cfg.RESNET_BACKBONE.TRAIN_ON_DIFFICULT
            register_voc(name, args.voc_root, splits[i], classes, difficult, **checks)
        elif kinds[i] == "coco":
            register_coco(name, args.coco_json[i], roots[i], **checks)
        elif kinds[i] == "panoptic":
            files = args.sem_seg[i], args.panoptic_json[i], (args.panoptic_root or ("", ""))[i]
            register_panoptic(name, args.coco_json[i], roots[i], *files, **checks)
        else:
            shared = roots[0] == roots[1] and args.sem_seg[0] != args.sem_seg[1]
            register_semantic(name, roots[i], args.sem_seg[i], shared_images=shared, **checks)


def _kind(cfg: CfgNode, args: argparse.Namespace) -> str:
    if not args.sem_seg:
        return "coco"
    if not labels_pixels(cfg):
        raise UsageError(
            f"--sem-seg: {cfg.MODEL.META_ARCHITECTURE} does not use label images; choose "
            "a semantic or panoptic config from configs/segmentation"
        )
    if not detects_objects(cfg):
        return "sem_seg"
    if not (args.coco_json and args.panoptic_json):
        raise UsageError("Panoptic FPN needs --coco-json, --panoptic-json, and --sem-seg")
    return "panoptic"


def check_annotations(cfg: CfgNode, name: str, records: Records) -> None:
    """Refuses training data without the boxes, masks or labels that the model needs."""
    if labels_pixels(cfg) and not records.image_column("has_labels").all():
        raise UsageError(
            f"data set {name} has no label images, which {cfg.MODEL.META_ARCHITECTURE} needs: "
            "give --sem-seg TRAIN TEST (resnet-backbone prepare-data labels makes them from masks)"
        )
    if not detects_objects(cfg):
        return
    is_object, mask = records.box_column("crowd") == 0, records.box_column("mask")
    objects = int(is_object.sum())
    if not objects:
        raise UsageError(f"data set {name} has no boxes to learn from: choose an annotated set")
    if not cfg.MODEL.MASK_ON:
        return
    is_bare = is_object & (mask == 0)
    bare = int(is_bare.sum())
    if bare == objects:
        raise UsageError(
            f"data set {name}: MODEL.MASK_ON needs masks, but none of the {bare} boxes has a "
            "usable one: give --coco-json with segmentations, or set MODEL.MASK_ON False"
        )
    for line in _boxes_without_masks(records, np.unique(records.box_column("image")[is_bare])):
        logger.warning("left out: no usable mask: %s", line)
    encoded = int((is_object & (mask == RUN_LENGTHS)).sum())
    if encoded and cfg.INPUT.MASK_FORMAT == "polygon":
        raise UsageError(
            f"data set {name}: {encoded} of {objects - bare} masks are run-length encoded: set "
            "INPUT.MASK_FORMAT bitmask"
        )


def _boxes_without_masks(records: Records, places: Sequence[int]) -> Iterator[str]:
    for image in (records[place] for place in places):
        for entry in image["annotations"]:
            if not entry.get("segmentation") and not entry.get("iscrowd", 0):
                yield f"{image['file_name']}: box {[round(side, 1) for side in entry['bbox']]}"


def set_class_counts(cfg: CfgNode, things: Sequence[str], labels: Sequence[str]) -> None:
    """Writes names and numbers of thing and stuff classes into the config."""
    cfg.RESNET_BACKBONE.CLASS_NAMES = list(things)
    cfg.RESNET_BACKBONE.STUFF_CLASS_NAMES = list(labels)
    if things:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(things)
    if labels:
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(labels)
    if "POINT_HEAD" in cfg.MODEL:
        cfg.MODEL.POINT_HEAD.NUM_CLASSES = len(things or labels)


def _adopt(name: str, cfg: CfgNode, on_bad: str) -> None:
    """Re-registers a data set of Detectron2's own loaders, to be read and checked by our code.

    It also registers VOC 2012's test set, which has no annotations and is unknown to Detectron2.
    """
    if name == VOC_2012_TEST and name not in DatasetCatalog.list():
        root = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "VOC2012")
        register_voc(name, root, "test", VOC_CLASSES, on_bad=on_bad, decode=True)
        return
    known, tested = MetadataCatalog.get(name), name in cfg.DATASETS.TEST
    loader, kind = getattr(DatasetCatalog[name], "__module__", ""), known.get("evaluator_type")
    if not loader.startswith("detectron2.data.datasets.") or kind not in ("pascal_voc", "coco"):
        return
    keeps_difficult = cfg.RESNET_BACKBONE.TRAIN_ON_DIFFICULT
    is_voc = kind == "pascal_voc"
    if is_voc and tested and name in cfg.DATASETS.TRAIN and not keeps_difficult:
        raise UsageError(
            f"{name} is in DATASETS.TRAIN and DATASETS.TEST, and only evaluation has its difficult "
            "boxes: give --voc-root with --train-set and --test-set, or "
            "RESNET_BACKBONE.TRAIN_ON_DIFFICULT True"
        )
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    if not is_voc:
        register_coco(name, known.json_file, known.image_root, on_bad, decode=tested)
    else:
        difficult = tested or keeps_difficult
        classes = list(known.thing_classes)
        register_voc(name, known.dirname, known.split, classes, difficult, on_bad, decode=tested)
    own = MetadataCatalog.get(name)  # keeps what else is known, such as keypoint_names
    own.set(**{key: value for key, value in known.as_dict().items() if not hasattr(own, key)})
