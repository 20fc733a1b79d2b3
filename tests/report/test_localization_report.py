"""The page of localization runs: Table 13, intervals by hand, and the picture."""

import json

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.report import localization

TABLE_13 = [  # typed from the paper's
    ("VGG's", "center crop", "VGG-16", "33.1", "-"),
    ("RPN", "center crop", "ResNet-101", "13.3", "-"),
    ("RPN", "dense", "ResNet-101", "11.7", "14.4"),
    ("RPN + R-CNN", "dense", "ResNet-101", "-", "10.6"),
    ("RPN + R-CNN", "dense", "ensemble", "-", "8.9"),
]
# Name -> architecture, keys, images with a wrong box, guessed first and third, errors in percent
RUNS = {
    "crop": ("ClassProposalNetwork", {"CENTER_CROP": 224, "SCALES": [224]}, 6, (20, 0), [30]),
    "rpn": ("ClassProposalNetwork", {"CENTER_CROP": 0, "SCALES": [224]}, 4, (12, 4), [20, 40, 20]),
    "rcnn": ("LocalizationRCNN", {"CENTER_CROP": 0, "SCALES": [224]}, 2, (12, 4), [10, 40, 20]),
    "joined": ("LocalizationRCNN", {"CENTER_CROP": 0, "SCALES": [224]}, 2, (12, 6), [10, 40, 10]),
    "whole": ("LocalizationRCNN", {"CENTER_CROP": 0, "SCALES": []}, 3, (20, 0), [15]),
}


@pytest.fixture
def make_run(make_detector, tmp_path):
    """Function: a name of RUNS -> a run folder of 20 images; the first ones have a wrong box."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (90, 60)).save(photo)

    def make(name, photo=str(photo)):
        kind, keys, wrong, guessed, errors = RUNS[name]
        config = {"MODEL.META_ARCHITECTURE": kind, "RESNET_BACKBONE.LOCALIZATION": keys}
        config |= {"RESNET_BACKBONE.TEST": {"ENSEMBLE": ["run"] * (name == "joined")}}
        # the images without a right box come first, those guessed first come last
        ranks = [None] * (20 - sum(guessed)) + [3] * guessed[1] + [1] * guessed[0]
        box = {"class": "bar", "objects": [[5, 5, 50, 50]], "box": [9, 5, 50, 50], "score": 0.5}
        rows = [
            {"image": photo, **box, "iou": 0.4 if number < wrong else 0.5, "rank": rank}
            for number, rank in enumerate(ranks)
        ]
        names = "true_class_error", "top1_error", "top5_error"
        results = {"localization": dict(zip(names, errors, strict=False))}
        run = make_detector(name, 1, config=config, results={"results": results})
        (run / "inference" / "test:test" / "localizations.json").write_text(json.dumps(rows))
        return run

    return make


@pytest.mark.parametrize("images", [50_000, 20])
def test_errors_beside_table_13(make_run, cells, tool, tmp_path, monkeypatch, images):
    monkeypatch.setattr(localization, "LOCALIZATION_IMAGES", images)
    page, runs = tmp_path / "page.md", [make_run(name) for name in RUNS]
    words = ["--run", *runs, "--note", "Of bars.", "--output", page]
    status, printed, err = tool("localization", *words)
    assert status in (0, None), err
    text = page.read_text()
    assert status in (0, None) and "| RPN | dense |" in printed and "Of bars." in text
    rows = cells(text)[2:]
    assert [tuple(row[:5]) for row in rows[:5]] == TABLE_13
    # Agresti and Coull: (6 + 2) / 24 = 33.33 +- 1.96 sqrt(33.33 * 66.67 / 24)
    assert rows[1][5:] == ["ResNet-50", "30.00 [14.47, 52.19]", "-", "-"]
    errors = [[cell.split(" ")[0] for cell in row[6:]] for row in rows[:6]]
    assert errors[0] == ["-", "-", "-"] and rows[0][5] == "not measured"
    wanted = [RUNS[name][-1] for name in ("rpn", "rcnn", "joined", "whole")]
    assert errors[2:] == [[f"{x:.2f}" for x in row] + ["-"] * (3 - len(row)) for row in wanted]
    assert rows[4][5] == "ResNet-50 and 1 more"
    assert rows[5][:2] == ["RPN + R-CNN", "whole image"]
    assert ("Ours are of other images than the paper's" in text) == (images != 20)
    assert "RPN, center crop, 20 images; hardware not recorded" in text
    for command in ("python tools/train_net.py --voc-root", "localization --run $ROOT/crop"):
        assert command in text
    picture = np.asarray(Image.open(tmp_path / "page" / "boxes.jpg").convert("RGB"), int)
    assert (picture[..., 1] - picture[..., 0] > 100).any()  # green
    assert (picture[..., 0] - picture[..., 2] > 100).any()  # orange


def test_changes_on_the_same_images(make_run, cells, tool, refused, tmp_path):
    page, runs = tmp_path / "page.md", [make_run(name) for name in ("rpn", "rcnn", "crop")]
    tool("localization", "--run", *runs, "--output", page)
    text = page.read_text()
    assert "Errors minus those of RPN, dense, image by image" in text
    # Agresti and Min: 2 of 20 images are right now; (-2 / 22) +- 1.96 sqrt(3 - 22 (2 / 22)^2) / 22
    rcnn, crop = cells(text)[-2:]
    assert rcnn == ["RPN + R-CNN, dense", "-10.00 [-24.05, +5.87]", "+0.00 [-8.91, +8.91]"]
    assert crop[0] == "RPN, center crop" and crop[2] == "-"
    other = make_run("whole", photo="elsewhere.png")
    assert "different images" in refused("localization", "--run", runs[0], other, "--output", page)
    tool("localization", "--run", other, "--output", page)
    assert "No picture: " in page.read_text() and "elsewhere.png" in page.read_text()


def test_runs_of_other_tasks_are_refused(make_detector, make_run, refused, tmp_path):
    words = ["--output", tmp_path / "page.md"]
    error = refused("localization", "--run", make_detector("b", 1), *words)
    assert "has no results of localization" in error
    run = make_run("crop")
    file = run / "inference" / "test:test" / "localizations.json"
    file.write_text(file.read_text().replace("0.4", "0.6"))
    error = refused("localization", "--run", run, *words)
    assert "true_class_error is not that of" in error
    file.unlink()
    assert "evaluate the run again" in refused("localization", "--run", run, *words)
