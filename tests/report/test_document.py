"""The report of made-up runs, through the command line."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

pytest.importorskip("detectron2")

from resnet_backbone.report import document, pictures

PROJECT = Path(__file__).resolve().parents[2]
PICTURES = {
    "gain_per_class.png",
    "precision_recall.png",
    "precision_recall_classes.png",
    "errors.png",
    "losses.png",
}


@pytest.fixture
def runs(make_voc_run):
    """Three runs of a better ResNet and two of a VGG."""
    found = [make_voc_run("r50", seed, 0.95) for seed in (1, 2, 3)]
    return [str(path) for path in (*found, *(make_voc_run("vgg", seed, 0.4) for seed in (1, 2)))]


@pytest.fixture
def quick(monkeypatch):
    """Plots are made but not drawn, which takes most of the time."""
    monkeypatch.setattr(document, "save_png", lambda figure, path: path.write_bytes(b""))


def report(tool, runs, output, *options) -> int:
    return tool.main(["detection", "--run", *runs, "--output", str(output), *options])


def listing(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_report(tool, runs, tmp_path):
    output = tmp_path / "docs" / "detection.md"
    note = ["--note", "Cut from VOC.", "--score", "0.4"]
    assert report(tool, runs, output, *note) == 0
    text = output.read_text()
    assert listing(output.parent) == {"detection.md", "detection"}
    assert listing(output.with_suffix("")) == PICTURES | {"misses_R-50-FPN.jpg"}
    shown = set(re.findall(r"!\[[^]]*\]\(detection/([^)]+)\)", text))
    assert shown == listing(output.with_suffix(""))
    ap50 = {}
    for run in runs:
        content = json.loads((Path(run) / "results.json").read_text())
        ap50.setdefault(Path(run).name[:3], []).append(content["results"]["bbox"]["AP50"])
    gain = sum(ap50["r50"]) / 3 - sum(ap50["vgg"]) / 2
    assert gain > 5 and f"**{gain:.2f} points of AP50 above** VGG-16-FPN (3 and 2 runs;" in text
    assert "\n\nCut from VOC.\n\n" in text
    assert re.search(r"Of \d+ objects, R-50-FPN finds \d+ that VGG-16-FPN misses; the other", text)
    assert "`python tools/train_net.py --voc-root $ROOT/VOC2007 --test-set test SEED 2`" in text
    assert re.search(r"\| R-50-FPN .*\d ± \d+\.\d+ \[\d+\.\d+, \d+\.\d+\] \|", text)
    assert re.search(r"95 % interval over test images \+\d+\.\d+ to \+\d+\.\d+\)", text)
    assert str(tmp_path) not in text
    assert "Seconds per image of VGG-16-FPN, R-50-FPN: not measured." in text


def test_runs_of_an_earlier_version_have_its_defaults(quick, tool, make_voc_run, tmp_path):
    """A key that came later does not part them, unless a later run has another value."""
    runs = [make_voc_run("r50", seed) for seed in (1, 2, 3)]
    for run, value in zip(runs[1:], (1, 8), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert "ACCUMULATE" not in config["RESNET_BACKBONE"]
        config["RESNET_BACKBONE"]["ACCUMULATE"] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert report(tool, map(str, runs), tmp_path / "r.md") == 0
    text = (tmp_path / "r.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| R-50-FPN ")]
    assert [row[2] for row in rows[:2]] == ["1, 2", "3"]


def test_seconds_and_rows(quick, tool, make_voc_run, tmp_path):
    runs = [str(make_voc_run("r50", 1)), str(make_voc_run("vgg", 1))]
    rows = tmp_path / "rows.json"
    row = {"name": "baseline", "results": {"bbox": {"AP50": 20.0}}, "seconds_per_image": 0.7}
    refined = {**row, "name": "+refinement"}
    rows.write_text(json.dumps({"rows": [{**row, "run": runs[0]}, refined]}))
    output = tmp_path / "r.md"
    assert report(tool, runs, output, "--rows", str(rows)) == 0
    text = output.read_text()
    assert "| baseline | 20.00 | 0.7 |\n| + refinement | 20.00 | 0.7 |" in text
    assert "48.4" not in text  # the paper's Table 9 is of COCO
    assert "(r/accuracy_time.png)" in text
    assert "Seconds per image of VGG-16-FPN: not measured." in text


def test_a_baseline_alone_is_a_time_and_no_improvement(quick, tool, make_voc_run, tmp_path):
    runs = [str(make_voc_run(name, 1)) for name in ("r50", "vgg")]
    files = []
    for run in runs:
        files.append(tmp_path / f"{Path(run).name}.json")
        row = {"name": "baseline", "results": {"bbox": {"AP50": 20.0}}, "seconds_per_image": 0.7}
        files[-1].write_text(json.dumps({"rows": [{**row, "run": run}]}))
    assert report(tool, runs, tmp_path / "r.md", *(f"--rows={file}" for file in files)) == 0
    text = (tmp_path / "r.md").read_text()
    assert "## Improvements in testing" not in text and "not measured." not in text
    assert "(r/accuracy_time.png)" in text


@pytest.fixture
def drawn(monkeypatch) -> list[list]:
    """The points of each picture of accuracy and time."""
    pictures, plot = [], document.plot_accuracy_and_time
    monkeypatch.setattr(
        document, "plot_accuracy_and_time", lambda points: pictures.append(points) or plot(points)
    )
    return pictures


def test_seconds_of_the_runs_own_evaluations(quick, drawn, tool, make_voc_run, tmp_path):
    """Where no row of tools/evaluate_detector.py has measured the run; it says on what."""
    own = dict(images_at_a_time=2, hardware={"device": "cpu", "cpu": "Some CPU", "threads": 1})
    runs = [
        str(make_voc_run(name, seed, seconds_per_image=seconds, **own))
        for name, seed, seconds in (("r50", 1, 0.5), ("r50", 2, 0.7), ("vgg", 1, 0.3))
    ]
    row = {"name": "baseline", "results": {"bbox": {"AP50": 20.0}}, "seconds_per_image": 0.25}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [{**row, "run": runs[2]}]}))
    output = tmp_path / "r.md"
    assert report(tool, runs, output, "--rows", str(rows)) == 0
    (points,) = drawn
    seconds = {point.label: point.seconds for point in points}
    assert seconds == {"R-50-FPN": pytest.approx(0.6), "VGG-16-FPN": 0.25}
    text = output.read_text()
    assert "Seconds per image of R-50-FPN: the runs' own evaluations (Some CPU" in text
    assert "2 images at a time)." in text and ": not measured" not in text


def test_without_images_the_rest_is_there(quick, tool, runs, voc, tmp_path):
    shutil.rmtree(voc)
    output = tmp_path / "r.md"
    assert report(tool, runs, output) == 0
    text = output.read_text()
    assert listing(output.with_suffix("")) == {"gain_per_class.png", "errors.png", "losses.png"}
    found = re.findall(r"^(Neither curves nor intervals|No pictures): the images of", text, re.M)
    assert len(found) == 2 and "In brackets" not in text


def test_a_single_detector(quick, tool, runs, tmp_path):
    output = tmp_path / "r.md"
    assert report(tool, runs[:3], output) == 0
    text = output.read_text()
    assert "One detector: there is nothing to compare it with." in text
    assert "No pictures: there is one detector only." in text


def test_two_resnets_are_compared(quick, tool, make_voc_run, tmp_path):
    runs = [make_voc_run("r50", 1), make_voc_run("vgg", 1), make_voc_run("r50", 2)]
    config = yaml.safe_load((runs[2] / "config.yaml").read_text())
    config["MODEL"]["RESNETS"]["DEPTH"] = 101
    (runs[2] / "config.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "r.md"
    options = ["--reference", str(runs[0])]
    assert report(tool, map(str, runs), output, *options) == 0
    text = output.read_text()
    for label in ("VGG-16-FPN minus R-50-FPN", "R-101-FPN minus R-50-FPN"):
        assert f"| **{label}** |" in text
    assert (output.with_suffix("") / "misses_R-101-FPN.jpg").is_file()


def test_coco_has_tables_but_no_curves(quick, tool, make_voc_run, tmp_path):
    runs = []
    for network, value in (("r50", 3.0), ("vgg", 4.5)):
        bbox = {"AP": value, "AP50": 2 * value, "APs": 1.0, "AP-cat": value, "AP-dog": value}
        runs.append(make_voc_run(network, 1, results={"bbox": bbox}))
        (runs[-1] / "inference/test:test/voc_results.json").unlink()
    output = tmp_path / "r.md"
    assert report(tool, map(str, runs), output) == 0
    text = output.read_text()
    assert "R-50-FPN is **3.00 points of AP50 below** VGG-16-FPN" in text
    assert "## AP per class" in text and "| cat | 4.50 | 3.00 | −1.50 |" in text
    assert text.count(": they need runs on a single test set in VOC layout.") == 2
    assert "Not measured: a run has no errors" in text


def test_all_or_nothing(tool, runs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "docs" / "r.md"
    output.parent.mkdir()
    output.write_text("before")
    monkeypatch.setattr(document, "save_png", lambda *args: (_ for _ in ()).throw(OSError("full")))
    assert report(tool, runs, output) == 2
    assert "error: full" in capsys.readouterr().err
    assert listing(output.parent) == {"r.md"} and output.read_text() == "before"


def test_pictures_of_an_earlier_report_go(quick, tool, runs, voc, tmp_path):
    output = tmp_path / "r.md"
    assert report(tool, runs, output) == 0
    (output.with_suffix("") / "own.txt").write_text("kept")
    shutil.rmtree(voc)
    assert report(tool, runs, output) == 0
    shown = set(re.findall(r"\(r/([^)]+)\)", output.read_text()))
    assert listing(output.with_suffix("")) == shown | {"own.txt"}


def test_errors_take_one_line(quick, tool, runs, tmp_path, capsys):
    output = tmp_path / "r.md"
    twice = tmp_path / "again"
    shutil.copytree(runs[0], twice)
    for given, message in (
        ([*runs, str(twice)], "the same recipe and seed 1"),
        ([str(tmp_path)], "has no results.json"),
    ):
        assert report(tool, given, output) == 2
        captured = capsys.readouterr().err.strip().splitlines()
        assert message in captured[-1] and captured[-1].startswith("error: ")
        assert not output.exists()
    for bad in (["--score", "2"], ["--output", "x.txt"]):
        with pytest.raises(SystemExit, match="2"):
            tool.main(["detection", "--run", runs[0], "--output", str(output), *bad])


def test_sheets_stay_small():
    noise = Image.effect_noise((1600, 1200), 90).convert("RGB")
    content = pictures._compress(noise)
    assert len(content) < pictures.MAX_BYTES
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "JPEG" and picture.width < 1600
    plain = pictures._compress(Image.new("RGB", (1600, 1200)))
    assert Image.open(io.BytesIO(plain)).size == (1600, 1200)


def test_rows_on_other_images_are_told_apart(quick, drawn, tool, make_voc_run, tmp_path):
    runs = [str(make_voc_run("r50", 1)), str(make_voc_run("vgg", 1, seconds_per_image=0.5))]
    config = yaml.safe_dump({"DATASETS": {"TEST": ["test:few"]}})
    row = {"name": "baseline", "results": {"bbox": {"AP50": 20.0}}, "seconds_per_image": 0.7}
    row |= {"config": config, "run": runs[0]}
    refined = {**row, "name": "+refinement", "seconds_per_image": 0.9}
    vgg = {**row, "run": runs[1], "seconds_per_image": 0.8}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [row, refined, vgg]}))
    assert report(tool, runs, tmp_path / "r.md", "--rows", str(rows)) == 0
    assert [{point.label: point.seconds for point in points} for points in drawn] == [
        {"VGG-16-FPN": 0.5, "R-50-FPN": 0.7},
        {"R-50-FPN": 0.7, "+refinement": 0.9, "VGG-16-FPN": 0.8},
    ]
    assert drawn[0][1].color == drawn[1][0].color
    text = (tmp_path / "r.md").read_text()
    assert "Seconds per image of R-50-FPN: the rows on other images." in text
    assert text.count("Measured on `few`: these numbers compare with each other") == 2
    assert "(r/accuracy_time_2.png)" in text and (tmp_path / "r" / "accuracy_time_2.png").is_file()
