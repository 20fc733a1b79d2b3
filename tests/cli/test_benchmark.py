"""tools/benchmark.py: that it measures what it says."""

import json
import time
from pathlib import Path

import pytest
import torch

from resnet_backbone.cli import benchmark
from resnet_backbone.cli.benchmark.classification import load_images
from resnet_backbone.cli.benchmark.turns import measure, measure_memory


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def bench(run_command, tmp_path):
    """Function (arguments) -> what --output has, what was printed."""

    def run(*arguments) -> tuple[dict, str]:
        path = tmp_path / "out" / "measured.json"
        status, out, error = run_command(benchmark.main, *arguments, "--output", path)
        assert status == 0, error
        return json.loads(path.read_text()), out

    return run


def names(rows) -> list[str]:
    return [row["name"] for row in rows]


def test_turns_alternate_and_ratios_are_of_the_same_repeat():
    order = []

    def run(name, seconds):
        order.append(name)
        time.sleep(seconds)

    slow = {"slow": lambda: run("slow", 0.04)}
    runs = slow | {"fast": lambda: run("fast", 0.01 if order[-1] == "fast" else 0.2)}
    rows = measure(runs, 10, 4)
    assert order == ["slow", "slow", *["fast"] * 4, "slow", "slow"] * 2  # the second run counts
    assert rows[0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert len(rows[1]["measurements"]) == 4 and rows[1]["ratio"]["low"] > 1.2
    assert rows[1]["images_per_s"]["high"] < 1000


def test_loader_reports_speed_and_provenance(bench):
    arguments = "loader --images synthetic --count 3 --repeats 1 --batch 2"
    result, out = bench(*arguments.split())
    found = names(result["rows"])
    assert found[:2] == ["reference", "ours"] and found[-1] == "ours + norm"
    assert "loader --images synthetic" in result["command"] and result["threads"] == 1
    assert {"torch", "torchvision", "simplejpeg", "python"} <= set(result["versions"])
    assert result["date"] and result["cpu"] and "images/s" in out


def test_synthetic_images_are_of_imagenets_size():
    sizes = [len(data) for data in load_images("synthetic", 3)]
    assert all(50_000 < size < 200_000 for size in sizes)


SMALL = "--device cpu --model resnet18 --steps 1 --repeats 1".split()


def test_train_and_infer_run(bench, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, data in enumerate(load_images("synthetic", 4)):
        (folder / f"{i}.jpg").write_bytes(data)
    data = ("--images", folder, "--workers", 0)
    result, _ = bench("train", *SMALL, "--size", 32, "--batch", 2, *data)
    ours = ["ours, fp32, channels_last", "ours, bf16, channels_last"]
    assert names(result["rows"]) == ["torchvision resnet18, fp32", *ours]
    assert 0 < result["real_data"]["data_share"] < 1 and result["real_data"]["images_per_s"] > 0
    result, out = bench("infer", *SMALL, "--size", 32, "--batch", 1, 2)
    for batch in ("batch_1", "batch_2"):
        assert names(result[batch]["rows"]) == ["torchvision resnet18, fp32", *OURS]
        differences = list(result[batch]["differences"].values())
        assert max(differences[:2]) < 1e-4 < differences[2] < 0.05
    assert "differs by" in out


OURS = ["ours, fp32, as built", "ours, fp32, eager", "ours, bf16, eager"]
TRAINED = ["Detectron2, fp32", "ours, fp32, as built", "ours, bf16 autocast, as built"]
TRAINED += ["ours, fp32, checkpointed"]


@pytest.mark.slow
def test_engines_beside_each_other(bench):
    for name in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)
    engines = ("--engines", "openvino", "onnxruntime")
    result, _ = bench("infer", *SMALL, "--size", 64, "--batch", 2, *engines)
    differences = result["batch_2"]["differences"]
    for engine in engines[1:]:
        assert differences[f"ours, fp32, {engine}"] < 1e-4


def test_fpn_beside_detectron2(bench, detectron2):
    options = "--device cpu --height 64 --width 96 --repeats 1 --no-memory"
    result, _ = bench("fpn", *options.split())
    assert result["differences"]["float32"]["outputs"] < 1e-4
    assert max(result["differences"]["float64"].values()) < 1e-10
    inference = [f"inference: {name}" for name in ["Detectron2, fp32", *OURS]]
    assert names(result["inference"]) == inference
    assert names(result["training"]) == [f"training: {name}" for name in TRAINED]


def test_fpn_comparison_sees_another_network(detectron2):
    """A wrong statistic, and a gradient that stops."""
    from resnet_backbone.cli.benchmark.pyramid import build_pyramids, compare_pyramids

    images = torch.randn(1, 3, 64, 96)
    theirs, ours = build_pyramids()
    ours.bottom_up.res4[2].conv2.norm.running_var.mul_(1.5)
    found = compare_pyramids(theirs, ours, images)
    assert found["outputs"] > 1e-3 and found["gradient"] > 1e-3
    ours.bottom_up.res3.requires_grad_(False)
    with pytest.raises(ValueError, match="different parameters"):
        compare_pyramids(theirs, ours, images)


def test_the_parts_of_a_step(bench, detectron2):
    """Each backward function counts for the part whose forward pass it belongs to."""
    small = "--height 64 --width 96 --repeats 1 --dtype fp32"
    theirs, ours = bench("profile", *small.split())[0]["steps"]
    assert theirs["name"] == "Detectron2, fp32: coco/faster_rcnn_R_50_FPN"
    assert [part["part"] for part in theirs["parts"]] == [part["part"] for part in ours["parts"]]
    for step in (theirs, ours):
        assert sum(part["share"] for part in step["parts"]) == pytest.approx(1)
        parts = {part.pop("part"): part for part in step["parts"]}
        assert all(part["forward_ms"] > 0 for part in parts.values())
        frozen = {name for name, part in parts.items() if not part["backward_ms"]}
        assert {"backbone, stem", "backbone, res2"} <= frozen
        trained = {"backbone, res3", "pyramid, 1x1", "pyramid, 3x3", "RPN, head"}
        trained |= {f"regions, {name}" for name in ("pooler", "box_head", "box_predictor")}
        assert trained <= parts.keys() - frozen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_grows_with_the_image_and_with_the_regions(detectron2):
    from resnet_backbone.cli.benchmark.detectors import Setting, detector_candidates
    from resnet_backbone.cli.benchmark.pyramid import REFERENCE, pyramid_candidates

    images = [((1, 3, side, 640), []) for side in (64, 512)]
    regions = [(Setting("c4", number, 8, 64, 96, 1), []) for number in (4, 100)]
    training = (pyramid_candidates, images, "training")
    for build, settings, kind in (training, (detector_candidates, regions, "inference")):
        found = [measure_memory(build, setting, [(kind, REFERENCE)]) for setting in settings]
        few, many = (one[f"{kind}: {REFERENCE}"] for one in found)
        assert many["peak"] - many["before"] > 100 + few["peak"] - few["before"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["loader", "--images", "/nowhere"], "/nowhere"),
        (["train", "--device", "cpu", "--model", "resnet51"], "resnet51"),
        (["infer", "--device", "cpu", "--dtype", "int8"], "eager has no int8: use openvino"),
        (["profile", "--config-file", "coco/cascade_rcnn_R_18_FPN"], "only Faster R-CNN can be"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, refusal):
    assert message in refusal(benchmark.main, *arguments)


def test_evaluation_beside_pycocotools_and_detectron2(bench, detectron2):
    small = "--coco-images 5 --coco-detections 9 --voc-images 4 --voc-detections 6 --repeats 1"
    result, out = bench("evaluate", *small.split())
    for data in ("coco", "voc"):
        reference, ours = result[data]["numbers"].values()
        assert len(result[data]["rows"]) == 2 and reference.keys() == ours.keys()
    reference, ours = result["coco"]["numbers"].values()
    assert reference == pytest.approx(ours, abs=1e-12, nan_ok=True) and len(ours) == 12
    assert "numbers differ by" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_start_beside_detectron2(bench, tmp_path, monkeypatch, detectron2):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from resnet_backbone.cli.benchmark.datasets import NAME, STARTS, starts, write_set

    result, out = bench("data", "--set-images", 3, 600, "--repeats", 1)
    for count in (3, 600):
        rows = result[f"images_{count}"]["rows"]
        assert names(rows) == list(STARTS) and f"{count} images" in out
        assert all(row["seconds"]["median"] > 0 < row["memory_mb"]["median"] for row in rows)
    write_set(tmp_path, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # restored after `starts` sets it
    for prepare in list(starts(str(tmp_path), "start").values())[::2]:
        (image,) = prepare()()
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.remove(NAME)
        assert image["image"].shape == (3, 800, 1067) and len(image["instances"]) > 0


DETECT = "detect --height 64 --width 96 --regions 4 --proposals 6 --repeats 1 --no-memory".split()


@pytest.mark.parametrize("arch", [pytest.param("fpn", marks=pytest.mark.slow), "c4"])
def test_detectors_beside_detectron2(bench, arch, detectron2):
    kinds = ["inference", "training"] if arch == "fpn" else ["inference"]
    result, out = bench(*DETECT, "--arch", arch, "--kind", *kinds)
    found = result[f"{arch}, inference, 6 proposals"]
    assert names(found["rows"]) == ["Detectron2, fp32", *OURS]
    built, optimized, half = found["differences"].values()
    for values in (built, optimized):
        assert values["detections"] > 2 and values["unmatched"] == 0 and values["score"] < 1e-4
    assert 1e-6 < half["score"] < 0.2
    if "training" in kinds:
        steps = result[f"{arch}, training step, 4 regions"]
        assert names(steps["rows"]) == TRAINED
        single, half, checkpointed = steps["differences"].values()
        assert len(single) == 4 and max(single.values()) < 1e-3
        assert checkpointed == pytest.approx(single, abs=1e-6)
        assert 1e-6 < max(half.values()) < 0.1 and steps["data_seconds"] > 0
    assert "s/image" in out


def test_losses_are_compared_by_their_ratio(detectron2):
    from resnet_backbone.cli.benchmark.detectors import losses_differ

    found = losses_differ({"a": 1.5, "b": 0.0, "c": 0.1}, {"a": -2.0, "b": 0.0, "c": 0.0})
    assert found == {"a": 1.75, "b": 0.0, "c": float("inf")}


def test_detections_are_compared_by_class_and_place(detectron2):
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
        found = detections_differ(detections(boxes, [0.9, 0.5], classes), expected)
        assert found == {"detections": 2, "unmatched": 0.5, "score": 0.0}
