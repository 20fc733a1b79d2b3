"""The registered backbones: shapes, freezing, Detectron2's keys and outputs, refusals, graphs."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.export.torchscript_patch import patch_nonscriptable_classes
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone, build_backbone, build_model
from detectron2.modeling.backbone import fpn, resnet
from detectron2.structures import ImageList
from drawn_networks import randomize
from torch import nn

from resnet_backbone.detection import PaperResNet, PaperVGG
from resnet_backbone.detection.modeling.backbones import OutputConv
from resnet_backbone.detection.references import losses_of
from resnet_backbone.fast import sparse
from resnet_backbone.models import FrozenBatchNorm2d

STAGES = ["stem", "res2", "res3", "res4", "res5"]
VGG_STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5", "pool5"]
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "detection"
RUNNABLE = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/faster_rcnn_*.yaml"))
RESNET, FPN, P6P7 = (f"build_paper_resnet{kind}_backbone" for kind in ("", "_fpn", "_p6p7"))
VGG, VGG_FPN = "build_vgg_backbone", "build_vgg_fpn_backbone"
DEEPLAB = "build_paper_resnet_deeplab_backbone"


@pytest.fixture
def build(make_cfg):
    """Function (registered name, KEY=value...) -> backbone, ResNet-18 or VGG-11 unless told."""

    def run(name, node=True, **keys):
        defaults = dict(MODEL__BACKBONE__NAME=name, MODEL__RESNETS__DEPTH=18)
        if name in (FPN, P6P7):
            used = STAGES[1:] if name == FPN else STAGES[2:]
            defaults |= dict(MODEL__RESNETS__OUT_FEATURES=used, MODEL__FPN__IN_FEATURES=used)
        if name == VGG_FPN:
            used = VGG_STAGES[2:]
            defaults |= dict(RESNET_BACKBONE__VGG__OUT_FEATURES=used, MODEL__FPN__IN_FEATURES=used)
        if node:
            defaults |= dict(RESNET_BACKBONE__VGG__DEPTH=11)
        cfg = make_cfg(node=node, **(defaults | keys))
        if name == DEEPLAB:
            pytest.importorskip("detectron2.projects.deeplab").add_deeplab_config(cfg)
            cfg.MODEL.RESNETS.update(STEM_TYPE="basic", RES5_MULTI_GRID=[1, 2])
            cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
        return build_backbone(cfg)

    return run


def assert_shapes_are_true(backbone, height, width, size_of):
    """``size_of(pixels, stride)`` is the expected side of a map."""
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, height, width))
    specs = backbone.output_shape()
    assert maps.keys() == specs.keys()
    for name, value in maps.items():
        sides = size_of(height, specs[name].stride), size_of(width, specs[name].stride)
        assert value.shape == (1, specs[name].channels, *sides), name


def round_up(pixels, stride):
    return -(-pixels // stride)


@pytest.mark.parametrize("file", RUNNABLE)
def test_detectors_of_all_configs_build(make_cfg, file):
    assert len(RUNNABLE) >= 29
    cfg = make_cfg(file, MODEL__DEVICE="meta")
    with torch.device("meta"):
        model = build_model(cfg)
    kind = PaperVGG if "VGG" in file else PaperResNet
    networks = [module for module in model.modules() if isinstance(module, kind)]
    assert [network.depth for network in networks] == [int(re.search(r"\d+", Path(file).name)[0])]
    assert ("p2" in model.backbone.output_shape()) == ("FPN" in file)


@pytest.mark.parametrize("name", [RESNET, FPN, P6P7, VGG])
def test_builds_without_our_node(build, name):
    backbone = build(name, node=False)
    network = getattr(backbone, "bottom_up", backbone)
    assert isinstance(backbone, Backbone) and network.depth == (16 if name == VGG else 18)
    assert_shapes_are_true(backbone, 64, 64, round_up)


@pytest.mark.parametrize("depth, dilation", [(18, 1), (34, 2), (50, 1), (50, 2)])
@pytest.mark.parametrize("size", [(64, 96), (75, 109), (33, 1)])
def test_resnet_shapes(build, depth, dilation, size):
    keys = dict(MODEL__RESNETS__DEPTH=depth, MODEL__RESNETS__RES5_DILATION=dilation)
    backbone = build(RESNET, MODEL__RESNETS__OUT_FEATURES=STAGES, **keys)
    assert_shapes_are_true(backbone, *size, round_up)
    widest = 512 if depth < 50 else 2048
    assert backbone.output_shape()["res5"] == ShapeSpec(widest, stride=16 if dilation == 2 else 32)
    assert backbone.output_shape()["stem"] == ShapeSpec(64, stride=4)
    assert backbone.size_divisibility == 0 and not backbone.padding_constraints


@pytest.mark.parametrize("size", [(64, 96), (75, 109)])
def test_vgg_shapes(build, size):
    backbone = build(VGG, RESNET_BACKBONE__VGG__OUT_FEATURES=VGG_STAGES)
    assert_shapes_are_true(backbone, *size, lambda pixels, stride: pixels // stride)
    strides = {name: spec.stride for name, spec in backbone.output_shape().items()}
    assert strides == dict(conv1=1, conv2=2, conv3=4, conv4=8, conv5=16, pool5=32)
    assert backbone.size_divisibility == 0


@pytest.mark.parametrize(
    "name, levels", [(FPN, "p2 p3 p4 p5 p6"), (P6P7, "p3 p4 p5 p6 p7"), (VGG_FPN, "p2 p3 p4 p5 p6")]
)
def test_pyramid_shapes(build, name, levels):
    """Odd image sizes, padded as Detectron2's meta-architectures pad them."""
    backbone = build(name, MODEL__FPN__OUT_CHANNELS=16)
    images, padding = [torch.zeros(3, 75, 109), torch.zeros(3, 50, 131)], backbone.size_divisibility
    constraints = backbone.padding_constraints
    images = ImageList.from_tensors(images, padding, padding_constraints=constraints)
    assert backbone.size_divisibility == 32 and images.tensor.shape[2:] == (96, 160)
    assert list(backbone.output_shape()) == levels.split()
    assert_shapes_are_true(backbone, 96, 160, round_up)


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("name", [RESNET, FPN, VGG])
def test_freeze_at(build, name, freeze_at):
    """What freezing does to gradients and statistics: tests/models/test_networks.py."""
    keys = dict(MODEL__RESNETS__NORM="BN", RESNET_BACKBONE__VGG__NORM="BN")
    keys |= dict(MODEL__BACKBONE__FREEZE_AT=freeze_at, MODEL__RESNETS__OUT_FEATURES=STAGES[1:])
    backbone = build(name, **keys)
    network = getattr(backbone, "bottom_up", backbone)
    frozen = (VGG_STAGES if name == VGG else STAGES)[:freeze_at]
    for key, parameter in network.named_parameters():
        assert parameter.requires_grad == (key.split(".")[0] not in frozen), key
    for key, module in network.named_modules():
        if hasattr(module, "running_mean"):
            assert isinstance(module, FrozenBatchNorm2d) == (key.split(".")[0] in frozen), key
    if name == FPN:
        assert all(p.requires_grad for p in backbone.fpn_lateral5.parameters())


THEIRS = {RESNET: resnet.build_resnet_backbone, FPN: fpn.build_resnet_fpn_backbone}
THEIRS[P6P7] = fpn.build_retinanet_resnet_fpn_backbone


def twins(make_cfg, build, name, depth=18, **keys):
    """Detectron2's backbone and ours from the same keys, with its state dict, in float64."""
    used = STAGES[1:] if name != P6P7 else STAGES[2:]
    keys |= dict(MODEL__RESNETS__OUT_FEATURES=used, MODEL__FPN__IN_FEATURES=used)
    keys |= dict(MODEL__RESNETS__DEPTH=depth, MODEL__FPN__OUT_CHANNELS=32)
    if depth == 18:  # theirs needs it, ours follows the depth
        keys |= dict(MODEL__RESNETS__RES2_OUT_CHANNELS=64)
    with torch.device("meta"):
        theirs = THEIRS[name](make_cfg(**keys), ShapeSpec(channels=3))
        ours = build(name, **keys).eval()
    randomize(theirs.double().to_empty(device="cpu"))
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return theirs, ours


@pytest.mark.parametrize(
    "name, depth, keys",
    [
        (RESNET, 18, {}),
        (FPN, 18, {}),
        (FPN, 50, dict(MODEL__RESNETS__STRIDE_IN_1X1=True)),
        (FPN, 50, dict(MODEL__RESNETS__STRIDE_IN_1X1=False)),
        (P6P7, 50, dict(MODEL__RESNETS__STRIDE_IN_1X1=False)),
        (RESNET, 50, dict(MODEL__RESNETS__RES5_DILATION=2)),
    ],
)
def test_equals_detectron2(make_cfg, build, name, depth, keys):
    theirs, ours = twins(make_cfg, build, name, depth, **keys)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.output_shape() == theirs.output_shape()
    assert ours.size_divisibility == theirs.size_divisibility
    assert dict(ours.padding_constraints) == dict(theirs.padding_constraints)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["", "GN"])
def test_gradients_of_few_cells_equal_detectron2s(make_cfg, build, norm, monkeypatch):
    """Those of a loss of some cells of the finest map and of all of another; GN's are dense."""
    theirs, ours = twins(make_cfg, build, FPN, MODEL__FPN__NORM=norm)
    assert type(ours.fpn_output2) is (Conv2d if norm else OutputConv)
    passes, function = [], sparse.gradients_of_cells
    monkeypatch.setattr(
        sparse, "gradients_of_cells", lambda *call: passes.append(len(call[2])) or function(*call)
    )
    x, gradients = torch.randn(1, 3, 64, 96, dtype=torch.float64), []
    for pyramid in (theirs, ours):
        maps = pyramid(x)
        (maps["p2"][:, :, 3:6, 4:9].square().sum() + maps["p3"].square().sum()).backward()
        gradients.append({key: value.grad for key, value in pyramid.named_parameters()})
    assert gradients[0]["fpn_output2.weight"].any() and passes == ([] if norm else [15])
    torch.testing.assert_close(*gradients)


def test_retinanet_trains(make_cfg, images):
    keys = dict(MODEL__META_ARCHITECTURE="RetinaNet", MODEL__RETINANET__NUM_CLASSES=2)
    keys |= dict(MODEL__BACKBONE__NAME=P6P7, MODEL__RESNETS__DEPTH=18, MODEL__FPN__OUT_CHANNELS=16)
    keys |= dict.fromkeys(("MODEL__RESNETS__OUT_FEATURES", "MODEL__FPN__IN_FEATURES"), STAGES[2:])
    model = build_model(make_cfg(**keys)).train()
    losses = losses_of(model, images)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for level in ("p6", "p7"):
        assert getattr(model.backbone.top_block, level).weight.grad.abs().sum() > 0


NORMS = {"BN": "BatchNorm2d", "FrozenBN": "FrozenBatchNorm2d", "SyncBN": "SyncBatchNorm"}
NORMS |= {"nnSyncBN": "SyncBatchNorm", "naiveSyncBN": "NaiveSyncBatchNorm"}
NORMS |= {"GN": "GroupNorm", "LN": "LayerNorm", "": "NoneType"}


@pytest.mark.parametrize("norm, kind", NORMS.items())
@pytest.mark.parametrize("name", [RESNET, VGG])
def test_norms(build, name, norm, kind):
    key = "MODEL__RESNETS__NORM" if name == RESNET else "RESNET_BACKBONE__VGG__NORM"
    backbone = build(name, MODEL__BACKBONE__FREEZE_AT=0, **{key: norm}).eval()
    convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert {type(conv.norm).__name__ for conv in convs} == {kind}
    assert {conv.bias is None for conv in convs} == {norm != ""}
    for value in backbone(torch.randn(1, 3, 64, 64)).values():
        assert torch.isfinite(value).all()
    if name == RESNET and kind.endswith("BatchNorm"):
        stem = build(name, MODEL__BACKBONE__FREEZE_AT=1, **{key: norm}).stem
        assert isinstance(stem.conv1.norm, FrozenBatchNorm2d)


DILATED = dict(MODEL__RESNETS__RES5_DILATION=2)
RESNETS = "MODEL__RESNETS__"


@pytest.mark.parametrize(
    "name, keys, message",
    [
        (RESNET, {RESNETS + "DEPTH": 20}, "DEPTH 20 is not one of 18, 34, 50, 101, 152"),
        (RESNET, {RESNETS + "NUM_GROUPS": 32}, "NUM_GROUPS 32 .* use 1"),
        (RESNET, {RESNETS + "STEM_OUT_CHANNELS": 32}, "STEM_OUT_CHANNELS 32 .* use 64"),
        (RESNET, {RESNETS + "RES2_OUT_CHANNELS": 128}, "RES2_OUT_CHANNELS 128 .* use 64"),
        (RESNET, {RESNETS + "DEFORM_ON_PER_STAGE": [False, True, True, True]}, "DEFORM_ON_PER"),
        (RESNET, {RESNETS + "NORM": "BatchNorm"}, "unknown NORM 'BatchNorm': use one of BN"),
        (RESNET, {RESNETS + "OUT_FEATURES": ["res6"]}, "res6.*this network has stem, res2"),
        (RESNET, dict(MODEL__BACKBONE__FREEZE_AT=6), "from 0 to 5"),
        (FPN, dict(MODEL__FPN__IN_FEATURES=["res1", "res2"]), "'res1'.*set its OUT_FEATURES"),
        (FPN, DILATED, "'res4': 16, 'res5': 16.*remove the dilation"),
        (P6P7, DILATED, "remove the dilation"),
        (P6P7, {RESNETS + "OUT_FEATURES": ["res3"]}, "add it to MODEL.RESNETS.OUT_FEATURES"),
        (VGG, dict(RESNET_BACKBONE__VGG__DEPTH=12), "12: use one of 11, 13, 16, 19"),
        (VGG_FPN, dict(RESNET_BACKBONE__VGG__OUT_FEATURES=["conv5"]), "set its OUT_FEATURES"),
    ],
)
def test_refusals_say_what_to_set(build, name, keys, message):
    with pytest.raises(ValueError, match=message):
        build(name, **keys)


# What Detectron2's tests/modeling/test_backbone.py asks of its backbones (scripted, one map), asked
# of every builder and all maps: scripted, traced, exported and compiled.


@pytest.fixture(scope="module")
def scriptable():
    """Detectron2's own preparation of FPN for torch.jit.script, undone afterwards."""
    patch_nonscriptable_classes()
    yield
    for kind in (fpn.FPN, resnet.ResNet):
        del kind.__prepare_scriptable__


@pytest.fixture(params=[RESNET, FPN, P6P7, VGG, VGG_FPN, DEEPLAB])
def backbone(request, build, scriptable):
    torch.manual_seed(0)
    keys = {FPN: dict(MODEL__FPN__NORM="GN", MODEL__RESNETS__NORM="GN")}.get(request.param, {})
    return build(request.param, MODEL__FPN__OUT_CHANNELS=32, **keys).eval()


@torch.no_grad()
def assert_same_maps(graph, backbone, sizes=((2, 3, 64, 96), (1, 3, 128, 64))):
    for size in sizes:
        images = torch.rand(size)
        found, expected = graph(images), backbone(images)
        assert list(found) == list(expected)
        torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_and_compile(backbone):
    torch.compiler.reset()
    with torch.no_grad():
        program = torch.export.export(backbone, (torch.rand(2, 3, 64, 96),))
    assert_same_maps(program.module(), backbone, ((2, 3, 64, 96),))
    assert_same_maps(torch.compile(backbone, backend="eager", fullgraph=True), backbone)


def test_script_and_trace(backbone):
    assert_same_maps(torch.jit.script(backbone), backbone)
    with torch.no_grad():
        traced = torch.jit.trace(backbone, torch.rand(2, 3, 64, 96), strict=False)
    assert_same_maps(traced, backbone)
    if not hasattr(backbone, "bottom_up"):  # torch.fx cannot read Detectron2's FPN
        assert_same_maps(torch.fx.symbolic_trace(backbone), backbone)
