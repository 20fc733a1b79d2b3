"""Written files, loaded by the libraries they are for, which then preprocess in their own way."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from drawn_networks import random_checkpoint, randomize
from libraries import LIBRARIES, assert_close, detectron2_resnet
from PIL import Image

from resnet_backbone.weights import Checkpoint, WeightsError, read_checkpoint
from resnet_backbone.weights.compare import outputs_of
from resnet_backbone.weights.convert import convert_input, fold_bn, to_dtype, use_channel_means
from resnet_backbone.weights.export import FORMATS, export_checkpoint
from resnet_backbone.weights.load import build_network
from resnet_backbone.weights.preprocessing import InputNormalizer

SIDE = 64  # pixels; stated as the test's size too, so that no library resizes


def target(folder, format):
    suffixes = FORMATS[format].suffixes
    return folder / f"{format}{suffixes[0] if suffixes else ''}"


def with_test_size(checkpoint: Checkpoint, side: int = SIDE) -> Checkpoint:
    return checkpoint.restated(resize_size=side, crop_size=side, interpolation="bicubic")


@pytest.fixture(scope="module")
def images(pictures):
    """PIL, SIDE x SIDE."""
    return to_pil(pictures[:2, :, 80 : 80 + SIDE, 80 : 80 + SIDE])


def to_pil(pixels):
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def as_tensor(images):
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


def own_logits(checkpoint, images):
    normalize = InputNormalizer(checkpoint.preprocessing)
    stage = "conv5" if checkpoint.model.num_classes is None else ""
    return outputs_of(build_network(checkpoint), normalize, as_tensor(images), stage)


def as_the_usage_says(exported):
    """Torchvision's network and its transform, by the very lines."""
    scope = dict(vars(torchvision.transforms), torchvision=torchvision, torch=torch)
    exec(exported.usage, scope | dict(safetensors=safetensors), scope)
    return scope["network"].eval(), scope["transform"]


def by_torchvision(exported, images):
    network, transform = as_the_usage_says(exported)
    return network(torch.stack([transform(image) for image in images]))


def by_timm(exported, images):
    timm = pytest.importorskip("timm")
    network = timm.create_model(f"local-dir:{exported.path}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    prepare = timm.data.create_transform(**config, is_training=False)
    return network(torch.stack([prepare(image) for image in images]))


def by_transformers(exported, images):
    transformers = pytest.importorskip("transformers")
    network, info = transformers.ResNetForImageClassification.from_pretrained(
        exported.path, output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value and "key" in key}
    assert not problems
    assert network.dtype == torch.float32
    processor = transformers.AutoImageProcessor.from_pretrained(exported.path)
    return network.eval()(**processor(images, return_tensors="pt")).logits


def by_detectron2(exported, images):
    from detectron2.checkpoint import DetectionCheckpointer

    spec, own = exported.checkpoint.model, exported.checkpoint.preprocessing
    network = detectron2_resnet(spec.name, own.stride_in_1x1, num_classes=spec.num_classes).eval()
    DetectionCheckpointer(network).load(str(exported.path))
    order = [2, 1, 0] if own.channel_order == "BGR" else [0, 1, 2]  # INPUT.FORMAT
    pixels = as_tensor(images)[:, order]
    settings = dict(line.split(maxsplit=1) for line in exported.usage.splitlines())
    stated = (json.loads(settings[f"MODEL.PIXEL_{name}"]) for name in ("MEAN", "STD"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in stated)
    return network((pixels - mean) / std)["linear"]


LOADERS = dict(torchvision=by_torchvision, timm=by_timm, huggingface=by_transformers)
LOADERS |= dict(detectron2=by_detectron2, caffe2=by_detectron2)


@torch.inference_mode()
def loaded_logits(format, exported, images):
    return LOADERS[format](exported, images)


def check_all_ways(name, source, tmp_path, images):
    """From a random network of one library through ours into every other one."""
    torch.manual_seed(0)
    network = randomize(LIBRARIES[source](name, False))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "source.pth")
    checkpoint = read_checkpoint(tmp_path / "source.pth", "torchvision")
    checkpoint = with_test_size(checkpoint, images[0].width)
    with torch.inference_mode():
        expected = network(InputNormalizer(checkpoint.preprocessing)(as_tensor(images)))
    assert_close(own_logits(checkpoint, images), expected)
    for format in LOADERS if name.startswith("resnet") else ("torchvision", "timm"):
        exported = export_checkpoint(checkpoint, target(tmp_path, format), format)
        assert_close(loaded_logits(format, exported, images), expected)


@pytest.mark.data
@pytest.mark.parametrize("source", ["torchvision", "timm", "huggingface"])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_random_networks_through_every_library(name, source, tmp_path, images):
    check_all_ways(name, source, tmp_path, images)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_vgg_through_every_library(name, tmp_path, pictures):
    check_all_ways(name, "timm", tmp_path, to_pil(pictures[:1]))


@pytest.mark.data
@pytest.mark.parametrize("format", ["huggingface", "detectron2", "caffe2"])
def test_msra_resnet50_in_other_libraries(format, msra, tmp_path, images):
    checkpoint = with_test_size(msra)
    exported = export_checkpoint(checkpoint, target(tmp_path, format), format)
    expected = own_logits(checkpoint, images)
    assert_close(expected, loaded_logits(format, exported, images))


@pytest.mark.data
def test_vgg16_convolutions_in_torchvision(vgg_convolutions, tmp_path, images):
    checkpoint = with_test_size(vgg_convolutions)
    exported = export_checkpoint(checkpoint, tmp_path / "vgg16.pth", "torchvision")
    network, transform = as_the_usage_says(exported)
    with torch.inference_mode():
        found = network.features[:-1](torch.stack([transform(image) for image in images]))
    assert_close(found, own_logits(checkpoint, images))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("convention", ["msra", "torchvision"])
def test_there_and_back_is_bit_equal(format, convention, tmp_path):
    before = random_checkpoint("resnet18", convention)
    exported = export_checkpoint(before, target(tmp_path, format), format)
    says_it = format != "torchvision"  # whose files hold nothing but tensors
    back = read_checkpoint(exported.path, "" if says_it else exported.checkpoint.preprocessing)
    assert back.preprocessing.same_input(exported.checkpoint.preprocessing)
    own = before.preprocessing
    again = convert_input(back, channel_order=own.channel_order, value_range=own.value_range)
    assert again.preprocessing.mean == pytest.approx(own.mean, rel=1e-12)
    assert again.preprocessing.std == pytest.approx(own.std, rel=1e-12)
    assert again.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in before.tensors.items())
    assert (back.model.name, back.model.num_classes) == ("resnet18", 10)


@pytest.mark.parametrize(
    "name, format", [("x.pkl", "detectron2"), ("x.pth", "detectron2"), ("x.pkl", "caffe2")]
)
def test_an_input_without_name_goes_along(name, format, tmp_path):
    before = random_checkpoint("resnet18", "torchvision")
    before = convert_input(before, value_range=255.0, std=(1.0, 1.0, 1.0))
    path, stated = tmp_path / name, before.preprocessing.to_json()
    export_checkpoint(before, path, format)
    assert read_checkpoint(path).preprocessing.to_json() == stated
    with pytest.raises(WeightsError, match="its content states another preprocessing than 'msra'"):
        read_checkpoint(path, "msra")
    is_torch = path.suffix == ".pth"
    content = torch.load(path) if is_torch else pickle.loads(path.read_bytes())
    content["preprocessing"] = stated.replace('"RGB"', '"GRB"')
    torch.save(content, path) if is_torch else path.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match=f"{name}: channel_order must be RGB or BGR, not 'GRB'"):
        read_checkpoint(path)


@pytest.mark.data
def test_torchvision_safetensors(tmp_path, images):
    checkpoint = with_test_size(random_checkpoint("resnet18", "msra"))
    exported = export_checkpoint(checkpoint, tmp_path / "x.safetensors", "torchvision")
    assert_close(loaded_logits("torchvision", exported, images), own_logits(checkpoint, images))
    back = read_checkpoint(exported.path)  # says its input, which torchvision's own files do not
    assert back.preprocessing.same_input(exported.checkpoint.preprocessing)


def test_usage_states_the_transform(tmp_path):
    exported = export_checkpoint(random_checkpoint("resnet18", "msra"), tmp_path / "x", "timm")
    assert "RGB, 0..1" in exported.usage
    assert "0.485019608, 0.457956863, 0.407603922" in exported.usage


@pytest.mark.parametrize("format", ["detectron2", "caffe2"])
@pytest.mark.parametrize("name, norm", [("resnet18", "BN"), ("resnet50", "BN"), ("resnet50", "GN")])
def test_usage_builds_detectron2s_own_backbone(name, norm, format, tmp_path, detectron2):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    checkpoint = random_checkpoint(name, "torchvision", None, norm=norm)
    exported = export_checkpoint(checkpoint, tmp_path / "x.pkl", format)
    cfg = get_cfg()
    lines = [line.split(maxsplit=1) for line in exported.usage.splitlines()]
    cfg.merge_from_list([word.strip('"') for line in lines for word in line])
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]])
    backbone = build_backbone(cfg).eval()
    DetectionCheckpointer(backbone).load(cfg.MODEL.WEIGHTS)
    pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    network = checkpoint.model.build(out_features=["res2", "res5"]).eval()
    network.load_state_dict(checkpoint.tensors, strict=False)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    with torch.inference_mode():
        found = backbone((pixels - mean) / std)
        expected = network(InputNormalizer(checkpoint.preprocessing)(pixels))
    for stage, value in expected.items():
        assert_close(found[stage], value)


@pytest.mark.parametrize("resize, crop", [(256, 224), (232, 224), (235, 224), (320, 288)])
def test_size_of_the_test_survives(resize, crop, tmp_path):
    facts = dict(resize_size=resize, crop_size=crop, interpolation="bicubic")
    before = random_checkpoint("resnet18").restated(**facts)
    for format in ("timm", "huggingface"):
        path = export_checkpoint(before, tmp_path / format, format).path
        (path / "model.safetensors").unlink()  # whose metadata say it too
        export_checkpoint(before, tmp_path / "x.pth", "torchvision", overwrite=True)
        (tmp_path / "x.pth").rename(path / "pytorch_model.bin")
        back = read_checkpoint(path).preprocessing
        assert (back.resize_size, back.crop_size, back.interpolation) == tuple(facts.values())


@pytest.mark.data
def test_shards(tmp_path, images):
    checkpoint = with_test_size(random_checkpoint("resnet18", "msra"))
    exported = export_checkpoint(checkpoint, tmp_path / "hf", "huggingface", shard_size=10_000_000)
    names = sorted(path.name for path in exported.path.glob("model*"))
    shards = [f"model-{number:05}-of-00005.safetensors" for number in range(1, 6)]
    assert names == [*shards, "model.safetensors.index.json"]
    assert_close(own_logits(checkpoint, images), loaded_logits("huggingface", exported, images))
    assert read_checkpoint(exported.path).tensors.keys() == checkpoint.tensors.keys()


@pytest.mark.data
def test_half_precision_files_load_as_fp32(tmp_path, images):
    half = with_test_size(to_dtype(random_checkpoint("resnet18"), "fp16"))
    paths = [(target(tmp_path, format), format) for format in FORMATS if format in LOADERS]
    for path, format in [*paths, (tmp_path / "x.pth", "detectron2")]:
        exported = export_checkpoint(half, path, format)
        assert_close(own_logits(half, images), loaded_logits(format, exported, images))


def test_mean_image_only_in_our_own_files(tmp_path):
    image = torch.rand(3, 8, 8)
    before = random_checkpoint("resnet18").restated(mean_image=image)
    path = export_checkpoint(before, tmp_path / "ours.safetensors", "resnet_backbone").path
    assert torch.equal(read_checkpoint(path).preprocessing.mean_image, image)
    with pytest.raises(WeightsError, match="mean image.*--accept-channel-means"):
        export_checkpoint(before, tmp_path / "x.pth", "torchvision")
    export_checkpoint(use_channel_means(before), tmp_path / "x.pth", "torchvision")


def test_what_no_other_library_has(tmp_path):
    before = random_checkpoint("resnet18")
    folded = fold_bn(before)
    other_eps = before.restated(bn_eps=1e-3)
    for format in LOADERS:
        for checkpoint, message in ((folded, "norm"), (other_eps, "BN eps 0.001.*--bn-eps-to")):
            with pytest.raises(WeightsError, match=message):
                export_checkpoint(checkpoint, target(tmp_path, format), format)
    export_checkpoint(folded, tmp_path / "x.safetensors", "resnet_backbone")


def test_backbones_that_stop_early(tmp_path):
    before = random_checkpoint("resnet18")
    tensors = {k: v for k, v in before.tensors.items() if not k.startswith(("res5", "linear"))}
    spec = replace(before.model, num_classes=None)
    before = replace(before, tensors=tensors, model=spec)
    for format in ("torchvision", "timm"):
        with pytest.raises(WeightsError, match="end at res4"):
            export_checkpoint(before, target(tmp_path, format), format)
    for format in ("huggingface", "detectron2"):
        exported = export_checkpoint(before, target(tmp_path, format), format)
        assert read_checkpoint(exported.path, exported.checkpoint.preprocessing).tensors
    config = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    assert config["depths"] == [2, 2, 2]
    transformers = pytest.importorskip("transformers")
    network = transformers.ResNetModel.from_pretrained(tmp_path / "huggingface")
    kernel = network.state_dict()["encoder.stages.2.layers.1.layer.1.convolution.weight"]
    assert torch.equal(kernel, tensors["res4.1.conv2.weight"])


def test_bf16_has_no_numpy(tmp_path):
    half = to_dtype(random_checkpoint("resnet18"), "bf16")
    for format in ("detectron2", "caffe2"):
        with pytest.raises(WeightsError, match="bf16.*fp16 or fp32"):
            export_checkpoint(half, tmp_path / "x.pkl", format)
    export_checkpoint(half, tmp_path / "x.pth", "detectron2")


def test_wrong_targets(tmp_path):
    def refused(path, format, message, name="resnet18", **options):
        with pytest.raises(WeightsError, match=message):
            export_checkpoint(random_checkpoint(name, "msra"), path, format, **options)

    refused(tmp_path / "x", "timm", "their stride .*: huggingface, detectron2", "resnet50")
    refused(tmp_path / "x", "huggingface", "only this package", "cifar_resnet20")
    assert not list(tmp_path.iterdir())

    refused(tmp_path / "x.txt", "torchvision", r"\.pth or \.safetensors")
    refused(tmp_path / "x.pth", "onnx", "unknown format 'onnx'")
    refused(tmp_path / "x.pth", "timm", "folder")
    refused(tmp_path / "no" / "x.pth", "torchvision", "the folder .* does not exist")
    refused(tmp_path / "x.pkl", "caffe2", "sharded", shard_size=5)
    refused(tmp_path / "x", "huggingface", "positive", shard_size=0)
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth", "torchvision", "is a folder", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(tmp_path / "mine", "timm", "contains thesis.tex", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_unless_asked(format, tmp_path):
    path = target(tmp_path, format)
    export_checkpoint(random_checkpoint("resnet18"), path, format)
    other = random_checkpoint("resnet18", num_classes=5)
    with pytest.raises(WeightsError, match="already exists"):
        export_checkpoint(other, path, format)
    exported = export_checkpoint(other, path, format, overwrite=True)
    assert read_checkpoint(path, exported.checkpoint.preprocessing).model.num_classes == 5
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "format, failing", [*((name, 1) for name in FORMATS), ("timm", 2), ("huggingface", 2)]
)
def test_an_interrupted_write_leaves_the_old(format, failing, tmp_path, monkeypatch):
    path = target(tmp_path, format)
    export_checkpoint(random_checkpoint("resnet18"), path, format)
    file = path / "config.json" if path.is_dir() else path
    before = file.read_bytes()

    moves, move = [], os.replace

    def fail(*args):
        moves.append(args)
        if len(moves) == failing:
            raise OSError("disk full")
        move(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(random_checkpoint("resnet18"), path, format, overwrite=True)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
