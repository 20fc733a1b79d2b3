"""Layer responses, the paper's Fig. 7."""

import json

import numpy as np
import pytest
import torch
from drawn_networks import randomize
from PIL import Image
from torch import nn
from torch.nn import functional as F

from resnet_backbone.classification.data.sources import read_cifar10
from resnet_backbone.classification.networks import NetworkSpec, describe, save_network
from resnet_backbone.models import BottleneckBlock, build_model
from resnet_backbone.models.layers import freeze
from resnet_backbone.report.plots import Responses, layer_responses, plot_responses
from resnet_backbone.report.published import parse_network
from resnet_backbone.weights import Preprocessing


@pytest.fixture
def network():
    torch.manual_seed(0)
    return lambda name, **options: randomize(build_model(name, **options)).double()


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.manual_seed(1))


def by_hand(model, images, plain):
    """The network of 8 layers in plain functions, from its tensors; standard deviations by name."""
    tensors, found = model.state_dict(), {}

    def response(name, x, stride=1):
        norm = [tensors[f"{name}.norm.{key}"] for key in ("running_mean", "running_var")]
        affine = [tensors[f"{name}.norm.{key}"] for key in ("weight", "bias")]
        x = F.conv2d(x, tensors[f"{name}.weight"], stride=stride, padding=1)
        x = F.batch_norm(x, *norm, *affine)
        found[name] = x.std(correction=0).item()
        return x

    x = response("stem", images).relu()
    for stage, stride in (("res2", 1), ("res3", 2), ("res4", 2)):
        y = response(f"{stage}.0.conv1", x, stride).relu()
        y = response(f"{stage}.0.conv2", y)
        shortcut = x[:, :, ::stride, ::stride]
        padding = torch.zeros(*(len(x), y.shape[1] - x.shape[1]), *y.shape[2:], dtype=x.dtype)
        x = (y if plain else y + torch.cat([shortcut, padding], 1)).relu()
    return found


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_plain8"])
def test_equals_the_computation_by_hand(network, images, name):
    model = network(name)
    expected = by_hand(model, images, plain="plain" in name)
    found = layer_responses(model, images)
    assert [layer for layer, _ in found] == list(expected)  # 6n+1, in the order of the layers
    np.testing.assert_allclose([std for _, std in found], list(expected.values()), rtol=1e-12)


def test_the_shortcut_is_not_part_of_a_response(network, images):
    residual, plain = network("cifar_resnet8"), build_model("cifar_plain8").double()
    plain.load_state_dict(residual.state_dict())  # twins: the same tensors
    first, second = (dict(layer_responses(model, images)) for model in (residual, plain))
    before = ("stem", "res2.0.conv1", "res2.0.conv2")  # layers that no sum has gone into
    assert [first[name] for name in before] == [second[name] for name in before]
    assert first["res3.0.conv1"] != second["res3.0.conv1"]


def test_leaves_the_network_as_it_was(network, images):
    model = network("cifar_resnet8").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layer_responses(model, images)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_batches_and_frozen_norms_change_nothing(network, images):
    model = network("cifar_resnet8")
    expected = layer_responses(model, images)
    for size in (1, 4):
        again = layer_responses(model, images, batch_size=size)
        np.testing.assert_allclose([s for _, s in again], [s for _, s in expected], rtol=1e-12)
    freeze(model)
    frozen = layer_responses(model, images)
    np.testing.assert_allclose([s for _, s in frozen], [s for _, s in expected], rtol=1e-10)


def test_bottlenecks_count_once(images):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), BottleneckBlock(16, 16), BottleneckBlock(16, 32))
    found = layer_responses(model.double(), images)
    assert [name for name, _ in found] == ["1.conv2", "2.conv2"]


def test_networks_of_other_libraries_are_refused(images):
    with pytest.raises(ValueError, match="Sequential has no 3x3 layers"):
        layer_responses(nn.Sequential(nn.Conv2d(3, 8, 3)), images)


def test_picture_has_the_panels_of_fig7():
    names = ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56")
    stds = [[1.0, 3.0, 2.0], [2.0, 1.0, 4.0], [0.5, 0.7, 0.2], [0.1, 0.3, 0.2]]
    curves = []
    for name, values in zip(names, stds, strict=True):
        curves.append(Responses(parse_network(name).title, parse_network(name), values))
    ordered, ranked = plot_responses(curves).axes
    assert [list(line.get_ydata()) for line in ordered.lines] == stds
    assert list(ordered.lines[0].get_xdata()) == [1, 2, 3]
    assert [list(line.get_ydata()) for line in ranked.lines] == [sorted(s)[::-1] for s in stds]
    assert [line.get_linestyle() for line in ordered.lines] == ["--", "--", "-", "-"]
    colors = [line.get_color() for line in ordered.lines]
    assert colors[:2] == colors[2:] and colors[0] != colors[1]
    labels = [text.get_text() for text in ordered.get_legend().texts]
    assert labels == ["plain-20", "plain-56", "ResNet-20", "ResNet-56"]
    figure = plot_responses([curves[0], curves[0]._replace(label="again")])
    first, second = (line.get_color() for line in figure.axes[0].lines)
    assert first != second


@pytest.fixture
def weights(tmp_path):
    """Function that writes the weights of a network, as the trainer does; returns path, model."""

    def write(name="cifar_resnet8", file="w.safetensors"):
        torch.manual_seed(2)
        spec = NetworkSpec(name, 10)
        model = randomize(spec.build())
        expected = Preprocessing("BGR", 255.0, (100.0, 110.0, 120.0), (50.0, 51.0, 52.0))
        save_network(tmp_path / file, model, spec, describe(model, expected))
        return tmp_path / file, model

    return write


def test_command_line_normalizes_as_the_weights_ask(tool, weights, tiny_cifar10, tmp_path):
    (path, model), images = weights(), read_cifar10(tiny_cifar10, train=False)[0]
    output, numbers = tmp_path / "fig7.png", tmp_path / "fig7.json"
    arguments = ["--num-images", "10", "--output", output, "--json", numbers]
    status, out, _ = tool("responses", "--weights", path, "--cifar10", tiny_cifar10, *arguments)
    assert status == 0 and "ResNet-8" in out
    mean, std = torch.tensor([100.0, 110, 120]), torch.tensor([50.0, 51, 52])
    inputs = (images[:10].flip(1).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = layer_responses(model, inputs)
    found = json.loads(numbers.read_text())
    assert found["images"] == 10
    stds = [std for _, std in found["std"]["ResNet-8"]]
    np.testing.assert_allclose(stds, [std for _, std in expected], rtol=1e-4)
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


def test_command_line_reads_folders_of_images(tool, refused, weights, tmp_path):
    path, _ = weights()
    folder = tmp_path / "images" / "n01"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (300, 260), "red").save(folder / name)
    output = tmp_path / "r.png"
    arguments = ["responses", "--weights", f"{path}=mine", "--output", output, "--images"]
    status, out, _ = tool(*arguments, folder.parent)
    assert status == 0 and "mine" in out
    (tmp_path / "empty").mkdir()
    assert "no images found" in refused(*arguments, tmp_path / "empty")


def test_command_line_errors_are_one_line(refused, weights, tiny_cifar10, tmp_path):
    (path, _), output = weights(), tmp_path / "r.png"
    common = ["responses", "--cifar10", tiny_cifar10, "--output", output, "--weights"]
    for words, message in (
        ([path, "--weights", path], "two networks are named 'ResNet-8'"),
        ([tmp_path / "none.safetensors"], "none.safetensors: no such file"),
        ([path, "--model", "cifar_resnet14"], "cifar_resnet8"),
        ([path, "--num-images", "0"], "at least 1"),
    ):
        assert message in refused(*common, *words)
    assert not output.exists()
