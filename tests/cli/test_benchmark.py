"""tools/benchmark.py: that it measures what it says."""

import json
import time
from pathlib import Path

import pytest
import torch

from resnet_backbone.cli import benchmark
from resnet_backbone.cli.benchmark import classification
from resnet_backbone.cli.benchmark.classification import geometry_difference, load_images
from resnet_backbone.cli.benchmark.interleaved import measure, measure_memory


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
    rows = measure(runs, 4)
    assert order == ["slow", "fast", "fast", "slow"] * 2 + ["slow", "fast"]
    assert rows[0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert len(rows[1]["measurements"]) == 4 and rows[1]["ratio"]["low"] > 1.2
    assert rows[1]["images_per_s"]["high"] < 1000


def test_loader_reports_speed_geometry_and_provenance(tmp_path, capsys):
    path = tmp_path / "out" / "loader.json"
    arguments = "loader --images synthetic --count 3 --repeats 1 --batch 2".split()
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
    monkeypatch.setattr(classification, "resize_crop", shifted(classification.resize_crop))
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
    for batch in ("batch_1", "batch_2"):
        assert [row["name"] for row in result[batch]["rows"]] == [
            "torchvision resnet18, fp32",
            "ours, fp32, as built",
            "ours, fp32, optimized",
            "ours, bf16, optimized",
        ]
        differences = list(result[batch]["differences"].values())
        assert max(differences[:2]) < 1e-4 < differences[2] < 0.05
    assert "differs by" in capsys.readouterr().out


@pytest.mark.slow
def test_other_runtimes(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    path = tmp_path / "infer.json"
    small = ["--device", "cpu", "--model", "resnet18", "--size", "64", "--steps", "1"]
    options = ["--repeats", "1", "--batch", "2", "--runtimes", "--output", str(path)]
    assert benchmark.main(["infer", *small, *options]) == 0
    differences = json.loads(path.read_text())["batch_2"]["differences"]
    assert differences["onnxruntime, fp32"] < 1e-4 and differences["OpenVINO, fp32"] < 1e-4


def test_fpn_beside_detectron2(tmp_path, capsys):
    pytest.importorskip("detectron2")
    path = tmp_path / "fpn.json"
    options = ["--device", "cpu", "--height", "64", "--width", "96", "--repeats", "1"]
    assert benchmark.main(["fpn", *options, "--no-memory", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["differences"]["float32"]["outputs"] < 1e-4
    assert max(result["differences"]["float64"].values()) < 1e-10
    names = [row["name"] for kind in ("inference", "training") for row in result[kind]]
    assert names == [
        "inference: Detectron2, fp32",
        "inference: ours, fp32, as built",
        "inference: ours, fp32, optimized",
        "inference: ours, bf16, optimized",
        "training: Detectron2, fp32",
        "training: ours, fp32, as built",
        "training: ours, bf16 autocast, as built",
    ]


def test_fpn_comparison_sees_another_network():
    """A wrong statistic, and a gradient that stops."""
    pytest.importorskip("detectron2")
    from resnet_backbone.cli.benchmark.pyramid import build_pyramids, compare_pyramids

    images = torch.randn(1, 3, 64, 96)
    theirs, ours = build_pyramids()
    ours.bottom_up.res4[2].conv2.norm.running_var.mul_(1.5)
    found = compare_pyramids(theirs, ours, images)
    assert found["outputs"] > 1e-3 and found["gradient"] > 1e-3
    ours.bottom_up.res3.requires_grad_(False)
    with pytest.raises(ValueError, match="different parameters"):
        compare_pyramids(theirs, ours, images)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_the_pass():
    pytest.importorskip("detectron2")
    from resnet_backbone.cli.benchmark.pyramid import REFERENCE, pyramid_candidates

    small, large = (
        measure_memory(pyramid_candidates, (1, 3, side, 640), [("training", REFERENCE)])
        for side in (64, 512)
    )
    (small,), (large,) = small.values(), large.values()
    assert large["peak"] - large["before"] > 100 + small["peak"] - small["before"]


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


def test_evaluation_beside_pycocotools_and_detectron2(tmp_path, capsys):
    pytest.importorskip("detectron2")
    small = "--coco-images 5 --coco-detections 9 --voc-images 4 --voc-detections 6 --repeats 1"
    path = tmp_path / "evaluate.json"
    assert benchmark.main(["evaluate", *small.split(), "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    for data in ("coco", "voc"):
        reference, ours = result[data]["numbers"].values()
        assert len(result[data]["rows"]) == 2 and reference.keys() == ours.keys()
    reference, ours = result["coco"]["numbers"].values()
    assert reference == pytest.approx(ours, abs=1e-12, nan_ok=True) and len(ours) == 12
    assert "numbers differ by" in capsys.readouterr().out


DETECT = "detect --height 64 --width 96 --regions 4 --proposals 6 --repeats 1 --no-memory".split()


@pytest.mark.parametrize("arch", [pytest.param("fpn", marks=pytest.mark.slow), "c4"])
def test_detectors_beside_detectron2(tmp_path, capsys, arch):
    pytest.importorskip("detectron2")
    path = tmp_path / "detect.json"
    kinds = ["inference", "training"] if arch == "fpn" else ["inference"]
    arguments = [*DETECT, "--arch", arch, "--kind", *kinds, "--output", str(path)]
    assert benchmark.main(arguments) == 0
    result = json.loads(path.read_text())
    found = result[f"{arch}, inference, 6 proposals"]
    assert [row["name"] for row in found["rows"]] == [
        "Detectron2, fp32",
        "ours, fp32, as built",
        "ours, fp32, optimized",
        "ours, bf16, optimized",
    ]
    built, optimized, half = found["differences"].values()
    for values in (built, optimized):
        assert values["detections"] > 2 and values["unmatched"] == 0 and values["score"] < 1e-4
    assert 1e-6 < half["score"] < 0.2
    if "training" in kinds:
        steps = result[f"{arch}, training step, 4 regions"]
        assert [row["name"] for row in steps["rows"]] == [
            "Detectron2, fp32",
            "ours, fp32, as built",
            "ours, bf16 autocast, as built",
        ]
        single, half = steps["differences"].values()
        assert len(single) == 4 and max(single.values()) < 1e-3
        assert 1e-6 < max(half.values()) < 0.1 and steps["data_seconds"] > 0
    assert "s/image" in capsys.readouterr().out


def test_losses_are_compared_by_their_ratio():
    pytest.importorskip("detectron2")
    from resnet_backbone.cli.benchmark.detectors import losses_differ

    found = losses_differ({"a": 1.5, "b": 0.0, "c": 0.1}, {"a": -2.0, "b": 0.0, "c": 0.0})
    assert found == {"a": 1.75, "b": 0.0, "c": float("inf")}


def test_detections_are_compared_by_class_and_place():
    pytest.importorskip("detectron2")
    from detectron2.structures import Boxes, Instances

    from resnet_backbone.cli.benchmark.detectors import detections_differ

    def detections(boxes, scores, classes):
        values = Boxes(torch.tensor(boxes)), torch.tensor(scores), torch.tensor(classes)
        names = "pred_boxes", "scores", "pred_classes"
        return [Instances((100, 100), **dict(zip(names, values, strict=True)))]

    square, other = [10.0, 10.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]
    expected = detections([square, other], [0.9, 0.5], [1, 2])
    swapped = detections([other, square], [0.5, 0.875], [2, 1])
    found = detections_differ(swapped, expected)
    assert found["detections"] == 2 and found["unmatched"] == 0
    assert found["score"] == pytest.approx(0.025)
    for boxes, classes in (([square, other], [1, 3]), ([square, square], [1, 2])):
        assert detections_differ(detections(boxes, [0.9, 0.5], classes), expected) == {
            "detections": 2,
            "unmatched": 0.5,
            "score": 0.0,
        }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_a_detector_grows_with_its_regions():
    pytest.importorskip("detectron2")
    from resnet_backbone.cli.benchmark.detectors import detector_candidates
    from resnet_backbone.cli.benchmark.pyramid import REFERENCE

    few, many = (
        measure_memory(
            detector_candidates, ("c4", number, 8, 64, 96, 1), [("inference", REFERENCE)]
        )
        for number in (4, 100)
    )
    (few,), (many,) = few.values(), many.values()
    assert many["peak"] - many["before"] > 100 + few["peak"] - few["before"]
