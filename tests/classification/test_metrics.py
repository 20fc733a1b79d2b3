"""Metrics against scikit-learn and against counting by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_backbone.classification.metrics import (
    Predictions,
    confusion_matrix,
    cross_entropy,
    per_class_error,
    top_k_error,
)


def predictions_of(scores, labels, indices=None):
    indices = torch.arange(len(labels)) if indices is None else indices
    return Predictions.from_probabilities(scores, labels, indices)


@st.composite
def scored(draw):
    """Probabilities without ties, (N, C) with N in 1..40 and C in 2..12, and labels."""
    number, classes = draw(st.integers(1, 40)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = torch.from_numpy(rng.dirichlet(np.ones(classes), number))
    return scores, torch.from_numpy(rng.integers(0, classes, number))


@settings(max_examples=25, deadline=None)
@given(scored())
def test_scikit_learn_agrees(case):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    scores, labels = case
    number, classes = scores.shape
    found = predictions_of(scores, labels)
    names = list(range(classes))
    for k in range(1, min(classes, 6)):
        # scikit-learn wants (N,) scores of two classes, and warns where k is all classes
        y_score = scores.numpy() if classes > 2 else scores[:, 1].numpy()
        right = sklearn.top_k_accuracy_score(labels, y_score, k=k, labels=names, normalize=False)
        assert top_k_error(found, k) == 100 * (number - int(right)) / number
    expected = sklearn.confusion_matrix(labels, scores.argmax(1), labels=names)
    confusion = confusion_matrix(found, classes)
    assert confusion.tolist() == expected.tolist()
    recall = sklearn.recall_score(
        labels, scores.argmax(1), labels=names, average=None, zero_division=np.nan
    )
    for error, expected in zip(per_class_error(confusion), recall, strict=True):
        assert (error is None) == math.isnan(expected)
        assert error is None or error == pytest.approx(100 * (1 - expected), abs=1e-9)
    assert cross_entropy(found) == pytest.approx(
        sklearn.log_loss(labels, scores.numpy(), labels=names), rel=1e-12
    )


def test_ties_go_to_the_lower_class():
    scores = torch.full((2, 8), 0.125, dtype=torch.float64)
    found = predictions_of(scores, torch.tensor([4, 5]))
    assert found.classes.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert top_k_error(found, 5) == 50.0
    partly = torch.tensor([[0.2, 0.4, 0.0, 0.4]], dtype=torch.float64)
    assert predictions_of(partly, torch.tensor([3])).classes.tolist() == [[1, 3, 0, 2]]


def test_probability_zero_has_a_finite_loss():
    found = predictions_of(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 700 < cross_entropy(found) < 710


@settings(max_examples=30, deadline=None)
@given(scored(), st.integers(1, 7))
def test_merged_parts_are_the_whole(case, world):
    scores, labels = case
    whole = predictions_of(scores, labels)
    parts = []
    for rank in range(world):
        mine = torch.arange(len(labels))[rank::world]  # may be none
        parts.append(predictions_of(scores[mine], labels[mine], mine))
    merged = Predictions.merge(parts)
    for name in Predictions.__dataclass_fields__:
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name


def test_unreadable_images_count_as_wrong():
    scores = torch.eye(3, dtype=torch.float64)
    found = predictions_of(scores, torch.tensor([0, 1, 2]))
    assert top_k_error(found, 1) == 0.0
    assert top_k_error(found, 1, num_bad=1) == 25.0
    assert per_class_error(confusion_matrix(found, 3), [2, 2, 2]) == [0.0, 0.0, 75.0]
    assert per_class_error(confusion_matrix(found, 4), [3]) == [0.0, 0.0, 0.0, 100.0]
