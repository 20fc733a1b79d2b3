"""ImageNet-sized data from a config: class folders, a flat validation folder, tar shards."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from resnet_backbone.classification.config import Config, DataConfig
from resnet_backbone.classification.data.augment import CentreCrop, PaperAugmentation
from resnet_backbone.classification.data.bad_images import BadImageReport
from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.build import (
    INPUT_FILE,
    ClassificationData,
    keep_input,
    kept_input,
    preprocessing_from,
    stream_of,
)
from resnet_backbone.classification.data.evaluation import EvaluationFiles
from resnet_backbone.classification.data.imagenet import (
    ImageFiles,
    check_same_classes,
    class_indices,
    read_class_list,
    read_flat_folder,
    read_image_folder,
)
from resnet_backbone.classification.data.loader import LoaderSource
from resnet_backbone.classification.data.modern import InceptionAugmentation
from resnet_backbone.classification.data.shards import TarShards
from resnet_backbone.classification.data.statistics import compute_mean
from resnet_backbone.weights import Preprocessing

BAD_IMAGES = "bad_images.txt"
RAND_AUGMENT = 9  # magnitude, as in torchvision's recipes
WAIT_SECONDS = 24 * 3600  # of the other processes for the mean


def build_files(
    config: Config, folder: Path, *, rank: int = 0, world: int = 1, prepare: Any = None
) -> ClassificationData:
    """See :func:`resnet_backbone.classification.data.build.build_data`."""
    data = config.data
    train = read_training_set(data)
    val = read_validation_set(data, train)
    groups = {"group_sizes": train.group_sizes} if isinstance(train, TarShards) else {}
    report = BadImageReport(folder / BAD_IMAGES, data.max_bad_images, "data.max_bad_images")
    source = LoaderSource(
        train,
        stream_of(config, len(train), rank, world, **groups),
        augmentation_of(data),
        workers=data.workers,
        report=report,
    )
    preprocessing = _preprocessing(config, train, folder, rank, report)
    sides = (config.evaluation.short_side,) if config.evaluation.protocol == "centre" else (None,)
    evaluation = EvaluationFiles(val.samples, sides, prepare)
    names = tuple(train.class_names)
    return ClassificationData(source, evaluation, preprocessing, names, f"{val.root}")


def read_training_set(data: DataConfig) -> ImageFiles | TarShards:
    """``root/train/<class>/<image>``, or ``root/<class>/<image>``, or shards in ``root``."""
    if data.format == "shards":
        return TarShards(data.root)
    classes = read_class_list(data.class_list) if data.class_list else None
    root = Path(data.root)
    return read_image_folder(root / "train" if (root / "train").is_dir() else root, classes)


def read_validation_set(data: DataConfig, train: ImageFiles | TarShards) -> ImageFiles:
    """``val_root``, by default ``root/val``: class folders, or flat with ``val_labels``."""
    root = Path(data.val_root or Path(data.root) / "val")
    if not root.is_dir():
        raise DataError(f"{root}: no validation images; give their folder with data.val_root=PATH")
    classes = class_indices(train)
    if data.val_labels:
        return read_flat_folder(root, data.val_labels, classes, train.num_classes)
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise DataError(
            f"{root} has no class folders: give the label list of a flat folder with "
            "data.val_labels=FILE (tools/prepare_imagenet.py writes it)"
        )
    if data.class_list:  # a part of the classes may be there
        return read_image_folder(root, classes, train.num_classes)
    val = read_image_folder(root)
    if isinstance(train, ImageFiles):
        check_same_classes(train, val)
    return read_image_folder(root, classes, train.num_classes)


def augmentation_of(data: DataConfig):
    """The training augmentation that a config names."""
    if data.augmentation == "none":
        return CentreCrop(data.crop, data.short_side[0])
    if data.augmentation == "inception":
        magnitude = RAND_AUGMENT if data.rand_augment else None
        return InceptionAugmentation(
            data.crop, randaugment=magnitude, colour_noise=data.color_noise
        )
    return PaperAugmentation(data.crop, tuple(data.short_side), colour_noise=data.color_noise)


def _preprocessing(
    config: Config, train: Any, folder: Path, rank: int, report: BadImageReport
) -> Preprocessing:
    """Means of the training set: computed once by the main process, kept in the run folder."""
    data = config.data
    if data.mean == "imagenet" and data.std != "channel":
        return preprocessing_from(data, (0.0,) * 3, (1.0,) * 3, None, "")
    settings = (data.channel_order, data.mean, data.std, data.crop, data.short_side[0])
    made_from = f"{len(train)} images, {data.mean_samples} used, {settings}"
    for _ in range(WAIT_SECONDS):
        kept = kept_input(folder, made_from)
        if kept is not None:
            return kept
        if rank == 0:
            break
        time.sleep(1)  # the main process, which shares the run folder, computes it
    else:
        raise DataError(f"{folder / INPUT_FILE} did not appear: is the run folder shared?")
    found = compute_mean(
        train,
        num_images=data.mean_samples,
        size=data.crop,
        short_side=data.short_side[0],
        workers=data.workers,
        report=report,
        progress=sys.stderr.isatty(),
    )
    image = found.image if data.mean == "pixel" else None
    where = f"centre crops of {found.num_images} training images"
    made = preprocessing_from(data, found.channels, found.std, image, where)
    keep_input(folder, made, made_from)
    return made
