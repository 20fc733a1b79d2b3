"""tools/evaluate_classifier.py as users run it."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawn_images import picture
from safetensors.torch import load_file, save_file

from resnet_backbone.classification.data.evaluation import EvaluationFiles, EvaluationLoader
from resnet_backbone.classification.evaluation import evaluate
from resnet_backbone.classification.networks import NetworkSpec, save_network
from resnet_backbone.classification.protocols import Center, Dense, TenCrop
from resnet_backbone.cli.evaluate_classifier import main
from resnet_backbone.fast.engines import why_not
from resnet_backbone.models import build_model
from resnet_backbone.weights import Preprocessing
from resnet_backbone.weights.preprocessing import PREPROCESSINGS, InputNormalizer

from trainings import ENVIRONMENT, ROOT  # isort: skip

GREY = Preprocessing("RGB", 255.0, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))
BGR = Preprocessing("BGR", 255.0, (90.0, 95.0, 100.0), (30.0, 30.0, 30.0))
WNIDS = ("n01", "n02", "n03")


def network(seed, classes, **options):
    torch.manual_seed(seed)
    spec = NetworkSpec("cifar_resnet8", classes, options)
    model = spec.build().eval()
    torch.nn.init.normal_(model.linear.weight)
    return model, spec


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights and twelve images of three classes, as folders and flat."""
    root = tmp_path_factory.mktemp("evaluation")
    for name, seed, preprocessing in (("a", 0, GREY), ("b", 1, BGR)):
        model, spec = network(seed, 3)
        save_network(root / f"{name}.safetensors", model, spec, preprocessing)
    model, spec = network(2, 8)
    save_network(root / "eight.safetensors", model, spec, GREY)
    save_file(load_file(root / "a.safetensors"), root / "bare.safetensors")
    (root / "flat").mkdir()
    lines = []
    for number in range(12):
        wnid = WNIDS[number % 3]
        (root / "val" / wnid).mkdir(parents=True, exist_ok=True)
        for folder in (root / "val" / wnid, root / "flat"):
            picture(40 + number, 52, seed=number).save(folder / f"{number}.png")
        lines.append(f"{number}.png {wnid}\n")
    (root / "labels.txt").write_text("".join(lines))
    (root / "numbers.txt").write_text("".join(line.replace("n0", "") for line in lines))
    (root / "classes.txt").write_text("n01 5\nn02 0\nn03 7\n")
    (root / "eight.txt").write_text("n01 0\nn02 1\nn03 2\n")
    (root / "beyond.txt").write_text("n01 5\nn02 0\nn03 8\n")
    return root


@pytest.fixture
def val(files):
    """Options of a center crop of the images."""
    return ("--imagenet-folder", files / "val", "--resize", 36, "--crop", 32)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


SMALL = ("--workers", "0", "--device", "cpu", "--batch-size", "5")


def results(output, *arguments):
    main([*map(str, arguments), *SMALL, "--output", str(output)])
    return json.loads((output / "results.json").read_text())


def expected(files, names, protocol):
    paths = sorted((files / "val").glob("*/*"))
    samples = [(path, WNIDS.index(path.parent.name)) for path in paths]
    images = EvaluationFiles(samples, protocol.short_sides, None, protocol.interpolation)
    loader = EvaluationLoader(images, 5)
    models = {"a": (network(0, 3)[0], GREY), "b": (network(1, 3)[0], BGR)}
    pairs = [(models[name][0], InputNormalizer(models[name][1])) for name in names]
    return evaluate(pairs, protocol, loader)


@pytest.mark.parametrize(
    "arguments, protocol",
    [
        (("--resize", "36", "--crop", "32"), Center(36, 32)),
        (("--protocol", "ten_crop", "--resize", "36", "--crop", "32"), TenCrop(36, 32)),
        (
            "--protocol dense --sizes 32 40 --window 8 --no-flip --softmax at_end".split(),
            Dense((32, 40), False, "sliding", "at_end", 8),
        ),
    ],
)
def test_results_files(files, tmp_path, arguments, protocol, capsys):
    weights = files / "a.safetensors"
    data = ("--weights", weights, "--imagenet-folder", files / "val")
    found = results(tmp_path, *data, *arguments)
    result = expected(files, "a", protocol)
    assert found["top1_error"] == result.top1_error and found["top5_error"] is None
    assert found["cross_entropy"] == pytest.approx(result.cross_entropy, rel=1e-6)
    assert found["protocol"] == json.loads(json.dumps(protocol.settings()))
    assert str(result) in capsys.readouterr().out
    rows = table(tmp_path / "predictions.csv")
    assert len(rows) == 12
    wrong = [row for row in rows if row["label"] != row["class1"]]
    assert 100 * len(wrong) / 12 == pytest.approx(found["top1_error"])
    assert all(row["image"].split("/")[-2] == row["label_name"] for row in rows)
    assert [row["images"] for row in table(tmp_path / "per_class.csv")] == ["4"] * 3
    counts = [list(map(int, list(row.values())[1:])) for row in table(tmp_path / "confusion.csv")]
    assert counts == result.confusion.tolist() and (tmp_path / "confusion.png").is_file()
    assert {"command", "date", "hardware", "versions"} <= set(found)


@pytest.mark.parametrize(
    "arguments, protocol",
    [
        ((), Center(288, 272, "bicubic")),
        (("--crop", "280"), Center(288, 280, "bicubic")),
        (("--resize", "300"), Center(300, 272, "bicubic")),
    ],
)
def test_what_the_weights_state_of_the_test(files, tmp_path, arguments, protocol):
    """Each size by itself, and the interpolation."""
    stated = replace(GREY, resize_size=288, crop_size=272, interpolation="bicubic")
    save_network(tmp_path / "x.safetensors", *network(0, 3), stated)
    data = ("--weights", tmp_path / "x.safetensors", "--imagenet-folder", files / "val")
    found = results(tmp_path, *data, *arguments)
    assert found["protocol"] == protocol.settings()
    result = expected(files, "a", protocol)
    assert found["cross_entropy"] == pytest.approx(result.cross_entropy, rel=1e-6)
    bilinear = expected(files, "a", replace(protocol, interpolation="bilinear"))
    assert found["cross_entropy"] != pytest.approx(bilinear.cross_entropy, rel=1e-4)


def test_an_ensemble_keeps_each_preprocessing(files, val, tmp_path):
    weights = (files / "a.safetensors", files / "b.safetensors")
    found = results(tmp_path, "--weights", *weights, *val)
    result = expected(files, "ab", Center(36, 32))
    assert found["num_models"] == 2
    assert found["cross_entropy"] == pytest.approx(result.cross_entropy, rel=1e-6)
    alone = expected(files, "a", Center(36, 32)).cross_entropy
    assert abs(found["cross_entropy"] - alone) > 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_engines(files, val, tmp_path, precision):
    """OpenVINO's probabilities are PyTorch's but for rounding, which counts in their difference."""
    problem = why_not("openvino", getattr(torch, precision))
    if problem:
        pytest.skip(f"openvino {problem}")
    options = {"bfloat16": ("--amp", "bf16"), "int8": ("--int8", files / "flat")}
    arguments = ("--weights", files / "a.safetensors", *val, "--engine", "openvino")
    found = results(tmp_path, *arguments, *options.get(precision, ()))
    engine = "int8" if precision == "int8" else "openvino"
    assert (found["engine"], found["precision"]) == ([engine], precision)
    difference = abs(found["cross_entropy"] - expected(files, "a", Center(36, 32)).cross_entropy)
    least, most = {"float32": (0, 1e-5), "bfloat16": (1e-5, 0.05), "int8": (1e-5, 0.5)}[precision]
    assert least <= difference <= most


def test_files_that_say_nothing_and_files_that_do(files, val, tmp_path):
    """One --model and one --preprocessing serve the files that need them."""
    weights = ("--weights", files / "bare.safetensors", files / "b.safetensors")
    stated = "--model cifar_resnet8 --num-classes 3 --preprocessing caffe_vgg".split()
    assert results(tmp_path, *weights, *stated, *val)["num_models"] == 2


@pytest.mark.parametrize("labels", ["labels.txt", "numbers.txt"])
def test_flat_folder(files, tmp_path, labels):
    """numbers.txt has labels 1, 2, 3, for a network of eight classes; labels.txt has wnids."""
    numbered = labels == "numbers.txt"
    weights = files / ("eight.safetensors" if numbered else "a.safetensors")
    arguments = ("--flat", files / "flat", "--labels", files / labels, "--resize", 36, "--crop", 32)
    found = results(tmp_path, "--weights", weights, *arguments)
    assert list(found["per_class_error"]) == (["1", "2", "3"] if numbered else ["0", "1", "2"])
    if not numbered:
        assert found["top1_error"] == expected(files, "a", Center(36, 32)).top1_error


def test_part_of_the_classes(files, val, tmp_path):
    classes = ("--class-list", files / "classes.txt")
    found = results(tmp_path, "--weights", files / "eight.safetensors", *val, *classes)
    assert list(found["per_class_error"]) == ["0", "5", "7"] and found["top5_error"] is not None
    rows = table(tmp_path / "predictions.csv")
    assert {row["label"] + row["label_name"] for row in rows} == {"5n01", "0n02", "7n03"}


def test_unreadable_images(files, tmp_path, refusal):
    folder = tmp_path / "val"
    shutil.copytree(files / "val", folder)
    (folder / "n02" / "1.png").write_bytes(b"")
    arguments = ("--weights", files / "a.safetensors", "--imagenet-folder", folder)
    arguments += ("--resize", 36, "--crop", 32)
    message = refusal(main, *arguments, *SMALL)
    assert "n02/1.png: the file is empty" in message and "--max-bad-images N" in message
    found = results(tmp_path / "out", *arguments, "--max-bad-images", 1)
    assert found["num_images"] == 12 and found["bad"][0]["name"].endswith("n02/1.png")
    assert len(table(tmp_path / "out" / "predictions.csv")) == 11
    assert [row["images"] for row in table(tmp_path / "out" / "per_class.csv")] == ["4"] * 3


def test_cifar10(tiny_cifar10, tmp_path):
    model, spec = network(3, 10)
    save_network(tmp_path / "c.safetensors", model, spec, GREY)
    arguments = ("--weights", tmp_path / "c.safetensors", "--cifar10", tiny_cifar10)
    found = results(tmp_path / "out", *arguments)
    assert found["protocol"] == {"name": "full"}
    names = [row["label_name"] for row in table(tmp_path / "out" / "predictions.csv")]
    assert len(names) == found["num_images"] == 40
    assert set(names) == set("airplane automobile bird cat deer dog frog horse ship truck".split())


NET, CLASSES = "--model cifar_resnet8", "has 3 classes, the network 8.*--class-list FILE"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("gone VAL", "gone.safetensors: no such file"),
        ("bare VAL", "does not state which input"),
        ("bare --preprocessing msra VAL", "say which network.*give --model"),
        ("a --predict nowhere", "--predict nowhere: no such file or folder"),
        (f"bare {NET} --num-classes 3 VAL", r"which input .* name it.*\(--preprocessing\)"),
        (f"bare {NET} --preprocessing caffe_vgg VAL", "linear.weight has shape"),
        ("a --model resnet18 VAL", "is a cifar_resnet8"),
        ("a b a --model resnet18 vgg16 VAL", "--model: give one for all, or one for each"),
        ("a eight VAL", "same classes: cifar_resnet8 has 3, cifar_resnet8 has 8"),
        ("eight VAL", f"val {CLASSES}"),
        ("eight --flat flat --labels labels.txt", f"labels.txt {CLASSES}"),
        ("a --flat flat --labels numbers.txt", "label 3, but there are 3 classes"),
        ("eight VAL --class-list beyond.txt", "index 8, but num_classes is 8"),
        ("a --flat flat", "--flat DIR and --labels FILE need each other"),
        ("a --cifar10 flat --class-list classes.txt", "--class-list is for"),
        ("a --cifar10 flat", "has 3 classes, but CIFAR-10 has 10"),
        ("a VAL --flip", "--flip is for protocol dense, not"),
        (
            "a VAL --protocol dense --crop 32",
            "--crop is for protocol center and ten_crop, not dense",
        ),
        ("a VAL --resize 32 --crop 40", "crop of 40 does not fit into a short side of 32"),
        ("a VAL --batch-size 0", "batch size 0"),
        ("a VAL --int8 flat", "engine eager has no int8: use openvino"),
        ("a VAL --int8 flat --amp bf16 --engine openvino", "two precisions: give one"),
        ("a VAL --int8 nowhere --engine openvino", "--int8 nowhere: no such file or folder"),
        ("a VAL --protocol dense --window 8 --engine openvino", "give --pooling global_pool"),
    ],
)
def test_wrong_input_is_one_line(files, monkeypatch, refusal, arguments, message):
    given = re.sub(r"\b(gone|bare|a|b|eight)\b(?= |$)", r"\1.safetensors", arguments)
    arguments = "--weights " + given.replace("VAL", "--imagenet-folder val")
    monkeypatch.chdir(files)
    assert re.search(message, refusal(main, *arguments.split(), "--device", "cpu"))


def test_another_stride_is_mended_by_an_option_of_this_tool(tmp_path, refusal):
    path = tmp_path / "r50.safetensors"
    save_file({k: v.contiguous() for k, v in build_model("resnet50").state_dict().items()}, path)
    arguments = ["--weights", path, "--imagenet-folder", tmp_path, "--model", "resnet50"]
    arguments += ["--preprocessing", "torchvision", "--device", "cpu"]
    solution = "stride_in_1x1=False (--model-options stride_in_1x1=False)\n"
    assert solution in refusal(main, *arguments)


def test_an_ensemble_has_one_order_of_classes(files, val, tmp_path, refusal):
    weights = [tmp_path / "w.safetensors", tmp_path / "v.safetensors"]
    for path, names in zip(weights, (WNIDS, WNIDS[::-1]), strict=True):
        save_network(path, *network(0, 3), GREY, class_names=names)
    unnamed = files / "a.safetensors"
    assert results(tmp_path, "--weights", unnamed, weights[0], *val)["num_models"] == 2
    error = refusal(main, "--weights", *weights, *val, "--device", "cpu")
    assert "name different classes, or orders" in error


def test_tensors_say_the_network(val, tmp_path):
    """As inspect does, where only one network has them."""
    model, spec = network(3, 3, shortcut="B")
    named, bare = tmp_path / "named.safetensors", tmp_path / "bare.safetensors"
    save_network(named, model, spec, PREPROCESSINGS["msra"])
    save_file(load_file(named), bare)
    found = results(tmp_path, "--weights", bare, "--preprocessing", "msra", *val)
    assert found["cross_entropy"] == results(tmp_path, "--weights", named, *val)["cross_entropy"]


@pytest.mark.slow
def test_two_processes_write_the_results_of_one(files, val, tmp_path):
    arguments = ("--weights", files / "a.safetensors", files / "b.safetensors", *val)
    alone = results(tmp_path / "one", *arguments)
    command = [sys.executable, ROOT / "tools" / "evaluate_classifier.py", *arguments, *SMALL]
    command += ["--num-processes", "2", "--output", tmp_path / "two"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=ENVIRONMENT)
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["processes"] == 2
    for key in ("top1_error", "per_class_error", "num_images", "bad"):
        assert together[key] == alone[key], key
    for name in ("per_class.csv", "confusion.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("pool, top1, top5", [(False, 72.2, 91.2), (True, 73.4, 91.4)])
def test_the_papers_weights(data_root, tmp_path, pool, top1, top5):
    """With the right preprocessing and stride; docs/results/msra_resnet50.md."""
    classes = "n01440764 0,n02102040 217,n02979186 482,n03000684 491,n03028079 497,"
    classes += "n03394916 566,n03417042 569,n03425413 571,n03445777 574,n03888257 701"
    (tmp_path / "classes.txt").write_text(classes.replace(",", "\n"))
    words = ["--weights", data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"]
    words += ["--model", "resnet50", "--preprocessing", "msra", "--resize", 224]
    words += ["--model-options", f"caffe_pool={pool}", "--class-list", tmp_path / "classes.txt"]
    found = results(tmp_path, *words, "--imagenet-folder", data_root / "imagenet_val500")
    assert found["num_images"] == 500
    assert abs(100 - found["top1_error"] - top1) <= 0.4
    assert abs(100 - found["top5_error"] - top5) <= 0.4


def test_weights_say_their_sizes_and_classes(files, tmp_path, capsys, refusal):
    """Here the data's classes are in another order than the network's."""
    model, spec = network(0, 3)
    mean = torch.full((3, 32, 32), 110.0)
    stated = replace(GREY, resize_size=36, crop_size=32, mean_image=mean)
    save_network(tmp_path / "w.safetensors", model, spec, stated, class_names=("n03", "n01", "n02"))
    weights = ["--weights", str(tmp_path / "w.safetensors")]
    flat = ("--flat", files / "flat", "--labels", files / "labels.txt")
    for data in (flat, ("--imagenet-folder", files / "val")):
        found = results(tmp_path, *weights, *data)
        rows = table(tmp_path / "predictions.csv")
        numbers = {row["label_name"]: row["label"] for row in rows}
        assert numbers == {"n03": "0", "n01": "1", "n02": "2"}
        assert found["protocol"] == Center(36, 32).settings()
    (tmp_path / "list.txt").write_text("n01 0\nn02 2\nn03 1\n")
    error = refusal(main, *weights, *data, "--class-list", tmp_path / "list.txt", *SMALL)
    assert re.search("list.txt: n0[13] has index [01], but [01] in the weights", error)
    capsys.readouterr()
    main([*weights, "--predict", str(files / "flat"), *SMALL, "--output", str(tmp_path / "p")])
    lines, again = capsys.readouterr().out.splitlines(), table(tmp_path / "p" / "predictions.csv")
    assert len(again) == 12 and "label" not in again[0] and len(lines) == 14
    assert "crops of 32 from a short side of 36, bilinear" in lines[0]
    best = {Path(row["image"]).name: (row["name1"], row["score1"]) for row in rows}
    assert {Path(row["image"]).name: (row["name1"], row["score1"]) for row in again} == best
    assert f"{again[0]['name1']} {float(again[0]['score1']):.3f}" in lines[1]


def test_networks_of_more_outputs_than_names(files, tmp_path, capsys):
    """As with model.num_classes=8 in the trainer; an unreadable image to predict is named."""
    model, spec = network(2, 8)
    names = ("n01", "n02", "n03")
    save_network(tmp_path / "w.safetensors", model, spec, GREY, class_names=names)
    weights = ["--weights", str(tmp_path / "w.safetensors")]
    data = ("--imagenet-folder", files / "val")
    found = results(tmp_path, *weights, *data)
    same = ("--weights", files / "eight.safetensors", "--class-list", files / "eight.txt")
    wanted = results(tmp_path / "x", *same, *data)
    assert found["top1_error"] == wanted["top1_error"]
    shutil.copytree(files / "flat", tmp_path / "new")
    (tmp_path / "new" / "0.png").write_bytes(b"no image")
    capsys.readouterr()
    main([*weights, "--predict", str(tmp_path / "new"), *SMALL, "--max-bad-images", "1"])
    out, errors = capsys.readouterr()
    assert "class 7" in out or "n01" in out
    assert "new/0.png: cannot be read: " in errors
