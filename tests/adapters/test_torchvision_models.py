"""torchvision's detectors and DeepLabV3 on our backbones, with the real library."""

import pytest
import torch
import torchvision
from drawn_networks import assert_close, randomize
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation import DeepLabV3, deeplabv3_resnet50
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from resnet_backbone.adapters import rgb_checkpoint, torchvision_models
from resnet_backbone.adapters.torchvision_models import deeplabv3, fpn_backbone
from resnet_backbone.fast import InferenceNetwork, optimize_for_inference
from resnet_backbone.fast.engines import why_not
from resnet_backbone.weights import InputNormalizer, WeightsError, get_preprocessing

SIZES = dict(min_size=96, max_size=128)
FEWER = dict(topk_candidates=50, detections_per_img=5)  # of RetinaNet, for speed
FEWER_REGIONS = dict(box_batch_size_per_image=16, box_detections_per_img=5)
FEWER_REGIONS |= dict(rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50)
FEWER_REGIONS |= dict(rpn_post_nms_top_n_test=20)


def detector(kind, name, weights, preprocessing="", **options):
    if kind is RetinaNet:
        levels = ("conv4", "conv5", "pool5") if name.startswith("vgg") else ("res3", "res4", "res5")
        options |= dict(out_features=levels, extra_blocks=LastLevelP6P7(256, 256))
    backbone, norm = fpn_backbone(name, weights, preprocessing, **options)
    fewer = FEWER if kind is RetinaNet else FEWER_REGIONS
    return kind(backbone, num_classes=21, **norm, **SIZES, **fewer)


def test_states_of_another_stride_or_input_are_refused(weights_file, tmp_path):
    """No tensor's shape shows these."""
    path = weights_file("resnet50", "msra")[0]
    trained = detector(FasterRCNN, "resnet50", path)
    torch.save(trained.state_dict(), tmp_path / "det.pth")
    state = torch.load(tmp_path / "det.pth")
    detector(FasterRCNN, "resnet50", path).load_state_dict(state)
    other = "image_mean .*, but this model .*; image_std .*: build the model as before"
    with pytest.raises(ValueError, match=f"the state's backbone has {other}"):
        detector(FasterRCNN, "resnet50", None).load_state_dict(state)
    known = rgb_checkpoint(path).preprocessing
    again, norm = fpn_backbone("resnet50", tmp_path / "det.pth", known)
    assert norm == fpn_backbone("resnet50", path)[1]
    assert_close(again.body.state_dict(), trained.backbone.body.state_dict())
    with pytest.raises(ValueError, match="stride_in_1x1 .1.0., but this model .0.0.: build"):
        two = [deeplabv3("resnet50", 3, stride_in_1x1=value) for value in (True, False)]
        two[1].load_state_dict(two[0].state_dict())


def targets_for(images):
    targets = []
    for image in images:
        height, width = image.shape[1:]
        box = torch.tensor([[width * 0.2, height * 0.2, width * 0.8, height * 0.9]])
        masks = torch.zeros(1, height, width, dtype=torch.uint8)
        masks[:, height // 4 : height // 2, width // 4 : width // 2] = 1
        targets.append(dict(boxes=box, labels=torch.tensor([3]), masks=masks))
    return targets


def train_step(model, images):
    losses = model.train()(images, targets_for(images))
    assert losses and all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    return model.backbone.body


def has_gradient(module):
    grads = [parameter.grad for parameter in module.parameters()]
    return any(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_without_weights_the_normalization_is_torchvisions():
    _, norm = fpn_backbone("resnet18")
    assert norm == {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def test_the_normalization_cannot_be_forgotten():
    with pytest.raises(ValueError, match="out_channels"):
        FasterRCNN(fpn_backbone("resnet18"), num_classes=21)


INPUTS = {"resnet18": "torchvision", "resnet50": "msra", "vgg11": "caffe_vgg"}


@pytest.mark.parametrize("name, preprocessing", INPUTS.items())
def test_maps_are_the_original_networks(name, preprocessing, weights_file, photo, photo_bytes):
    """From RGB in 0..1 through torchvision's transform, as from the weights' own preprocessing."""
    path, network = weights_file(name, preprocessing)
    backbone, norm = fpn_backbone(name, path)
    model = FasterRCNN(backbone, num_classes=21, min_size=96, max_size=128, **norm).eval()
    with torch.no_grad():
        batch, _ = model.transform([photo])
        found = model.backbone.body(batch.tensors)
        normalize = InputNormalizer(get_preprocessing(preprocessing))
        wanted = network.forward_features(normalize(photo_bytes))
    levels = torchvision_models.VGG_LEVELS if name == "vgg11" else torchvision_models.RESNET_LEVELS
    for key, stage in zip("0123", levels, strict=True):
        assert_close(found[key], wanted[stage])


@pytest.mark.parametrize(
    "kind, name",
    [
        (FasterRCNN, "resnet18"),
        (RetinaNet, "resnet18"),
        (MaskRCNN, "resnet18"),
        (FasterRCNN, "vgg11"),
        (RetinaNet, "vgg11"),
        pytest.param(MaskRCNN, "vgg11", marks=pytest.mark.slow),
    ],
)
def test_detectors_train_and_detect(kind, name, photo):
    model = detector(kind, name, None)
    body = train_step(model, [photo, photo[:, :80].flip(2)])
    assert has_gradient(next(iter(body.values()))), "nothing is frozen without weights"
    with torch.no_grad():
        found = model.eval()([photo])[0]
    assert found["boxes"].shape[1:] == (4,) and torch.isfinite(found["scores"]).all()
    assert ("masks" in found) == (kind is MaskRCNN)


@pytest.mark.data
@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet, MaskRCNN])
def test_detectors_with_the_papers_weights(kind, data_root, photo):
    file = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    model = detector(kind, "resnet50", file, "msra")
    body = train_step(model, [photo, photo[:, :80].flip(2)])
    trained = {name: has_gradient(stage) for name, stage in body.items()}
    assert trained == dict(stem=False, res2=False, res3=True, res4=True, res5=True)
    with torch.no_grad():
        found = model.eval()([photo])[0]
    assert torch.isfinite(found["boxes"]).all()


def test_levels_have_the_strides_of_torchvisions():
    for name in ("resnet18", "vgg11"):
        backbone, _ = fpn_backbone(name)
        with torch.no_grad():
            maps = backbone(torch.rand(1, 3, 128, 128))
        assert {key: x.shape[-1] for key, x in maps.items()} == {
            "0": 32, "1": 16, "2": 8, "3": 4, "pool": 2
        }  # fmt: skip


@pytest.mark.parametrize("order", [("res5", "res3"), ("res3", "res5")])
def test_levels_come_in_any_order(order):
    backbone, _ = fpn_backbone("resnet18", out_features=order)
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps.values()] == [8, 2, 1]


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_optimized_faster_rcnn(photo, engine):
    if problem := why_not(engine, torch.bfloat16):
        pytest.skip(problem)
    model = randomize(detector(FasterRCNN, "resnet18", None))
    fast = optimize_for_inference(model, dtype=torch.bfloat16, engine=engine)
    assert type(fast) is FasterRCNN and isinstance(fast.backbone, InferenceNetwork)
    assert fast.roi_heads.box_head.fc6.weight.dtype == torch.bfloat16
    assert fast.roi_heads.box_predictor.cls_score.weight.dtype == torch.float32
    with torch.no_grad():
        maps, wanted = fast.backbone(photo[None]), model.backbone(photo[None])
        assert fast([photo])[0]["boxes"].shape[1] == 4
    assert_close(maps, wanted, 0.03)
    heads = fast.rpn.head.conv, fast.roi_heads.box_head
    assert [part.engine for part in (fast.backbone, *heads)] == [engine, "eager", "eager"]


def test_optimized_deeplab(photo):
    model = randomize(deeplabv3("resnet18", 4))
    fast = optimize_for_inference(model, dtype=torch.bfloat16, engine="eager")
    assert type(fast) is DeepLabV3 and isinstance(fast.backbone, InferenceNetwork)
    with torch.no_grad():
        assert_close(fast(photo[None]), model(photo[None]), 0.03)


def torchvision_file(name, body, path):
    """A file of torchvision's classifier with the weights of another model's body."""
    classifier = torchvision.models.get_model(name)
    classifier.load_state_dict(body.state_dict(), strict=False)
    save_file(classifier.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_fpn_maps_equal_torchvisions(name, tmp_path, photo):
    theirs = randomize(resnet_fpn_backbone(backbone_name=name, weights=None))
    path = torchvision_file(name, theirs.body, tmp_path / "weights.safetensors")
    backbone, _ = fpn_backbone(name, path, "torchvision")
    backbone.eval().fpn.load_state_dict(theirs.fpn.state_dict())
    with torch.no_grad():
        wanted, found = theirs(photo[None]), backbone(photo[None])
    assert_close(found, wanted)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_freeze_at_is_five_minus_trainable_layers(freeze_at, weights_file):
    path, _ = weights_file("resnet18", "torchvision")
    backbone, _ = fpn_backbone("resnet18", path, freeze_at=freeze_at)
    options = dict(weights=None, trainable_layers=5 - freeze_at)
    theirs = resnet_fpn_backbone(backbone_name="resnet18", **options)

    def count(body):
        return sum(p.numel() for p in body.parameters() if p.requires_grad)

    assert count(backbone.body) == count(theirs.body)


def test_deeplab_equals_torchvisions_but_for_the_first_dilated_blocks(tmp_path, photo, photo_bytes):
    """torchvision's keep the dilation of the stage before, ours have their stage's own."""
    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    randomize(theirs)
    path = torchvision_file("resnet50", theirs.backbone, tmp_path / "weights.safetensors")
    ours = deeplabv3("resnet50", 5, path, "torchvision", output_stride=8, aux_loss=True).eval()
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    ours.aux_classifier.load_state_dict(theirs.aux_classifier.state_dict())
    images = InputNormalizer(get_preprocessing("torchvision"))(photo_bytes)
    with torch.no_grad():
        found = ours(photo[None])
        assert not torch.allclose(theirs(images)["out"], found["out"], rtol=1e-2)
        for stage, dilation in ((theirs.backbone.layer3, 2), (theirs.backbone.layer4, 4)):
            stage[0].conv2.dilation = stage[0].conv2.padding = (dilation, dilation)
        wanted = theirs(images)
    assert_close(found, wanted)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("multi_grid", [(), (1, 2)])
def test_deeplab_trains(output_stride, multi_grid, photo):
    options = dict(output_stride=output_stride, aux_loss=True, multi_grid=multi_grid)
    model = deeplabv3("resnet18", 4, **options)
    images = torch.stack([photo, photo.flip(2)])
    maps = model.backbone(images)
    assert maps["out"].shape[-1] == 128 // output_stride
    logits = model.train()(images)
    assert logits["out"].shape == logits["aux"].shape == (2, 4, 96, 128)
    loss = nn.functional.cross_entropy(logits["out"], torch.ones(2, 96, 128, dtype=torch.long))
    loss.backward()
    assert torch.isfinite(loss) and has_gradient(model.backbone.network.stem)


def test_multi_grid_and_pooling_rates_reach_the_model():
    model = deeplabv3("resnet50", 4, output_stride=16, multi_grid=(1, 2, 4))
    assert [block.conv2.dilation[0] for block in model.backbone.network.res5] == [2, 4, 8]
    rates = [conv[0].dilation[0] for conv in model.classifier[0].convs[1:4]]
    assert rates == [6, 12, 18]


def test_deeplab_normalizes_as_the_weights_ask(weights_file, photo, photo_bytes):
    path, network = weights_file("resnet50", "msra")
    model = deeplabv3("resnet50", 4, path).eval()
    with torch.no_grad():
        own = (photo[None] - model.backbone.mean) / model.backbone.std
        found = model.backbone.network.forward_features(own, ["res4"])["res4"]
        images = InputNormalizer(get_preprocessing("msra"))(photo_bytes)
        wanted = network.forward_features(images)["res4"]  # not dilated
    assert_close(found, wanted)
    assert any(key.endswith("backbone.mean") for key in model.state_dict())


@pytest.mark.parametrize("scale, shift", [(255, 0), (4, -2)])
def test_deeplab_refuses_other_ranges(scale, shift, photo):
    model = deeplabv3("resnet18", 4).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="0..1"):
        model(photo[None] * scale + shift)


def test_weights_of_another_network(weights_file):
    with pytest.raises(WeightsError, match="holds a resnet18, not a resnet50"):
        fpn_backbone("resnet50", weights_file("resnet18", "msra")[0])
    with pytest.raises(WeightsError, match="stride_in_1x1"):
        fpn_backbone("resnet50", weights_file("resnet50", "msra")[0], stride_in_1x1=False)


@pytest.mark.parametrize(
    "name, options, message",
    [("vgg16", {}, "dilated ResNet"), ("resnet18", {"output_stride": 32}, "16 or 8")],
)
def test_what_deeplab_cannot_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        deeplabv3(name, 4, **options)
