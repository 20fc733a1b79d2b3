"""From a config to training batches, evaluation images and what the weights will expect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from resnet_backbone.classification.config import Config, DataConfig
from resnet_backbone.classification.data.arrays import ArraySource, channel_statistics, mean_image
from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.cifar import CLASS_NAMES, HELD_OUT, read_cifar10
from resnet_backbone.classification.data.evaluation import EvaluationArrays, EvaluationFiles
from resnet_backbone.classification.data.stream import SampleStream
from resnet_backbone.classification.data.synthetic import SyntheticSource
from resnet_backbone.weights import PREPROCESSINGS, Preprocessing

INPUT_FILE = "input.safetensors"  # in the run folder: the statistics, so that none is made twice
INPUT_KEY, MADE_FROM = "preprocessing", "made_from"


@dataclass(frozen=True)
class ClassificationData:
    """What training needs of its data.

    Attributes:
        source: training batches by iteration, with ``num_samples``.
        evaluation: every image once; for ``EvaluationLoader``.
        preprocessing: mean, standard deviation and channel order of the input.
        class_names: one per class.
        evaluated_on: what the errors are measured on.
    """

    source: Any
    evaluation: EvaluationFiles | EvaluationArrays
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    evaluated_on: str


def build_data(
    config: Config,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    prepare: Any = None,
) -> ClassificationData:
    """Reads the data set that a config names.

    Args:
        config: the whole config; ``data`` and ``train`` matter here.
        folder: of the run; computed means are kept there.
        rank, world: of this process.
        device: where arrays lie.
        prepare: of the evaluation protocol, see ``EvaluationFiles``.

    Raises:
        DataError: missing or damaged data.
    """
    if config.data.format == "synthetic":
        return _synthetic(config, rank, world, device)
    if config.data.format in ("imagenet", "shards"):
        from resnet_backbone.classification.data.build_files import build_files

        return build_files(config, folder, rank=rank, world=world, prepare=prepare)
    return _arrays(config, rank, world, device)


def stream_of(config: Config, num_samples: int, rank: int, world: int, **options) -> SampleStream:
    return SampleStream(
        num_samples, config.train.batch_size, config.train.seed, rank, world, **options
    )


def _arrays(config: Config, rank: int, world: int, device) -> ClassificationData:
    """Data sets that fit into memory."""
    data = config.data
    if data.format == "cifar10":
        names, tested_on = CLASS_NAMES, "CIFAR-10 test"
        images, labels = read_cifar10(data.root, train=True)
        tests, test_labels = read_cifar10(data.root, train=False)
        if data.split == "45k":
            tested_on = f"CIFAR-10, the last {HELD_OUT} training images"
            tests, test_labels = images[-HELD_OUT:], labels[-HELD_OUT:]
            images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    else:
        from resnet_backbone.classification.data.digits import CLASS_NAMES as names
        from resnet_backbone.classification.data.digits import read_digits

        tested_on = "built-in digits, test"
        images, labels = read_digits(train=True)
        tests, test_labels = read_digits(train=False)
    mean, std = channel_statistics(images)
    image = mean_image(images) if data.mean == "pixel" else None
    preprocessing = preprocessing_from(data, mean, std, image, f"training set of {data.format}")
    source = ArraySource(
        images,
        labels,
        stream_of(config, len(labels), rank, world),
        names,
        augmentation=data.augmentation,
        padding=_padding(data, preprocessing),
        device=device,
    )
    evaluation = EvaluationArrays(tests.to(device), test_labels)
    return ClassificationData(source, evaluation, preprocessing, tuple(names), tested_on)


def _padding(data: DataConfig, preprocessing: Preprocessing) -> Tensor | None:
    """Pixels (3, H, W), RGB, 0..255, around a training image: those that normalise to zero."""
    if data.padding == "black":
        return None
    mean = preprocessing.mean_image
    if mean is None:
        mean = torch.tensor(preprocessing.mean)[:, None, None]
    return mean.flip(0) if preprocessing.channel_order == "BGR" else mean


def _synthetic(config: Config, rank: int, world: int, device) -> ClassificationData:
    data = config.data
    local = config.train.batch_size // world
    shape = (3, data.synthetic_size, data.synthetic_size)
    names = tuple(f"class_{number}" for number in range(data.synthetic_classes))
    source = SyntheticSource(local, shape, names, data.synthetic_samples, device, rank)
    count = min(data.synthetic_samples, 2 * config.evaluation.batch_size)
    tests = torch.zeros((count, *shape), dtype=torch.uint8)
    evaluation = EvaluationArrays(tests, torch.arange(count) % len(names))
    grey = (127.5,) * 3
    preprocessing = preprocessing_from(data, grey, (74.0,) * 3, None, "synthetic data")
    return ClassificationData(source, evaluation, preprocessing, names, "synthetic images")


def preprocessing_from(
    data: DataConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image: Tensor | None,
    where: str,
) -> Preprocessing:
    """The input that a config asks for.

    Args:
        mean, std: of the training set's channels R, G, B, 0..255.
        image: its per-pixel mean (3, H, W), R, G, B, 0..255, or None.
        where: what they were computed from.
    """
    known = PREPROCESSINGS["torchvision"]
    if data.mean == "imagenet":
        mean, image, where = known.pixel_mean_255(), None, "torchvision's mean of ImageNet"
    if data.std == "one":
        std = (1.0, 1.0, 1.0)
    elif data.std == "imagenet":
        std = known.pixel_std_255()
    if data.channel_order == "BGR":
        mean, std = mean[::-1], std[::-1]
        image = None if image is None else image.flip(0)
    return Preprocessing(data.channel_order, 255.0, mean, std, source=where, mean_image=image)


def keep_input(folder: Path, preprocessing: Preprocessing, made_from: str) -> None:
    """Writes a computed preprocessing into the run folder, with what it was computed from."""
    image = preprocessing.mean_image
    tensors = {} if image is None else {"mean_image": image.contiguous()}
    temporary = folder / f"{INPUT_FILE}.tmp"
    save_file(tensors, temporary, {INPUT_KEY: preprocessing.to_json(), MADE_FROM: made_from})
    temporary.replace(folder / INPUT_FILE)


def kept_input(folder: Path, made_from: str) -> Preprocessing | None:
    """The preprocessing that :func:`keep_input` wrote; None if there is none of this origin."""
    path = folder / INPUT_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            if file.metadata()[MADE_FROM] != made_from:
                return None
            found = Preprocessing.from_json(file.metadata()[INPUT_KEY])
            image = file.get_tensor("mean_image") if "mean_image" in file.keys() else None  # noqa: SIM118
    except Exception as error:
        raise DataError(f"{path} cannot be read ({error}); remove it to compute it anew") from error
    return Preprocessing(**{**found.__dict__, "mean_image": image})
