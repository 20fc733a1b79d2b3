"""Builds training batches, evaluation images and the input from a config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

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
from resnet_backbone.classification.data.loader import (
    Augmentation,
    BadImageReport,
    BatchMaker,
    LoaderSource,
    run_loader,
)
from resnet_backbone.classification.data.sources import (
    CIFAR10_CLASSES,
    HELD_OUT,
    MEAN_SUBSET,
    ArraySource,
    Batch,
    SampleStream,
    SyntheticSource,
    read_cifar10,
    read_digits,
)
from resnet_backbone.classification.protocols import Full, Protocol
from resnet_backbone.runtime.builtin import CLASS_NAMES as DIGITS
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.files import whole_file
from resnet_backbone.runtime.processes import World, make_rng
from resnet_backbone.weights import PREPROCESSINGS, Preprocessing

BAD_IMAGES = "bad_images.txt"  # in the run folder
RAND_AUGMENT = 9  # magnitude, as in torchvision's recipes
MEAN_BATCH = 64
INPUT_FILE = "input.safetensors"  # in the run folder: the mean, which is computed once
INPUT_KEY, MADE_FROM = "preprocessing", "made_from"


@dataclass(frozen=True)
class ClassificationData:
    source: Any  # training batches by iteration, with `num_samples`
    evaluation: EvaluationFiles | EvaluationArrays  # every image once
    preprocessing: Preprocessing  # mean, standard deviation and channel order of the input
    class_names: tuple[str, ...]
    evaluated_on: str  # name of the evaluation set


def build_data(
    config: Config, folder: Path, world: World | None = None, protocol: Protocol | None = None
) -> ClassificationData:
    """Reads the data set that a config names. All processes of a run call it together.

    Args:
        folder: the run folder, where the computed mean is kept.
        world: this process in the run; arrays are put on its device.
        protocol: of the evaluation; by default whole images are evaluated, not resized.

    Raises:
        DataError: missing or damaged data.
    """
    world = world or World()
    if config.data.format == "synthetic":
        return _synthetic(config, world)
    if config.data.format in ("imagenet", "shards"):
        return _encoded(config, folder, world, protocol or Full())
    return _arrays(config, world)


def _stream(config: Config, count: int, world: World, groups: tuple[int, ...] = ()) -> SampleStream:
    train = config.train
    return SampleStream(count, train.batch_size, train.seed, world.rank, world.size, groups)


def _arrays(config: Config, world: World) -> ClassificationData:
    """Builds data sets that fit into memory."""
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
    """Returns padding (3, H, W), RGB, 0..255, that normalizes to zero; None for black."""
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


def _encoded(config: Config, folder: Path, world: World, protocol: Protocol) -> ClassificationData:
    """Builds ImageNet-sized data: class folders, a flat validation folder, tar shards."""
    data = config.data
    train = read_training_set(data)
    if len(train.class_names) == 1:
        raise DataError(
            f"{data.root} has a single class, {train.class_names[0]}: data.root is the folder of "
            "the class folders, or of train"
        )
    val = read_validation_set(data, train)
    groups = train.group_sizes if isinstance(train, TarShards) else ()
    report = BadImageReport(folder / BAD_IMAGES, data.max_bad_images)
    source = LoaderSource(
        train,
        _stream(config, len(train), world, groups),
        augmentation_of(data),
        workers=data.workers,
        report=report,
    )
    if config.model.weights:  # their input takes the place of this one: no mean is computed
        data = replace(data, mean="imagenet", std="one")
    preprocessing = training_input(data, train, folder, world, report)
    evaluation = EvaluationFiles(val.samples, *protocol.loading)
    return ClassificationData(source, evaluation, preprocessing, train.class_names, str(val.root))


def read_training_set(data: DataConfig) -> EncodedDataset:
    """Reads ``root/train/<class>/<image>``, ``root/<class>/<image>``, or shards in ``root``."""
    if data.format == "shards":
        return TarShards(data.root)
    train = Path(data.root) / "train"
    root = train if train.is_dir() else data.root
    classes = read_class_list(data.class_list, root) if data.class_list else None
    return read_image_folder(root, classes)


def read_validation_set(data: DataConfig, train: EncodedDataset) -> ImageFiles:
    """Reads ``val_root``, by default ``root/val``: class folders, or flat with ``val_labels``."""
    root = Path(data.val_root or Path(data.root) / "val")
    if not root.is_dir():
        raise DataError(f"{root}: no validation images; give their folder with data.val_root=PATH")
    classes = {name: index for index, name in enumerate(train.class_names)}
    if data.val_labels:
        return read_flat_folder(root, data.val_labels, classes, len(classes))
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise DataError(
            f"{root} has no class folders: give the label list of a flat folder with "
            "data.val_labels=FILE (prepare-data imagenet writes it)"
        )
    if isinstance(train, TarShards) or data.class_list:  # a part of the classes will do
        return read_image_folder(root, classes, len(classes))
    val = read_image_folder(root)
    check_same_classes(train, val)
    return val


def augmentation_of(data: DataConfig) -> Augmentation:
    if data.augmentation == "none":
        return CenterCrop(data.crop, data.short_side[0])
    if data.augmentation == "inception":
        magnitude = RAND_AUGMENT if data.rand_augment else None
        return InceptionAugmentation(data.crop, randaugment=magnitude, color_noise=data.color_noise)
    return PaperAugmentation(data.crop, tuple(data.short_side), color_noise=data.color_noise)


class MeanStatistics(NamedTuple):
    """Statistics of images, RGB, in gray levels 0..255."""

    image: Tensor | None  # float32 (3, H, W), the per-pixel mean
    channels: tuple[float, ...]  # mean of each channel over all pixels
    std: tuple[float, ...]  # of each channel over all pixels
    num_images: int


def image_statistics(
    batches: Iterable[Tensor], shape: tuple[int, ...], world: World | None = None
) -> MeanStatistics:
    """Computes statistics of images, uint8 (N, *shape), over all processes; DataError if none.

    Sums are exact, so the order and the batches of images do not matter.
    """
    total = torch.zeros(*shape, dtype=torch.int64)
    squares, count = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for images in batches:
        total += images.sum(0, dtype=torch.int64)
        squares += images.to(torch.int32).square().sum((0, 2, 3))
        count += len(images)
    if world is not None:
        for sums in (total, squares, count):
            sums.copy_(world.sum(sums.to(world.device)))
    if not count:
        raise DataError("no image of the training set can be read, so it has no mean")
    mean = total.to(torch.float64) / count
    channels = mean.mean((1, 2))
    std = (squares.double() / (count * mean[0].numel()) - channels**2).clamp_min(0).sqrt()
    return MeanStatistics(mean.float(), tuple(channels.tolist()), tuple(std.tolist()), count.item())


def compute_mean(
    dataset: EncodedDataset,
    *,
    num_images: int,
    size: int,
    short_side: int,
    workers: int = 0,
    report: BadImageReport | None = None,
    world: World | None = None,
) -> MeanStatistics:
    """Averages the center crops of a training set (paper, section 3.4: "per-pixel mean").

    The paper does not say which crops; these are center crops at the smallest training scale, as
    in AlexNet. Bad images are skipped and counted. All processes share the work.

    Args:
        num_images: size of a random subset; a channel mean has a standard error of about
            50 / sqrt(num_images) gray levels.
        size, short_side: of the crop and of the resized image, in pixels.

    Raises:
        DataError: no image can be read, or more are bad than the report allows.
    """
    world, report = world or World(), report or BadImageReport()
    chosen = np.arange(len(dataset))
    if num_images < len(dataset):
        chosen = np.sort(make_rng(0, MEAN_SUBSET).choice(chosen, num_images, replace=False))
    mine = [(index, 0) for index in chosen[world.rank :: world.size].tolist()]
    parts = [mine[first : first + MEAN_BATCH] for first in range(0, len(mine), MEAN_BATCH)]
    maker = BatchMaker(dataset, CenterCrop(size, short_side), replace=False)

    def batches() -> Iterator[Tensor]:
        made = run_loader(maker, parts, workers)
        hidden = None if world.is_main else True
        for batch in tqdm(made, "mean image", len(parts), unit="batch", disable=hidden):
            report.add(*batch.notes)
            if len(batch.labels):
                yield batch.images

    return image_statistics(batches(), (3, size, size), world)


def preprocessing_from(data: DataConfig, found: MeanStatistics, where: str) -> Preprocessing:
    """Returns the config's input from the statistics `found`, which were computed from `where`."""
    known = PREPROCESSINGS["torchvision"]
    mean, std, image = found.channels, found.std, found.image if data.mean == "pixel" else None
    if data.mean == "imagenet":
        mean, where = known.pixel_mean_255(), "torchvision's mean of ImageNet"
    if data.std == "one":
        std = (1.0, 1.0, 1.0)
    elif data.std == "imagenet":
        std = known.pixel_std_255()
    if data.channel_order == "BGR":
        mean, std = mean[::-1], std[::-1]
        image = None if image is None else image.flip(0)
    return Preprocessing(data.channel_order, 255.0, mean, std, source=where, mean_image=image)


def training_input(
    data: DataConfig, train: EncodedDataset, folder: Path, world: World, report: BadImageReport
) -> Preprocessing:
    """Returns the input with the training set's mean, computed once by all processes together.

    It is kept in the run folder, and read from there for the same data set and settings.
    """
    if data.mean == "imagenet" and data.std != "channel":
        return preprocessing_from(data, MeanStatistics(None, (), (), 0), "")
    short = data.short_side[0]
    settings = (data.class_list, data.channel_order, data.mean, data.std, data.crop, short)
    root = data.root if "://" in data.root else Path(data.root).resolve()
    made_from = f"{len(train)} images of {root}, {data.mean_samples} used, {settings}"
    kept = world.broadcast(_kept(folder, made_from) if world.is_main else None)
    if kept is not None:
        return kept
    sizes = dict(num_images=data.mean_samples, size=data.crop, short_side=short)
    found = compute_mean(train, **sizes, workers=data.workers, report=report, world=world)
    made = preprocessing_from(data, found, f"center crops of {found.num_images} training images")
    if world.is_main:
        tensors = {} if made.mean_image is None else {"mean_image": made.mean_image.contiguous()}
        with whole_file(folder / INPUT_FILE) as temporary:
            save_file(tensors, temporary, {INPUT_KEY: made.to_json(), MADE_FROM: made_from})
    return made


def _kept(folder: Path, made_from: str) -> Preprocessing | None:
    """Reads the preprocessing kept in a run folder; None if there is none of this origin."""
    path = folder / INPUT_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts[MADE_FROM] == made_from:
            return replace(Preprocessing.from_json(facts[INPUT_KEY]), **tensors)
    except Exception as error:
        raise DataError(
            f"{path} cannot be read ({error}); remove it to compute it again"
        ) from error
    return None
