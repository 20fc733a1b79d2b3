"""The paper's networks, on plain PyTorch."""

from resnet_backbone.models.factory import build_model, list_models
from resnet_backbone.models.layers import FrozenBatchNorm2d
from resnet_backbone.models.network import Feature, StagedNetwork
from resnet_backbone.models.resnet import BasicBlock, BottleneckBlock, ResNet
from resnet_backbone.models.resnet_cifar import CifarResNet
from resnet_backbone.models.vgg import VGG

__all__ = [
    "BasicBlock",
    "BottleneckBlock",
    "CifarResNet",
    "Feature",
    "FrozenBatchNorm2d",
    "ResNet",
    "StagedNetwork",
    "VGG",
    "build_model",
    "list_models",
]
