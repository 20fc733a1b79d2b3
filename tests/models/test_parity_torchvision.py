"""Every stage, the logits and every gradient equal torchvision's, in float64."""

import copy

import pytest
import torch
import torchvision
from drawn_networks import on_meta
from parity import TOLERANCE, adopt, assert_same, draw
from torch import nn

from resnet_backbone.models import build_model
from resnet_backbone.weights.keymaps import from_torchvision


def twins(name, full_width=False, **options):
    """Makes torchvision's network and ours with its weights, both in float64.

    VGG's two hidden linear layers are 119 million parameters: unless ``full_width``, both
    networks get narrower ones.
    """
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=7)
        ours = build_model(name, num_classes=7, **options)
    if name.startswith("vgg") and not full_width:
        narrow = [nn.Linear(512 * 49, 16), nn.Linear(16, 16), nn.Linear(16, 7)]
        theirs.classifier[0], theirs.classifier[3], theirs.classifier[6] = narrow
        ours.fc6, ours.fc7, ours.linear = copy.deepcopy(narrow)
    theirs = draw(theirs)
    adopt(ours, from_torchvision(theirs.state_dict()))
    return theirs, ours


def resnet_stages(model):
    stages = {f"res{i}": getattr(model, f"layer{i - 1}") for i in range(2, 6)}
    return {"stem": model.maxpool, **stages}


def vgg_stages(model):
    """Our stages end before the pooling: the inputs of torchvision's pools, and the last pool."""
    layers = list(model.features)
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    stages = {f"conv{n}": layers[i - 1] for n, i in enumerate(pools, start=1)}
    return {**stages, "pool5": layers[-1]}


def check(theirs, ours, stages, images):
    """Compares stages, logits, gradients and, after the step, batch norm statistics."""
    expected = {}
    for name, module in stages.items():
        module.register_forward_hook(lambda _, __, out, name=name: expected.update({name: out}))
    logits, maps = theirs(images), ours.forward_features(images)
    assert list(maps) == list(stages)
    expected["logits"], maps["logits"] = logits, ours.forward_head(maps[ours.stage_names[-1]])
    canceled = {  # biases before a batch norm
        f"features.{i}.bias"
        for i, layer in enumerate(getattr(theirs, "features", ())[1:])
        if isinstance(layer, nn.BatchNorm2d)
    }
    assert_same(theirs, ours, expected, maps, from_torchvision, canceled)


def random_images(count, size):
    return torch.randn(count, 3, size, size, dtype=torch.float64)


DEEP = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet101", "resnet152")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", *DEEP])
def test_resnet(name, training):
    options = {} if name in ("resnet18", "resnet34") else {"stride_in_1x1": False}
    theirs, ours = twins(name, **options)
    theirs.train(training), ours.train(training)
    check(theirs, ours, resnet_stages(theirs), random_images(2, 40))  # res5 is 2x2


SLOW_VGG = [pytest.param(n, marks=pytest.mark.slow) for n in ("vgg13", "vgg19", "vgg19_bn")]


@pytest.mark.parametrize("name", ["vgg11", "vgg16", "vgg16_bn", *SLOW_VGG])
def test_vgg(name):
    theirs, ours = twins(name)
    theirs.eval(), ours.eval()  # no dropout
    check(theirs, ours, vgg_stages(theirs), random_images(1, 64))


@pytest.mark.slow
def test_vgg16_full_width():
    theirs, ours = twins("vgg16", full_width=True)
    theirs.eval(), ours.eval()
    check(theirs, ours, vgg_stages(theirs), random_images(1, 224))


def test_vgg_batch_norm_in_training():
    theirs, ours = twins("vgg11_bn", dropout=0.0)
    for module in theirs.classifier:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs.train(), ours.train()
    check(theirs, ours, vgg_stages(theirs), random_images(2, 64))


def test_vgg_dropout_is_torchvisions():
    theirs, ours = twins("vgg11")
    images = random_images(2, 32)
    torch.manual_seed(3)
    expected = theirs.train()(images)
    torch.manual_seed(3)
    torch.testing.assert_close(ours.train()(images), expected, **TOLERANCE)


def test_stride_setting_matters():
    """The same weights with the other stride give other features: the test above can see it."""
    theirs, ours = twins("resnet50", stride_in_1x1=True)
    images = random_images(1, 64)
    assert not torch.allclose(theirs.eval()(images), ours.eval()(images), rtol=1e-2)


VGG_KEYS = ("neck.weight", "features.1.weight", "classifier.1.weight", "features.0.scale")
RESNET_KEYS = ("layer5.0.conv1.weight", "module.conv1.weight", "layer1.0.bn1.scale")


@pytest.mark.parametrize("name, keys", [("vgg11", VGG_KEYS), ("resnet18", RESNET_KEYS)])
def test_unknown_keys(name, keys):
    state = on_meta(torchvision.models.get_model, name).state_dict()
    for key in keys:
        with pytest.raises(ValueError, match=f"key '{key}'"):
            from_torchvision({**state, key: torch.ones(1)})


def test_incomplete_vgg():
    state = {f"features.{i}.weight": torch.ones(1, 1, 3, 3) for i in (0, 1, 2)}
    with pytest.raises(ValueError, match="indices of features: 0, 1, 2"):
        from_torchvision(state)
    state = on_meta(torchvision.models.vgg11_bn).state_dict()
    del state["features.1.running_mean"]
    with pytest.raises(ValueError, match="no conv1.0.norm.running_mean"):
        from_torchvision(state)
