"""tools/benchmark.py: that it measures what it says."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from resnet_backbone import build_model
from resnet_backbone.data.reference import geometry_difference, load_images

TOOL = Path(__file__).resolve().parents[1] / "tools" / "benchmark.py"
spec = importlib.util.spec_from_file_location("benchmark", TOOL)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_turns_alternate_and_ratios_are_of_the_same_repeat():
    order = []

    def run(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return 10

    runs = {"slow": lambda: run("slow", 0.04), "fast": lambda: run("fast", 0.01)}
    rows = benchmark.summarize(benchmark.interleave(runs, 4, lambda: None))
    assert order == ["slow", "fast", "fast", "slow"] * 2 + ["slow", "fast"]
    assert rows[0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert len(rows[1]["measurements"]) == 4 and rows[1]["ratio"]["low"] > 1.2
    assert rows[1]["images_per_s"]["high"] < 1000


def test_loader_reports_speed_geometry_and_provenance(tmp_path, capsys):
    path = tmp_path / "out" / "loader.json"
    arguments = [
        "loader",
        "--images",
        "synthetic",
        "--count",
        "3",
        "--repeats",
        "1",
        "--batch",
        "2",
    ]
    assert benchmark.main([*arguments, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["reference", "ours"] and names[-1] == "ours + norm"
    assert result["geometry"]["images"] == 3 and result["geometry"]["mean"] <= 0.05
    assert "loader --images synthetic" in result["command"] and result["threads"] == 1
    assert {"torch", "torchvision", "simplejpeg", "python"} <= set(result["versions"])
    assert result["date"] and result["cpu"]
    assert "images/s" in capsys.readouterr().out


def test_geometry_check_sees_half_a_pixel(monkeypatch):
    images = load_images(None, 2, 90)
    good = geometry_difference(images)
    import resnet_backbone.data.reference as reference

    monkeypatch.setattr(reference, "resize_crop", shifted(reference.resize_crop))
    assert good["mean"] < 0.05 < geometry_difference(images)["mean"]


def shifted(resize_crop):
    def resize(image, crop):
        crop = crop._replace(x=crop.x._replace(start=max(0, crop.x.start - 1)))
        return resize_crop(image, crop)

    return resize


def test_synthetic_images_are_of_imagenets_size():
    sizes = [len(data) for data in load_images(None, 3, None)]
    assert all(50_000 < size < 200_000 for size in sizes)


def test_train_and_infer_run(tmp_path, capsys):
    small = ["--device", "cpu", "--model", "resnet18", "--size", "32", "--steps", "1"]
    small += ["--repeats", "1"]
    folder = tmp_path / "images"
    folder.mkdir()
    for i, data in enumerate(load_images(None, 4, 50)):
        (folder / f"{i}.jpg").write_bytes(data)
    path = tmp_path / "train.json"
    options = ["--batch", "2", "--images", str(folder), "--workers", "0", "--output", str(path)]
    assert benchmark.main(["train", *small, *options]) == 0
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == [
        "torchvision resnet18, fp32",
        "ours, fp32, channels_last",
        "ours, bf16, channels_last",
    ]
    assert 0 < result["real_data"]["data_share"] < 1 and result["real_data"]["images_per_s"] > 0
    path = tmp_path / "infer.json"
    options = ["--batch", "1", "2", "--output", str(path)]
    assert benchmark.main(["infer", *small, *options]) == 0
    result = json.loads(path.read_text())
    assert len(result["batch_1"]) == len(result["batch_2"]) == 5
    assert "folded" in capsys.readouterr().out


def test_folded_batch_norms_change_nothing():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.1)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        folded = benchmark.fold_batch_norms(model)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["loader", "--images", "/nowhere"], "no such folder"),
        (["train", "--device", "cpu", "--model", "resnet51"], "resnet51"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
