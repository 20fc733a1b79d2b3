"""tools/demo.py on a tiny untrained detector: inputs, outputs, errors."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")  # resnet_backbone.detection cannot be imported without it

import torch
from PIL import Image

from resnet_backbone.cli import demo
from resnet_backbone.detection import Checkpointer, build_detector
from resnet_backbone.detection.config import UsageError, load_config
from resnet_backbone.detection.inference.pictures import read_video, video_writer
from resnet_backbone.detection.inference.predictor import Predictor, find_class_names, run_config
from resnet_backbone.weights import WeightsError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/detection/quickstart/faster_rcnn_R_18_FPN.yaml")
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "6"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "INPUT.MIN_SIZE_TEST", "96"),
]
SCORE = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3"]


def config(*overrides):
    return load_config(CONFIG, [*TINY, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    cfg = config("OUTPUT_DIR", str(folder), "RESNET_BACKBONE.CLASS_NAMES", "['a', 'b', 'c']")
    torch.manual_seed(0)
    model, names = build_detector(cfg), cfg.RESNET_BACKBONE.CLASS_NAMES
    Checkpointer(model, cfg.OUTPUT_DIR, class_names=names).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with two images of different size, and a text that is none of our business."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(noise(60, 90)).save(folder / "wide.png")
    Image.fromarray(noise(120, 70)).save(folder / "tall.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def call(run, run_command):
    """Function (arguments) -> status, output, errors of the tool with every detection kept."""
    return partial(run_command, demo.main, "--run", run, "--confidence", 0)


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, _, text = result
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in text
    assert all(word in errors[0] for word in words)


def test_rgb_detectors_get_rgb(tmp_path):
    """A detector built for RGB sees a BGR image with its channels turned."""
    cfg = config("INPUT.FORMAT", "RGB", "OUTPUT_DIR", str(tmp_path))
    Checkpointer(build_detector(cfg), cfg.OUTPUT_DIR).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    seen = []
    predictor = Predictor(cfg)
    predictor.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0][0]))
    predictor(np.full((96, 96, 3), (10, 20, 30), np.uint8))
    assert seen[0]["image"][:, 5, 5].tolist() == [30, 20, 10]
    assert not predictor.model.training
    image = np.zeros((96, 96, 3), np.uint8)
    for wrong in (image.astype("float32"), image[:, :, 0], image[:, :, :1], "photo.jpg"):
        with pytest.raises(TypeError, match="expected an image as BGR, uint8, .H, W, 3., not "):
            predictor(wrong)


@pytest.mark.parametrize("pooler", ["ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_gives_float_boxes_in_the_image(run, precision, pooler):
    keys = ["RESNET_BACKBONE.TEST.PRECISION", precision, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", pooler]
    predictor, seen = Predictor(config("MODEL.WEIGHTS", str(run / "model_final.pth"), *keys)), []
    stem = next(m for m in predictor.model.modules() if type(m).__name__ == "Stem")
    stem.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    found = predictor(noise(60, 90))["instances"]
    assert seen == [getattr(torch, precision)]
    assert len(found) and found.image_size == (60, 90)
    assert found.pred_boxes.tensor.isfinite().all() and found.scores.dtype == torch.float32


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "MODEL.WEIGHTS is empty"),
        ("nowhere.pth", "nowhere.pth: no such file; check MODEL.WEIGHTS"),
        ("broken.pth", "broken.pth is not a file of weights"),
        ("part.pth", "part.pth lacks .* only a part of a detector"),
        ("backbone.pth", "MODEL.WEIGHTS .*backbone.pth holds only a backbone or a classifier"),
    ],
)
def test_weights_of_less_than_a_detector_are_refused(run, tmp_path, name, message):
    whole = torch.load(run / "model_final.pth", weights_only=True)["model"]
    part = {key: value for key, value in whole.items() if key.startswith("backbone.")}
    torch.save({"model": part}, tmp_path / "part.pth")
    prefix = "backbone.bottom_up."
    bare = {key.removeprefix(prefix): v for key, v in part.items() if key.startswith(prefix)}
    torch.save(bare, tmp_path / "backbone.pth")
    (tmp_path / "broken.pth").write_bytes(b"torn")
    with pytest.raises((UsageError, WeightsError), match=message) as caught:
        Predictor(config("MODEL.WEIGHTS", str(tmp_path / name) if name else ""))
    assert "\n" not in str(caught.value)


def test_wrong_preprocessing_is_refused(call, photos, tmp_path):
    arguments = ("--input", photos, "--output", tmp_path / "out", "INPUT.FORMAT", "RGB")
    assert_one_line(call(*arguments), "INPUT.FORMAT is RGB", "set INPUT.FORMAT")
    assert not (tmp_path / "out").exists()


def test_the_input_can_follow_the_checkpoint(run, photos, tmp_path, run_command):
    """A base config of other input, and WEIGHTS_INPUT set; what the user says too must agree."""
    config_file = tmp_path / "config.yaml"
    config_file.write_text((run / "config.yaml").read_text().replace("FORMAT: BGR", "FORMAT: RGB"))
    files = ["--config-file", config_file, "--input", photos, "--json", tmp_path / "a.json"]
    tool = partial(run_command, demo.main, *files, "MODEL.WEIGHTS", run / "model_final.pth")
    assert_one_line(tool(), "INPUT.FORMAT is RGB", 'set INPUT.FORMAT "BGR"')
    status, out, _ = tool("RESNET_BACKBONE.WEIGHTS_INPUT", "set")
    assert status == 0 and "weights: INPUT.FORMAT RGB -> BGR" in out
    both = ("RESNET_BACKBONE.WEIGHTS_INPUT", "set", "INPUT.FORMAT", "RGB")
    assert_one_line(tool(*both), "INPUT.FORMAT RGB contradicts")


def test_one_image_to_a_file(run, call, photos, tmp_path):
    """Drawn, and in the JSON file as the predictor returns it: in pixels of the original."""
    output, numbers = tmp_path / "new" / "drawn.png", tmp_path / "a.json"
    files = ("--output", output, "--json", numbers)
    whole = ("INPUT.MIN_SIZE_TEST", 0)  # is not resized
    status, out, _ = call(*files, "--input", photos / "wide.png", *whole)
    assert status == 0
    drawn = np.asarray(Image.open(output))
    assert drawn.shape == (480, 720, 3)
    enlarged = Image.fromarray(noise(60, 90)).resize((720, 480), Image.BICUBIC)
    assert (drawn != np.asarray(enlarged)).any()
    line = out.splitlines()[0]
    assert "wide.png: 6 detections, " in line and line.endswith(" s")
    cfg = config("MODEL.WEIGHTS", str(run / "model_final.pth"), "INPUT.MIN_SIZE_TEST", 0)
    found = Predictor(cfg)(noise(60, 90)[:, :, ::-1])["instances"]
    written = json.loads(numbers.read_text())["images"][0]["detections"]
    boxes = torch.tensor([entry["box"] for entry in written])
    torch.testing.assert_close(boxes, found.pred_boxes.tensor, rtol=0, atol=0.02)
    assert found.image_size == (60, 90)


def test_folder_to_folder_with_sheet_and_numbers(run, call, photos, tmp_path):
    output, sheet, numbers = tmp_path / "out", tmp_path / "s" / "sheet.png", tmp_path / "all.json"
    files = ("--output", output, "--sheet", sheet, "--sheet-columns", "1", "--json", numbers)
    assert call("--input", photos, *files)[0] == 0
    assert sorted(p.name for p in output.iterdir()) == ["tall.jpg", "wide.png"]
    assert Image.open(sheet).width == 480 + 20
    content = json.loads(numbers.read_text())
    assert content["weights"] == str(run / "model_final.pth") and content["unreadable"] == []
    sizes = {str(photos / "wide.png"): (90, 60), str(photos / "tall.jpg"): (70, 120)}
    assert {image["file"] for image in content["images"]} == set(sizes)
    for image in content["images"]:
        width, height = sizes[image["file"]]
        for entry in image["detections"]:
            x0, y0, x1, y1 = entry["box"]
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert entry["class"] in ("a", "b", "c") and 0 <= entry["score"] <= 1


def test_globs_config_file_and_sheet_max(run, photos, tmp_path):
    arguments = ["--config-file", run / "config.yaml", "--confidence", "0"]
    arguments += ["--input", photos / "*.*", photos / "wide.png", "--output", tmp_path / "out"]
    arguments += ["--sheet", tmp_path / "s.png", "--sheet-max", "1"]
    demo.main([*map(str, arguments), "MODEL.WEIGHTS", str(run / "model_final.pth")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tall.jpg", "wide.png"]
    assert Image.open(tmp_path / "s.png").width < 480  # one tall picture


def test_video(call, tmp_path):
    film = tmp_path / "film.avi.mp4"
    with video_writer(film, 10.0) as write:
        for seed in range(3):
            write(noise(64, 96, seed))
    output, sheet = tmp_path / "out", tmp_path / "s.png"
    files = ("--output", output, "--sheet", sheet, "--json", tmp_path / "a.json")
    assert call("--input", film, *files)[0] == 0
    rate, _, frames = read_video(output / "film.avi.mp4")
    assert rate == 10.0 and [frame.shape for frame in frames] == [(480, 720, 3)] * 3
    frames = json.loads((tmp_path / "a.json").read_text())["images"]
    assert [frame["frame"] for frame in frames] == [0, 1, 2]
    boxes = [one["box"] for frame in frames for one in frame["detections"]]
    assert boxes and all(box[2] <= 96 and box[3] <= 64 for box in boxes)
    assert sheet.is_file()


def test_unreadable_images_are_named_and_the_rest_is_done(call, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    Image.new("RGB", (9000, 1)).save(photos / "narrow.png")
    arguments = ("--output", tmp_path / "out", "--json", tmp_path / "a.json")
    status, _, errors = call("--input", photos, *arguments)
    assert status == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tall.jpg", "wide.png"]
    assert errors.count("broken.jpg: cannot be read") == 1
    assert "narrow.png: an image of 9000 x 1 pixels is too narrow" in errors
    assert errors.splitlines()[-1] == "error: 2 of 4 inputs could not be read"
    assert call("--input", photos / "broken.jpg", "--output", tmp_path / "one.png")[0] == 2
    assert len(json.loads((tmp_path / "a.json").read_text())["unreadable"]) == 2


def test_the_last_checkpoint_serves(run, call, photos, tmp_path):
    """Also beside the final one of a run that has then been continued."""
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    with pytest.raises(UsageError, match="has no checkpoint"):
        run_config(str(unfinished), [])
    shutil.copy(run / "model_final.pth", unfinished / "model_0000199.pth")
    (unfinished / "last_checkpoint").write_text("model_0000199.pth")
    arguments = ("--run", unfinished, "--input", photos, "--output", tmp_path / "out")
    assert call(*arguments)[0] == 0
    shutil.copy(run / "model_final.pth", unfinished)
    assert run_config(str(unfinished), []).MODEL.WEIGHTS.endswith("model_0000199.pth")
    (unfinished / "model_0000199.pth").unlink()
    assert run_config(str(unfinished), []).MODEL.WEIGHTS.endswith("model_final.pth")


def test_missing_names_are_said_and_numbered(call, photos, tmp_path):
    arguments = ("--input", photos / "wide.png", "--json", tmp_path / "a.json")
    status, _, errors = call(*arguments, "RESNET_BACKBONE.CLASS_NAMES", "[]")
    assert status == 0 and "the class names are not known" in errors
    found = json.loads((tmp_path / "a.json").read_text())["images"][0]["detections"]
    assert found and {entry["class"] for entry in found} <= {0, 1, 2}
    arguments += ("--input", photos / "wide.png", photos, "--confidence", "0.99")
    status, out, _ = call(*arguments)
    assert status == 0
    images = json.loads((tmp_path / "a.json").read_text())["images"]
    assert len(images) == 2 and not any(image["detections"] for image in images)
    best = max(entry["score"] for entry in found)
    for start in ("wide.png: 0 detections", "\n0 detections in all inputs"):
        hint = re.search(start + r" \(best score ([.\d]+); try --confidence ([.\d]+)\)", out)
        assert float(hint[1]) >= round(best, 2) and float(hint[2]) <= float(hint[1])


def test_names_of_the_data_set_serve(run):
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("demo_names").thing_classes = ["x", "y", "z"]
    assert find_class_names(config("DATASETS.TEST", "('demo_names',)")) == ["x", "y", "z"]
    MetadataCatalog.remove("demo_names")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--input", "nowhere.jpg", "--output", "out"], ["nowhere.jpg", "no such file"]),
        (["--input", "{empty}", "--output", "out"], ["this folder has no image or video"]),
        (["--input", "{photos}", "--output", "one.jpg"], ["one.jpg", "name a folder"]),
        (["--input", "{photos}/wide.png", "--output", "a.mp4"], ["an image gives an image"]),
        (["--input", "{photos}", "--output", "{photos}"], ["is an input"]),
        (["--input", "{photos}", "--sheet", "{photos}/wide.png"], ["is an input"]),
        (["--input", "{photos}", "--json", "{empty}"], ["empty is a folder: give the path"]),
        (["--input", "{photos}", "--sheet", "sheet"], ["--sheet sheet", "sheet.png"]),
        (["--input", "{photos}"], ["no output: give"]),
        (["--output", "o"], ["no input: give --input or --web"]),
        (["--input", "{photos}", "--web"], ["either --web or --input"]),
        (["--input", "{photos}", "--output", "o", "--confidence", "2"], ["between 0 and 1"]),
        (["--input", "{photos}", "--output", "o", "--run", "{empty}"], ["no config.yaml"]),
        (["--input", "{photos}", "--output", "o", "MODEL.WEIGHTS", "no.pth"], ["no.pth"]),
        (["--input", "{photos}", "--output", "o", "MODEL.WEIGHTS", ""], ["WEIGHTS is empty"]),
        (["--input", "{photos}", "--output", "o", "MODEL.WIGHTS", "x"], ["MODEL.WEIGHTS"]),
        (["--input", "{photos}", "--output", "o", *SCORE], [SCORE[0], "set by --confidence"]),
        (["--input", "{photos}", "--output", "o", "--config-file", "x"], ["--run DIR, or"]),
    ],
)
def test_wrong_use_is_one_line(call, photos, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"photos": photos, "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    assert_one_line(call(*(word.format(**places) for word in arguments)), *words)
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before


def test_equal_names_do_not_overwrite_one_another():
    inputs = [Path("a/x.jpg"), Path("b/x.jpg"), Path("x.gif"), Path("x.avi")]
    expected = ["x.jpg", "x_2.jpg", "x.png", "x.mp4"]
    assert demo.plan_outputs(inputs, "out") == [Path("out") / name for name in expected]


def test_the_page_shows_what_the_threshold_lets_through(run):
    args, picture = demo.parse_arguments(["--run", str(run), "--web"]), noise(60, 90)
    page = demo.Demo(Predictor(run_config(str(run), [])), args)
    output = page.predictor(picture[:, :, ::-1])
    drawn, rows, text, file = demo.for_page(page, picture, output, 0.0)
    scores = [row[1] for row in rows]
    assert len(rows) == 6 and drawn.shape == (480, 720, 3) and text.startswith("6 detections")
    assert len(json.loads(Path(file).read_text())["detections"]) == 6
    assert 0 < len(demo.for_page(page, picture, output, sorted(scores)[3] + 5e-4)[1]) < 6
    _, rows, text, _ = demo.for_page(page, picture, output, 0.999)
    assert rows == [] and text.endswith("lower the threshold")
    pytest.importorskip("gradio")
    detect, show = (one.fn for one in demo.build_page(page).fns.values())
    assert len(detect(picture, 0.0)[2]) == 6 and show(None, None, 0.5)[:2] == (None, [])
