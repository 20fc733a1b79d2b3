"""Detectron2's own backbone: strict loading both ways, equal maps and gradients in float64."""

import pytest
import torch
from drawn_networks import meta_state, on_meta
from parity import adopt, assert_same, draw

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling.backbone.resnet import build_resnet_backbone  # noqa: E402

from resnet_backbone.models import build_model  # noqa: E402

STAGES = ("stem", "res2", "res3", "res4", "res5")
BASIC = (18, 34)


def make_cfg(depth, out_features, freeze_at=0, **resnets):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    if depth in BASIC:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    keys = {"DEPTH": depth, "OUT_FEATURES": list(out_features), **resnets}
    for key, value in keys.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def assert_counters_alone_lack(found):
    """Detectron2 >= 0.7 keeps the batch counter, which nothing reads, in a frozen norm."""
    assert not found.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)


def twins(depth, out_features=STAGES, builder=build_resnet_backbone, freeze_at=0, **options):
    """Makes Detectron2's backbone and ours with its weights, both in float64.

    ``options`` are ours; Detectron2's keys are derived from them.
    """
    *_, res4, res5 = options.get("dilations", (1, 1, 1, 1))
    keys = dict(NORM=options.get("norm", "BN"), STRIDE_IN_1X1=options.get("stride_in_1x1", True))
    keys |= dict(RES5_MULTI_GRID=list(options.get("multi_grid", (1, 1, 1))), STEM_TYPE="basic")
    cfg = make_cfg(depth, out_features, freeze_at, RES4_DILATION=res4, RES5_DILATION=res5, **keys)
    stages = dict(out_features=out_features, freeze_at=freeze_at)
    ours = on_meta(build_model, f"resnet{depth}", **stages, **options)
    theirs = draw(on_meta(builder, cfg, ShapeSpec(channels=3)))
    adopt(ours, theirs.state_dict())
    assert_counters_alone_lack(theirs.load_state_dict(ours.state_dict(), strict=freeze_at == 0))
    table = {name: (spec.channels, spec.stride) for name, spec in theirs.output_shape().items()}
    assert table == {name: ours.features[name] for name in out_features}
    return theirs, ours


def check(theirs, ours):
    """Compares maps, gradients (also of the images) and, afterwards, batch norm statistics."""
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)  # res5 is 2x2, enough for training
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    assert_same(theirs, ours, theirs(inputs[0]), ours(inputs[1]))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-11)


SLOW = pytest.mark.slow
DC5 = dict(dilations=(1, 1, 1, 2))


@pytest.mark.parametrize(
    "depth, stages, options",
    [
        (18, STAGES[1:], {}),
        (34, STAGES[1:], {}),
        (50, STAGES[1:], {}),
        (50, STAGES[1:], dict(stride_in_1x1=False)),
        (50, ("res5",), DC5),
        pytest.param(50, ("res5",), dict(stride_in_1x1=False, **DC5), marks=SLOW),
        (18, ("res2", "res4"), dict(norm="GN")),
        (50, ("res2", "res4"), dict(norm="FrozenBN")),
        *(
            pytest.param(depth, STAGES, dict(stride_in_1x1=stride), marks=SLOW)
            for depth in (101, 152)
            for stride in (True, False)
        ),
    ],
)
def test_maps_and_gradients(depth, stages, options):
    check(*twins(depth, stages, **options))


def test_sync_batch_norm_keys_and_evaluation():
    theirs, ours = twins(18, ("res5",), norm="SyncBN")
    theirs.eval(), ours.eval()
    check(theirs, ours)


def test_no_norm():
    """Detectron2's convolutions have no bias even without a norm; ours have one."""
    cfg = make_cfg(18, ["res5"], NORM="")
    theirs = on_meta(build_resnet_backbone, cfg, ShapeSpec(channels=3)).state_dict()
    ours = meta_state("resnet18", out_features=["res5"], norm="")
    assert theirs.keys() == {key for key in ours if not key.endswith("bias")}


@pytest.mark.parametrize("depth, freeze_at", [*((18, n) for n in range(6)), (50, 2)])
def test_freezing(depth, freeze_at):
    """In training mode: the same parameters learn, the same statistics move."""
    theirs, ours = twins(depth, ("res4",) if freeze_at < 5 else ("res5",), freeze_at=freeze_at)
    learning = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in ours.named_parameters() if p.requires_grad}
    check(theirs.train(), ours.train())


@pytest.mark.parametrize("dilations", [pytest.param((1, 1, 1, 2), marks=SLOW), (1, 1, 2, 4)])
def test_deeplab_multi_grid(dilations):
    """DeepLabV3 of Detectron2: multi-grid (1, 2, 4) at output stride 16 and 8."""
    deeplab = pytest.importorskip("detectron2.projects.deeplab")
    options = dict(dilations=dilations, multi_grid=(1, 2, 4), stride_in_1x1=False)
    builder = deeplab.build_resnet_deeplab_backbone
    theirs, ours = twins(50, ("res2", "res5"), builder, **options)
    rates = [block.conv2.dilation[0] for block in ours.res5]
    assert rates == [dilations[3] * rate for rate in (1, 2, 4)]
    check(theirs, ours)


def test_frozen_and_trainable_norms_exchange_states():
    """Frozen norms take a trainable network's state strictly, and the other way round."""
    theirs, ours = twins(18, ("res5",), norm="FrozenBN")
    trainable = build_model("resnet18", out_features=["res5"]).double()
    trainable.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(trainable.state_dict(), strict=True)
    assert_counters_alone_lack(trainable.load_state_dict(theirs.state_dict(), strict=False))
