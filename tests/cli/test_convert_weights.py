"""tools/convert_weights.py as a user runs it."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn_images import fill
from drawn_networks import random_checkpoint
from safetensors.torch import save_file

from resnet_backbone.cli import convert_weights as tool
from resnet_backbone.weights import get_preprocessing, read_checkpoint, write_checkpoint
from resnet_backbone.weights.export import export_checkpoint

ROOT = Path(__file__).parents[2]
FAST = ("--size", "32")


@pytest.fixture
def run(run_command):
    return partial(run_command, tool.main)


@pytest.fixture
def succeed(printed):
    return partial(printed, tool.main)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights by name: ResNet-18 that says all of itself, and others that say less."""
    folder, whole = tmp_path_factory.mktemp("weights"), random_checkpoint("resnet18", "msra")
    names = ("ours", "silent", "a plain", "with image")  # a space, which commands must quote
    ours, silent, plain, with_image = (folder / f"{name}.safetensors" for name in names)
    write_checkpoint(whole, ours)
    save_file(whole.tensors, silent)
    save_file(random_checkpoint("plain18").tensors, plain)  # these fit two networks
    own = replace(whole.preprocessing, mean_image=torch.rand(3, 32, 32) * 255)
    write_checkpoint(replace(whole, preprocessing=own), with_image)
    return SimpleNamespace(ours=ours, silent=silent, plain=plain, with_image=with_image)


@pytest.fixture
def refused(refusal):
    return partial(refusal, tool.main)


def test_help_teaches(succeed):
    for command in ([], ["inspect"], ["convert"], ["verify"]):
        out = succeed(*command, "--help")
        assert max(map(len, out.splitlines())) <= 100
        if not command:
            assert "examples:" in out and "Exit status" in out


MEAN = "mean [103.939, 116.779, 123.68], std [1.0, 1.0, 1.0]"
ASKS = "--preprocessing msra, caffe_vgg, torchvision"


@pytest.mark.parametrize(
    "file, options, words",
    [
        ("silent", [], ["resnet18, 10 classes", "11,181,642", "not stated:", ASKS]),
        ("silent", ["--preprocessing", "torchvision"], ["RGB, 0..1, mean [0.485, 0.456, 0.406]"]),
        ("ours", [], [f"BGR, 0..255, {MEAN}", "key names:     resnet_backbone"]),
        ("plain", ["--preprocessing", "msra"], ["add --model resnet18 or --model plain18"]),
        ("plain", ["--preprocessing", "msra", "--model", "plain18"], ["plain18, 10 classes"]),
        ("with_image", [], ["mean image:    32x32", "11,181,642"]),
    ],
)
def test_inspect(succeed, files, file, options, words):
    out = succeed("inspect", getattr(files, file), *options)
    assert all(word in out for word in words) and "convert" in out.splitlines()[-1]
    is_missing = any(word.startswith(("not stated", "add")) for word in words)
    assert ("not stated" in out) == is_missing


def next_command(out):
    line = out.splitlines()[-1]
    assert line.startswith("next:          python tools/convert_weights.py convert ")
    return shlex.split(line)[3:]


def test_what_to_do_next_repeats_what_was_stated(succeed, files, tmp_path):
    stated = "--channel-order BGR --value-range 255 --mean 10 20.5 -30 --std 1 2 3".split()
    stated += "--stride-in-1x1 true --bn-eps 0.001".split()
    plain = files.plain
    both, *parts = ([], "NAME --model NAME"), (stated, "NAME"), (["--model", "plain18"], "NAME")
    for given, missing in (both, *parts):
        out = succeed("inspect", plain, *given)
        assert out.count("not stated:") == (2 if given == [] else 1)
        end = "--model NAME" if given == stated else f"--preprocessing {missing}"
        assert next_command(out) == ["convert", str(plain), "OUT", *given, *end.split()]
    command = next_command(succeed("inspect", plain, *stated, "--model", "plain18"))
    assert command[3:] == [*stated, "--model", "plain18"]
    command[2] = tmp_path / "out.safetensors"
    succeed(*command, *FAST)
    assert next_command(succeed("inspect", command[2]))[3:] == []


@pytest.mark.data
def test_inspect_of_the_released_weights(succeed, data_root):
    file = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    out = succeed("inspect", file)
    assert "213 float32, 54 float16" in out and "25,557,032" in out
    assert "where its bottlenecks have their stride" in out


TARGETS = {"resnet_backbone": "x.safetensors", "torchvision": "x.pth", "timm": "x"}
TARGETS |= {"huggingface": "x", "detectron2": "x.pkl", "caffe2": "x.pkl"}


@pytest.mark.parametrize("format, name", TARGETS.items())
def test_convert_to_every_format(format, name, succeed, files, tmp_path):
    out = succeed("convert", files.ours, tmp_path / name, "--to", format, *FAST)
    assert "equal within 0.0001" in out and "photographs" in out
    if format in ("torchvision", "timm", "huggingface"):
        assert "Normalize([0.485019608, 0.457956863, 0.407603922]" in out
    if format in ("detectron2", "caffe2"):
        assert "INPUT.FORMAT BGR" in out


def test_all_conversions_at_once(succeed, files, tmp_path):
    out_file = tmp_path / "x.safetensors"
    options = ["--channel-order-to", "RGB", "--value-range-to", 1, "--fold-std", "--fold-bn"]
    out = succeed("convert", files.ours, out_file, *options, "--dtype", "bf16", *FAST)
    assert "equal within 0.05" in out
    back = read_checkpoint(out_file)
    own = back.preprocessing
    assert (own.channel_order, own.value_range, own.std) == ("RGB", 1.0, (1.0, 1.0, 1.0))
    assert back.model.options["norm"] == ""
    assert back.tensors["res2.0.conv1.weight"].dtype == torch.bfloat16


def test_fold_std_for_detectron2(succeed, files, tmp_path):
    options = ["--to", "detectron2", "--fold-std", "--preprocessing", "torchvision"]
    out = succeed("convert", files.silent, tmp_path / "x.pkl", *options, *FAST)
    assert "MODEL.PIXEL_STD [1, 1, 1]" in out and "INPUT.FORMAT RGB" in out
    assert "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]" in out


def test_stated_input(succeed, refused, files, tmp_path):
    stated = ["--channel-order", "BGR", "--value-range", 255, "--std", 1, 2, 3]
    stated += ["--mean", 10, 20, 30]
    out_file, silent = tmp_path / "x.safetensors", files.silent
    succeed("convert", silent, out_file, *stated, "--bn-eps", 1e-3, *FAST)
    own = read_checkpoint(out_file).preprocessing
    assert (own.mean, own.std, own.bn_eps) == ((10, 20, 30), (1, 2, 3), 1e-3)
    part = ("convert", silent, tmp_path / "y.safetensors", *stated[:4])
    assert "--mean, --std" in refused(*part)
    command = ["convert", silent, tmp_path / "y.pth", "--to", "torchvision", *stated]
    error = refused(*command, "--bn-eps", 1e-3)
    assert "BN eps 0.001" in error and "--bn-eps-to 1e-05" in error
    succeed(*command, "--bn-eps", 1e-3, "--bn-eps-to", 1e-5, *FAST)


def test_a_named_input_with_other_values_says_so(succeed, files, tmp_path):
    out_file, silent = tmp_path / "x.safetensors", files.silent
    stated = ("--preprocessing", "msra", "--mean", 0, 0, 0, "--bn-eps", 1e-3)
    succeed("convert", silent, out_file, *stated, *FAST)
    own = read_checkpoint(out_file).preprocessing
    assert own.mean == (0, 0, 0) and own.std == (1, 1, 1)
    assert own.source.startswith("msra, with mean, bn_eps stated on the command line; Kaiming")
    succeed("convert", silent, tmp_path / "y.safetensors", *stated[:2], *FAST)
    source = read_checkpoint(tmp_path / "y.safetensors").preprocessing.source
    assert source == get_preprocessing("msra").source


def test_a_wrong_file_does_not_pass_the_check(run, succeed, files, tmp_path, monkeypatch):
    """The check after writing reads the file, not the memory."""

    def read_damaged(*args):
        found = read_checkpoint(*args)
        if "x.safetensors" not in str(args[0]):
            return found
        tensors = {**found.tensors, "linear.weight": found.tensors["linear.weight"].flip(0)}
        return replace(found, tensors=tensors)

    monkeypatch.setattr(tool, "read_checkpoint", read_damaged)
    status, out, _ = run("convert", files.ours, tmp_path / "x.safetensors", *FAST)
    assert status == 1 and "DIFFER" in out and "none of" in out
    out = succeed("convert", files.ours, tmp_path / "x2.safetensors", "--no-verify")
    assert "photographs" not in out


def test_verify_says_equal_and_what_is_wrong(run, succeed, files):
    ours, silent = files.ours, files.silent
    out = succeed("verify", ours, silent, "--preprocessing-b", "caffe_vgg", *FAST)
    assert "equal within 0.0001" in out
    order = ["--channel-order-b", "RGB", "--value-range-b", 255, "--std-b", 1, 1, 1]
    order += ["--mean-b", 103.939, 116.779, 123.68]
    status, out, _ = run("verify", ours, silent, *order, *FAST)
    assert status == 1 and "DIFFER" in out and "channel order BGR in place of RGB" in out
    succeed("verify", ours, silent, *order, *FAST, "--tolerance", 2)


def test_verify_on_a_folder(succeed, files, tmp_path):
    images = ("--images", fill(tmp_path, ["one"], 3), "--num-images", 2)
    out = succeed("verify", files.ours, files.ours, *images, *FAST)
    assert "2 of 3 pictures" in out


@pytest.mark.data
def test_verify_finds_the_stride_of_the_released_weights(run, data_root, tmp_path):
    file = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    pictures = data_root / "imagenet_val500"
    stated = "--preprocessing-a msra --preprocessing-b msra --stride-in-1x1-b false".split()
    images = ["--images", pictures, "--num-images", 2, "--size", 64]
    status, out, _ = run("verify", file, file, *stated, *images)
    assert status == 1 and "stride_in_1x1 True in place of False" in out


def test_wrong_input_is_one_line(refused, files, tmp_path):
    ours, silent = files.ours, files.silent
    out, pth = tmp_path / "x.safetensors", tmp_path / "x.pth"
    named = ("convert", silent, out, "--preprocessing", "msra")
    broken, bad = tmp_path / "broken.pkl", tmp_path / "bad" / "bad.jpg"
    broken.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    bad.parent.mkdir()
    bad.write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("inspect", tmp_path / "no.pth"), ["no.pth", "no such file"]),
        (named[:3], ["silent.safetensors", "--preprocessing msra|"]),
        (("verify", ours, silent), ["--preprocessing-b msra|"]),
        (("convert", ours, ours), ["already exists", "--overwrite"]),
        (("convert", ours, tmp_path / "x.onnx"), [".safetensors"]),
        (("convert", ours, out, "--preprocessing", "torchvision"), ["its metadata"]),
        (("convert", ours, out, "--preprocessing", "imagenet"), ["imagenet", "msra"]),
        ((*named, "--model", "vgg16"), ["vgg16"]),
        (("convert", ours, pth, "--to", "torchvision", "--channel-order-to", "BGR"), ["RGB only"]),
        (("verify", ours, ours, "--images", tmp_path / "empty"), ["no images found"]),
        (("verify", ours, ours, "--images", bad.parent), ["bad.jpg"]),
        (("verify", ours, ours, "--size", 0), ["at least 32"]),
        (("verify", ours, ours, "--num-images", 0), ["at least 1"]),
        (("inspect", broken), ["broken.pkl", "refused"]),
    ):
        error = refused(*arguments)
        assert all(word in error for word in words), error
    assert not out.exists()


def test_mean_image_is_dropped_only_when_asked(succeed, refused, files, tmp_path):
    arguments = ("convert", files.with_image, tmp_path / "x.pth", "--to", "torchvision", *FAST)
    error = refused(*arguments)
    assert "mean image" in error and "--accept-channel-means" in error
    out = succeed(*arguments, "--accept-channel-means")
    assert "not exactly the same" in out


@pytest.mark.data
@pytest.mark.slow
def test_every_command_of_the_guide(data_root, tmp_path, monkeypatch):
    guide = (ROOT / "docs" / "guides" / "weights.md").read_text(encoding="utf-8")
    file = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    (tmp_path / "my_resnet50.safetensors").symlink_to(file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache/hub/resnet_backbone/dl.fbaipublicfiles.com"
    cached /= "detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    cached.parent.mkdir(parents=True)
    export_checkpoint(read_checkpoint(file, "msra"), cached, "detectron2")
    blocks = re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
    commands = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [command for command in commands if "convert-weights" in command]
    assert len(commands) == 11
    for command in commands:
        script = f"{sys.executable} -W ignore {ROOT}/tools/convert_weights.py"
        line = command.replace("resnet-backbone convert-weights", script)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert "Traceback" not in done.stderr
        if "verify" in command and command.startswith("!"):
            assert "stride_in_1x1 True in place of False" in done.stdout
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[-1]
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "r50_python.safetensors" in done.stdout, done.stderr
    assert (tmp_path / "r50_python.safetensors").is_file()
