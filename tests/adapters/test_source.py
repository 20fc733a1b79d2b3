"""What all adapters share: weights for RGB in 0..1, and the network that they belong to."""

import subprocess
import sys

import pytest
import torch
from drawn_networks import assert_close

from resnet_backbone.adapters import build_backbone, image_normalization, rgb_checkpoint
from resnet_backbone.models import FrozenBatchNorm2d
from resnet_backbone.weights import PREPROCESSINGS, InputNormalizer, WeightsError, get_preprocessing


def test_the_package_loads_no_other_library():
    libraries = {"torchvision", "timm", "transformers", "mmengine", "detectron2"}
    code = f"import sys, resnet_backbone; print(sorted({libraries} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("preprocessing", sorted(PREPROCESSINGS))
def test_converted_weights_are_the_same_function(preprocessing, weights_file, photo_bytes):
    path, network = weights_file("resnet18", preprocessing)
    found = rgb_checkpoint(path)
    assert (found.preprocessing.channel_order, found.preprocessing.value_range) == ("RGB", 1.0)
    converted = found.model.build().eval()
    converted.load_state_dict(found.tensors, strict=False)
    with torch.no_grad():
        logits = converted(InputNormalizer(found.preprocessing)(photo_bytes))
        wanted = network(InputNormalizer(get_preprocessing(preprocessing))(photo_bytes))
    assert_close(logits, wanted)


def test_normalization_of_unconverted_weights_is_refused():
    with pytest.raises(WeightsError, match="rgb_checkpoint"):
        image_normalization(get_preprocessing("msra"))


def test_with_weights_norms_are_constant_and_two_stages_frozen(weights_file):
    path, network = weights_file("resnet50", "torchvision")
    found, preprocessing = build_backbone("resnet50", path, out_features=("res4",))
    assert not found.stride_in_1x1 and preprocessing.same_input(get_preprocessing("torchvision"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in found.modules())
    frozen = [name for name, stage in found.named_children() if not _trains(stage)]
    assert frozen == ["stem", "res2"]
    assert torch.equal(found.res4[5].conv1.weight, network.res4[5].conv1.weight)


def test_options_win(weights_file):
    path, _ = weights_file("resnet18", "msra")
    found, _ = build_backbone("resnet18", path, norm="BN", freeze_at=0, dilations=(1, 1, 1, 2))
    assert isinstance(found.stem.conv1.norm, torch.nn.BatchNorm2d) and _trains(found.stem)
    assert found.features["res5"].stride == 16


def test_weights_without_norm_stay_without(weights_file):
    path, _ = weights_file("vgg11", "caffe_vgg")
    found, _ = build_backbone("vgg11", path, out_features=("conv3",))
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in found.modules())


def _trains(module):
    return any(parameter.requires_grad for parameter in module.parameters())
