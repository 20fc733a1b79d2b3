"""What Detectron2's tests/modeling/test_backbone.py asks of its backbones, asked of ours.

Its two tests script build_resnet_backbone and build_resnet_fpn_backbone (with GN) and compare one
map. Here every builder is scripted, traced, exported and compiled, and all maps are compared.
"""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.export.torchscript_patch import patch_nonscriptable_classes
from detectron2.modeling import build_backbone

R, V = ["res2", "res3", "res4", "res5"], ["conv3", "conv4", "conv5", "pool5"]
OUT, IN = "MODEL.RESNETS.OUT_FEATURES", "MODEL.FPN.IN_FEATURES"
GN = {"MODEL.FPN.NORM": "GN", "MODEL.RESNETS.NORM": "GN"}
DEEPLAB = {"MODEL.RESNETS.STEM_TYPE": "basic", "MODEL.RESNETS.RES5_MULTI_GRID": [1, 2]}
BACKBONES = {
    "build_paper_resnet_backbone": {},
    "build_paper_resnet_fpn_backbone": {OUT: R, IN: R, **GN},
    "build_paper_resnet_p6p7_backbone": {OUT: R[1:], IN: R[1:]},
    "build_vgg_backbone": {},
    "build_vgg_fpn_backbone": {"RESNET_BACKBONE.VGG.OUT_FEATURES": V, IN: V},
    "build_paper_resnet_deeplab_backbone": {OUT: ["res2", "res5"], **DEEPLAB},
}


@pytest.fixture(autouse=True, scope="module")
def scriptable():
    """Detectron2's own preparation of FPN for torch.jit.script, undone afterwards."""
    from detectron2.modeling.backbone import FPN, ResNet

    patch_nonscriptable_classes()
    yield
    for kind in (FPN, ResNet):
        del kind.__prepare_scriptable__


@pytest.fixture(params=BACKBONES)
def backbone(request, make_cfg):
    name, keys = request.param, BACKBONES[request.param]
    cfg = make_cfg()
    if "deeplab" in name:
        pytest.importorskip("detectron2.projects.deeplab").add_deeplab_config(cfg)
    small = ["MODEL.RESNETS.DEPTH", 18, "RESNET_BACKBONE.VGG.DEPTH", 11]
    small += ["MODEL.BACKBONE.NAME", name, "MODEL.FPN.OUT_CHANNELS", 32]
    cfg.merge_from_list([*small, *(word for pair in keys.items() for word in pair)])
    torch.manual_seed(0)
    return build_backbone(cfg).eval()


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
