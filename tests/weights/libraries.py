"""Networks of other libraries, their random values, and what "the same" means."""

from operator import attrgetter, itemgetter

import pytest
import timm
import torch
import torchvision
from torch import nn

from resnet_backbone.models.resnet import DEPTHS

CLASSES = 7
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")


class Logits(nn.Module):
    """Logits in place of a library's output object; the state is the library's."""

    def __init__(self, model, get):
        super().__init__()
        self.model, self.get = model, get
        self.load_state_dict, self.state_dict = model.load_state_dict, model.state_dict

    def forward(self, images):
        return self.get(self.model(images))


def transformers_resnet(name, stride_in_1x1=False):
    transformers = pytest.importorskip("transformers")
    block, depths = DEPTHS[int(name.removeprefix("resnet"))]
    widths = [width * block.expansion for width in (64, 128, 256, 512)]
    options = dict(depths=list(depths), hidden_sizes=widths, num_labels=CLASSES)
    options["layer_type"] = "bottleneck" if name in BOTTLENECKS else "basic"
    config = transformers.ResNetConfig(downsample_in_bottleneck=stride_in_1x1, **options)
    return Logits(transformers.ResNetForImageClassification(config), attrgetter("logits"))


def detectron2_resnet(name, stride_in_1x1=True, norm="BN", **options):
    resnet = pytest.importorskip("detectron2.modeling.backbone.resnet")
    stride = {"stride_in_1x1": stride_in_1x1} if name in BOTTLENECKS else {}
    stages = resnet.ResNet.make_default_stages(int(name[6:]), norm=norm, **stride)
    return resnet.ResNet(resnet.BasicStem(norm=norm), stages, **options)


LIBRARIES = {
    "torchvision": lambda name, _: torchvision.models.get_model(name, num_classes=CLASSES),
    "timm": lambda name, _: timm.create_model(name, num_classes=CLASSES),
    "huggingface": transformers_resnet,
    "detectron2": lambda name, stride: Logits(
        detectron2_resnet(name, stride, num_classes=CLASSES), itemgetter("linear")
    ),
}


def assert_close(found, expected):
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert expected.std() > 1e-2, "the test is blind"


def assert_same(found, expected):
    """The same keys, types, shapes and values."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
