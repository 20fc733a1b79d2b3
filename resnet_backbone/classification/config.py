"""Configuration of the classification trainer: typed, printed, saved, and checked before any work.

A config is a YAML file that states what differs from its ``_BASE_`` (a path relative to it) or
from the defaults below. Several files and ``key=value`` overrides are merged in order.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter, ge, gt, le, lt
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.files import find_config

# Limit of a number -> comparison, and its text in messages.
LIMITS = {
    "least": (ge, "{} or more"),
    "most": (le, "at most {}"),
    "above": (gt, "a number above {}"),
    "below": (lt, "a number below {}"),
}


def one_of(*choices: str) -> Any:
    """Returns a field with one of these values; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


def number(default: float, **limits: float) -> Any:
    """Returns a number field with the limits ``least``, ``most``, ``above`` and ``below``."""
    return field(default=default, metadata=limits)


@dataclass
class ModelConfig:
    name: str = "resnet50"  # list_models(), torchvision/<name> or timm/<name>
    num_classes: int = number(0, least=0)  # 0: as many as the data has
    options: dict[str, Any] = field(default_factory=dict)  # constructor arguments: shortcut: "A"
    weights: str = ""  # file or address to start from; empty: He initialization
    preprocessing: str = ""  # of weights that do not state theirs: msra, caffe_vgg, torchvision
    new_head: bool = False  # fine-tuning: load all of the weights except the last layer


@dataclass
class DataConfig:
    format: str = one_of("imagenet", "shards", "cifar10", "digits", "synthetic")
    root: str = ""  # folder of the data set
    val_root: str = ""  # folder of validation images; empty: root/val
    val_labels: str = ""  # label list of a flat validation folder
    class_list: str = ""  # file of "wnid index" lines, for a subset of the classes
    split: str = one_of("50k", "45k")  # cifar10: 50k trains on all; 45k holds 5k out for validation
    channel_order: str = one_of("RGB", "BGR")  # of the network's input; BGR as in the MSRA models
    # of the training set, or torchvision's for ImageNet
    mean: str = one_of("channel", "pixel", "imagenet")
    std: str = one_of("one", "channel", "imagenet")  # one: the paper subtracts the mean only
    mean_samples: int = number(10000, least=1)  # images for the mean of ImageNet-sized data
    augmentation: str = one_of("paper", "inception", "pad_crop", "shift", "none")  # shift: no flip
    padding: str = one_of("mean", "black")  # of pad_crop and shift; mean: zero once subtracted
    short_side: list[int] = field(default_factory=lambda: [256, 480])  # paper: range of the resize
    crop: int = number(224, least=1)  # training crop, pixels
    color_noise: str = one_of("cuda_convnet", "fb_resnet_torch", "none")  # two published scalings
    rand_augment: bool = False
    workers: int = number(4, least=0)  # loader processes per GPU
    max_bad_images: int = number(100, least=0)  # unreadable training images before the run stops
    synthetic_samples: int = number(1280, least=1)
    synthetic_size: int = number(224, least=1)
    synthetic_classes: int = number(1000, least=2)


@dataclass
class LossConfig:
    label_smoothing: float = number(0.0, least=0, below=1)
    mixup: float = number(0.0, least=0)  # alpha; 0: off
    cutmix: float = number(0.0, least=0)  # alpha; 0: off


@dataclass
class OptimizerConfig:
    momentum: float = number(0.9, least=0, below=1)
    momentum_form: str = one_of("caffe", "pytorch")  # v = m v + lr g (the paper) or v = m v + g
    weight_decay: float = number(1e-4, least=0)
    decay_norm_and_bias: bool = True  # the paper decays every parameter
    clip_norm: float = number(0.0, least=0)  # largest gradient norm; 0: off


@dataclass
class ScheduleConfig:
    iterations: int = number(600000, least=1)
    scale: float = number(1.0, above=0, below=math.inf)  # of iterations, milestones and warm-up
    epochs: float = number(0, least=0)  # passes over the data, in place of iterations; 0: off
    lr: float = number(0.1, above=0, below=math.inf)
    policy: str = one_of("steps", "plateau", "cosine")
    milestones: list[int] = field(default_factory=list)  # steps: iterations where lr *= gamma
    gamma: float = number(0.1, above=0, most=1)
    plateau_patience: int = number(5, least=1)  # evaluations without progress before a drop
    plateau_threshold: float = number(0.1, least=0)  # progress: points of top-1 error (absolute)
    plateau_drops: int = number(3, least=0)  # largest number of drops of the rate
    warmup_lr: float = number(0.0, least=0)  # during (error) or at the start of (linear) warm-up
    warmup_iterations: int = number(0, least=0)  # linear warm-up
    warmup_until_error: float = number(0.0, least=0)  # training error, %, that ends it; 0: off


@dataclass
class TrainConfig:
    batch_size: int = number(256, least=1)  # of one iteration, over all GPUs and micro-batches
    micro_batch: int = number(0, least=0)  # images per forward pass, and per BN batch; 0: all
    amp: str = one_of("none", "bf16", "fp16")
    channels_last: bool = True
    # reduce-overhead: CUDA graphs
    compile: str = one_of("none", "default", "reduce-overhead", "max-autotune")
    ema: float = number(0.0, least=0, below=1)  # decay of averaged weights, warmed up; 0: off
    sync_bn: bool = False
    recompute_bn: bool = True  # true BN statistics over the training set, after training
    recompute_bn_samples: int = number(0, least=0)  # training images for these statistics; 0: all
    device: str = one_of("auto", "cpu", "cuda")
    threads: int = number(0, least=0)  # CPU threads; 0: PyTorch's choice
    seed: int = number(1, least=0)


@dataclass
class EvaluationConfig:
    protocol: str = one_of("center", "full")  # full: the whole image, not resized
    short_side: int = 256
    crop: int = 224
    batch_size: int = number(256, least=1)
    every: int = number(5000, least=0)  # iterations; 0: only at the end
    max_bad_images: int = number(0, least=0)


@dataclass
class OutputConfig:
    dir: str = ""  # run folder; empty: output/<name of the config file>
    log_every: int = number(20, least=1)  # iterations
    checkpoint_every: int = number(1000, least=1)  # iterations
    keep: int = number(2, least=1)  # number of newest checkpoints to keep
    keep_every: int = number(0, least=0)  # also keep checkpoints at its multiples; 0: none
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


GROUPS = {group.name: fields(group.default_factory) for group in fields(Config)}
# Every key ("model.name", "data.root", ...) -> its field.
KEYS = {f"{group}.{item.name}": item for group, items in GROUPS.items() for item in items}


def hint_for(key: str) -> str:
    """Suggests a key for an unknown one: with the same last word, or else a similar one."""
    group, _, word = key.rpartition(".")
    same = [name for name in KEYS if name.endswith(f".{word}")]
    near = difflib.get_close_matches(key, same or KEYS, n=1, cutoff=0 if same else 0.75)
    if near:
        return f"did you mean {near[0]}?"
    names = [item.name for item in GROUPS[group]] if group in GROUPS else GROUPS
    return f"{group if group in GROUPS else 'a config'} has {', '.join(names)}"


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merges config files and overrides onto the defaults, and checks the result.

    Args:
        files: YAML files or names of ours (see :func:`find_config`), later ones on top.
        overrides: "key=value", for example "schedule.scale=0.05"; "model=NAME" selects another
            network and drops the files' ``model.options``.

    Raises:
        UsageError: lists all unknown keys and wrong values, or all impossible combinations.
    """
    merged, problems = OmegaConf.structured(Config), []
    for file in files:
        merged = _merge(merged, _read(find_config(file, "classification")), str(file), problems)
    planned = OmegaConf.to_object(merged)
    for override in overrides:
        if override.startswith("model="):
            merged.model.options = {}
        try:
            merged = _merge(merged, _parse(override), override, problems)
        except UsageError as error:
            problems.append(str(error))
    config = OmegaConf.to_object(merged)
    for group, name in (key.split(".") for key, about in KEYS.items() if about.type == "str"):
        section = getattr(config, group)  # ~ is the home folder, as in a shell
        setattr(section, name, os.path.expanduser(getattr(section, name)))
    problems += _wrong_values(config)
    if not problems:  # the rest needs valid values
        given = {word.partition("=")[0] for word in overrides}
        _follow(config, planned, given)
        scale_schedule(config.schedule)
        hint = "give schedule.iterations in place of schedule.epochs, or leave it out"
        counted = ("schedule.milestones", "schedule.warmup_iterations")
        if config.schedule.epochs:
            lengths = given & {"schedule.iterations", "schedule.scale"}
            problems += [f"{key} and schedule.epochs: give one of them" for key in sorted(lengths)]
            problems += [f"{key} is in iterations: {hint}" for key in counted if key in given]
        problems += _combinations(config)
    if problems:
        raise UsageError("; ".join(dict.fromkeys(problems)))
    return config


def _follow(config: Config, planned: Config, given: set[str]) -> None:
    """Adapts milestones, warm-up and micro-batch to overrides, in place, unless they are given."""
    schedule, train = config.schedule, config.train
    followed = replace(planned.schedule, scale=schedule.iterations / planned.schedule.iterations)
    scale_schedule(followed)
    for name in ("milestones", "warmup_iterations"):
        if f"schedule.{name}" not in given:
            setattr(schedule, name, getattr(followed, name))
    if train.micro_batch and "train.micro_batch" not in given:
        sizes = range(min(train.micro_batch, train.batch_size), 0, -1)
        train.micro_batch = next(size for size in sizes if train.batch_size % size == 0)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    if path.resolve() in seen:
        raise UsageError(f"{path}: _BASE_ leads back to this file")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # errors of YAML parsers have no common base class
        raise UsageError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{path}: a config is a table of keys")
    base = loaded.pop("_BASE_", None)
    if base is None:
        return loaded
    return OmegaConf.merge(_read(path.parent / str(base), (*seen, path.resolve())), loaded)


def _parse(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r}: overrides are written key=value, for example train.seed=2")
    key = "model.name" if key == "model" else key
    if key in GROUPS:
        raise UsageError(f"{override!r}: {key} is a group; write {key}.<key>=value")
    if key in KEYS and KEYS[key].type == "str":  # not YAML, where 2024_10_05 is a number
        group, name = key.split(".")
        return OmegaConf.create({group: {name: value}})
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except Exception as error:
        raise UsageError(f"{override!r}: {' '.join(str(error).split())}") from error


def _merge(onto: DictConfig, update: DictConfig, where: str, problems: list[str]) -> DictConfig:
    """Returns the merged config; if it is invalid, ``onto``, and adds to ``problems``."""
    try:
        return OmegaConf.merge(onto, update)
    except OmegaConfBaseException as error:
        unknown = [key for key in leaves(update) if key not in KEYS]
        wrong = f"{where}: {error.full_key}: {str(error).splitlines()[0]}"
        problems += [f"{where}: unknown key {k}: {hint_for(k)}" for k in unknown] or [wrong]
        return onto


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys that a part of a config sets."""
    for name in node:
        key = f"{prefix}{name}"
        if isinstance(node[name], DictConfig) and key != "model.options":
            yield from leaves(node[name], f"{key}.")
        else:
            yield key


def scale_schedule(schedule: ScheduleConfig) -> None:
    """Applies ``scale`` to iterations, milestones and warm-up in place, and sets it to 1."""
    factor, schedule.scale = schedule.scale, 1.0
    if factor != 1:
        schedule.iterations = max(1, round(schedule.iterations * factor))
        milestones = {round(value * factor) for value in schedule.milestones}
        schedule.milestones = sorted(m for m in milestones if 0 < m < schedule.iterations)
        schedule.warmup_iterations = round(schedule.warmup_iterations * factor)


def _wrong_values(config: Config) -> Iterator[str]:
    """Checks every value by its field's metadata, see :func:`one_of` and :func:`number`."""
    for key, item in KEYS.items():
        value, limits = attrgetter(key)(config), dict(item.metadata)
        choices = limits.pop("choices", (value,))
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            yield f"{key} is {value!r}; use {', '.join(choices)}{hint}"
        for limit, bound in limits.items():
            holds, wanted = LIMITS[limit]
            if not holds(value, bound):
                yield f"{key} is {value}; give {wanted.format(bound)}"


def _combinations(config: Config) -> Iterator[str]:
    """Yields a message for each impossible combination of values."""
    data, evaluation = config.data, config.evaluation
    schedule, train = config.schedule, config.train
    places = [0, *schedule.milestones, schedule.iterations]
    if sorted(set(places)) != places:
        yield f"schedule.milestones {places[1:-1]} must rise between 0 and iterations, {places[-1]}"
    if schedule.policy != "steps" and schedule.milestones:
        yield f"schedule.milestones are for policy steps, not {schedule.policy}: remove one of them"
    if schedule.policy == "plateau" and not evaluation.every:
        yield "schedule.policy plateau needs evaluations: set evaluation.every above 0"
    if schedule.warmup_iterations > schedule.iterations:
        yield f"schedule.warmup_iterations exceed the {schedule.iterations} schedule.iterations"
    if schedule.warmup_iterations and schedule.warmup_until_error:
        yield "schedule.warmup_iterations and warmup_until_error exclude each other: set one"
    if schedule.warmup_until_error and not schedule.warmup_lr:
        yield "schedule.warmup_until_error needs schedule.warmup_lr (the paper: 0.01)"
    if train.micro_batch and train.batch_size % train.micro_batch:
        yield f"train.micro_batch {train.micro_batch} does not divide {train.batch_size} images"
    if len(data.short_side) != 2 or not 0 < data.crop <= data.short_side[0] <= data.short_side[1]:
        yield f"data.short_side {data.short_side} must be [least, most], both at least data.crop"
    if evaluation.crop > evaluation.short_side:
        yield "evaluation.crop is larger than evaluation.short_side"
    small = data.format in ("cifar10", "digits")
    if data.augmentation != "none" and small != (data.augmentation in ("pad_crop", "shift")):
        fit = {"cifar10": "pad_crop", "digits": "shift"}.get(data.format, "paper")
        yield f"data.augmentation {data.augmentation} is not for {data.format} images: use {fit}"
    if data.rand_augment and data.augmentation != "inception":
        yield "data.rand_augment belongs to data.augmentation=inception: set both or none"
    if data.class_list and data.format != "imagenet":
        yield "data.class_list is for data.format imagenet; shards hold their classes"
    if data.format == "synthetic" and evaluation.protocol == "center":
        if evaluation.crop > data.synthetic_size:
            yield f"evaluation.crop {evaluation.crop} is larger than data.synthetic_size"
    cropped = evaluation.protocol == "center" and data.format in ("imagenet", "shards")
    if cropped and data.mean == "pixel" and evaluation.crop != data.crop:
        yield f"data.mean pixel needs evaluation.crop={data.crop}; or set data.mean=channel"
    if small and evaluation.protocol != "full":
        yield f"evaluation.protocol: {data.format} images are tested without crops: use full"
    if data.format in ("imagenet", "shards", "cifar10") and not data.root:
        yield f"data.root is empty: give the folder of the {data.format} data, data.root=PATH"


def to_yaml(config: Config) -> str:
    """Returns the resolved config as YAML, readable by :func:`load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(first: Config, second: Config) -> list[str]:
    """Returns the keys whose values differ."""
    return [key for key in KEYS if attrgetter(key)(first) != attrgetter(key)(second)]
