"""The backbone for mmdetection, with mmengine's real registry and configs.

mmdetection itself needs mmcv with compiled operators, for which there are no wheels here: its
contract is tested as its own ResNet states it (``out_indices``, ``frozen_stages``, ``norm_eval``,
``init_cfg``, ``style``, a tuple of maps); a child registry of mmengine's stands for mmdetection's.
"""

import pytest
import torch
from drawn_networks import assert_close
from torch import nn

mmengine = pytest.importorskip("mmengine")

from mmengine.config import Config  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.registry import MODELS, Registry  # noqa: E402

from resnet_backbone.adapters import mmdetection  # noqa: E402
from resnet_backbone.adapters.mmdetection import PaperResNet  # noqa: E402
from resnet_backbone.models import FrozenBatchNorm2d  # noqa: E402
from resnet_backbone.weights import InputNormalizer, WeightsError, get_preprocessing  # noqa: E402

MSRA = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)
TORCHVISION = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
STYLES = [("msra", MSRA, "caffe"), ("torchvision", TORCHVISION, "pytorch")]


def test_mmdetections_registry_finds_it():
    child = Registry("model", parent=MODELS, scope="mmdet")
    config = Config(dict(backbone=dict(type="PaperResNet", depth=18, out_indices=(1, 3))))
    backbone = child.build(config.backbone)
    assert isinstance(backbone, PaperResNet) and backbone.out_indices == (1, 3)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (2,), [3, 1]])
@pytest.mark.parametrize("depth, channels", [(18, 64), (50, 256)])
def test_maps_are_a_tuple(depth, channels, out_indices):
    backbone = PaperResNet(depth, out_indices=out_indices)
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert isinstance(maps, tuple)
    expected = [(1, channels * 2**i, 16 >> i, 16 >> i) for i in sorted(out_indices)]
    assert [tuple(x.shape) for x in maps] == expected
    deepest = f"res{max(out_indices) + 3}"
    assert not any(name.startswith(f"network.{deepest}") for name, _ in backbone.named_modules())


@pytest.mark.parametrize("style, strides", [("caffe", (2, 1)), ("pytorch", (1, 2))])
def test_style_is_the_place_of_the_stride(style, strides):
    block = PaperResNet(50, style=style).network.res3[0]
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_frozen_stages_and_norm_eval(frozen_stages, norm_eval):
    backbone = PaperResNet(18, frozen_stages=frozen_stages, norm_eval=norm_eval)
    backbone.eval().train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    maps = backbone(torch.rand(2, 3, 64, 64))
    if frozen_stages < 4:
        sum(x.square().mean() for x in maps).backward()
    stages = ("stem", "res2", "res3", "res4", "res5")
    for index, name in enumerate(stages):
        stage, frozen = getattr(backbone.network, name), index <= frozen_stages
        assert all((p.grad is None) == frozen for p in stage.parameters()), name
        norms = [m for m in stage.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        assert all(isinstance(m, FrozenBatchNorm2d) == frozen for m in norms), name
        means = [k for k in before if k.startswith(f"network.{name}.") and k.endswith("_mean")]
        moved = any(not torch.equal(backbone.state_dict()[key], before[key]) for key in means)
        assert moved == (not frozen and not norm_eval), name
    assert backbone.training and not backbone.eval().training


def test_norm_cfg():
    backbone = PaperResNet(18, norm_cfg=dict(type="BN", requires_grad=False))
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained and not any(".norm." in name for name in trained)
    group = PaperResNet(18, norm_cfg=dict(type="GN")).network.res2[0].conv1.norm
    assert isinstance(group, nn.GroupNorm)


@pytest.mark.parametrize("name, settings, style", STYLES)
def test_weights_come_from_init_cfg(name, settings, style, weights_file, photo_bytes):
    path, network = weights_file("resnet50", name)
    pretrained = dict(type="Pretrained", checkpoint=str(path))
    source = dict(data_preprocessor=settings, init_cfg=pretrained)
    backbone = PaperResNet(50, style=style, frozen_stages=1, **source).eval()
    assert not torch.equal(backbone.network.res3[0].conv1.weight, network.res3[0].conv1.weight)
    backbone.init_weights()
    other = {"caffe": "pytorch", "pytorch": "caffe"}[style]
    with pytest.raises(WeightsError, match=f'style="{style}"'):
        PaperResNet(50, style=other, **source).init_weights()
    image = InputNormalizer(get_preprocessing(name))(photo_bytes)
    with torch.no_grad():
        wanted = network.forward_features(image)
        for stage, x in zip(("res2", "res3", "res4", "res5"), backbone(image), strict=True):
            assert_close(x, wanted[stage])


class Detector(BaseModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)


def test_a_model_of_mmengine_initialises_it(weights_file):
    path, network = weights_file("resnet18", "msra")
    config = dict(type="PaperResNet", depth=18, data_preprocessor=MSRA)
    model = Detector(dict(config, init_cfg=dict(type="Pretrained", checkpoint=str(path))))
    model.init_weights()
    assert torch.equal(model.backbone.network.res5[1].conv2.weight, network.res5[1].conv2.weight)
    fresh = Detector(config)
    before = fresh.backbone.network.res5[1].conv2.weight.clone()
    fresh.init_weights()
    assert torch.equal(fresh.backbone.network.res5[1].conv2.weight, before)


def test_what_no_tensor_shows_is_compared(weights_file):
    path, _ = weights_file("resnet18", "msra", shortcut="A")
    pretrained = dict(type="Pretrained", checkpoint=str(path))
    options = dict(data_preprocessor=MSRA, init_cfg=pretrained)
    PaperResNet(18, shortcut="A", **options).init_weights()
    with pytest.raises(WeightsError, match="shortcut"):
        PaperResNet(18, shortcut="none", **options).init_weights()


@pytest.mark.parametrize("name", ["msra", "torchvision"])
def test_settings_written_for_weights_pass_their_check(name):
    preprocessing = get_preprocessing(name)
    usual = dict(msra=MSRA, torchvision=TORCHVISION)[name]  # mmdetection's own configs
    for settings in (mmdetection.data_preprocessor_for(preprocessing), usual):
        mmdetection.check_data_preprocessor(preprocessing, settings, "x")


@pytest.mark.parametrize(
    "settings, message",
    [
        (None, "mean=.103.939, 116.779, 123.68., std=.1.0, 1.0, 1.0., bgr_to_rgb=False"),
        (TORCHVISION, "the model has"),
        ({**MSRA, "bgr_to_rgb": True}, "the model has"),
        ({**MSRA, "mean": MSRA["mean"][::-1]}, "the model has"),
        ({**MSRA, "std": [58.0, 57.0, 57.0]}, "the model has"),
        (dict(bgr_to_rgb=False), "the model has"),
    ],
)
def test_another_data_preprocessor_is_refused(settings, message, weights_file):
    path, _ = weights_file("resnet18", "msra")
    pretrained = dict(type="Pretrained", checkpoint=str(path))
    backbone = PaperResNet(18, data_preprocessor=settings, init_cfg=pretrained)
    before = backbone.network.res5[1].conv2.weight.clone()
    with pytest.raises(WeightsError, match=message):
        backbone.init_weights()
    assert torch.equal(backbone.network.res5[1].conv2.weight, before)


BAD = [dict(style="tensorflow"), dict(num_stages=3), dict(frozen_stages=5), dict(out_indices=())]
BAD += [dict(out_indices=(0, 4)), dict(norm_cfg=dict(type="BN", eps=1e-3))]


@pytest.mark.parametrize("options", BAD)
def test_bad_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PaperResNet(18, **options)


def test_initialization_by_others_is_refused():
    with pytest.raises(WeightsError, match="Pretrained"):
        PaperResNet(18, init_cfg=dict(type="Kaiming")).init_weights()


def test_mmdetections_other_arguments_with_their_defaults():
    """As mmdetection's DC5 config has them."""
    places = dict(strides=[1, 2, 2, 1], dilations=(1, 1, 1, 2))
    backbone = PaperResNet(50, dcn=None, with_cp=False, deep_stem=False, **places)
    with torch.no_grad():
        sizes = [x.shape[-1] for x in backbone.eval()(torch.rand(1, 3, 64, 64))]
    assert sizes == [16, 8, 4, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(strides=(1, 2, 2, 1)), r"strides=\(1, 2, 2, 2\) with dilations"),
        (dict(dcn=dict(type="DCNv2")), "leave dcn out"),
        (dict(with_cp=True), "with_cp=False, not True"),
    ],
)
def test_mmdetections_other_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        PaperResNet(50, **options)
