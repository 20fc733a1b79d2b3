"""What the command-line tools share: configs, data sets by path, errors in one line."""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)
from yaml import YAMLError

from resnet_backbone.detection.config import (
    UsageError,
    add_resnet_backbone_config,
    backbone_node,
)
from resnet_backbone.detection.data import VOC_CLASSES, find_voc_classes, register_voc
from resnet_backbone.detection.data.coco import register_coco
from resnet_backbone.detection.projects import add_project_keys
from resnet_backbone.detection.segmentation import (
    add_label_arguments,
    check_annotations,
    detects_objects,
    labels_pixels,
    register_label_paths,
    set_class_counts,
)
from resnet_backbone.detection.signals import EXIT_STOPPED, Stopped

logger = logging.getLogger(__name__)

VOC_2012_TEST = "voc_2012_test"


ONE_LINE = (ValueError, OSError, FloatingPointError, Stopped)


def one_line_errors(main: Callable) -> Callable:
    """Wrong input (ValueError, OSError) and divergence end a tool with one line, exit status 2.

    A stop by a signal does so with ``EXIT_STOPPED``. With the environment variable
    ``RESNET_BACKBONE_TRACEBACK`` set, the traceback is shown.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except ONE_LINE as error:
            if os.environ.get("RESNET_BACKBONE_TRACEBACK"):
                raise
            message, status = outcome(error)
            print(message, file=sys.stderr)
            raise SystemExit(status) from None

    return wrapped


def outcome(error: Exception) -> tuple[str, int]:
    """The line and the exit status for one of :data:`ONE_LINE`."""
    if isinstance(error, Stopped):
        return f"stopped by {error}; go on with the same command and --resume", EXIT_STOPPED
    return f"error: {diverged(error) if isinstance(error, FloatingPointError) else error}", 2


def diverged(error: FloatingPointError) -> str:
    """What to do about a loss, proposals or weights that are not finite."""
    first_line = str(error).partition("\n")[0]
    return (
        f"{first_line} Lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or set "
        "SOLVER.CLIP_GRADIENTS.ENABLED True, and start again"
    )


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Detectron2's defaults + ours + a YAML file + ``KEY VALUE`` pairs.

    Raises:
        UsageError: no such file, a key that does not exist (with the nearest one that does), a
            value of the wrong type, ``key=value`` in place of ``KEY VALUE``.
    """
    cfg = add_resnet_backbone_config(get_cfg())
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if config_file:
        if not os.path.isfile(config_file):
            raise UsageError(f"{config_file}: no such config; configs/detection has ready ones")
        _merge(cfg, lambda: add_project_keys(cfg, config_file, overrides))
        _merge(cfg, lambda: cfg.merge_from_file(config_file, allow_unsafe=False))
    joined = next((word for word in overrides[::2] if "=" in word), None)
    if joined:
        raise UsageError(f"write {joined.replace('=', ' ', 1)!r} and not {joined!r}: KEY VALUE")
    if len(overrides) % 2:
        raise UsageError(f"overrides come in pairs, KEY VALUE: {' '.join(overrides)!r} has a rest")
    _merge(cfg, lambda: cfg.merge_from_list(overrides))
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: there is no GPU here; use cpu")
    return cfg


def _merge(cfg: CfgNode, merge: Callable[[], None]) -> None:
    try:
        merge()
    except (KeyError, ValueError, AssertionError, TypeError, YAMLError) as error:
        # yacs says "Non-existent config key: A.B" (KeyError) in files and "Non-existent key: A.B"
        # (AssertionError) in overrides
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error))
        if not unknown:
            raise UsageError(f"config: {' '.join(str(error).split())}") from error
        near = difflib.get_close_matches(unknown[1], _keys(cfg), n=1, cutoff=0.4)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"there is no config key {unknown[1]}{hint}") from error


def refuse_frozen_random(cfg: CfgNode) -> None:
    """Layers without weights that cannot learn either would spoil a training silently.

    Raises:
        UsageError: ``MODEL.WEIGHTS`` is empty, and ``FREEZE_AT`` or FrozenBN keeps layers fixed.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    key, norm = "MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM
    if "vgg" in cfg.MODEL.BACKBONE.NAME:
        key, norm = "RESNET_BACKBONE.VGG.NORM", backbone_node(cfg).VGG.NORM
    found, mend = [], []
    if freeze_at > 0:
        found.append(f"the first {freeze_at} stages are frozen (MODEL.BACKBONE.FREEZE_AT)")
        mend.append("MODEL.BACKBONE.FREEZE_AT 0")
    if norm == "FrozenBN":
        found.append(f"{key} is FrozenBN")
        mend.append(f"{key} BN")
    if found and not cfg.MODEL.WEIGHTS:
        raise UsageError(
            f"MODEL.WEIGHTS is empty but {' and '.join(found)}: random layers would never learn; "
            f"give weights, or set {' '.join(mend)}"
        )


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name a data set by path."""
    data = parser.add_argument_group(
        "data", "By path, or by registered names with DATASETS.TRAIN and DATASETS.TEST."
    )
    data.add_argument("--voc-root", metavar="DIR", help="folder with Annotations/, JPEGImages/")
    data.add_argument("--train-set", metavar="NAME", help="split in ImageSets/Main, e.g. trainval")
    data.add_argument("--test-set", metavar="NAME", help="split in ImageSets/Main, e.g. test")
    data.add_argument(
        "--coco-json",
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="instances JSON files to train on and to evaluate on",
    )
    data.add_argument(
        "--image-root",
        nargs="+",
        metavar="DIR",
        help="image folders of the two JSON files; one folder serves both",
    )
    add_label_arguments(data)
    data.add_argument(
        "--bad-data",
        choices=("drop", "refuse"),
        default="drop",
        help="missing or broken files and boxes: go on without them, or stop (default: drop)",
    )


def set_up_data(cfg: CfgNode, args: argparse.Namespace) -> int:
    """Registers the data sets, checks them, and writes their names and classes into the config.

    Returns:
        The number of training images without those that Detectron2 leaves out.

    Raises:
        DataError: problems in the data with ``--bad-data refuse``, or nothing usable at all.
    """
    if args.voc_root and args.coco_json:
        raise UsageError("give --voc-root or --coco-json, not both")
    if args.voc_root:
        _register_voc_paths(cfg, args)
    elif args.sem_seg:
        register_label_paths(cfg, args, _image_roots(args))
    elif args.coco_json:
        _register_coco_paths(cfg, args)
    else:
        for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
            _adopt(name, cfg, args.bad_data)
    if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
        raise UsageError(
            "no data: give --voc-root DIR --train-set NAME --test-set NAME, or --coco-json TRAIN "
            "TEST --image-root DIR, or DATASETS.TRAIN and DATASETS.TEST"
        )
    counts = {}
    for name in sorted({*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}):
        images = DatasetCatalog.get(name)
        counts[name] = count_usable(cfg, images)
        boxes = sum(len(image.get("annotations", ())) for image in images)
        logger.info("data set %s: %d images, %d boxes", name, len(images), boxes)
        if name in cfg.DATASETS.TRAIN and not args.eval_only:
            check_annotations(cfg, name, images)
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
                f"MODEL.{key}.NUM_CLASSES {wanted}, but the data have {count} classes: leave it out"
            )
    return sum(counts[name] for name in cfg.DATASETS.TRAIN)


def count_usable(cfg: CfgNode, images: list[dict]) -> int:
    """The number of images that a training would use, as Detectron2's loader filters them."""
    if not images or "annotations" not in images[0]:
        return len(images)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        images = filter_images_with_only_crowd_annotations(images)
    if cfg.MODEL.KEYPOINT_ON:
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        images = filter_images_with_few_keypoints(images, least)
    return len(images)


def take_back_overrides(args: argparse.Namespace, *options: str) -> None:
    """Gives KEY VALUE pairs behind options with several values back to the config, in place.

    Args:
        options: beside ``image_root``; their values are lists of words, or None.
    """
    is_key = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD").fullmatch
    for option in ("image_root", *options):
        words = getattr(args, option, None) or []
        first = next((i for i, word in enumerate(words) if i and is_key(word)), len(words))
        args.opts = [*args.opts, *words[first:]]
        if words:
            setattr(args, option, words[:first])


def _common_classes(cfg: CfgNode, key: str, kind: str) -> list[str]:
    """The class names that all data sets agree on, and with them the config key if it is set."""
    classes, source = list(cfg.RESNET_BACKBONE[key]), f"RESNET_BACKBONE.{key}"
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        found = list(MetadataCatalog.get(name).get(kind, []))
        if classes and found != classes:
            raise UsageError(
                f"data set {name} has the classes {found}, {source} has {classes}: both need the "
                "same names in the same order (COCO JSON: the order of the category ids)"
            )
        classes, source = found, f"data set {name}"
    return classes


def _register_voc_paths(cfg: CfgNode, args: argparse.Namespace) -> None:
    train_set = args.train_set or (args.test_set if args.eval_only else None)
    if not train_set or not args.test_set:
        raise UsageError("--voc-root needs --train-set NAME and --test-set NAME")
    splits = [train_set, args.test_set]
    classes = list(cfg.RESNET_BACKBONE.CLASS_NAMES) or find_voc_classes(args.voc_root, splits)
    keep = cfg.RESNET_BACKBONE.TRAIN_ON_DIFFICULT
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"train:{splits[0]}",), (f"test:{splits[1]}",)
    for name, split, difficult, decode in (
        (cfg.DATASETS.TRAIN[0], splits[0], keep, False),
        (cfg.DATASETS.TEST[0], splits[1], True, True),
    ):
        register_voc(name, args.voc_root, split, classes, difficult, args.bad_data, decode)


def _image_roots(args: argparse.Namespace) -> list[str]:
    if not args.image_root or len(args.image_root) > 2:
        option, got = "--coco-json" if args.coco_json else "--sem-seg", args.image_root or ["none"]
        raise UsageError(
            f"{option} TRAIN TEST needs --image-root DIR, or one for each file; got "
            f"{' '.join(got)} (KEY VALUE pairs go elsewhere than after these folders)"
        )
    return (args.image_root * 2)[:2]


def _register_coco_paths(cfg: CfgNode, args: argparse.Namespace) -> None:
    roots = _image_roots(args)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train:coco",), ("test:coco",)
    for name, file, root in zip(("train:coco", "test:coco"), args.coco_json, roots, strict=True):
        register_coco(name, file, root, args.bad_data, decode=name == "test:coco")


def _adopt(name: str, cfg: CfgNode, on_bad: str) -> None:
    """Lets our loaders read and check a data set that Detectron2 registered by itself.

    Also VOC 2012's test set, which has no annotations and which Detectron2 does not know.
    """
    if name == VOC_2012_TEST and name not in DatasetCatalog.list():
        root = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "VOC2012")
        register_voc(name, root, "test", VOC_CLASSES, on_bad=on_bad, decode=True)
        return
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no data set is registered as {name!r}{hint}")
    known, tested = MetadataCatalog.get(name), name in cfg.DATASETS.TEST
    if known.get("evaluator_type") not in ("pascal_voc", "coco") or known.get("adopted"):
        return
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    if known.evaluator_type == "coco":
        register_coco(name, known.json_file, known.image_root, on_bad, decode=tested)
    else:
        difficult = tested or cfg.RESNET_BACKBONE.TRAIN_ON_DIFFICULT
        classes = list(known.thing_classes)
        register_voc(name, known.dirname, known.split, classes, difficult, on_bad, decode=tested)
    MetadataCatalog.get(name).adopted = True
