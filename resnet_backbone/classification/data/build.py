"""From a config to training batches, evaluation images and the input that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_backbone.classification.config import Config, DataConfig
from resnet_backbone.classification.data.augment import (
    CenterCrop,
    InceptionAugmentation,
    PaperAugmentation,
)
from resnet_backbone.classification.data.evaluation import EvaluationArrays, EvaluationFiles
from resnet_backbone.classification.data.imagenet import (
    EncodedDataset,
    ImageFiles,
    TarShards,
    check_same_classes,
    read_class_list,
    read_flat_folder,
    read_image_folder,
)
from resnet_backbone.classification.data.loader import Augmentation, BadImageReport, LoaderSource
from resnet_backbone.classification.data.sources import (
    CIFAR10_CLASSES,
    HELD_OUT,
    ArraySource,
    Batch,
    SampleStream,
    SyntheticSource,
    read_cifar10,
    read_digits,
)
from resnet_backbone.classification.data.statistics import (
    MEAN_BATCH,
    MeanStatistics,
    image_statistics,
    preprocessing_from,
    training_input,
)
from resnet_backbone.runtime.builtin import CLASS_NAMES as DIGITS
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights import Preprocessing

BAD_IMAGES = "bad_images.txt"  # in the run folder
RAND_AUGMENT = 9  # magnitude, as in torchvision's recipes


@dataclass(frozen=True)
class ClassificationData:
    """What training needs of its data."""

    source: Any  # training batches by iteration, with `num_samples`
    evaluation: EvaluationFiles | EvaluationArrays  # every image once
    preprocessing: Preprocessing  # mean, standard deviation and channel order of the input
    class_names: tuple[str, ...]
    evaluated_on: str  # what the errors are measured on


def build_data(
    config: Config,
    folder: Path,
    world: World | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> ClassificationData:
    """Reads the data set that a config names. Called by all processes of a run together.

    Args:
        config: the whole config; ``data``, ``train`` and ``evaluation`` matter here.
        folder: of the run; the computed mean is kept there.
        world: this process among those of the run; arrays lie on its device. By default one
            process on the CPU.
        prepare: of the evaluation protocol, see ``EvaluationFiles``.

    Raises:
        DataError: missing or damaged data.
    """
    world = world or World()
    if config.data.format == "synthetic":
        return _synthetic(config, world)
    if config.data.format in ("imagenet", "shards"):
        return _encoded(config, folder, world, prepare)
    return _arrays(config, world)


def _stream(
    config: Config, num_samples: int, world: World, group_sizes: tuple[int, ...] = ()
) -> SampleStream:
    train = config.train
    return SampleStream(
        num_samples, train.batch_size, train.seed, world.rank, world.size, group_sizes
    )


def _arrays(config: Config, world: World) -> ClassificationData:
    """Data sets that fit into memory."""
    data = config.data
    if data.format == "cifar10":
        names, tested_on = CIFAR10_CLASSES, "CIFAR-10 test"
        images, labels = read_cifar10(data.root, train=True)
        tests, test_labels = read_cifar10(data.root, train=False)
        if data.split == "45k":
            tested_on = f"CIFAR-10, the last {HELD_OUT} training images"
            tests, test_labels = images[-HELD_OUT:], labels[-HELD_OUT:]
            images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    else:
        names, tested_on = DIGITS, "built-in digits, test"
        images, labels = read_digits(train=True)
        tests, test_labels = read_digits(train=False)
    found = image_statistics(images.split(MEAN_BATCH), images.shape[1:])
    preprocessing = preprocessing_from(data, found, f"training set of {data.format}")
    source = ArraySource(
        images,
        labels,
        _stream(config, len(labels), world),
        augmentation=data.augmentation,
        padding=_padding(data, preprocessing),
        device=world.device,
    )
    evaluation = EvaluationArrays(tests.to(world.device), test_labels)
    return ClassificationData(source, evaluation, preprocessing, names, tested_on)


def _padding(data: DataConfig, preprocessing: Preprocessing) -> Tensor | None:
    """Pixels (3, H, W), RGB, 0..255, around a training image: those that normalize to zero."""
    if data.padding == "black":
        return None
    mean = preprocessing.mean_image
    if mean is None:
        mean = torch.tensor(preprocessing.mean)[:, None, None]
    return mean.flip(0) if preprocessing.channel_order == "BGR" else mean


def _synthetic(config: Config, world: World) -> ClassificationData:
    data = config.data
    local = config.train.batch_size // world.size
    shape = (3, data.synthetic_size, data.synthetic_size)
    names = tuple(f"class_{number}" for number in range(data.synthetic_classes))
    samples = data.synthetic_samples
    random = torch.Generator().manual_seed(world.rank)
    images = torch.randint(0, 256, (local, *shape), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, len(names), (local,), generator=random)
    images = images.to(world.device, memory_format=torch.channels_last)
    source = SyntheticSource(Batch(images, labels.to(world.device)), samples)
    count = min(samples, 2 * config.evaluation.batch_size)
    tests = torch.zeros((count, *shape), dtype=torch.uint8)
    evaluation = EvaluationArrays(tests, torch.arange(count) % len(names))
    gray = MeanStatistics(None, (127.5,) * 3, (74.0,) * 3, samples)
    preprocessing = preprocessing_from(data, gray, "synthetic data")
    return ClassificationData(source, evaluation, preprocessing, names, "synthetic images")


def _encoded(
    config: Config, folder: Path, world: World, prepare: Callable[[Tensor], Tensor] | None
) -> ClassificationData:
    """ImageNet-sized data: class folders, a flat validation folder, tar shards."""
    data = config.data
    train = read_training_set(data)
    val = read_validation_set(data, train)
    groups = train.group_sizes if isinstance(train, TarShards) else ()
    report = BadImageReport(folder / BAD_IMAGES, data.max_bad_images, "data.max_bad_images")
    source = LoaderSource(
        train,
        _stream(config, len(train), world, groups),
        augmentation_of(data),
        workers=data.workers,
        report=report,
    )
    preprocessing = training_input(data, train, folder, world, report)
    whole = config.evaluation.protocol == "full"
    evaluation = EvaluationFiles(
        val.samples, (None if whole else config.evaluation.short_side,), prepare
    )
    return ClassificationData(source, evaluation, preprocessing, train.class_names, str(val.root))


def read_training_set(data: DataConfig) -> EncodedDataset:
    """``root/train/<class>/<image>``, or ``root/<class>/<image>``, or shards in ``root``."""
    if data.format == "shards":
        return TarShards(data.root)
    classes = read_class_list(data.class_list) if data.class_list else None
    root = Path(data.root)
    return read_image_folder(root / "train" if (root / "train").is_dir() else root, classes)


def read_validation_set(data: DataConfig, train: EncodedDataset) -> ImageFiles:
    """``val_root``, by default ``root/val``: class folders, or flat with ``val_labels``."""
    root = Path(data.val_root or Path(data.root) / "val")
    if not root.is_dir():
        raise DataError(f"{root}: no validation images; give their folder with data.val_root=PATH")
    classes = {name: index for index, name in enumerate(train.class_names)}
    if data.val_labels:
        return read_flat_folder(root, data.val_labels, classes, len(classes))
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise DataError(
            f"{root} has no class folders: give the label list of a flat folder with "
            "data.val_labels=FILE (tools/prepare_data.py imagenet writes it)"
        )
    if isinstance(train, ImageFiles) and not data.class_list:  # else a part of the classes will do
        check_same_classes(train, read_image_folder(root))
    return read_image_folder(root, classes, len(classes))


def augmentation_of(data: DataConfig) -> Augmentation:
    """The training augmentation that a config names."""
    if data.augmentation == "none":
        return CenterCrop(data.crop, data.short_side[0])
    if data.augmentation == "inception":
        magnitude = RAND_AUGMENT if data.rand_augment else None
        return InceptionAugmentation(data.crop, randaugment=magnitude, color_noise=data.color_noise)
    return PaperAugmentation(data.crop, tuple(data.short_side), color_noise=data.color_noise)
