"""Checkpoints and pictures for the tests of conversions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_networks import randomise
from PIL import Image

from resnet_backbone.weights import Checkpoint, ModelSpec, get_preprocessing, read_checkpoint
from resnet_backbone.weights.keymaps.table import without_counters


@pytest.fixture(scope="session")
def random_checkpoint():
    """Function (name, convention, num_classes, **options) -> a Checkpoint of random weights."""

    def make(name, convention="torchvision", num_classes=10, **options):
        torch.manual_seed(0)
        preprocessing = get_preprocessing(convention)
        if name in ("resnet50", "resnet101", "resnet152"):
            options["stride_in_1x1"] = preprocessing.stride_in_1x1
        else:
            preprocessing = replace(preprocessing, stride_in_1x1=None)
        spec = ModelSpec(name, num_classes, options)
        state = without_counters(randomise(spec.build()).state_dict())
        tensors = {key: value.detach().contiguous() for key, value in state.items()}
        return Checkpoint(tensors, spec, preprocessing)

    return make


@pytest.fixture(scope="session")
def pictures(data_root):
    """Real images, uint8 (4, 3, 224, 224), RGB."""
    files = sorted((data_root / "imagenet_val500").rglob("*.[jJ][pP]*[gG]"))
    images = [np.array(Image.open(file).convert("RGB")) for file in files[:: len(files) // 4][:4]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def msra(data_root):
    """The paper's own ResNet-50."""
    return read_checkpoint(data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors", "msra")


@pytest.fixture(scope="session")
def vgg_convolutions(data_root):
    """VGG-16 without its head."""
    file = data_root / "weights" / "vgg16_conv_bgr_fp16.safetensors"
    return read_checkpoint(file, "caffe_vgg")
