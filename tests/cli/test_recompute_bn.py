"""tools/recompute_bn.py on a run's folder."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from resnet_backbone.classification import networks
from resnet_backbone.classification.data.sources import ArraySource, SampleStream, read_cifar10
from resnet_backbone.cli import recompute_bn
from resnet_backbone.weights import Preprocessing, read_checkpoint
from resnet_backbone.weights.preprocessing import InputNormalizer

GREY = Preprocessing("RGB", 255.0, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))


@pytest.fixture
def tool(run_command):
    return partial(run_command, recompute_bn.main)


@pytest.fixture
def run(tmp_path, tiny_cifar10):
    torch.manual_seed(0)
    spec = networks.NetworkSpec("cifar_resnet8", 10)
    networks.save_network(tmp_path / "final.safetensors", spec.build(), spec, GREY)
    (tmp_path / "config.yaml").write_text(
        f"""
model: {{name: cifar_resnet8}}
data: {{format: cifar10, root: {tiny_cifar10}, augmentation: pad_crop, padding: black}}
schedule: {{iterations: 5}}
train: {{batch_size: 40, micro_batch: 8, seed: 3, device: cpu}}
evaluation: {{protocol: full, batch_size: 16}}
"""
    )
    return tmp_path


@pytest.mark.parametrize("layer_inputs", ["batch", "population"])
def test_new_statistics(tool, run, tiny_cifar10, layer_inputs):
    before = (run / "final.safetensors").read_bytes()
    _, out, _ = tool("--run", run, "--layer-inputs", layer_inputs, "--images", 70)
    assert "7 batch norms from 70 images, 8 normalized together" in out
    assert "before: top-1 error" in out and "after:  top-1 error" in out
    assert (run / "final.safetensors").read_bytes() == before
    new = run / "true_bn.safetensors"
    assert networks.read_spec(new) == networks.NetworkSpec("cifar_resnet8", 10)
    assert read_checkpoint(new).preprocessing == replace(GREY, resize_size=32, crop_size=32)
    assert networks.read_class_names(new)[:2] == ["airplane", "automobile"]
    tensors = read_checkpoint(new).tensors
    # the first batch norm sees the convolved first 70 images of training
    images, labels = read_cifar10(tiny_cifar10, train=True)
    source = ArraySource(images, labels, SampleStream(200, 40, 3))
    x = torch.cat([InputNormalizer(GREY)(source.batch(i).images) for i in range(2)])[:70]
    seen = torch.nn.functional.conv2d(x, tensors["stem.weight"], padding=1).double()
    mean, var = (tensors[f"stem.norm.running_{key}"] for key in ("mean", "var"))
    torch.testing.assert_close(mean.double(), seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var.double(), seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_all_images_by_default_and_another_file(tool, run):
    """The run was a fine-tuning; its own last layer stays."""
    other, new = run / "other.safetensors", run / "new" / "x.safetensors"
    (run / "final.safetensors").rename(other)
    arguments = ("--weights", other, "--output", new, "--micro-batch", 20, "train.batch_size=40")
    _, out, _ = tool("--run", run, *arguments, "model.new_head=true")
    assert "from 200 images, 20 normalized together" in out
    before, after = load_file(other), load_file(new)
    assert after.keys() == before.keys()
    assert torch.equal(after["linear.weight"], before["linear.weight"])


def test_files_are_not_overwritten(tool, refusal, run):
    """Also not those of the run beside the new weights."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    options = "--run", run, "--images", 40, "data.mean=channel"
    message = "final.safetensors already exists: give another --output, or --overwrite"
    assert message in refusal(recompute_bn.main, *options, "--output", run / "final.safetensors")
    tool(*options)
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert after.keys() - before.keys() == {"true_bn.safetensors"}
    assert after.items() > before.items()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--run", "nowhere"], "nowhere has no config.yaml"),
        (["--run", ".", "--weights", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--run", ".", "--images", "-1"], "--images: at least 1"),
        (["--run", ".", "--output", "x.pth"], "--output x.pth: give a .safetensors file"),
        (["--run", ".", "train.batchsize=3"], "did you mean train.batch_size"),
        (["--run", ".", "model.weights=x"], "give --weights FILE in place of model.weights"),
    ],
)
def test_wrong_input_is_one_line(refusal, run, monkeypatch, arguments, message):
    monkeypatch.chdir(run)
    assert message in refusal(recompute_bn.main, *arguments)
