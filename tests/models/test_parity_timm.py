"""Dilated stages against timm, and multi-grid, which timm lacks, against its blocks re-dilated.

Two conventions exist for the first block of a dilated stage: timm and torchvision give it the
dilation of the stage before (the block that would have had the stride keeps its rate); Detectron2,
R-FCN and we give all blocks of the stage the new one. So timm's first blocks are re-dilated here
before the comparison, and a test shows that this is the only difference.
"""

import pytest
import torch
from drawn_networks import on_meta
from parity import adopt, assert_same, draw
from torch import nn

from resnet_backbone.models import build_model
from resnet_backbone.models.resnet import DILATIONS
from resnet_backbone.weights.keymaps import from_torchvision

timm = pytest.importorskip("timm")

STAGES = ("res2", "res3", "res4", "res5")


def twins(name, output_stride, **options):
    """Makes timm's network and ours with its weights, both in float64."""
    if name == "resnet50":
        options["stride_in_1x1"] = False
    theirs = draw(on_meta(timm.create_model, name, num_classes=7, output_stride=output_stride))
    ours = on_meta(build_model, name, 7, dilations=DILATIONS[output_stride], **options)
    adopt(ours, from_torchvision(theirs.state_dict()))  # timm's keys are torchvision's
    return theirs, ours


def set_dilation(block, dilation):
    """Gives the 3x3 convolutions of a timm block this dilation."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)


def maps_of(theirs, ours, images):
    found = theirs.forward_intermediates(images, intermediates_only=True)[1:]
    return dict(zip(STAGES, found, strict=True)), ours.forward_features(images, STAGES)


def check(theirs, ours):
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert_same(theirs, ours, *maps_of(theirs, ours, images), renamed=from_torchvision)


SLOW = pytest.param("resnet50", 16, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, output_stride", [("resnet18", 16), ("resnet18", 8), ("resnet50", 8), SLOW]
)
def test_output_stride(name, output_stride):
    theirs, ours = twins(name, output_stride)
    for number, dilation in enumerate(DILATIONS[output_stride], start=1):
        set_dilation(getattr(theirs, f"layer{number}")[0], dilation)
    assert ours.features["res5"].stride == output_stride
    check(theirs, ours)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_keeps_the_first_blocks_dilation(name):
    """Unchanged, timm agrees up to res4 and differs in res5."""
    theirs, ours = twins(name, 16)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected, maps = maps_of(theirs.eval(), ours.eval(), images)
    assert torch.allclose(maps["res4"], expected["res4"], rtol=1e-10)
    assert maps["res5"].shape == expected["res5"].shape
    assert not torch.allclose(maps["res5"], expected["res5"], rtol=1e-2)


@pytest.mark.parametrize("name, grid", [("resnet18", (1, 2)), ("resnet50", (1, 2, 4))])
def test_multi_grid(name, grid):
    """Block i of res5 has dilation 2 * grid[i] at output stride 16 (arXiv 1706.05587, 3.2.1)."""
    theirs, ours = twins(name, 16, multi_grid=grid)
    for block, rate in zip(theirs.layer4, grid, strict=True):
        set_dilation(block, 2 * rate)
    check(theirs, ours)
