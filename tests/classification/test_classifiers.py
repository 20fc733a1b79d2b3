"""Classifiers by name, their weights, checkpoints (damaged ones passed over aloud), run folders."""

import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from resnet_backbone.classification import networks as module
from resnet_backbone.classification.networks import STATE, WEIGHTS, NetworkSpec, describe
from resnet_backbone.models import build_model
from resnet_backbone.runtime.processes import World
from resnet_backbone.runtime.records import RunFolder
from resnet_backbone.weights import Preprocessing, WeightsError, load_weights

SPEC = NetworkSpec("cifar_resnet8", 10, {"shortcut": "B"})
INPUT = Preprocessing("RGB", 255.0, (120.0, 121.0, 122.0), (1.0, 1.0, 1.0), source="test")


make = partial(module.Checkpoints, spec=SPEC, preprocessing=INPUT)


def same_weights(model, other) -> bool:
    return all(map(torch.equal, model.parameters(), other.parameters()))


def iterations(kept):
    return [int(path.name) for path in module.checkpoints_in(kept.run)]


def test_newest_and_multiples_stay(tmp_path):
    kept = make(tmp_path, keep=2, keep_every=30)
    assert kept.load_latest(SPEC.build()) is None
    for iteration in range(10, 80, 10):
        kept.save(iteration, SPEC.build(), {"iteration": iteration})
    assert iterations(kept) == [30, 60, 70]
    assert make(tmp_path).load_latest(SPEC.build()) == {"iteration": 70}
    with pytest.raises(WeightsError):
        kept.load_latest(build_model("cifar_resnet14", shortcut="B"))


def test_weights_carry_network_and_input(tmp_path):
    model, kept = SPEC.build(), make(tmp_path)
    kept.preprocessing = replace(INPUT, mean_image=torch.rand(3, 32, 32) * 255)
    path = kept.save(5, model, {}) / WEIGHTS
    assert module.read_spec(path) == SPEC
    again = module.read_spec(path).build()
    found = load_weights(again, path)
    assert found == INPUT and torch.equal(found.mean_image, kept.preprocessing.mean_image)
    assert same_weights(again, model)


def test_a_write_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    kept = make(tmp_path)
    kept.save(1, SPEC.build(), {"iteration": 1})

    monkeypatch.setattr(module.torch, "save", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        kept.save(2, SPEC.build(), {"iteration": 2})
    assert iterations(kept) == [1]
    assert kept.load_latest(SPEC.build()) == {"iteration": 1}
    assert len(list((kept.run / "checkpoints").iterdir())) == 1  # nothing of the rest is left


@pytest.mark.parametrize(
    "name, damage",
    [(WEIGHTS, "cut"), (WEIGHTS, "gone"), (WEIGHTS, "nan"), (STATE, "cut"), (STATE, "gone")],
)
def test_damaged_checkpoints_are_passed_over_aloud(tmp_path, caplog, name, damage):
    kept = make(tmp_path)
    model = SPEC.build()
    kept.save(1, model, {"iteration": 1})
    if damage == "nan":
        model.linear.bias.data[3] = float("nan")
    folder = kept.save(2, model, {"iteration": 2})
    if damage == "cut":
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        (folder / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert kept.load_latest(SPEC.build()) == {"iteration": 1}
    assert "00000002 cannot be used" in caplog.text
    assert iterations(kept) == [1]  # the damaged one is set aside, and not counted again
    kept.save(2, SPEC.build(), {"iteration": 2})
    kept.load_latest(SPEC.build())
    shutil.rmtree(kept.run / "checkpoints/00000001")
    assert kept.load_latest(SPEC.build()) == {"iteration": 2}
    kept.save(1, SPEC.build(), {"iteration": 1})
    for path in kept.run.glob("checkpoints/*/" + STATE):
        path.write_bytes(b"")
    with pytest.raises(WeightsError, match="none of 2 checkpoints"):
        kept.load_latest(SPEC.build())


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/resnet10t"])
def test_other_libraries_networks(tmp_path, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    spec = NetworkSpec(name, 7)
    model = spec.build()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    path = tmp_path / "w.safetensors"
    module.save_network(path, model, spec, describe(model, INPUT))
    again = module.read_spec(path).build()
    module.load_network(again, path)
    assert same_weights(again, model)
    with pytest.raises(WeightsError, match="another network"):
        module.load_network(NetworkSpec(name, 8).build(), path)


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("resnet51", {}, "resnet5"),
        ("torchvision/googlnet", {}, "torchvision/googlenet"),
        ("timm/resnet50x", {}, "timm/resnet50"),
        ("keras/resnet50", {}, "torchvision/<name>"),
        ("resnet18", {"shortcutt": "A"}, "model.options"),
        ("torchvision/resnet18", {"shortcut": "A"}, "model.options"),
    ],
)
def test_unknown_names_and_options_have_a_hint(name, options, hint):
    with pytest.raises(ValueError, match=hint):
        NetworkSpec(name, 10, options).build()


def test_description_follows_the_network():
    bottleneck = describe(build_model("resnet50", num_classes=2, stride_in_1x1=False), INPUT)
    assert bottleneck.stride_in_1x1 is False and bottleneck.bn_eps == 1e-5
    expected = {"resnet50": True, "resnet18": None}
    expected |= dict.fromkeys(("torchvision/resnet50", "timm/resnet50"), False)
    for name, stride_in_1x1 in expected.items():
        assert describe(NetworkSpec(name, 2).build(), INPUT).stride_in_1x1 is stride_in_1x1
    googlenet = NetworkSpec("torchvision/googlenet", 2, {"init_weights": False}).build()
    assert describe(googlenet, INPUT).bn_eps == 0.001


def test_each_start_is_recorded_and_tensorboard_has_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path)
    for size in (1, 2):
        folder.start("a: 1\n", World(size=size))
    starts = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [1, 2]
    assert starts[0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    folder.add_metrics({"iteration": 5, "train_loss": 2.5})
    folder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(5, 2.5)]


HEADS = ("linear", "fc")  # ours, torchvision's


@pytest.mark.parametrize("name", ["cifar_resnet8", "bn_inception", "torchvision/resnet18"])
def test_fine_tuning_takes_all_but_the_last_layer(tmp_path, name):
    source, target = (NetworkSpec(name, classes, {}) for classes in (7, 3))
    trained, model = source.build(), target.build()
    head = [key for key in model.state_dict() if key.split(".")[0] in HEADS]
    before = {key: model.state_dict()[key].clone() for key in head}
    module.save_network(tmp_path / "w.safetensors", trained, source, INPUT, class_names="abcdefg")
    with pytest.raises(WeightsError):
        module.load_network(model, tmp_path / "w.safetensors")
    tune = partial(module.load_network, path=tmp_path / "w.safetensors", new_head=True)
    with pytest.raises(WeightsError, match="file is a .*, this network is a cifar_resnet14"):
        tune(build_model("cifar_resnet14"))
    with pytest.raises(WeightsError, match="Sequential has no linear head to leave out"):
        tune(torch.nn.Sequential())
    assert tune(model).same_input(INPUT)
    for key, value in model.state_dict().items():
        wanted = before[key] if key in before else trained.state_dict()[key]
        assert torch.equal(value, wanted), key
    assert len(head) == 2 and module.read_class_names(tmp_path / "w.safetensors") == list("abcdefg")
