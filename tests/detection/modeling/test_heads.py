"""The region heads: res5 per region at every depth, DC5, and VGG-16's fc6 and fc7."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_box_head, build_model, build_roi_heads
from detectron2.modeling.backbone import resnet
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from drawn_networks import randomize
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import RoIPool

from resnet_backbone.detection import Checkpointer, PaperRes5ROIHeads, VGGBoxHead
from resnet_backbone.detection.references import losses_of
from resnet_backbone.fast import InferenceNetwork
from resnet_backbone.models import BasicBlock, BottleneckBlock
from resnet_backbone.models import build_model as build_network
from resnet_backbone.weights import PREPROCESSINGS, WeightsError, save_weights
from resnet_backbone.weights.checkpoint import METADATA_KEY

C4, DC5, VGG = (f"voc/faster_rcnn_{name}.yaml" for name in ("R_18_C4", "R_18_DC5", "VGG_16"))
CHEAP = dict(MODEL__RPN__POST_NMS_TOPK_TRAIN=20, MODEL__RPN__POST_NMS_TOPK_TEST=20)
CHEAP |= dict(MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=16, MODEL__ROI_HEADS__NUM_CLASSES=2)
BLOCKS = {18: 2, 34: 3, 50: 3, 101: 3, 152: 3}


def build_c4_head(cfg, kind=build_roi_heads):
    """The head alone, on res4 of the config's depth."""
    channels = 256 if cfg.MODEL.RESNETS.DEPTH < 50 else 1024
    return kind(cfg, {"res4": ShapeSpec(channels=channels, stride=16)})


@pytest.mark.parametrize("depth", BLOCKS)
def test_c4_head_is_the_depths_own_res5(make_cfg, depth):
    cfg = make_cfg(C4, MODEL__RESNETS__DEPTH=depth, MODEL__RESNETS__STRIDE_IN_1X1=True)
    with torch.device("meta"):
        head = build_c4_head(cfg)
        res5 = build_network(f"resnet{depth}", out_features=["res5"]).res5
    assert isinstance(head, PaperRes5ROIHeads)
    block, channels = (BasicBlock, 512) if depth < 50 else (BottleneckBlock, 2048)
    assert [type(module) for module in head.res5] == [block] * BLOCKS[depth]
    shapes = {key: value.shape for key, value in res5.state_dict().items()}
    own = {key: value.shape for key, value in head.res5.state_dict().items()}
    assert own == {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")}
    assert head.box_predictor.cls_score.in_features == channels
    pooled = head.pooler.level_poolers[0].stride
    assert (pooled, head.res5[0].shortcut.stride) == ((1, (2, 2)) if depth < 50 else (2, (1, 1)))


def test_one_more_norm_behind_res5(make_cfg, tmp_path, caplog):
    """MoCo's head, by hand: the same weights with and without it, from a classifier."""
    given = PREPROCESSINGS["torchvision"]
    save_weights(build_network("resnet18"), tmp_path / "x.safetensors", given)
    models = []
    for name in ("PaperRes5ROIHeads", "PaperRes5ROIHeadsExtraNorm"):
        keys = CHEAP | dict(MODEL__RESNETS__NORM="BN", MODEL__ROI_HEADS__NAME=name)
        model = build_model(make_cfg(C4, MODEL__WEIGHTS="", **keys)).eval()
        with caplog.at_level("INFO", logger="resnet_backbone"):
            Checkpointer(model).load(str(tmp_path / "x.safetensors"), [])
        models.append(model.roi_heads)
    assert "start at random: roi_heads.res5 (4 tensors)" in caplog.text
    plain, extra = models
    nn.init.normal_(extra.res5.norm.running_mean)
    maps, boxes = [torch.randn(1, 256, 8, 8)], [Boxes(torch.tensor([[0.0, 0.0, 90.0, 60.0]]))]
    with torch.no_grad():
        expected = extra.res5.norm(plain._shared_roi_transform(maps, boxes))
        found = extra._shared_roi_transform(maps, boxes)
    torch.testing.assert_close(found, expected)


def test_c4_head_follows_the_config(make_cfg):
    keys = dict(RESNET_BACKBONE__MULTI_GRID=[1, 2, 4], MODEL__RESNETS__RES5_DILATION=2)
    keys |= dict(MODEL__RESNETS__NORM="BN", RESNET_BACKBONE__ZERO_INIT_RESIDUAL=True)
    keys |= dict(MODEL__RESNETS__STRIDE_IN_1X1=False)
    head = build_c4_head(make_cfg("voc/faster_rcnn_R_50_C4.yaml", **keys))
    assert [block.conv2.dilation for block in head.res5] == [(2, 2), (4, 4), (8, 8)]
    assert head.res5[0].shortcut.stride == (1, 1) and head.pooler.level_poolers[0].stride == 1
    for block in head.res5:
        assert isinstance(block.conv3.norm, nn.BatchNorm2d)
        assert not block.conv3.norm.weight.any()
    keys = dict(RESNET_BACKBONE__SHORTCUT="highway")
    head = build_c4_head(make_cfg(C4, **keys))
    assert [block.gate.bias.unique().item() for block in head.res5] == [-3.0, -3.0]


HEADS = {
    "paper": dict(MODEL__RESNETS__STRIDE_IN_1X1=True),
    "stride in the 3x3": dict(MODEL__RESNETS__STRIDE_IN_1X1=False),
    "RoIPool": dict(MODEL__ROI_BOX_HEAD__POOLER_TYPE="ROIPool"),
    "RoIAlign without offset": dict(MODEL__ROI_BOX_HEAD__POOLER_TYPE="ROIAlign"),
    "odd bins": dict(MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION=5),
    "trained norms": dict(MODEL__RESNETS__NORM="BN"),
}


def detectron2s_c4_head(cfg, depth):
    """Detectron2's head; at 18 and 34, where it has none, with Detectron2's own basic blocks."""
    head = build_c4_head(cfg, Res5ROIHeads)
    if depth >= 50:
        return head
    count, sizes = BLOCKS[depth], dict(in_channels=256, out_channels=512, norm="FrozenBN")
    strides = [2] + [1] * (count - 1)
    blocks = resnet.ResNet.make_stage(resnet.BasicBlock, count, stride_per_block=strides, **sizes)
    head.res5 = nn.Sequential(*blocks)
    return head


def head_gradients(head, features, proposals):
    """Scores, deltas and maps of fixed regions, and all gradients of their weighted sum."""
    features = features.clone().requires_grad_()
    maps = head._shared_roi_transform([features], proposals)
    scores, deltas = head.box_predictor(maps.mean(dim=[2, 3]))
    weights = torch.linspace(-1, 1, scores.numel() + deltas.numel(), dtype=torch.float64)
    torch.cat([scores.flatten(), deltas.flatten()]).mul(weights).sum().backward()
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    outputs = {"maps": maps, "scores": scores, "deltas": deltas, "map gradient": features.grad}
    return outputs | gradients


@pytest.mark.parametrize(
    "depth, kind",
    [(18, "paper"), (50, "paper"), (50, "stride in the 3x3")]
    + [pytest.param(50, kind, marks=pytest.mark.slow) for kind in [*HEADS][2:]]
    + [pytest.param(depth, "paper", marks=pytest.mark.slow) for depth in (34, 101, 152)],
)
def test_c4_head_equals_detectron2(make_cfg, depth, kind):
    """Res5ROIHeads' state loads strictly; outputs and gradients are its own in float64.

    Some boxes reach beyond the map, one is smaller than a cell, one is empty.
    """
    keys = dict(MODEL__RESNETS__DEPTH=depth, MODEL__ROI_HEADS__NUM_CLASSES=2, **HEADS[kind])
    cfg = make_cfg("voc/faster_rcnn_R_50_C4.yaml", **keys)
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    with torch.device("meta"):
        theirs, ours = detectron2s_c4_head(cfg, depth), build_c4_head(cfg)
    randomize(theirs.double().to_empty(device="cpu")).train()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        ours_p.requires_grad_(theirs_p.requires_grad)
    channels = 1024 if depth >= 50 else 256
    features = torch.rand(2, channels, 6, 8, dtype=torch.float64)
    corners = [[[3, 4, 60, 70], [-40, 60, 20, 140]], [[7, 7, 9, 9], [40, 40, 40, 60]]]
    boxes = [Boxes(torch.tensor(of_image)) for of_image in corners]
    for value in boxes:
        value.tensor = value.tensor.double()
    expected, found = (head_gradients(head, features, boxes) for head in (theirs, ours))
    assert len(expected["maps"]) == 4 and expected.keys() == found.keys()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        ours.REGIONS_AT_ONCE = 3
        maps = ours.eval()._shared_roi_transform([features], boxes)
        expected = theirs.eval()._shared_roi_transform([features], boxes)
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-9)


def boxes_in_a_map(count):
    corners = torch.rand(count, 2) * 60
    return torch.cat([corners, corners + 5 + 60 * torch.rand(count, 2)], 1)


def test_c4_head_that_is_traced_takes_any_number_of_regions(make_cfg):
    head = build_c4_head(make_cfg(C4)).eval().requires_grad_(False)
    head.REGIONS_AT_ONCE = 3

    def call(features, boxes):
        return head._shared_roi_transform([features], [Boxes(boxes)])

    features = torch.rand(1, 256, 6, 8)
    with torch.no_grad():
        traced = torch.jit.trace(call, (features, boxes_in_a_map(8)), check_trace=False)
        for count in (2, 8, 13):
            boxes = boxes_in_a_map(count)
            expected = head.res5(head.pooler([features], [Boxes(boxes)]))
            torch.testing.assert_close(traced(features, boxes), expected, rtol=1e-4, atol=1e-5)


def test_c4_head_is_calibrated_with_one_call_an_image(make_cfg):
    """A quantized res5 keeps a limited number of calls, so parts would mean fewer images."""
    head = build_c4_head(make_cfg(C4)).eval()
    head.REGIONS_AT_ONCE, head.res5 = 3, InferenceNetwork(head.res5, torch.int8, "openvino")
    with torch.no_grad():
        head._shared_roi_transform([torch.rand(1, 256, 6, 8)], [Boxes(boxes_in_a_map(8))])
    assert [len(sample) for sample in head.res5.samples] == [8]


def test_c4_head_calls_a_pooler_with_hooks(make_cfg):
    head, seen = build_c4_head(make_cfg(C4)).eval(), []
    head.pooler.register_forward_hook(lambda module, inputs, bins: seen.append(bins))
    features, boxes = torch.rand(1, 256, 6, 8), Boxes(boxes_in_a_map(5))
    with torch.no_grad():
        found = head._shared_roi_transform([features], [boxes])
        assert [bins.shape for bins in seen] == [(5, 256, 14, 14)]
        torch.testing.assert_close(found, head.res5(seen[0]))


@pytest.mark.parametrize("file", [C4, DC5, VGG])
def test_detector_trains(make_cfg, images, file):
    keys = dict(MODEL__ROI_BOX_HEAD__FC_DIM=16, RESNET_BACKBONE__VGG__DEPTH=11)
    keys |= {} if file == VGG else dict(MODEL__BACKBONE__FREEZE_AT=0, MODEL__RESNETS__NORM="BN")
    model = build_model(make_cfg(file, **keys, **CHEAP)).train()
    stages = {C4: "roi_heads.res5", DC5: "backbone.res5", VGG: "roi_heads.box_head"}
    stage = model.get_submodule(stages[file])
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = losses_of(model, images)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    optimizer.step()
    for key, value in stage.state_dict().items():
        assert torch.isfinite(value).all() and not torch.equal(value, before[key]), key
    if file == VGG:
        assert model.backbone.conv3[1].weight.grad.any()
        assert all(p.grad is None for p in model.backbone.conv2.parameters())
    with torch.no_grad():
        assert len(model.eval()(images)) == 2


def test_dc5_regions_are_pooled_at_stride_16(make_cfg):
    cfg = make_cfg("voc/faster_rcnn_R_101_DC5.yaml", MODEL__DEVICE="meta")
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.backbone.output_shape() == {"res5": ShapeSpec(channels=2048, stride=16)}
    assert [pooler.spatial_scale for pooler in model.roi_heads.box_pooler.level_poolers] == [1 / 16]
    assert model.proposal_generator.anchor_generator.strides == [16]
    assert [block.conv2.dilation for block in model.backbone.res5] == [(2, 2)] * 3


def test_vgg_detector_is_the_published_one(make_cfg):
    with torch.device("meta"):
        model = build_model(make_cfg(VGG, MODEL__DEVICE="meta"))
    assert model.backbone.output_shape() == {"conv5": ShapeSpec(channels=512, stride=16)}
    (pooler,) = model.roi_heads.box_pooler.level_poolers
    assert isinstance(pooler, RoIPool)
    assert (pooler.output_size, pooler.spatial_scale) == ((7, 7), 1 / 16)
    head = model.roi_heads.box_head
    assert isinstance(head, VGGBoxHead) and head.dropout.p == 0.5
    sizes = [(layer.in_features, layer.out_features) for layer in (head.fc6, head.fc7)]
    assert sizes == [(512 * 7 * 7, 4096), (4096, 4096)]
    assert model.roi_heads.box_predictor.cls_score.in_features == 4096
    frozen = {k[:5] for k, value in model.backbone.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "conv2"}


def test_vgg_head_drops_only_in_training(make_cfg):
    torch.manual_seed(0)
    cfg = make_cfg(VGG, MODEL__ROI_BOX_HEAD__FC_DIM=2000)
    head = build_box_head(cfg, ShapeSpec(channels=4, height=7, width=7))
    assert head.output_shape == ShapeSpec(channels=2000)
    for layer in (head.fc6, head.fc7):
        nn.init.constant_(layer.weight, 0.1)
    regions = torch.rand(3, 4, 7, 7)
    assert torch.equal(head.eval()(regions), head(regions))
    assert (head(regions) > 0).all()
    head.train()
    assert not torch.equal(head(regions), head(regions))
    assert 0.45 < (head(regions) == 0).float().mean() < 0.55
    assert (head(-100 * regions) == 0).all()  # ReLU after fc6


def test_file_without_res5_is_refused_by_c4(make_cfg, tmp_path):
    network = build_network("resnet18", out_features=["res4"])
    save_weights(network, tmp_path / "r18.safetensors", PREPROCESSINGS["torchvision"])
    with pytest.raises(WeightsError, match=r"lacks res5.0.* of the C4 head"):
        Checkpointer(build_model(make_cfg(C4, **CHEAP))).load(str(tmp_path / "r18.safetensors"))


@pytest.mark.parametrize("fc_dim", [8, 12])
def test_vgg_head_gets_fc6_and_fc7(make_cfg, tmp_path, fc_dim):
    tensors = build_network("vgg11", out_features=["conv5"]).state_dict()
    for name, size in (("fc6", 512 * 49), ("fc7", 8)):
        tensors |= {f"{name}.weight": torch.randn(8, size), f"{name}.bias": torch.randn(8)}
    path = str(tmp_path / "vgg.safetensors")
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, path, {METADATA_KEY: PREPROCESSINGS["torchvision"].to_json()})
    keys = dict(MODEL__ROI_BOX_HEAD__FC_DIM=fc_dim, RESNET_BACKBONE__VGG__DEPTH=11)
    model = build_model(make_cfg(VGG, **keys, **CHEAP))
    if fc_dim != 8:
        before = model.backbone.conv1[0].weight.clone()
        with pytest.raises(WeightsError, match=r"fc6.* has shape \(8, 25088\), but the head needs"):
            Checkpointer(model).load(path)
        assert torch.equal(model.backbone.conv1[0].weight, before)
        return
    Checkpointer(model).load(path)
    for key, value in model.roi_heads.box_head.state_dict().items():
        assert torch.equal(value, tensors[key])
