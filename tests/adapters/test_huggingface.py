"""Our weights in Hugging Face transformers: classification, DETR, and other detectors."""

import pytest
import torch
from drawn_networks import assert_close

pytest.importorskip("transformers")

import transformers
from torch import nn
from transformers import DetrImageProcessor, ResNetBackbone, ResNetConfig

from resnet_backbone.adapters import image_normalization, rgb_checkpoint
from resnet_backbone.adapters.huggingface import (
    backbone_config,
    freeze_backbone,
    load_backbone,
)
from resnet_backbone.weights import InputNormalizer, WeightsError, get_preprocessing
from resnet_backbone.weights.reading import read_checkpoint

SMALL = dict(num_labels=20, use_timm_backbone=False, d_model=32, num_queries=5)
for part in ("encoder", "decoder"):
    SMALL |= {f"{part}_layers": 1, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 2}
DETR = transformers.DetrForObjectDetection, transformers.DetrConfig
CONDITIONAL = transformers.ConditionalDetrForObjectDetection, transformers.ConditionalDetrConfig


def detr(backbone, classes=DETR):
    kind, config = classes
    return kind(config(backbone_config=backbone, **SMALL))


def count_trained(model):
    return sum(parameter.requires_grad for parameter in model.parameters())


def inner(model):
    return next(module for module in model.modules() if isinstance(module, ResNetBackbone))


@pytest.mark.parametrize("name, preprocessing", [("resnet18", "torchvision"), ("resnet50", "msra")])
def test_detr_sees_the_maps_of_the_original_network(name, preprocessing, weights_file, photo_bytes):
    """From bytes through DETR's own image processor, at the photograph's own size."""
    path, network = weights_file(name, preprocessing)
    checkpoint = rgb_checkpoint(path)
    backbone = backbone_config(checkpoint, out_features=["stage2", "stage3", "stage4"])
    model = detr(backbone).eval()
    load_backbone(model, checkpoint)
    processor = DetrImageProcessor(do_resize=False, **image_normalization(checkpoint.preprocessing))
    batch = processor(photo_bytes, return_tensors="pt")
    with torch.no_grad():
        found = inner(model)(batch["pixel_values"]).feature_maps
        normalize = InputNormalizer(get_preprocessing(preprocessing))
        wanted = network.forward_features(normalize(photo_bytes))
    for stage, x in zip(("res3", "res4", "res5"), found, strict=True):
        assert_close(x, wanted[stage])


@pytest.mark.parametrize("classes", [DETR, CONDITIONAL])
def test_detectors_train(classes, weights_file, photo_bytes):
    checkpoint = rgb_checkpoint(weights_file("resnet50", "msra")[0])
    model = detr(backbone_config(checkpoint), classes).train()
    load_backbone(model, checkpoint)
    processor = DetrImageProcessor(**image_normalization(checkpoint.preprocessing))
    box = dict(bbox=[20, 20, 60, 50], category_id=3, area=3000, iscrowd=0)
    options = dict(annotations=[dict(image_id=i, annotations=[box]) for i in range(2)])
    options |= dict(size={"shortest_edge": 96, "longest_edge": 128}, return_tensors="pt")
    batch = processor([photo_bytes[0], photo_bytes[0, :, :80]], **options)
    loss = model(**batch).loss
    loss.backward()
    stages = [inner(model).embedder, *inner(model).encoder.stages]
    trained = [any(p.grad is not None for p in stage.parameters()) for stage in stages]
    assert torch.isfinite(loss) and trained == [False, False, True, True, True]
    with torch.no_grad():
        found = model.eval()(pixel_values=batch["pixel_values"])
    assert torch.isfinite(found.logits).all() and torch.isfinite(found.pred_boxes).all()


@pytest.mark.parametrize("freeze_at", [0, 3])
def test_freeze_at(freeze_at, weights_file):
    checkpoint = rgb_checkpoint(weights_file("resnet18", "msra")[0])
    model = detr(backbone_config(checkpoint))
    load_backbone(model, checkpoint, freeze_at)
    stages = [inner(model).embedder, *inner(model).encoder.stages]
    trains = [all(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert trains == [index >= freeze_at for index in range(5)]


def test_frozen_norms_are_constants_in_models_that_train_norms(weights_file, tmp_path):
    """DETR freezes all norms by itself, other models none."""
    checkpoint = rgb_checkpoint(weights_file("resnet18", "msra")[0])
    model = ResNetBackbone(backbone_config(checkpoint, ["stage1", "stage4"])).train()
    load_backbone(model, checkpoint)
    with torch.no_grad():
        expected = model.eval()(images := torch.randn(2, 3, 64, 64)).feature_maps[0]
        model.train()(images)
        assert torch.equal(model(images).feature_maps[0], expected)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.encoder.stages[1].modules())
    model.save_pretrained(tmp_path)
    again = ResNetBackbone.from_pretrained(tmp_path).train()
    freeze_backbone(again)
    with torch.no_grad():
        assert torch.equal(again(images).feature_maps[0], expected)
    assert count_trained(again) == count_trained(model)
    with pytest.raises(ValueError, match="freeze_at must be 0 to 5, not 6"):
        freeze_backbone(again, 6)


def test_timms_entry_is_a_backbone_of_transformers():
    import resnet_backbone.adapters.timm_models  # noqa: F401

    options = dict(out_indices=[2, 4], use_pretrained_backbone=False)
    config = transformers.TimmBackboneConfig(backbone="paper_resnet18", **options)
    maps = transformers.TimmBackbone(config)(torch.rand(1, 3, 64, 64)).feature_maps
    assert [tuple(x.shape) for x in maps] == [(1, 128, 8, 8), (1, 512, 2, 2)]


def test_another_stride_or_depth_than_the_models(weights_file):
    checkpoint = rgb_checkpoint(weights_file("resnet50", "msra")[0])
    for config, name in (
        (ResNetConfig(), "downsample_in_bottleneck"),
        (ResNetConfig(depths=[3, 4, 23, 3], downsample_in_bottleneck=True), "depths"),
    ):
        model = detr(config)
        before = inner(model).embedder.embedder.convolution.weight.clone()
        with pytest.raises(WeightsError, match=name):
            load_backbone(model, checkpoint)
        assert torch.equal(inner(model).embedder.embedder.convolution.weight, before)


def test_weights_that_were_not_converted_or_have_no_place(weights_file):
    checkpoint = read_checkpoint(weights_file("resnet18", "msra")[0])
    model = detr(backbone_config(checkpoint))
    with pytest.raises(WeightsError, match="rgb_checkpoint"):
        load_backbone(model, checkpoint)
    with pytest.raises(WeightsError, match="0 ResNetBackbone"):
        load_backbone(torch.nn.Linear(2, 2), rgb_checkpoint(weights_file("resnet18", "msra")[0]))


def test_another_epsilon_than_transformers(weights_file):
    checkpoint = rgb_checkpoint(weights_file("resnet18", "msra")[0]).restated(bn_eps=1e-3)
    with pytest.raises(WeightsError, match="BN eps 0.001, but huggingface"):
        backbone_config(checkpoint)


@pytest.mark.parametrize("name, options", [("plain18", {}), ("resnet18", {"shortcut": "A"})])
def test_networks_that_transformers_does_not_have(name, options, weights_file):
    checkpoint = rgb_checkpoint(weights_file(name, "msra", **options)[0])
    with pytest.raises(WeightsError, match="shortcut"):
        backbone_config(checkpoint)
