"""Conversions keep the function: logits before and after, exactness, and what is refused."""

from dataclasses import replace

import pytest
import torch
from drawn_networks import random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone import build_model, load_weights
from resnet_backbone.weights import (
    PREPROCESSINGS,
    Checkpoint,
    ModelSpec,
    WeightsError,
    convert,
    get_preprocessing,
    read_checkpoint,
    save_weights,
)
from resnet_backbone.weights.compare import compare
from resnet_backbone.weights.convert import convert_input, fold_bn, to_dtype, to_unit_responses
from resnet_backbone.weights.load import build_network
from resnet_backbone.weights.preprocessing import InputNormalizer

STDS = st.tuples(*[st.floats(0.1, 300)] * 3)
SMALL = ("resnet18", "plain18", "cifar_resnet20")


def relative(before, after, images):
    """Largest difference of outputs, in units of the largest output."""
    return compare(before, after, images, tolerance=1.0).difference.relative


@pytest.fixture(scope="module")
def small():
    return random_checkpoint("resnet18", "torchvision")


def every_conversion(checkpoint):
    """name -> the checkpoint converted."""
    own = checkpoint.preprocessing
    range_ = 256.0 - own.value_range  # the other of 1 and 255
    changed = dict(channel_order=own.channel_order[::-1], value_range=range_)
    found = {
        "order": convert_input(checkpoint, channel_order=own.channel_order[::-1]),
        "range": convert_input(checkpoint, value_range=range_),
        "std": convert_input(checkpoint, std=(0.3, 0.4, 0.7)),
        "all": convert_input(checkpoint, std=(1, 1, 1), **changed),
    }
    if any(".norm." in key for key in checkpoint.tensors):
        found["BN"] = fold_bn(checkpoint)
        found["eps"] = convert.to_bn_eps(checkpoint, 1e-2)
        found["all and BN"] = fold_bn(found["all"])
    return found


@pytest.mark.data
@pytest.mark.parametrize("name", SMALL)
def test_every_direction_keeps_the_logits(name, pictures):
    images = pictures[:2, :, :32, :32]
    for convention in ("msra", "torchvision"):
        checkpoint = random_checkpoint(name, convention)
        for step, after in every_conversion(checkpoint).items():
            assert relative(checkpoint, after, images) < 1e-4, step


@pytest.mark.data
def test_every_direction_keeps_the_logits_of_the_released_weights(msra, vgg_convolutions, pictures):
    for checkpoint in (msra, vgg_convolutions):
        steps = every_conversion(checkpoint)
        for step in {"order", "std", "eps", "all and BN"} & steps.keys():
            found = relative(checkpoint, steps[step], pictures[:1, :, 80:144, 80:144])
            assert found < 1e-5, step


@pytest.mark.data
def test_the_conversions_are_not_empty(small, pictures):
    """The pictures tell a conversion from its statement alone."""
    images = pictures[:1, :, :32, :32]
    for step, after in every_conversion(small).items():
        if step != "range" and "BN" not in step:
            wrong = replace(after, tensors=small.tensors)
            assert relative(small, wrong, images) > 1e-3, step


def test_channel_order_is_bit_exact_and_its_own_inverse(small):
    there = convert_input(small, channel_order="BGR")
    key = "stem.conv1.weight"
    assert torch.equal(there.tensors[key], small.tensors[key][:, [2, 1, 0]])
    assert there.preprocessing.mean == small.preprocessing.mean[::-1]
    back = convert_input(there, channel_order="RGB")
    assert back.preprocessing == small.preprocessing
    assert all(torch.equal(back.tensors[k], v) for k, v in small.tensors.items())
    assert there.tensors["linear.weight"] is small.tensors["linear.weight"]


def test_value_range_changes_no_tensor(small):
    there = convert_input(small, value_range=255.0)
    assert there.preprocessing.mean == pytest.approx(PREPROCESSINGS["torchvision"].pixel_mean_255())
    assert there.preprocessing.pixel_std_255() == pytest.approx(small.preprocessing.pixel_std_255())
    assert all(there.tensors[key] is value for key, value in small.tensors.items())


@settings(deadline=None, max_examples=30)
@given(STDS, STDS)
def test_std_there_and_back_is_exact_to_rounding(first, second):
    preprocessing = replace(PREPROCESSINGS["torchvision"], std=first)
    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    before = Checkpoint({"stem.weight": kernel}, ModelSpec("cifar_resnet20"), preprocessing)
    there = convert_input(before, std=second)
    ratios = torch.tensor(second).double() / torch.tensor(first).double()
    found, expected = there.tensors["stem.weight"].double(), kernel * ratios[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    back = convert_input(there, std=first)
    torch.testing.assert_close(back.tensors["stem.weight"], kernel, rtol=3e-7, atol=0)


def test_powers_of_two_are_bit_exact(small):
    own = small.preprocessing.std
    there = convert_input(small, std=(own[0] * 2, own[1] / 4, own[2]))
    back = convert_input(there, std=own)
    key = convert.first_convolution(small.tensors)
    assert not torch.equal(there.tensors[key], small.tensors[key])
    assert torch.equal(back.tensors[key], small.tensors[key])


@pytest.mark.data
def test_half_precision_kernels_lose_nothing_by_folding(msra):
    """A product of fp16 values is kept in fp32."""
    there = convert_input(msra, std=(2.5, 3.5, 4.5))
    assert msra.tensors["stem.conv1.weight"].dtype == torch.float16
    assert there.tensors["stem.conv1.weight"].dtype == torch.float32
    assert fold_bn(msra).tensors["res2.0.conv1.weight"].dtype == torch.float32


@pytest.mark.parametrize("std", [(0, 1, 1), (1, 1), (1, -1, 1), (float("nan"), 1, 1)])
def test_wrong_std_is_refused(small, std):
    with pytest.raises(WeightsError, match="three positive numbers"):
        convert_input(small, std=std)


@pytest.mark.data
def test_mean_image_follows(small, pictures):
    image = torch.rand(3, 32, 32)
    before = small.restated(mean_image=image)
    images = pictures[:2, :, :32, :32]
    assert relative(before, small, images) > 1e-3
    for step, after in every_conversion(before).items():
        assert relative(before, after, images) < 1e-5, step
    assert relative(convert.use_channel_means(before), small, images) == 0


@pytest.mark.data
def test_unit_responses_of_the_released_vgg(vgg_convolutions, pictures):
    """Standard deviation 1 after each layer; every stage is the old one divided by a number."""
    after = to_unit_responses(vgg_convolutions, pictures)
    assert stds(after, pictures) == pytest.approx([1.0] * 13, rel=1e-4)
    assert max(stds(vgg_convolutions, pictures)) > 300
    stages = ("conv1", "conv2", "conv3", "conv4", "conv5")
    with torch.inference_mode():
        old, new = (
            build_network(checkpoint).forward_features(
                InputNormalizer(checkpoint.preprocessing)(pictures), stages
            )
            for checkpoint in (vgg_convolutions, after)
        )
    for stage in stages:
        ratio = (old[stage].std() / new[stage].std()).item()
        torch.testing.assert_close(new[stage] * ratio, old[stage], rtol=1e-3, atol=1e-4 * ratio)


def stds(checkpoint, pictures):
    found = []
    network = build_network(checkpoint)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: found.append(y.relu().std().item()))
    with torch.inference_mode():
        network(InputNormalizer(checkpoint.preprocessing)(pictures))
    return found


def test_unit_responses_keep_the_logits():
    checkpoint = random_checkpoint("vgg11", "caffe_vgg")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    after = to_unit_responses(checkpoint, images)
    assert not torch.equal(after.tensors["fc6.weight"], checkpoint.tensors["fc6.weight"])
    assert relative(checkpoint, after, images) < 1e-5


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_only_a_vgg_without_norms_gets_unit_responses(name):
    with pytest.raises(WeightsError, match="norms level the responses"):
        to_unit_responses(random_checkpoint(name), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_folded_network_has_biases_and_no_norms(small):
    folded = fold_bn(small)
    network = folded.model.build()
    assert not any("norm" in key for key in network.state_dict())
    assert network.state_dict().keys() == folded.tensors.keys()
    with pytest.raises(WeightsError, match="no batch norms"):
        fold_bn(folded)


@pytest.mark.parametrize("options", [{"norm": "GN"}, {"norm": ""}])
def test_only_batch_norms_are_folded(options):
    with pytest.raises(WeightsError, match="batch norms"):
        fold_bn(random_checkpoint("resnet18", "msra", **options))


def test_dtypes(small):
    half = to_dtype(small, "fp16")
    for key, value in half.tensors.items():
        assert value.dtype == (torch.float16 if value.dim() > 1 else torch.float32), key
    twice = to_dtype(to_dtype(half, "fp32"), "fp16")
    assert all(torch.equal(twice.tensors[key], value) for key, value in half.tensors.items())
    with pytest.raises(WeightsError, match="fp8"):
        to_dtype(small, "fp8")


def test_overflow_names_the_tensor(small):
    large = small.tensors["res3.0.conv1.weight"].clone()
    large[0, 0, 0, 0] = 7e4
    broken = replace(small, tensors={**small.tensors, "res3.0.conv1.weight": large})
    with pytest.raises(WeightsError, match=r"res3\.0\.conv1\.weight.*7e\+04.*bf16"):
        to_dtype(broken, "fp16")
    assert to_dtype(broken, "bf16").tensors["res3.0.conv1.weight"].isfinite().all()


def test_gray_images_are_refused():
    gray = random_checkpoint("resnet18", "msra", in_channels=1)
    with pytest.raises(WeightsError, match="only color"):
        convert_input(gray, channel_order="RGB")
    with pytest.raises(ValueError, match="none of the keys stem.conv1.weight"):
        convert.first_convolution({"features.0.weight": torch.zeros(1, 3, 3, 3)})


def test_what_no_tensor_shows_is_kept_by_the_file(tmp_path):
    options = dict(dilations=(1, 1, 1, 2), multi_grid=(1, 2, 1), stride_in_1x1=False)
    network = build_model("resnet50", 10, **options).eval()
    save_weights(network, tmp_path / "x.safetensors", get_preprocessing("torchvision"))
    images = torch.randn(1, 3, 96, 96)
    for again in (
        build_network(read_checkpoint(tmp_path / "x.safetensors")),
        build_model("resnet50", 10, weights=tmp_path / "x.safetensors").eval(),
    ):
        with torch.no_grad():
            torch.testing.assert_close(again(images), network(images))
    plain = build_model("resnet50", stride_in_1x1=False, out_features=("res4",))
    load_weights(plain, tmp_path / "x.safetensors")  # a choice of the user's
