"""Tables and picture of an evaluation."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_backbone.classification.data.evaluation import BadSample
from resnet_backbone.classification.evaluation import EvaluationResult, Predictions
from resnet_backbone.report.plots import plot_confusion
from resnet_backbone.report.table import confusion_rows, write_evaluation

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
    assert rows(tmp_path / "new" / "per_class.csv") == [
        ["class", "name", "images", "top1_error"],
        ["0", "cat", "2", "50.0000"],
        ["1", 'dog, "big"', "2", "50.0000"],
    ]
    assert rows(tmp_path / "new" / "confusion.csv") == [
        ["label \\ predicted", "cat", 'dog, "big"', "class 3"],
        ["cat", "1", "0", "1"],
        ['dog, "big"', "0", "1", "0"],
    ]
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
    columns, names = (
        [label.get_text() for label in labels]
        for labels in (axes.get_xticklabels(), axes.get_yticklabels())
    )
    assert columns == ["cat", "dog", "missed", "others"]
    assert names == ["cat (8)", "dog (2)", "background (2)"]


@pytest.mark.parametrize("classes, named", [(25, True), (100, False)])
def test_many_classes(classes, named):
    confusion = np.eye(classes, dtype=np.int64)
    axes = plot_confusion(confusion, [f"n{i}" for i in range(classes)]).axes[0]
    assert bool(axes.texts) == named
    assert axes.images[0].get_array().shape == (classes, classes)
    assert len(list(confusion_rows(confusion, [str(i) for i in range(classes)]))) == classes + 1
