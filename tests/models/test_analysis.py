"""Counts against the papers, torchvision and a computation by hand."""

from functools import lru_cache, partial

import pytest
import torch
import torchvision
from drawn_networks import on_meta
from torch import nn

from resnet_backbone.models import analyze, build_model, count_parameters

build_on_meta = lru_cache(partial(on_meta, build_model))
NAMES = "resnet18 resnet34 resnet50 resnet101 resnet152 vgg11 vgg16 vgg19"
PAPER = dict(resnet18=1.8, plain18=1.8, resnet34=3.6, plain34=3.6, resnet50=3.8, resnet101=7.6)
PAPER |= dict(resnet152=11.3, vgg16=15.3, vgg19=19.6)  # 1e9: Table 1, and section 4.1 for VGG
PRELU_NETS = dict(prelu_net_a=19.0, prelu_net_b=23.2, prelu_net_c=53.0)  # 1502.01852, Table 3


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_multiply_adds(name):
    """One unit of the paper's last digit, counting convolutions."""
    count = sum(stage.convolutions for stage in analyze(build_on_meta(name)))
    assert abs(count / 1e9 - PAPER[name]) <= 0.1


@pytest.mark.parametrize("name", PRELU_NETS)
def test_multiply_adds_of_prelu_nets(name):
    """Convolutions and linear layers, within one percent."""
    count = sum(stage.multiply_adds for stage in analyze(build_on_meta(name)))
    assert count / 1e9 == pytest.approx(PRELU_NETS[name], rel=0.01)


@pytest.mark.parametrize("name", NAMES.split())
def test_torchvisions_metadata(name):
    """Three decimals of 1e9, convolutions and linear layers."""
    meta = torchvision.models.get_model_weights(name).DEFAULT.meta
    options = {} if name[:3] == "vgg" or name[6:] in ("18", "34") else {"stride_in_1x1": False}
    stages = analyze(build_on_meta(name, **options))
    assert round(sum(stage.multiply_adds for stage in stages) / 1e9, 3) == meta["_ops"]


def test_one_convolution_by_hand():
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten()
    )
    model.append(nn.Linear(8 * 4 * 5, 10))
    # 8 channels of 4x5 positions, each 3x3 over 3 of the 6 channels
    convolution, linear = 8 * 4 * 5 * 3 * 3 * 3, 8 * 4 * 5 * 10
    assert analyze(model, (7, 9)) == [
        ("0", (8, 4, 5), 8 * 27 + 8, convolution, 0),
        ("1", (8, 4, 5), 0, 0, 0),
        ("2", (160,), 0, 0, 0),
        ("3", (10,), 1600 + 10, 0, linear),
    ]
    assert count_parameters(model) == (8 * 27 + 8) + (1600 + 10)


@pytest.mark.parametrize("name", "resnet50 vgg11 cifar_resnet8 prelu_net_a bn_inception".split())
def test_stages_sum_up(name):
    model = build_on_meta(name)
    stages = analyze(model, 96)
    assert sum(stage.parameters for stage in stages) == count_parameters(model)
    maps = model.forward_features(torch.empty(1, 3, 96, 96, device="meta"))
    shapes = {stage.name: stage.output_shape for stage in stages}
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()}.items() <= shapes.items()


def test_model_is_left_as_it_was():
    model = build_model("cifar_resnet8").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    analyze(model, 32)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
