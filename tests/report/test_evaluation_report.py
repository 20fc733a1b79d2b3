"""Tables and picture of an evaluation."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_backbone.classification.data.evaluation import BadSample
from resnet_backbone.classification.evaluation import EvaluationResult, Predictions
from resnet_backbone.report.evaluations import confusion_rows, write_evaluation
from resnet_backbone.report.plots import plot_confusion

NAMES = ["cat", 'dog, "big"', "cow", "class 3"]


def evaluation():
    """Labels cat, cat, dog; one cat is taken for class 3, which has no images; a bad dog."""
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.1, 0.1, 0.6], [0.1, 0.7, 0.1, 0.1]])
    found = Predictions.from_probabilities(scores, torch.tensor([0, 0, 1]), torch.arange(3))
    return EvaluationResult(found, (BadSample(3, 1, "", ""),), 4, {}, 1, 1.0, 0.0)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_tables(tmp_path):
    files = write_evaluation(tmp_path / "new", evaluation(), NAMES, "image {}".format)
    names = ["predictions.csv", "per_class.csv", "confusion.csv", "confusion.png"]
    assert [file.name for file in files] == names and all(file.is_file() for file in files)
    predictions = rows(tmp_path / "new" / "predictions.csv")
    header = "index image label label_name class1 name1 score1"
    assert predictions[0][:7] == header.split()
    assert predictions[2][:7] == ["1", "image 1", "0", "cat", "3", "class 3", "0.6"]
    assert len(predictions) == 4 and len(predictions[1]) == 4 + 3 * 4
    header, cat, dog = rows(tmp_path / "new" / "per_class.csv")
    assert header == ["class", "name", "images", "top1_error"]
    assert cat == ["0", "cat", "2", "50.0000"] and dog == ["1", 'dog, "big"', "2", "50.0000"]
    header, cat, dog = rows(tmp_path / "new" / "confusion.csv")
    assert header == ["label \\ predicted", "cat", 'dog, "big"', "class 3"]
    assert cat == ["cat", "1", "0", "1"] and dog == ['dog, "big"', "0", "1", "0"]
    with Image.open(tmp_path / "new" / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_picture_shows_shares_of_each_row():
    axes = plot_confusion(evaluation().confusion.numpy(), NAMES).axes[0]
    assert axes.images[0].get_array().tolist() == [[50, 0, 50], [0, 100, 0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == [*NAMES[:2], "others"]
    assert sorted(text.get_text() for text in axes.texts) == ["100", "50", "50"]


def test_picture_of_a_detectors_confusion():
    """Means over runs; a class without objects; what was missed, and what is on no object."""
    confusion = np.array([[6, 0, 1, 1], [0, 0, 0, 0], [0, 0.5, 1, 0.5], [1.5, 0.5, 0, 0]])
    axes = plot_confusion(confusion, ["cat", "cow", "dog"], detected=True).axes[0]
    found = axes.images[0].get_array().tolist()
    assert found == [[75, 12.5, 12.5, 0], [0, 50, 25, 25], [75, 0, 0, 25]]
    columns, names = axes.get_xticklabels(), axes.get_yticklabels()
    assert [label.get_text() for label in columns] == ["cat", "dog", "missed", "others"]
    assert [label.get_text() for label in names] == ["cat (8)", "dog (2)", "background (2)"]


@pytest.mark.parametrize("classes, named", [(25, True), (100, False)])
def test_many_classes(classes, named):
    confusion = np.eye(classes, dtype=np.int64)
    axes = plot_confusion(confusion, [f"n{i}" for i in range(classes)]).axes[0]
    assert bool(axes.texts) == named
    assert axes.images[0].get_array().shape == (classes, classes)
    assert len(list(confusion_rows(confusion, [str(i) for i in range(classes)]))) == classes + 1


@pytest.fixture
def tested(tmp_path):
    """Function: the folder of an evaluation of 100 images, of which the given ones are right."""

    def make(name, right, bad=(), images="img{}.jpg".format, **results):
        scores = torch.eye(5)[[0 if index in right else 1 for index in range(100)]]
        read = torch.tensor([index for index in range(100) if index not in bad])
        labels = torch.zeros(len(read), dtype=torch.long)
        found = Predictions.from_probabilities(scores[read], labels, read)
        samples = tuple(BadSample(index, 0, "", "") for index in bad)
        result = EvaluationResult(found, samples, 5, {}, 1, 2.0, 0.0)
        write_evaluation(tmp_path / name, result, list("abcde"), images)
        content = {**result.to_dict(), "engine": ["eager"], "precision": "float32"}
        content |= {"command": f"resnet-backbone evaluate-classifier --weights /home/me/{name}"}
        (tmp_path / name / "results.json").write_text(json.dumps(content | results))
        return tmp_path / name

    return make


def test_comparison_by_hand(tested, tool, cells, tmp_path):
    """80 and 88 right of 100: 3 only in the first, 11 only in the second; one is unreadable."""
    one, both = tested("one", range(80), bad=(99,)), tmp_path / "both.md"
    two = tested("two", range(3, 91), engine=["openvino"], precision="int8", date="2026-11-30")
    status, _, error = tool("evaluations", "--run", one, "--run", f"{two}=int8", "--output", both)
    assert status == 0, error
    header, _, first, second = cells(both.read_text())
    # 22 of 104 wrong: 21.15 +- 1.96 sqrt(.2115 .7885 / 104); 14 of 104: 13.46 +- 6.56
    assert first[:4] == ["one", "eager, float32", "20.00 [13.30, 29.00]", "1.00"]
    assert first[5:] == ["50.0", ""]
    assert second[:3] == ["int8", "openvino, int8", "12.00 [6.90, 20.02]"]
    # 3.5 and 11.5 of 102: -7.84 +- 1.96 sqrt(15 - 8 ** 2 / 102) / 102
    assert second[6] == "-8.00 [-15.13, -0.56]"
    assert "`resnet-backbone evaluate-classifier --weights $ROOT/two`" in both.read_text()


def test_comparisons_that_are_refused(tested, refused, tmp_path):
    one = tested("one", range(80))
    others = {
        "other and one were evaluated on different images": tested("other", range(80), images=str),
        "none has no results.json: give the --output of evaluate-clas": tmp_path / "none",
        "damaged (its top-1 error is not that of results.json": tested("odd", [], top1_error=1.0),
    }
    for message, folder in others.items():
        words = ["--run", one, "--run", folder, "--output", tmp_path / "t.md"]
        assert message in refused("evaluations", *words)
    assert not (tmp_path / "t.md").exists()
