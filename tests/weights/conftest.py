"""Released checkpoints and pictures for the tests of conversions."""

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_backbone.weights import read_checkpoint


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
