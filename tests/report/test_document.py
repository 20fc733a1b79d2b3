"""The report of made-up runs, through the command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from drawn_images import coco_json

from resnet_backbone.detection.data.coco import scan_coco
from resnet_backbone.detection.evaluation.imagenet import DETEvaluator
from resnet_backbone.report import detection_plots, document

PICTURES = {
    *("gain_per_class.png", "precision_recall.png", "precision_recall_classes.png"),
    *("f1.png", "f1_classes.png", "confusion_R-50-FPN.png", "confusion_VGG-16-FPN.png"),
    *("errors.png", "training.png"),
}
BASELINE = {"name": "baseline", "results": {"bbox": {"AP50": 20.0}}, "seconds_per_image": 0.7}


@pytest.fixture
def runs(make_voc_run):
    """Three runs of a better ResNet and two of a VGG."""
    found = [make_voc_run("r50", seed, 0.95) for seed in (1, 2, 3)]
    return [*found, *(make_voc_run("vgg", seed, 0.4) for seed in (1, 2))]


@pytest.fixture
def quick(monkeypatch):
    """Plots are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(document, "save_png", lambda figure, path: path.write_bytes(b""))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "docs" / "r.md"


@pytest.fixture
def write(tool, output):

    def report(runs, *options) -> str:
        status, _, error = tool("detection", "--run", *runs, "--output", output, *options)
        assert status == 0, error
        return output.read_text()

    return report


@pytest.fixture
def write_rows(tmp_path):

    def write(*rows, name="rows.json"):
        (tmp_path / name).write_text(json.dumps({"rows": rows}))
        return tmp_path / name

    return write


@pytest.fixture
def drawn(monkeypatch) -> list[list]:
    drawn, plot = [], detection_plots.plot_accuracy_and_time

    def draw(points):
        drawn.append(points)
        return plot(points)

    monkeypatch.setattr(detection_plots, "plot_accuracy_and_time", draw)
    return drawn


def listing(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def change_config(run, section, **values) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_report(write, runs, output, tmp_path):
    text = write(runs, "--note", "Cut from VOC.", "--score", "0.4")
    assert listing(output.parent) == {"r.md", "r"}
    pictures = listing(output.with_suffix(""))
    assert pictures - {"misses_R-50-FPN_back.jpg"} == PICTURES | {"misses_R-50-FPN.jpg"}
    assert set(re.findall(r"!\[[^]]*\]\(r/([^)]+)\)", text)) == pictures
    ap50 = {}
    for run in runs:
        content = json.loads((run / "results.json").read_text())
        ap50.setdefault(run.name[:3], []).append(content["results"]["bbox"]["AP50"])
    gain = sum(ap50["r50"]) / 3 - sum(ap50["vgg"]) / 2
    assert gain > 5 and f"**{gain:.2f} points of AP50 above** VGG-16-FPN (3 and 2 runs;" in text
    assert "\n\nCut from VOC.\n\n" in text
    sentence = r"Of \d+ objects, R-50-FPN finds \d+ that VGG-16-FPN misses, and .* finds (\d+) that"
    found = re.search(sentence, text)
    assert bool(int(found[1])) == ("VGG-16-FPN finds, R-50-FPN misses:" in text)
    assert "`python tools/train_net.py --voc-root $ROOT/VOC2007 --test-set test SEED 2`" in text
    assert re.search(r"\| R-50-FPN .*\d ± \d+\.\d+ \[\d+\.\d+, \d+\.\d+\] \|", text)
    assert re.search(r"95 % interval over test images \+\d+\.\d+ to \+\d+\.\d+\)", text)
    assert str(tmp_path) not in text
    assert "Seconds per image of VGG-16-FPN, R-50-FPN: not measured." in text


def test_runs_of_an_earlier_version_have_its_defaults(quick, write, make_voc_run):
    """A key that came later does not part them, unless a later run has another value."""
    runs = [make_voc_run("r50", seed) for seed in (1, 2, 3)]
    for run, value in zip(runs[1:], (1, 8), strict=True):
        change_config(run, "RESNET_BACKBONE", ACCUMULATE=value)
    lines = [line for line in write(runs).splitlines() if line.startswith("| R-50-FPN ")]
    assert [line.split(" | ")[2] for line in lines[:2]] == ["1, 2", "3"]


def test_seconds_and_rows(quick, write, write_rows, make_voc_run):
    runs = [make_voc_run("r50", 1), make_voc_run("vgg", 1)]
    rows = {**BASELINE, "run": str(runs[0])}, {**BASELINE, "name": "+refinement"}
    text = write(runs, "--rows", write_rows(*rows))
    assert "| baseline | 20.00 | 0.7 |\n| + refinement | 20.00 | 0.7 |" in text
    assert "48.4" not in text  # the paper's Table 9 is of COCO
    assert "(r/accuracy_time.png)" in text
    assert "Seconds per image of VGG-16-FPN: not measured." in text


def test_a_baseline_alone_is_a_time_and_no_improvement(quick, write, write_rows, make_voc_run):
    runs = [make_voc_run(name, 1) for name in ("r50", "vgg")]
    files = [write_rows({**BASELINE, "run": str(run)}, name=f"{run.name}.json") for run in runs]
    text = write(runs, *(f"--rows={file}" for file in files))
    assert "## Improvements in testing" not in text and "not measured." not in text
    assert "(r/accuracy_time.png)" in text


def test_seconds_of_the_runs_own_evaluations(quick, drawn, write, write_rows, make_voc_run):
    """Where no row of tools/evaluate_detector.py has measured the run; it says on what."""
    own = dict(images_at_a_time=2, hardware={"device": "cpu", "cpu": "Some CPU", "threads": 1})
    seconds = (("r50", 1, 0.5), ("r50", 2, 0.7), ("vgg", 1, 0.3))
    runs = [make_voc_run(name, seed, seconds_per_image=s, **own) for name, seed, s in seconds]
    row = {**BASELINE, "seconds_per_image": 0.25, "run": str(runs[2])}
    text = write(runs, "--rows", write_rows(row))
    (points,) = drawn
    seconds = {point.label: point.seconds for point in points}
    assert seconds == {"R-50-FPN": pytest.approx(0.6), "VGG-16-FPN": 0.25}
    assert "Seconds per image of R-50-FPN: the runs' own evaluations (Some CPU" in text
    assert "2 images at a time)." in text and ": not measured" not in text


def test_without_images_the_rest_is_there(quick, write, runs, voc, output):
    write(runs)
    (output.with_suffix("") / "own.txt").write_text("kept")
    shutil.rmtree(voc)
    text = write(runs)  # pictures of an earlier report go
    rest = {"gain_per_class.png", "errors.png", "training.png"}
    assert listing(output.with_suffix("")) == rest | {"own.txt"}
    assert set(re.findall(r"\(r/([^)]+)\)", text)) == rest
    absent = "are no curves or intervals|is no F1 and no confusion matrix|are no pictures"
    found = re.findall(rf"^There ({absent}): there is no ", text, re.M)
    assert len(found) == 3 and "In brackets" not in text


def test_a_single_detector(quick, write, runs):
    text = write(runs[:3])
    assert "There is only one detector, so there is nothing to compare it with." in text
    assert "There are no pictures: there is only one detector." in text


def test_two_resnets_are_compared(quick, write, make_voc_run, output):
    runs = [make_voc_run("r50", 1), make_voc_run("vgg", 1), make_voc_run("r50", 2)]
    change_config(runs[2], "MODEL", RESNETS={"DEPTH": 101})
    text = write(runs, "--reference", runs[0])
    for label in ("VGG-16-FPN minus R-50-FPN", "R-101-FPN minus R-50-FPN"):
        assert f"| **{label}** |" in text
    assert list(output.with_suffix("").glob("misses_R-101-FPN*.jpg"))


def test_data_in_coco_format(quick, write, make_coco_run, output, voc):
    """Own data: all that runs in VOC layout have, and nothing of VOC's."""
    runs = [make_coco_run("r50", 1, 0.95), make_coco_run("vgg", 1, 0.4)]
    text = write(runs)
    pictures = listing(output.with_suffix(""))
    assert pictures - {"misses_R-50-FPN_back.jpg"} == PICTURES | {"misses_R-50-FPN.jpg"}
    bbox = [json.loads((run / "results.json").read_text())["results"]["bbox"] for run in runs]
    gain = bbox[0]["AP50"] - bbox[1]["AP50"]
    assert f"R-50-FPN is **{gain:.2f} points of AP50 above** VGG-16-FPN (one run each; 95 %" in text
    assert "## AP per class" in text and "| class | objects | VGG-16-FPN | R-50-FPN |" in text
    assert re.search(r"VOC's matching, .* VGG-16-FPN \d+\.\d\d, R-50-FPN \d+\.\d\d\.", text, re.S)
    assert "published" not in text and "11-point" not in text and "crowds (ignored" in text
    shutil.move(voc.parent / "val.json", voc.parent / "moved.json")
    assert text.count("errors.png") > write(runs).count("errors.png")
    moved = ["--coco-json", voc.parent / "moved.json", "--image-root", voc / "JPEGImages"]
    assert "95 % interval" in write(runs, *moved)


def test_imagenet_detection(quick, write, tool, make_detector, output, voc):
    """One of two cats is found at IoU 0.3, enough for its size; the dog is found at once."""
    boxes = [(1, 1, (0, 0, 10, 10)), (1, 1, (100, 50, 90, 90)), (2, 3, (0, 0, 50, 50))]
    found = {
        1: [(0, 0, 10, 3, 0, 0.9), (0, 0, 10, 10, 0, 0.8)],
        2: [(0, 0, 50, 50, 2, 0.6), (0, 0, 50, 50, 0, 0.95)],
    }
    file = voc.parent / "val2.json"
    images = {number: (f"00000{number}.jpg", 200, 150) for number in found}
    file.write_text(json.dumps(coco_json({1: "cat", 2: "cow", 3: "dog"}, images, boxes)))
    records, _ = scan_coco(str(file), str(voc / "JPEGImages"))
    DatasetCatalog.register("det_report", lambda: records)
    MetadataCatalog.get("det_report").thing_classes = ["cat", "cow", "dog"]
    tables = {record["image_id"]: np.array(found[record["image_id"]]) for record in records}
    data = f"--coco-json train.json {file} --image-root {voc / 'JPEGImages'}"
    config = {"RESNET_BACKBONE.TEST": {"METRIC": "imagenet_det"}}
    run = make_detector("det", 1, {}, config=config)
    evaluator = DETEvaluator("det_report", str(run / "inference/test:test"))
    found = {image: (t[:, :4], t[:, 5], t[:, 4].astype(int)) for image, t in tables.items()}
    bbox = evaluator.score(found)["bbox"]
    assert bbox["AP50"] == pytest.approx(62.5)  # see test_det_by_hand
    results = json.loads((run / "results.json").read_text())
    results |= {"command": f"resnet-backbone train-net {data}", "results": {"bbox": bbox}}
    (run / "results.json").write_text(json.dumps(results))
    text = write([run])
    assert re.search(r"\| 62.50 \[\d", text) and "ImageNet's average precision" in text
    assert re.search(r"VOC's matching, .* R-50-FPN 58.33\.", text, re.S)  # cats: 1/2 at 1/3
    assert "published" not in text and "coco_instances" not in text
    results["results"]["bbox"]["AP50"] = 58.33
    (run / "results.json").write_text(json.dumps(results))
    status, _, error = tool("detection", "--run", run, "--output", output)
    assert status == 2 and "gives AP50 62.50 with these annotations" in error
    assert "give the --coco-json that the run was evaluated on" in error


def test_all_or_nothing(tool, runs, output, monkeypatch):
    output.parent.mkdir()
    output.write_text("before")
    monkeypatch.setattr(document, "save_png", lambda *args: (_ for _ in ()).throw(OSError("full")))
    status, _, error = tool("detection", "--run", *runs, "--output", output)
    assert status == 2 and "error: full" in error
    assert listing(output.parent) == {"r.md"} and output.read_text() == "before"


def test_errors_take_one_line(quick, tool, runs, output, tmp_path):
    twice = tmp_path / "again"
    shutil.copytree(runs[0], twice)
    same = "the same recipe and seed 1"
    for given, message in (([*runs, twice], same), ([tmp_path], "has no results.json")):
        status, _, error = tool("detection", "--run", *given, "--output", output)
        line = error.strip().splitlines()[-1]
        assert status == 2 and message in line and line.startswith("error: ")
        assert not output.exists()
    for bad in (["--score", "2"], ["--output", "x.txt"]):
        assert tool("detection", "--run", runs[0], "--output", output, *bad)[0] == 2


def test_rows_on_other_images_are_told_apart(quick, drawn, write, write_rows, make_voc_run, output):
    runs = [make_voc_run("r50", 1), make_voc_run("vgg", 1, seconds_per_image=0.5)]
    row = {**BASELINE, "config": "DATASETS: {TEST: ['test:few']}", "run": str(runs[0])}
    refined = {**row, "name": "+refinement", "seconds_per_image": 0.9}
    vgg = {**row, "run": str(runs[1]), "seconds_per_image": 0.8}
    text = write(runs, "--rows", write_rows(row, refined, vgg))
    assert [{point.label: point.seconds for point in points} for points in drawn] == [
        {"VGG-16-FPN": 0.5, "R-50-FPN": 0.7},
        {"R-50-FPN": 0.7, "+refinement": 0.9, "VGG-16-FPN": 0.8},
    ]
    assert drawn[0][1].color == drawn[1][0].color
    assert "Seconds per image of R-50-FPN: the rows on other images." in text
    assert text.count("Measured on `few`: these numbers compare with each other") == 2
    assert "(r/accuracy_time_2.png)" in text
    assert Path(output.with_suffix(""), "accuracy_time_2.png").is_file()
