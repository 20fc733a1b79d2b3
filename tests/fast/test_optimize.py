"""channels_last kernels, and optimize_for_inference: the same outputs in a faster form."""

import copy
import pickle
from functools import partial

import pytest
import torch
from drawn_networks import assert_close, network, unfolded
from safetensors.torch import load_file
from torch import nn

from resnet_backbone import build_model, optimize_for_inference
from resnet_backbone.fast import InferenceNetwork
from resnet_backbone.fast.export import NormalizedNetwork
from resnet_backbone.weights import get_preprocessing, load_weights, save_weights

optimize = partial(optimize_for_inference, engine="eager")
NAMES = ("resnet18", "resnet50", "cifar_resnet20", "vgg11_bn")
LAST = torch.channels_last


@pytest.mark.parametrize("name", NAMES)
def test_networks_and_maps_are_channels_last(name):
    """Whatever the form of the input."""
    model, images = network(name), torch.randn(2, 3, 64, 96)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kernels = [p for p in copied.parameters() if p.dim() == 4]
        assert kernels and all(p.is_contiguous(memory_format=LAST) for p in kernels)
    model = network(name, out_features=("conv5",) if "vgg" in name else ("res2",))
    with torch.no_grad():
        found = model(images), model(images.to(memory_format=LAST))
    assert_close(*found, bound=1e-6)
    for maps in found:
        assert all(value.is_contiguous(memory_format=LAST) for value in maps.values())


def test_files_are_as_before(tmp_path):
    """Values, keys and strides in a file do not show the form in memory."""
    model, path = network(), tmp_path / "w.safetensors"
    save_weights(model, path, get_preprocessing("torchvision"))
    tensors = load_file(path)
    assert tensors.keys() == model.state_dict().keys()
    assert all(value.is_contiguous() for value in tensors.values())
    other = build_model("cifar_resnet8")
    load_weights(other, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unfolded(model, images), unfolded(other.eval(), images))
    plain = {key: value.contiguous() for key, value in model.state_dict().items()}
    other.load_state_dict(plain)
    assert other.res2[0].conv1.weight.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_optimized_classifier(name, norm):
    model = network(name, norm=norm, num_classes=5).train()
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 96, 64)
    fast = optimize(model)
    assert type(fast) is type(model) and not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert_close(fast(images), unfolded(model.eval(), images))
    assert_close(fast(images.to(memory_format=LAST)), unfolded(model, images))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), "the original has changed"
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_optimized_backbone(dtype, bound):
    model = network("resnet18", out_features=("res3", "res5"))
    images = torch.randn(2, 3, 96, 64)
    fast = optimize(model, dtype=dtype)
    assert fast.features == model.features and fast.out_features == ("res3", "res5")
    for x in (images, images.to(memory_format=LAST), images.double().float()):
        assert_close(fast(x), unfolded(model, images), bound)
    assert next(fast.parameters()).dtype == dtype
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_close(copied(images), fast(images), 0)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float64, 1e-5)])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_optimized_then_moved_to_another_precision(first, dtype, bound):
    model = network("resnet18", out_features=("res3",))
    images = torch.randn(2, 3, 64, 64)
    moved, expected = optimize(model, dtype=first).to(dtype), unfolded(model, images)
    if first == torch.bfloat16:
        assert moved.dtype == dtype, "images take the parameters' precision"
        assert_close(moved(images), expected, 0.03)
    else:
        assert_close(moved(images.to(dtype))["res3"].float(), expected["res3"], bound)


@pytest.mark.parametrize("convention", ["msra", "torchvision"])
def test_optimized_network_with_its_preprocessing(convention):
    """Pixels are normalized in float32; the network alone is in bfloat16."""
    model = NormalizedNetwork(network("resnet18", num_classes=5), get_preprocessing(convention))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = unfolded(model.eval(), pixels)
    fast = optimize(model, dtype=torch.bfloat16)
    assert fast.mean.dtype == torch.float32 and isinstance(fast.network, InferenceNetwork)
    for images in (pixels, pixels.float()):
        assert_close(fast(images), expected, 0.03)
    whole = InferenceNetwork(copy.deepcopy(model), torch.bfloat16)
    assert_close(whole(pixels), expected, 0.03)


@pytest.mark.parametrize("dtype, strict", [(torch.float32, True), (torch.bfloat16, False)])
def test_weights_into_an_optimized_model(dtype, strict):
    """Those of another optimized model only: folded ones."""
    model, other = network(), network(seed=1)
    fast, images = optimize(model, dtype=dtype), torch.randn(2, 3, 32, 32)
    prefix = "" if dtype == torch.float32 else "network."
    state = {prefix + key: value for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="load into the original and optimize that"):
        fast.load_state_dict(state, strict=strict)
    assert_close(fast(images), unfolded(model, images), 0.03)
    fast.load_state_dict(optimize(other, dtype=dtype).state_dict(), strict=strict)
    assert_close(fast(images), unfolded(other, images), 0.03)


def test_compiled_code_takes_no_weights():
    detector = optimize_for_inference(nn.ModuleDict({"backbone": network()}), engine="compile")
    before = copy.deepcopy(detector.state_dict())
    state = {key: value + 1 for key, value in before.items()}
    with pytest.raises(RuntimeError, match="constants of its code"):
        detector.load_state_dict(state, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_a_feature_pyramid_of_detectron2_takes_the_precision_as_a_whole(detectron2):
    from resnet_backbone.detection.config import load_config
    from resnet_backbone.detection.engine.trainer import Trainer

    pyramid = Trainer.build_model(load_config("coco/faster_rcnn_R_18_FPN", [])).backbone.eval()
    fast = optimize(pyramid, dtype=torch.bfloat16)
    assert isinstance(fast, InferenceNetwork) and fast.size_divisibility == 32
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    images = torch.randn(1, 3, 64, 96)
    assert_close(fast(images), unfolded(pyramid, images), 0.05)


def test_refusals():
    fast = optimize(network(), dtype=torch.bfloat16)
    for model, dtype, message in (
        (network(), torch.float64, "torch.float64 is not one of"),
        (nn.Conv2d(3, 4, 1), torch.float32, "Conv2d contains none of our networks"),
        (fast, torch.float32, "optimized before"),
    ):
        with pytest.raises(ValueError, match=message):
            optimize(model, dtype=dtype)
    with pytest.raises(TypeError, match="a tensor of images, not a list"):
        fast([torch.randn(3, 32, 32)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_compiled(dtype, bound):
    import torch._inductor.config as inductor

    model = network(out_features=("res2", "res4"))
    fast = optimize_for_inference(model, dtype=dtype, engine="compile")
    for size in ((2, 3, 32, 32), (2, 3, 48, 32), (3, 3, 40, 64)):
        images = torch.randn(size)
        assert_close(fast(images), unfolded(model, images), bound)
    assert not inductor.freezing, "other compiled models must not be frozen"


@pytest.mark.slow
def test_compiled_then_moved_to_another_precision():
    """Back in float32 the weights are rounded, also those of code that was compiled before."""
    model, images = network(out_features=("res2",)), torch.randn(2, 3, 32, 32)
    fast, eager = optimize_for_inference(model, engine="compile"), optimize(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        fast, eager = fast.to(dtype), eager.to(dtype)
        expected = {name: value.float() for name, value in eager(images.to(dtype)).items()}
        assert_close(fast(images), expected, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.slow
def test_weights_are_constants_of_compiled_code():
    from torch._inductor.utils import run_and_get_code

    fast = optimize_for_inference(network(), engine="compile")
    _, code = run_and_get_code(fast, torch.randn(2, 3, 32, 32))
    assert "_frozen_param" in "".join(code)
