"""Traced, symbolically traced, scripted, exported and compiled networks: the same outputs."""

import pytest
import torch
from drawn_networks import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

from resnet_backbone import build_model
from resnet_backbone.models import build_model as build_paper

SIZES = ((2, 3, 64, 64), (1, 3, 70, 96))
NETWORKS = {
    "resnet18": dict(norm="FrozenBN", out_features=("res2", "res3")),
    "resnet50": dict(freeze_at=2, dilations=(1, 2, 2, 4), out_features=("res2", "res3")),
    "cifar_resnet8": dict(shortcut="highway", activation="prelu"),
    "cifar_plain8": dict(norm=""),
    "bn_inception": dict(num_classes=5),
    "prelu_net_a": dict(out_features=("conv1", "conv2")),
    "vgg11_bn": dict(out_features=("conv1", "conv3")),
}


@torch.no_grad()
def assert_same(graph, model, sizes=SIZES):
    for size in sizes:
        images = torch.rand(size)
        assert_close(graph(images), model(images), 1e-5)


@pytest.mark.parametrize("build", [build_paper, build_model])
@pytest.mark.parametrize("name", NETWORKS)
def test_script_and_traces(name, build):
    model = build(name, **NETWORKS[name]).eval()
    keys = list(model.state_dict())
    scripted = torch.jit.script(model)
    assert list(model.state_dict()) == keys and "_tensor_constant0" not in vars(model)
    assert_same(scripted, model)
    assert_same(torch.fx.symbolic_trace(model), model)
    assert_same(torch.jit.trace(model, torch.rand(2, 3, 64, 96), strict=False), model)


@pytest.mark.parametrize("name", ["cifar_resnet8", "vgg11_bn"])
def test_export_and_compile(name):
    torch.compiler.reset()
    model = build_model(name, **NETWORKS[name]).eval()
    free = {dim: torch.export.Dim.DYNAMIC for dim in (0, 2, 3)}
    with torch.no_grad():
        images = torch.rand(2, 3, 64, 96)
        program = torch.export.export(model, (images,), dynamic_shapes=(free,))
    assert_same(program.module(), model, SIZES[:1])
    assert_same(torch.compile(model, backend="eager", fullgraph=True), model)


def test_a_scripted_network_still_trains():
    torch.manual_seed(0)
    model = build_model("cifar_resnet8").train()
    scripted = torch.jit.script(model)
    images = torch.rand(4, 3, 16, 16)
    loss, expected = scripted(images).square().sum(), model(images).square().sum()
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for (name, found), value in zip(scripted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, value.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert scripted.eval()(images).shape == (4, 10)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_torchvisions_feature_extractor(norm):
    model = build_model("resnet18", norm=norm, out_features=("res4",)).eval()
    nodes = {"res3.1.activation": "middle", "res4.1.activation": "last"}
    extractor = create_feature_extractor(model, nodes)
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 64)
        found, expected = extractor(images), model.forward_features(images)
    for name, stage in (("middle", "res3"), ("last", "res4")):
        torch.testing.assert_close(found[name], expected[stage], rtol=1e-4, atol=1e-5)
