"""tools/export.py and fast/export.py: exported networks give PyTorch's outputs at any size."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import picture
from PIL import Image

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

from resnet_backbone import build_model
from resnet_backbone.cli import export as tool
from resnet_backbone.cli.benchmark.turns import randomize_norms
from resnet_backbone.fast import export
from resnet_backbone.weights import get_preprocessing, save_weights
from resnet_backbone.weights.preprocessing import InputNormalizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small network of the MSRA convention, with norms that are not the identity."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", shortcut="B")
    randomize_norms(model)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(model, path, get_preprocessing("msra"))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index, size in enumerate(((40, 56), (65, 33))):
        picture(*size, seed=index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run(run_command):

    def call(*arguments) -> tuple[int, str, list[str]]:
        code, out, error = run_command(tool.main, *arguments)
        return code, out, [line for line in error.splitlines() if line.startswith("error: ")]

    return call


def test_classifier(weights, photos, tmp_path, run):
    output = tmp_path / "new" / "net"
    code, out, errors = run("--weights", weights, "--images", photos, "--output", output)
    assert (code, errors) == (0, [])
    assert out.count("largest difference from PyTorch") == 2
    assert {path.name for path in output.parent.iterdir()} == {"net.json", "net.onnx", "net.pt2"}
    facts = json.loads((output.parent / "net.json").read_text())
    assert facts["model"]["name"] == "cifar_resnet8" and facts["model"]["num_classes"] == 10
    assert facts["input"]["channel_order"] == "BGR" and facts["input"]["dtype"] == "float32"
    assert facts["input"]["mean"] == [103.939, 116.779, 123.68]
    assert set(facts["differences"]) == {"pt2", "onnx"}
    proto = onnx.load(f"{output}.onnx")
    dims = [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "", "height", "width"]
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    props = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(props["input"]) == facts["input"]
    assert json.loads(props["preprocessing"])["channel_order"] == "BGR"


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_pixels_in_features_out(weights, photos, tmp_path, run, kind):
    """The graph alone, on pixels, does what preprocessing and network do."""
    output = tmp_path / "net"
    features = ["--out-features", "res2", "res4"]
    words = ["--weights", weights, "--images", photos, "--output", output, "--format", "onnx"]
    words += ["--with-normalization", "--input-type", kind, *features]
    assert run(*words)[::2] == (0, [])
    session = onnxruntime.InferenceSession(f"{output}.onnx")
    pixels = torch.from_numpy(np.array(Image.open(photos / "1.png"))).permute(2, 0, 1)[None]
    found = session.run(None, {"images": pixels.contiguous().numpy().astype(kind)})
    words = ["--weights", str(weights), "--images", "x", "--output", "y", *features]
    model = tool.build_network(tool.parse_arguments(words))[0]
    with torch.no_grad():
        expected = model(InputNormalizer(get_preprocessing("msra"))(pixels))
    assert [value.name for value in session.get_outputs()] == list(expected)
    for value, name in zip(found, expected, strict=True):
        assert np.abs(value - expected[name].numpy()).max() < 1e-4 * expected[name].abs().max()
    assert json.loads(Path(f"{output}.json").read_text())["outputs"] == {
        "res2": {"channels": 16, "stride": 1},
        "res4": {"channels": 64, "stride": 4},
    }


@pytest.mark.parametrize(
    "name, options, stage",
    [
        ("resnet18", {}, "res5"),
        ("resnet18", {"shortcut": "A"}, "res5"),
        ("cifar_resnet8", {}, "res4"),
    ],
)
def test_program_is_for_any_size(name, options, stage):
    model = build_model(name, out_features=(stage,), **options).eval()
    program = export.export_program(model)
    for size in ((1, 3, 64, 64), (3, 3, 97, 131), (1, 3, 66, 72), (2, 3, 33, 47)):
        images = torch.randn(size)
        with torch.no_grad():
            pair = program.module()(images)[stage], model(images)[stage]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_a_wrong_graph_is_not_written(weights, photos, tmp_path, run, monkeypatch):
    """The check sees a difference just above the tolerance."""
    original = export.run_onnx

    def off(path):
        right = original(path)
        return lambda images: {k: v + 2e-4 * v.abs().max() for k, v in right(images).items()}

    monkeypatch.setattr(export, "run_onnx", off)
    arguments = ["--weights", weights, "--images", photos, "--format", "onnx"]
    code, out, errors = run(*arguments, "--output", tmp_path / "bad" / "net")
    assert code == 1 and "logits of onnx by 2.0e-04" in errors[0] and len(errors) == 1
    assert not list((tmp_path / "bad").iterdir())
    assert run(*arguments, "--output", tmp_path / "net", "--tolerance", "1e-3")[0] == 0


@pytest.mark.parametrize("change", [lambda v: v[:, :1], lambda v: v[:1]])
def test_another_shape_differs_too(weights, photos, tmp_path, run, monkeypatch, change):
    original = export.run_program

    def cut(path):
        return lambda images: {k: change(v) for k, v in original(path)(images).items()}

    monkeypatch.setattr(export, "run_program", cut)
    arguments = ["--weights", weights, "--images", photos, "--format", "pt2"]
    code, _, errors = run(*arguments, "--output", tmp_path / "net")
    assert code == 1 and len(errors) == 1 and "differs: logits has shape" in errors[0]
    assert not list(tmp_path.iterdir())


def test_nan_and_other_outputs_differ():
    runs = [lambda x: {"logits": x}, lambda x: {"logits": x * float("nan")}]
    found = export.largest_difference(*runs, [torch.ones(2, 3)])
    assert not found["logits"] <= 1e-4
    runs = [lambda x: {"res2": x, "res3": x}, lambda x: {"res2": x}]
    for one, other in (runs, runs[::-1]):
        with pytest.raises(export.Mismatch, match="res3"):
            export.largest_difference(one, other, [torch.ones(2, 3)])


def test_programs_need_no_onnx(weights, photos, tmp_path, run, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool, "version", version)
    arguments = ["--weights", weights, "--images", photos, "--format", "pt2"]
    assert run(*arguments, "--output", tmp_path / "net")[::2] == (0, [])
    facts = json.loads((tmp_path / "net.json").read_text())
    assert facts["versions"] == {"torch": torch.__version__}


def test_images_are_read_until_there_are_enough(tmp_path, monkeypatch):
    """Four, or more until two sizes are among them; those of one size only up to four."""
    opened, original = [], tool.read_rgb
    monkeypatch.setattr(tool, "read_rgb", lambda file: opened.append(file) or original(file))
    for index in range(12):
        width = 30 if index == 8 else 20
        Image.fromarray(np.zeros((10, width, 3), np.uint8)).save(tmp_path / f"{index:02}.png")
    assert [x.shape[3] for x in tool.read_images([tmp_path], 640)] == [20, 20, 20, 20, 30]
    assert len(opened) == 9
    opened.clear()
    first = [tmp_path / "08.png", tmp_path]
    assert len(tool.read_images(first, 640)) == len(opened) == 4


def test_files_are_not_overwritten_unless_asked(weights, photos, tmp_path, run):
    words = ("--weights", weights, "--images", photos, "--output", tmp_path / "net")
    words += ("--format", "pt2")
    assert run(*words)[0] == 0
    code, _, (error,) = run(*words)
    assert code == 2 and "net.json already exists: give another --output, or --overwrite" in error
    (tmp_path / "net.onnx").touch()
    assert run(*words, "--overwrite")[0] == 0
    assert {path.name for path in tmp_path.glob("net*")} == {"net.json", "net.pt2"}
    (tmp_path / "net.json").unlink()
    assert "net.pt2 already exists" in run(*words)[2][0]


def test_sizes_that_an_onnx_file_cannot_take(tmp_path):
    """A VGG's, whose pooling to 7 x 7 needs larger maps there."""
    model = build_model("vgg11", num_classes=3).eval()
    export.export_onnx(model, tmp_path / "vgg.onnx")
    with pytest.raises(export.Mismatch, match="onnxruntime cannot run images of 1x3x96x128: "):
        export.run_onnx(tmp_path / "vgg.onnx")(torch.zeros(1, 3, 96, 128))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--weights": "missing.safetensors"}, "missing.safetensors"),
        ({"--images": "nowhere.jpg"}, "nowhere.jpg"),
        ({"--images": "one"}, "two sizes"),
        ({"--out-features": "res9"}, "unknown out_features ['res9']"),
        ({"--model": "resnet50"}, "resnet50"),
    ],
)
def test_errors_are_one_line(weights, photos, tmp_path, run, change, message):
    if change.get("--images") == "one":
        change = {"--images": photos / "0.png"}
    arguments = {"--weights": weights, "--images": photos, "--output": tmp_path / "net"} | change
    code, _, errors = run(*(word for pair in arguments.items() for word in pair))
    assert code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--config-file", "c.yaml", "--with-normalization"], "exports a detector"),
        (["--config-file", "c.yaml", "--format", "onnx"], "exports a detector"),
        (["--config-file", "c.yaml", "--preprocessing", "msra"], "exports a detector"),
        (["--config-file", "c.yaml", "--input-type", "uint8"], "exports a detector"),
        (["--input-type", "uint8"], "--input-type uint8 needs --with-normalization"),
        (["MODEL.MASK_ON", "True"], "belong to --config-file"),
        (["--longest-side", "0"], "at least 1"),
        (["--output", "exported/"], "exported/: give a file without suffix"),
        (["--output", "net.onnx"], "net.onnx: give a file without suffix"),
    ],
)
def test_wrong_combinations(run, extra, message):
    code, _, errors = run("--weights", "w", "--images", "i", "--output", "o", *extra)
    assert code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.data
@pytest.mark.slow
def test_real_weights_on_real_images(data_root, tmp_path, run):
    weights = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    images = sorted((data_root / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("*.jpg"))[:3]
    words = ["--weights", weights, "--preprocessing", "msra", "--output", tmp_path / "r50"]
    code, out, _ = run(*words, "--longest-side", "320", "--images", *images)
    assert code == 0 and out.count("largest difference") == 2
