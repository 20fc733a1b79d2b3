"""What public trainers put around and beside a network comes off; the choice of one is said."""

import argparse

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from resnet_backbone.cli.convert_weights import main
from resnet_backbone.weights import WeightsError, read_checkpoint

NETWORK = torchvision.models.resnet18(num_classes=10).state_dict()
OTHER = {key: value * 2 for key, value in NETWORK.items()}
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "backbone.body.", "encoder.", "net."),
    *("encoder_q.", "base_encoder.", "student.", "teacher.", "module.model.backbone."),
)
BESIDE = {"queue": torch.rand(4, 4), "queue_ptr": torch.zeros(1, dtype=torch.long)}
BESIDE |= {"projector.0.weight": torch.rand(3, 3), "prototypes.weight": torch.rand(2, 2)}


def under(prefix, network=NETWORK):
    return {prefix + key: value for key, value in network.items()}


def stem(path):
    return read_checkpoint(path, "torchvision").tensors["stem.conv1.weight"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_a_common_prefix_comes_off(tmp_path, prefix, container):
    path, content = tmp_path / f"x.{container}", under(prefix)
    if container == "pth":
        torch.save({"state_dict": content, "epoch": 1}, path)
    else:
        save_file(content, path)
    assert torch.equal(stem(path), NETWORK["conv1.weight"])


@pytest.mark.parametrize(
    "content",
    [
        {"model_state_dict": NETWORK, "epoch": 1},
        {"net": NETWORK, "acc": 93.0},
        {"meta": {}, "state_dict": under("backbone.")},
        {"state_dict": NETWORK, "args": argparse.Namespace(lr=1)},
        {"state_dict": NETWORK, "state_dict_ema": OTHER},
        {"student": under("module.backbone.", OTHER), "teacher": under("backbone."), "epoch": 9},
        {"state_dict": under("module.", {**NETWORK, **BESIDE})},
        {
            "state_dict": {
                **under("module.encoder_q."),
                **under("module.encoder_k.", OTHER),
                **under("module.", BESIDE),
            }
        },
    ],
    ids=["model_state_dict", "net", "mm", "namespace", "ema", "dino", "swav", "moco"],
)
def test_wrappers_and_what_lies_beside(tmp_path, content):
    torch.save(content, tmp_path / "x.pth.tar")
    assert torch.equal(stem(tmp_path / "x.pth.tar"), NETWORK["conv1.weight"])


def test_an_mlp_in_place_of_the_head_is_left_out(tmp_path):
    network = {k: v for k, v in NETWORK.items() if not k.startswith("fc.")}
    network |= {f"fc.{k}.{n}": torch.rand(4, 4) for k in (0, 2) for n in ("weight", "bias")}
    torch.save({"state_dict": under("module.encoder_q.", network)}, tmp_path / "x.pth.tar")
    checkpoint = read_checkpoint(tmp_path / "x.pth.tar", "torchvision")
    assert checkpoint.model.name == "resnet18" and checkpoint.model.num_classes is None


@pytest.mark.parametrize("key", ["state_dict_ema", "student", "encoder_k"])
def test_another_network_of_the_file_is_chosen_by_its_key(tmp_path, caplog, key):
    content = {"state_dict": NETWORK, "state_dict_ema": OTHER}
    if key == "student":
        content = {"student": OTHER, "teacher": NETWORK}
    if key == "encoder_k":
        content = {"state_dict": {**under("encoder_q."), **under("encoder_k.", OTHER)}}
    torch.save(content, tmp_path / "x.pth")
    assert torch.equal(stem(tmp_path / "x.pth"), NETWORK["conv1.weight"])
    assert key in caplog.text  # said
    assert torch.equal(stem(f"{tmp_path / 'x.pth'}#{key}"), OTHER["conv1.weight"])
    out, stated = str(tmp_path / "out.safetensors"), ["--preprocessing", "torchvision"]
    words = [str(tmp_path / "x.pth"), "--key", key, *stated]
    assert main(["inspect", *words]) == 0
    assert main(["convert", *words, out, "--num-images", "1", "--size", "32"]) == 0
    assert torch.equal(stem(out), OTHER["conv1.weight"])
    with pytest.raises(WeightsError, match=r"no weights under 'nothing'; its keys are .*"):
        stem(f"{tmp_path / 'x.pth'}#nothing")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "a web page, not a file of weights"),
    ],
)
def test_files_that_are_no_weights_are_recognized(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        stem(tmp_path / "x.pth")


def test_another_network_of_the_file_is_checked_as_well(tmp_path):
    damaged = {**OTHER, "conv1.weight": torch.full_like(OTHER["conv1.weight"], float("nan"))}
    torch.save({"state_dict": NETWORK, "state_dict_ema": damaged}, tmp_path / "x.pth")
    assert torch.equal(stem(tmp_path / "x.pth"), NETWORK["conv1.weight"])
    with pytest.raises(WeightsError, match="conv1.weight has NaN or infinite values"):
        stem(f"{tmp_path / 'x.pth'}#state_dict_ema")
