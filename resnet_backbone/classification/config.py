"""Configuration of the classification trainer: typed, printed, saved, and checked before any work.

A config is a YAML file that states what differs from its ``_BASE_`` (a path relative to it) or
from the defaults below. Several files and ``key=value`` overrides are merged in order.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_backbone.runtime.configs import find_config


class ConfigError(ValueError):
    """A config that cannot work; the message names the key and what to write instead."""


@dataclass
class ModelConfig:
    name: str = "resnet50"  # list_models(), torchvision/<name> or timm/<name>
    num_classes: int = 0  # 0: as many as the data has
    options: dict[str, Any] = field(default_factory=dict)  # constructor arguments: shortcut: "A"
    weights: str = ""  # .safetensors to start from; empty: He initialisation
    preprocessing: str = ""  # of weights that do not carry theirs: msra, caffe_vgg, torchvision


@dataclass
class DataConfig:
    format: str = "imagenet"  # imagenet, shards, cifar10, digits, synthetic
    root: str = ""  # folder of the data set
    val_root: str = ""  # folder of validation images; empty: as the format says
    val_labels: str = ""  # label list of a flat validation folder
    class_list: str = ""  # file "wnid index" per line, for a part of the classes
    split: str = "50k"  # cifar10: 50k trains on all; 45k holds 5k out for validation
    channel_order: str = "RGB"  # what the network sees; BGR as in the MSRA models
    mean: str = "channel"  # channel or pixel (the training set's own), or imagenet (torchvision's)
    std: str = "one"  # one (the paper subtracts the mean only), channel, or imagenet
    mean_samples: int = 10000  # images that the mean of ImageNet-sized data is computed from
    augmentation: str = "paper"  # paper, inception, pad_crop (CIFAR), shift (no flip), none
    padding: str = "mean"  # pad_crop, shift: mean (zero once it is subtracted) or black
    short_side: list[int] = field(default_factory=lambda: [256, 480])  # paper: range of the resize
    crop: int = 224  # training crop, pixels
    color_noise: str = "cuda_convnet"  # cuda_convnet, fb_resnet_torch (two scalings), none
    rand_augment: bool = False
    workers: int = 4  # loader processes per GPU
    max_bad_images: int = 100  # unreadable training images before the run stops
    synthetic_samples: int = 1280
    synthetic_size: int = 224
    synthetic_classes: int = 1000


@dataclass
class LossConfig:
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha; 0: off
    cutmix: float = 0.0  # alpha; 0: off


@dataclass
class OptimizerConfig:
    momentum: float = 0.9
    momentum_form: str = "caffe"  # caffe: v = m v + lr g (the paper); pytorch: v = m v + g
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True  # the paper decays every parameter
    clip_norm: float = 0.0  # largest gradient norm; 0: off


@dataclass
class ScheduleConfig:
    iterations: int = 600000
    scale: float = 1.0  # multiplies iterations, milestones and warm-up: a shortened run
    lr: float = 0.1
    policy: str = "steps"  # steps, plateau, cosine
    milestones: list[int] = field(default_factory=list)  # steps: iterations where lr *= gamma
    gamma: float = 0.1
    plateau_patience: int = 5  # plateau: evaluations without progress before lr *= gamma
    plateau_threshold: float = (
        0.1  # plateau: progress is this many points of top-1 error (absolute)
    )
    plateau_drops: int = 3  # plateau: largest number of drops
    warmup_lr: float = 0.0  # learning rate during (error) or at the start of (linear) warm-up
    warmup_iterations: int = 0  # linear warm-up
    warmup_until_error: float = 0.0  # warm-up until the training error is below this (%); 0: off


@dataclass
class TrainConfig:
    batch_size: int = 256  # of one iteration, over all GPUs and micro-batches
    micro_batch: int = (
        0  # images that go through the network, and its BN, at once; 0: all of a GPU's
    )
    amp: str = "none"  # none, bf16, fp16
    channels_last: bool = True
    compile: str = "none"  # none, default, reduce-overhead (CUDA graphs), max-autotune
    ema: float = 0.0  # decay of the averaged weights; 0: off
    sync_bn: bool = False
    recompute_bn: bool = True  # true BN statistics over the training set, after training
    recompute_bn_samples: int = 0  # images they are computed from; 0: the whole set once
    device: str = "auto"  # auto, cpu, cuda
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    seed: int = 1


@dataclass
class EvaluationConfig:
    protocol: str = "centre"  # centre (short side, centre crop) or full (the image as it is)
    short_side: int = 256
    crop: int = 224
    batch_size: int = 256
    every: int = 5000  # iterations; 0: only at the end
    max_bad_images: int = 0


@dataclass
class OutputConfig:
    dir: str = ""  # run folder; empty: output/<name of the config file>
    log_every: int = 20  # iterations
    checkpoint_every: int = 1000  # iterations
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # iterations whose multiples stay for good; 0: none
    tensorboard: bool = True


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


CHOICES = {
    "data.format": ("imagenet", "shards", "cifar10", "digits", "synthetic"),
    "data.split": ("50k", "45k"),
    "data.channel_order": ("RGB", "BGR"),
    "data.mean": ("channel", "pixel", "imagenet"),
    "data.std": ("one", "channel", "imagenet"),
    "data.augmentation": ("paper", "inception", "pad_crop", "shift", "none"),
    "data.padding": ("mean", "black"),
    "data.color_noise": ("cuda_convnet", "fb_resnet_torch", "none"),
    "optimizer.momentum_form": ("caffe", "pytorch"),
    "schedule.policy": ("steps", "plateau", "cosine"),
    "train.amp": ("none", "bf16", "fp16"),
    "train.compile": ("none", "default", "reduce-overhead", "max-autotune"),
    "train.device": ("auto", "cpu", "cuda"),
    "evaluation.protocol": ("centre", "full"),
}
LEAST = {
    "data.crop": 1,
    "data.workers": 0,
    "data.max_bad_images": 0,
    "data.mean_samples": 1,
    "data.synthetic_samples": 1,
    "data.synthetic_size": 1,
    "data.synthetic_classes": 2,
    "loss.label_smoothing": 0,
    "loss.mixup": 0,
    "loss.cutmix": 0,
    "model.num_classes": 0,
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "schedule.iterations": 1,
    "schedule.plateau_patience": 1,
    "schedule.plateau_threshold": 0,
    "schedule.plateau_drops": 0,
    "schedule.warmup_lr": 0,
    "schedule.warmup_until_error": 0,
    "schedule.warmup_iterations": 0,
    "train.batch_size": 1,
    "train.micro_batch": 0,
    "train.ema": 0,
    "train.recompute_bn_samples": 0,
    "train.threads": 0,
    "train.seed": 0,
    "evaluation.batch_size": 1,
    "evaluation.every": 0,
    "evaluation.max_bad_images": 0,
    "output.log_every": 1,
    "output.checkpoint_every": 1,
    "output.keep": 1,
    "output.keep_every": 0,
}


def key_names(node: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every key: "model.name", "data.root" ..."""
    for item in fields(node):
        made = item.default_factory() if callable(item.default_factory) else item.default
        if is_dataclass(made):
            yield from key_names(made, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def nearest_key(key: str) -> str:
    """The known key that is most like an unknown one."""
    names = list(key_names())
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    if same:
        return max(same, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return near[0]
    by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.5)
    return by_last[near[0]] if near else ""


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merges config files and overrides onto the defaults, and checks the result.

    Args:
        files: YAML files or names of ours (see :func:`find_config`), later ones on top.
        overrides: "key=value", for example "schedule.scale=0.05"; "model=NAME" is short for
            "model.name=NAME".

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, impossible combination.
    """
    merged = OmegaConf.structured(Config)
    for file in files:
        merged = _merge(merged, _read(_find(file)), str(file))
    for override in overrides:
        merged = _merge(merged, _parse(override), override)
    config = OmegaConf.to_object(merged)
    scale_schedule(config.schedule)
    check(config)
    return config


def _find(file: str | Path) -> Path:
    try:
        return find_config(file, "classification")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _read(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: _BASE_ leads back to this file")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file, named by _BASE_")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # what YAML parsers raise has no common base
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: a config is a table of keys")
    base = loaded.pop("_BASE_", None)
    if base is None:
        return loaded
    return OmegaConf.merge(_read(path.parent / str(base), (*seen, path.resolve())), loaded)


def _parse(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(
            f"{override!r}: overrides are written key=value, for example train.seed=2"
        )
    if key == "model":
        key = "model.name"
    if key in {item.name for item in fields(Config)}:
        raise ConfigError(f"{override!r}: {key} is a group; write {key}.<key>=value")
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except Exception as error:
        raise ConfigError(f"{override!r}: {' '.join(str(error).split())}") from error


def _merge(onto: DictConfig, update: DictConfig, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(onto, update)
    except OmegaConfBaseException as error:
        unknown = [key for key in _leaves(update) if key not in set(key_names())]
        if not unknown:
            message = f"{where}: {error.full_key}: {str(error).splitlines()[0]}"
            raise ConfigError(message) from error
        near = nearest_key(unknown[0])
        hint = f"did you mean {near}?" if near else "see resnet_backbone/classification/config.py"
        raise ConfigError(f"{where}: unknown key {unknown[0]}: {hint}") from error


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in node:
        key = f"{prefix}{name}"
        if isinstance(node[name], DictConfig) and key != "model.options":
            yield from _leaves(node[name], f"{key}.")
        else:
            yield key


def scale_schedule(schedule: ScheduleConfig) -> None:
    """Applies ``scale`` in place to iterations, milestones and warm-up, and sets it to 1."""
    if not schedule.scale > 0:
        raise ConfigError(f"schedule.scale is {schedule.scale}; give a number above 0")
    if schedule.scale != 1:
        schedule.iterations = max(1, round(schedule.iterations * schedule.scale))
        schedule.milestones = [round(value * schedule.scale) for value in schedule.milestones]
        schedule.warmup_iterations = round(schedule.warmup_iterations * schedule.scale)
        schedule.scale = 1.0


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


def check(config: Config) -> None:
    """Refuses values and combinations that cannot work."""
    for key, choices in CHOICES.items():
        if get(config, key) not in choices:
            near = difflib.get_close_matches(str(get(config, key)), choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{key} is {get(config, key)!r}; use {', '.join(choices)}{hint}")
    for key, least in LEAST.items():
        if not get(config, key) >= least:
            raise ConfigError(f"{key} is {get(config, key)}; give {least} or more")
    for problem in _combinations(config):
        raise ConfigError(problem)


def _combinations(config: Config) -> Iterator[str]:
    data, schedule, train = config.data, config.schedule, config.train
    if not 0 < schedule.lr < math.inf:
        yield f"schedule.lr is {schedule.lr}; give a number above 0"
    if not 0 < schedule.gamma <= 1:
        yield f"schedule.gamma is {schedule.gamma}; give a factor above 0, at most 1"
    if not config.optimizer.momentum < 1:
        yield f"optimizer.momentum is {config.optimizer.momentum}; give a number below 1"
    if sorted({0, *schedule.milestones}) != [0, *schedule.milestones]:
        yield f"schedule.milestones {schedule.milestones} must rise from above 0"
    if schedule.policy != "steps" and schedule.milestones:
        yield f"schedule.milestones are for policy steps, not {schedule.policy}: remove one of them"
    if schedule.policy == "steps" and any(m >= schedule.iterations for m in schedule.milestones):
        yield (
            f"schedule.milestones {schedule.milestones} reach past schedule.iterations "
            f"{schedule.iterations}: change both together with schedule.scale"
        )
    if schedule.policy == "plateau" and not config.evaluation.every:
        yield "schedule.policy plateau needs evaluations: set evaluation.every above 0"
    if schedule.warmup_iterations > schedule.iterations:
        yield (
            f"schedule.warmup_iterations {schedule.warmup_iterations} are more than "
            f"schedule.iterations {schedule.iterations}"
        )
    if schedule.warmup_iterations and schedule.warmup_until_error:
        yield "schedule.warmup_iterations and warmup_until_error are two kinds of warm-up: set one"
    if schedule.warmup_until_error and not schedule.warmup_lr:
        yield "schedule.warmup_until_error needs schedule.warmup_lr (the paper: 0.01)"
    if train.micro_batch and train.batch_size % train.micro_batch:
        size, part = train.batch_size, train.micro_batch
        yield f"train.batch_size {size} is no multiple of train.micro_batch {part}"
    if train.ema >= 1:
        yield f"train.ema is {train.ema}; give a decay below 1, such as 0.9999"
    if config.loss.label_smoothing >= 1:
        yield f"loss.label_smoothing is {config.loss.label_smoothing}; give a number below 1"
    if len(data.short_side) != 2 or not 0 < data.crop <= data.short_side[0] <= data.short_side[1]:
        yield f"data.short_side {data.short_side} must be [least, most], both at least data.crop"
    if config.evaluation.crop > config.evaluation.short_side:
        yield "evaluation.crop is larger than evaluation.short_side"
    small = data.format in ("cifar10", "digits")
    if small and data.augmentation not in ("pad_crop", "shift", "none"):
        fit = "pad_crop" if data.format == "cifar10" else "shift"
        yield f"data.augmentation {data.augmentation} is for larger images; {data.format}: {fit}"
    if not small and data.augmentation in ("pad_crop", "shift"):
        yield f"data.augmentation {data.augmentation} is for cifar10 and digits; use paper"
    if data.rand_augment and data.augmentation != "inception":
        yield "data.rand_augment belongs to data.augmentation=inception: set both or none"
    if data.class_list and data.format != "imagenet":
        yield "data.class_list is for data.format imagenet; shards hold their classes"
    centre = config.evaluation.protocol == "centre" and data.format in ("imagenet", "shards")
    if centre and data.mean == "pixel" and config.evaluation.crop != data.crop:
        yield (
            f"data.mean pixel fits images of data.crop {data.crop}, not of evaluation.crop "
            f"{config.evaluation.crop}: make them equal or set data.mean=channel"
        )
    if small and config.evaluation.protocol != "full":
        yield f"evaluation.protocol: {data.format} images are tested as they are: full"
    if data.format in ("imagenet", "shards", "cifar10") and not data.root:
        yield f"data.root is empty: give the folder of the {data.format} data, data.root=PATH"


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, readable by :func:`load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(first: Config, second: Config) -> list[str]:
    """Keys whose values differ."""
    return [key for key in key_names() if get(first, key) != get(second, key)]
