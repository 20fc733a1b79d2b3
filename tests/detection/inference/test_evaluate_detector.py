"""tools/evaluate_detector.py: the rows, what is kept of them, and what is refused."""

import hashlib
import json
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnet_backbone.cli import evaluate_detector
from resnet_backbone.detection import Checkpointer, build_detector
from resnet_backbone.detection.config import load_config
from resnet_backbone.detection.evaluation import voc
from resnet_backbone.detection.inference.predictor import Predictor
from resnet_backbone.fast.engines import why_not

CHEAP = dict(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.01, MODEL__RPN__POST_NMS_TOPK_TEST=10)
CHEAP |= dict(INPUT__MIN_SIZE_TEST=60, RESNET_BACKBONE__CLASS_NAMES=["bar", "box"])


@pytest.fixture
def make_run(make_family, tmp_path):
    """Function (folder name, seed, KEY=value...) -> a run folder with a random detector."""

    def make(name, seed=0, **keys):
        cfg = make_family("FPN", **(CHEAP | keys))
        cfg.OUTPUT_DIR, cfg.SEED = str(tmp_path / name), seed
        torch.manual_seed(seed)
        model = build_detector(cfg).eval()
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=2.0)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(cfg.dump())
        names = cfg.RESNET_BACKBONE.CLASS_NAMES
        Checkpointer(model, cfg.OUTPUT_DIR, class_names=names).save("model_final")
        return str(tmp_path / name)

    return make


@pytest.fixture
def tool(run_command, tiny_voc, monkeypatch):
    """Function (argument...) -> exit status, lines of stdout and of stderr."""
    monkeypatch.setattr(voc, "draw_voc", lambda *given: None)  # a fifth of the time

    def run(*arguments):
        data = ["--voc-root", tiny_voc, "--test-set", "test"]
        code, *printed = run_command(evaluate_detector.main, *arguments, *data)
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop("test:test", None)
        return code, *(text.splitlines() for text in printed)

    return run


def detections(folder, row):
    (path,) = (folder / row).glob("inference/*/detections.json")
    return json.loads(path.read_text())


def test_all_rows(make_run, tool, tiny_voc, tmp_path):
    run, output = make_run("plain"), tmp_path / "rows"
    context = make_run("context", seed=1, RESNET_BACKBONE__GLOBAL_CONTEXT=True)
    third = make_run("third", seed=2, INPUT__FORMAT="BGR", INPUT__MIN_SIZE_TEST=72)
    command = ["--run", run, "--context-run", context, "--ensemble-run", third, "--output", output]
    code, lines, errors = tool(*command)
    assert code == 0, errors
    names = ["baseline", "+refinement", "+context", "+multi-scale", "+ensemble"]
    assert [line.split()[0] for line in lines[:5]] == names
    content = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in content["rows"]] == names and not content["left_out"]
    first, last = content["rows"][0], content["rows"][-1]
    assert {"AP50", "AP", "AP75", "AP50-bar", "AP50-box"} <= first["results"]["bbox"].keys()
    assert first["seconds_per_image"] > 0 and first["hardware"]["cpu"] and first["date"]
    assert first["images_at_a_time"] == 1
    content = Path(run, "model_final.pth").read_bytes()
    assert first["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert (first["run"], first["seed"], last["run"], last["seed"]) == (run, 0, context, 1)
    assert first["switches"]["SCALES"] == [] and not first["switches"]["BOX_REFINEMENT"]
    assert last["switches"]["SCALES"] == [20, 40, 60, 80, 100]  # the paper's, at 60 of 600 pixels
    assert last["switches"]["ENSEMBLE"] == [third] and last["switches"]["BOX_REFINEMENT"]
    table = (output / "results.md").read_text()
    assert all(name in table for name in names) and "| bar |" in table
    assert "Each row adds" in table and first["intervals"]["AP50"] == [0, 0]
    assert "48.4" not in table  # the paper's rows are of COCO val

    files = {name: (output / name.removeprefix("+") / "row.json") for name in names}
    written = {name: path.stat().st_mtime_ns for name, path in files.items()}
    found = detections(output, "ensemble")
    assert found and found != detections(output, "multi-scale")
    check_detections(found, last["config"], tiny_voc, tmp_path)

    code, lines, _ = tool(*command)
    assert code == 0 and all(line.endswith("(kept)") for line in lines[:5])
    assert written == {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["+refinement"].unlink()  # as if it had been interrupted there
    model = torch.load(Path(third, "model_final.pth"), weights_only=False)
    model["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(model, Path(third, "model_final.pth"))
    code, lines, _ = tool(*command)
    redone = [line.split()[0] for line in lines[:5] if not line.endswith("(kept)")]
    assert code == 0 and redone == ["+refinement", "+ensemble"]


def check_detections(found, config, voc, folder):
    """What was evaluated is what a Predictor finds with the row's config."""
    (folder / "row.yaml").write_text(config)
    predictor = Predictor(load_config(str(folder / "row.yaml"), []))
    for image_id in {one["image_id"] for one in found}:
        image = cv2.imread(str(voc / "JPEGImages" / f"{image_id}.jpg"))
        instances = predictor(image)["instances"]
        mine = [one for one in found if one["image_id"] == image_id]
        scores = sorted(one["score"] for one in mine)
        assert scores == pytest.approx(sorted(instances.scores.tolist()), abs=1e-5)
        left = sorted(one["bbox"][0] for one in mine)
        boxes = instances.pred_boxes.tensor
        assert left == pytest.approx(sorted(boxes[:, 0].tolist()), abs=1e-2)


def test_rows_without_their_run_are_left_out(make_run, tool, tmp_path, monkeypatch):
    """And what rows share is read once: weights are hashed, and their detector is built."""
    trained = dict(SOLVER__AMP__ENABLED=True, RESNET_BACKBONE__TEST__METRIC="imagenet_det")
    run, output, used = make_run("plain", **trained), tmp_path / "rows", []
    owners = {"sha256": evaluate_detector, "trained_detector": evaluate_detector.predictor}
    for name, owner in owners.items():
        keep = getattr(owner, name)
        spy = lambda given, name=name, keep=keep: used.append(name) or keep(given)  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    rows = ["--rows", "baseline", "refinement", "context", "ensemble"]
    keys = ["RESNET_BACKBONE.TEST.FLIP", "True"]
    code, lines, errors = tool("--run", run, *keys, "--output", output, *rows)
    assert code == 0, errors
    assert lines[:2] == [
        "row context is left out: give --context-run DIR",
        "row ensemble is left out: give --ensemble-run DIR ...",
    ]
    content = json.loads((output / "results.json").read_text())
    assert used == ["sha256", "trained_detector"]
    assert [row["name"] for row in content["rows"]] == ["baseline", "+refinement"]
    assert content["rows"][0]["switches"]["FLIP"]
    assert "AP75" not in content["rows"][0]["results"]["bbox"], "the run's own metric"
    assert {row["precision"] for row in content["rows"]} == {"float32"}  # whatever training had
    assert set(content["left_out"]) == {"context", "ensemble"}
    assert "`ensemble` is left out" in (output / "results.md").read_text()


def test_each_row_alone(make_run, tool, tmp_path):
    run, output = make_run("plain"), tmp_path / "rows"
    added = ["--run", run, "--output", output, "--rows", "baseline", "flip"]
    assert [line.split()[0] for line in tool(*added)[1][:2]] == ["baseline", "+flip"]
    output = output.rename(tmp_path / "moved")  # what is measured is kept
    rows = ["--rows", "baseline", "soft-nms", "flip", "refinement"]
    command = ["--run", run, "--output", output, "--alone", *rows]
    code, lines, errors = tool(*command)
    assert code == 0 and "warning" not in "".join(lines), errors
    assert [line.split()[0] for line in lines if line.endswith("(kept)")] == ["baseline", "flip"]
    baseline, *found = json.loads((output / "results.json").read_text())["rows"]
    assert [row["name"] for row in found] == ["refinement", "flip", "soft-nms"]
    switches = [(s["BOX_REFINEMENT"], s["FLIP"], s["NMS"]) for s in (r["switches"] for r in found)]
    assert switches == [(True, False, "hard"), (False, True, "hard"), (False, False, "gaussian")]
    assert "Each row is one improvement alone." in (output / "results.md").read_text()
    assert all(row["intervals"].keys() == {"AP", "AP50", "AP50-11pt", "AP75"} for row in found)
    kept = json.loads((output / "flip" / "row.json").read_text())
    assert "torch" in kept["versions"]
    (output / "flip" / "row.json").write_text(json.dumps(kept | {"revision": "old"}))
    (warning,) = (line for line in tool(*command)[1] if line.startswith("warning"))
    assert warning.startswith(f"warning: flip is of revision old, this code is {kept['revision']}:")


@pytest.mark.skipif(bool(why_not("openvino", torch.float32)), reason="no OpenVINO")
def test_an_engine_finds_the_same(make_run, tool, tmp_path):
    run, keys = make_run("plain"), ["RESNET_BACKBONE.TEST.ENGINE", "openvino"]
    for name, options in (("eager", []), ("openvino", keys)):
        words = ["--run", run, "--rows", "baseline", "--output", tmp_path / name, *options]
        assert tool(*words)[0] == 0
    eager, fast = (detections(tmp_path / name, "baseline") for name in ("eager", "openvino"))
    assert len(eager) == len(fast) > 0
    for one, other in zip(eager, fast, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)
    row = json.loads((tmp_path / "openvino" / "results.json").read_text())["rows"][0]
    assert row["switches"]["ENGINE"] == row["engines"]["backbone"] == "openvino"


def test_refusals(make_run, tool, tmp_path):
    run = make_run("plain")
    other = make_run("other", RESNET_BACKBONE__CLASS_NAMES=["box", "bar"])
    context = make_run("context", RESNET_BACKBONE__GLOBAL_CONTEXT=True)
    refused = {
        "MODEL.WEIGHTS is set by --run": ["--run", run, "MODEL.WEIGHTS", "x"],
        "nowhere has no config.yaml": ["--run", "nowhere"],
        "lacks RESNET_BACKBONE.GLOBAL_CONTEXT": ["--run", run, "--context-run", run + "/."],
        "GLOBAL_CONTEXT: it belongs to --context-run": ["--run", context],
        "has RESNET_BACKBONE.GLOBAL_CONTEXT": ["--run", context, "--context-run", context],
        "they need the same classes in the same order": ["--run", run, "--ensemble-run", other],
        "no row is left to measure": ["--run", run, "--rows", "ensemble"],
        "RESNET_BACKBONE.TEST.NMS 'none'": ["--run", run, "RESNET_BACKBONE.TEST.NMS", "none"],
    }
    for message, arguments in refused.items():
        code, _, errors = tool("--output", tmp_path / "rows", *arguments)
        assert code == 2 and len(errors) == 1 and message in errors[0], (message, errors)
    assert not (tmp_path / "rows" / "results.json").exists()
