"""The classification configs: they load, name networks that exist, and hold the paper's recipe."""

import re
import shlex
from functools import cache
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from resnet_backbone.classification.config import KEYS, Config, leaves, load_config
from resnet_backbone.classification.networks import NetworkSpec

PROJECT = Path(__file__).resolve().parents[2]
ROOT = PROJECT / "configs" / "classification"
FOLDERS = ("imagenet", "cifar10")  # the paper's; the others have recipes of their own
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.yaml"))
OTHERS = sorted(set(ROOT.rglob("*.yaml")) - set(FILES))
OVERLAYS = ("modern.yaml", "plateau.yaml")
NETWORKS = [p for p in FILES if p.name not in OVERLAYS and not p.name.startswith("Base-")]
IMAGENET = [path for path in NETWORKS if path.parent.name == "imagenet"]
CIFAR10 = [path for path in NETWORKS if path.parent.name == "cifar10"]


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: f"{p.parent.name}-{p.stem}")


@cache
def load(*paths, overrides=()) -> Config:
    return load_config(paths, ["data.root=x", *overrides])


def header(path: Path) -> str:
    """The comment lines that a file opens with, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#") for line in lines[:end])


@each(NETWORKS + OTHERS)
def test_the_network_builds(path):
    model = load(path).model
    with torch.device("meta"):
        network = NetworkSpec(model.name, 10, model.options).build()
    assert sum(parameter.numel() for parameter in network.parameters()) > 1e5


# Written down from the paper, not read from the files.
PAPER = {  # the released weights' README for BN and the momentum's form
    "data.mean": "pixel",
    "data.std": "one",
    "optimizer.momentum": 0.9,
    "optimizer.momentum_form": "caffe",
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_norm_and_bias": True,
    "schedule.lr": 0.1,
    "schedule.gamma": 0.1,
    "train.recompute_bn": True,
}
PAPER_IMAGENET = PAPER | {  # section 3.4
    "data.format": "imagenet",
    "data.augmentation": "paper",
    "data.short_side": [256, 480],
    "data.crop": 224,
    "schedule.iterations": 600_000,
    "train.batch_size": 256,
    "train.micro_batch": 32,
    "evaluation.protocol": "center",
    "evaluation.short_side": 256,
    "evaluation.crop": 224,
}
PAPER_CIFAR10 = PAPER | {  # section 4.2; trained on 50k
    "data.format": "cifar10",
    "data.split": "50k",
    "data.augmentation": "pad_crop",
    "data.color_noise": "none",
    "data.crop": 32,
    "schedule.iterations": 64_000,
    "schedule.policy": "steps",
    "schedule.milestones": [32_000, 48_000],
    "train.batch_size": 128,
    "evaluation.protocol": "full",
}
VGG = {  # arXiv 1409.1556, section 3.1
    "data.mean": "channel",
    "data.short_side": [256, 512],
    "optimizer.weight_decay": 5e-4,
    "schedule.iterations": 370_000,
    "schedule.lr": 0.01,
    "train.recompute_bn": False,  # no BN
}
PRELU_NET = VGG | {  # arXiv 1502.01852, section 3: 80 epochs, two switches of the rate
    "data.mean": "pixel",
    "schedule.iterations": round(80 * 1_281_167 / 128, -4),
    "schedule.plateau_drops": 2,
    "train.batch_size": 128,
}


def assert_recipe(config: Config, recipe: dict[str, object]) -> None:
    assert {key: attrgetter(key)(config) for key in recipe} == recipe


@each(IMAGENET)
def test_imagenet_recipe(path):
    own = {"vgg16": VGG, "prelu_net_b": PRELU_NET}.get(path.stem, {})
    assert_recipe(load(path), PAPER_IMAGENET | own)


@each(CIFAR10)
def test_cifar10_recipe(path):
    config = load(path)
    assert_recipe(config, PAPER_CIFAR10)
    warmed_up = path.stem in ("resnet110", "resnet1202")  # "trained as described above"
    expected = (0.01, 80) if warmed_up else (0, 0)
    assert (config.schedule.warmup_lr, config.schedule.warmup_until_error) == expected
    assert config.schedule.warmup_iterations == 0


# Table 1, Fig. 3 and Table 3; Table 6 and section 4.2. VGG-16, GoogLeNet, BN-inception, PReLU-net
# and Highway networks are the others of the paper's tables and related work.
RELEASED = {"caffe_pool": True}
PAPER_NETWORKS = {
    "imagenet/resnet18": ("resnet18", RELEASED),
    "imagenet/resnet18_A": ("resnet18", RELEASED | {"shortcut": "A"}),
    "imagenet/resnet34": ("resnet34", RELEASED),
    "imagenet/resnet34_A": ("resnet34", RELEASED | {"shortcut": "A"}),
    "imagenet/resnet34_B": ("resnet34", RELEASED | {"shortcut": "B"}),
    "imagenet/resnet34_C": ("resnet34", RELEASED | {"shortcut": "C"}),
    "imagenet/resnet50": ("resnet50", RELEASED),
    "imagenet/resnet101": ("resnet101", RELEASED),
    "imagenet/resnet152": ("resnet152", RELEASED),
    "imagenet/plain18": ("plain18", RELEASED),
    "imagenet/plain34": ("plain34", RELEASED),
    "imagenet/vgg16": ("vgg16", {}),
    "imagenet/googlenet": ("torchvision/googlenet", {}),
    "imagenet/bn_inception": ("bn_inception", {}),
    "imagenet/prelu_net_b": ("prelu_net_b", {}),
    "imagenet/resnet34_prelu": ("resnet34", RELEASED | {"activation": "prelu"}),
    "imagenet/resnet34_highway": ("resnet34", RELEASED | {"shortcut": "highway"}),
    **{f"cifar10/resnet{d}": (f"cifar_resnet{d}", {}) for d in (20, 32, 44, 56, 110, 1202)},
    **{f"cifar10/plain{d}": (f"cifar_plain{d}", {}) for d in (20, 32, 44, 56, 110)},
}


def test_every_network_of_the_paper_has_a_config():
    found = {f"{p.parent.name}/{p.stem}": load(p).model for p in NETWORKS}
    assert {k: (m.name, m.options) for k, m in found.items()} == PAPER_NETWORKS


@each([path for path in FILES if not path.name.startswith("Base-")])
def test_states_only_what_differs(path):
    stated = OmegaConf.load(path)
    base = stated.pop("_BASE_", None)
    below = load(path.parent / base) if base else load(ROOT / "imagenet" / "Base-ImageNet.yaml")
    # a network's file names it, also where it is the default
    keys = set(leaves(stated)) - {"model.name"}
    same = {key for key in keys if attrgetter(key)(below) == OmegaConf.select(stated, key)}
    meant = {"schedule.plateau_patience", "schedule.plateau_threshold", "schedule.plateau_drops"}
    assert same <= meant  # the rule of the plateau reads as one


@each(IMAGENET)
def test_overlays_merge_on_every_imagenet_config(path):
    plateau = load(path, path.parent / "plateau.yaml").schedule
    assert (plateau.policy, plateau.milestones, plateau.gamma) == ("plateau", [], 0.1)
    assert (plateau.plateau_threshold, plateau.plateau_drops) == (0.1, 3)
    modern, own = load(path, path.parent / "modern.yaml"), load(path)
    assert modern.model == own.model
    assert modern.schedule.iterations == own.schedule.iterations
    assert (modern.schedule.policy, modern.schedule.milestones) == ("cosine", [])
    assert modern.loss.label_smoothing > 0 and modern.loss.mixup > 0 and modern.loss.cutmix > 0
    assert modern.train.ema > 0 and modern.data.rand_augment
    assert modern.data.augmentation == "inception"


@each([path for path in FILES if not path.name.startswith("Base-")])
def test_opens_with_its_story(path):
    story = header(path)
    command = re.search(r"resnet-backbone train-classifier .*?(?=\n [A-Z])", story, re.S)
    words = shlex.split(command[0].replace("\\\n", " "))
    assert str(path.relative_to(ROOT).with_suffix("")) in words and "data.root=PATH" in words
    assert {word.partition("=")[0] for word in words if "=" in word} <= set(KEYS)
    assert re.search(r"^ Hours: ", story, re.M)
    assert re.search(r"paper, (Table|Fig\.)|torchvision V1|no published|result and source", story)


@each([path for path in FILES if not path.name.startswith("Base-")])
def test_debug_overrides_make_it_short(path):
    words = re.search(r"Debug: (.*(\n   .*)?)", header(path))[1].split()
    base = [ROOT / "imagenet" / "resnet50.yaml"] if path.name in OVERLAYS else []
    config = load(*base, path, overrides=tuple(words))
    assert 1 <= config.schedule.iterations <= 320
    assert 0 < config.evaluation.every <= config.schedule.iterations
    assert config.output.dir == "output/debug"
