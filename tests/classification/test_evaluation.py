"""evaluate(): exact counts, ensembles, refusals, and two processes that equal one."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_backbone.classification.data.evaluation import BadSample, EvaluationBatch
from resnet_backbone.classification.evaluation import EvaluationResult, Predictions, evaluate
from resnet_backbone.classification.protocols import Full
from resnet_backbone.models import build_model
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.processes import World
from resnet_backbone.weights import Preprocessing
from resnet_backbone.weights.preprocessing import InputNormalizer

GREY = Preprocessing("RGB", 255.0, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))
BGR = Preprocessing("BGR", 255.0, (90.0, 95.0, 100.0), (1.0, 1.0, 1.0))
COUNT = 23


class Loader:
    """The part of a process of COUNT random images; "bad" ones, by index, cannot be read."""

    def __init__(self, batch_size=4, rank=0, world=1, bad=(), classes=10, count=COUNT):
        generator = torch.Generator().manual_seed(0)
        shape = (count, 3, 8, 8)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, classes, (count,), generator=generator)
        self.part = torch.arange(rank, count, world).split(batch_size) if rank < count else ()
        self.num_images, self.bad = count, set(bad)

    def __iter__(self):
        for part in self.part:
            keep = torch.tensor([int(i) not in self.bad for i in part])
            good, bad = part[keep], part[~keep].tolist()
            bad = (BadSample(i, int(self.labels[i]), self.name_of(i), "damaged") for i in bad)
            images = (self.images[good],) if len(good) else ()
            yield EvaluationBatch(images, self.labels[good], good, tuple(bad))

    def __len__(self):
        return len(self.part)

    def name_of(self, index):
        return f"folder/{index}.jpg"


def network(seed=0, classes=10, preprocessing=GREY):
    torch.manual_seed(seed)
    model = build_model("cifar_resnet8", num_classes=classes)
    nn.init.normal_(model.linear.weight)
    return model, InputNormalizer(preprocessing)


def test_numbers_equal_a_direct_computation():
    (model, normalizer), loader = network(), Loader()
    result = evaluate([(model, normalizer)], Full(), loader)
    with torch.no_grad():
        logits = model.eval()(normalizer(loader.images)).double()
    order = logits.argsort(1, descending=True)
    right = order == loader.labels[:, None]
    assert result.top1_error == 100 * (COUNT - int(right[:, :1].sum())) / COUNT
    assert result.top5_error == 100 * (COUNT - int(right[:, :5].sum())) / COUNT
    assert 0 < result.top5_error < result.top1_error < 100
    expected = nn.functional.cross_entropy(logits, loader.labels).item()
    assert result.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert result.predictions.classes.tolist() == order[:, :5].tolist()
    scores = logits.softmax(1).gather(1, order[:, :5]).float()
    torch.testing.assert_close(result.predictions.scores, scores)
    assert result.confusion.sum() == COUNT
    assert int(result.confusion.diagonal().sum()) == int(right[:, 0].sum())
    assert (result.num_images, result.num_classes, result.num_models) == (COUNT, 10, 1)


def test_an_ensemble_averages_probabilities_with_each_own_preprocessing():
    first, second = network(0), network(1, preprocessing=BGR)
    loader = Loader()
    result = evaluate([first, second], Full(), loader)
    with torch.no_grad():
        parts = [m.eval()(n(loader.images)).double().softmax(1) for m, n in (first, second)]
    expected = Predictions.from_probabilities(sum(parts) / 2, loader.labels, torch.arange(COUNT))
    assert result.predictions.classes.tolist() == expected.classes.tolist()
    # logits of hundreds, and what is folded depends on the batch
    torch.testing.assert_close(result.predictions.scores, expected.scores, rtol=1e-3, atol=1e-4)


def test_modes_come_back():
    model, normalizer = network()
    model.train().res3.eval()
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    evaluate([(model, normalizer)], Full(), Loader())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in statistics.items())


def test_unreadable_images_stop_or_count_as_wrong():
    with pytest.raises(UsageError, match=r"^folder/5.jpg: damaged; .*--max-bad-images N"):
        evaluate([network()], Full(), Loader(bad=[5]))
    with pytest.raises(UsageError, match=r"folder/5.jpg: damaged \(and 1 more\)"):
        evaluate([network()], Full(), Loader(bad=[6, 5]), max_bad_images=1)
    loader = Loader(batch_size=2, bad=[4, 5, 6])  # 4 and 5 are a whole batch
    result = evaluate([network()], Full(), loader, max_bad_images=3)
    assert (result.num_images, len(result.predictions)) == (COUNT, COUNT - 3)
    assert [bad.index for bad in result.bad] == [4, 5, 6]
    assert result.to_dict()["bad"][0]["name"] == "folder/4.jpg"
    assert "3 of them unreadable and counted as wrong" in str(result)
    with pytest.raises(UsageError, match="no readable image"):
        evaluate([network()], Full(), Loader(bad=range(COUNT)), max_bad_images=COUNT)


class NotANumber(nn.Module):
    """NaN for the images whose first red value is that of image 9."""

    def forward(self, x):
        logits = x.mean((2, 3)).repeat(1, 2)
        ninth = GREY.mean[0] + x[:, 0, 0, 0] * GREY.std[0]
        is_ninth = ninth.round() == Loader().images[9, 0, 0, 0]
        return torch.where(is_ninth[:, None], torch.nan, logits)


def test_scores_that_are_not_finite_name_the_image():
    models = [network(classes=6), (NotANumber(), InputNormalizer(GREY))]
    with pytest.raises(UsageError, match=r"folder/9.jpg \(index 9\): the scores of network 2"):
        evaluate(models, Full(), Loader(classes=6))


def test_few_classes_have_no_top5():
    result = evaluate([network(classes=3)], Full(), Loader(classes=3))
    assert result.top5_error is None and "top-5 error not defined" in str(result)
    assert result.predictions.classes.sort(1).values.tolist() == [[0, 1, 2]] * COUNT
    found = json.loads(json.dumps(result.to_dict()))
    assert found["top5_error"] is None and found["protocol"] == {"name": "full"}
    assert found["images_per_second"] > 0 and "predictions" not in found


@pytest.mark.parametrize(
    "models, loader, message",
    [
        ([], Loader(), "at least one network"),
        ([network(classes=9)], Loader(), "label 9, but the network has classes 0 to 8"),
        ([network(), network(classes=11)], Loader(), "network 2 has 11 classes, the first"),
        ([network()], Loader(world=2), "12 of 23 images were evaluated, 12 of them different"),
    ],
)
def test_refusals(models, loader, message):
    with pytest.raises(UsageError, match=message):
        evaluate(models, Full(), loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_gives_the_same_scores():
    (model, normalizer), loader = network(), Loader()
    cpu = evaluate([(model, normalizer)], Full(), loader)
    gpu = evaluate([(model.cuda(), InputNormalizer(GREY, "cuda"))], Full(), loader)
    torch.testing.assert_close(gpu.predictions.scores, cpu.predictions.scores, rtol=0, atol=0.01)


SAME = {"clean": {}, "one bad image": {"bad": [4]}, "fewer images than processes": {"count": 1}}
TOO_MANY = "folder/1.jpg: damaged (and 1 more)"
TWICE = "46 of 23 images were evaluated, 23 of them different"
REFUSED = {
    "one too many on one process": ({"bad": [1, 3]}, TOO_MANY),
    "one on each, together too many": ({"bad": [1, 2]}, TOO_MANY),
    "labels that one process has": ({"classes": 11, "count": 8}, "label 10, but the network has"),
    "not sharded": ({"rank": 0, "world": 1}, TWICE),
}


def attempts(world):
    found = {}
    for name, options in (SAME | {name: options for name, (options, _) in REFUSED.items()}).items():
        loader = Loader(**{"rank": world.rank, "world": world.size, **options})
        try:
            found[name] = evaluate([network()], Full(), loader, world=world, max_bad_images=1)
        except UsageError as error:
            found[name] = str(error)
    return found


def test_two_processes_equal_one(two_processes):
    alone = attempts(World())
    for found in two_processes(attempts):
        for name in SAME:
            assert_same(found[name], alone[name])
        for name, (_, message) in REFUSED.items():
            assert message in found[name]


def assert_same(result, expected):
    ours, theirs = vars(result.predictions), vars(expected.predictions)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("indices", "labels", "classes"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (result.bad, result.num_classes) == (expected.bad, expected.num_classes)


def result_of(scores, labels, bad=()):
    found = Predictions.from_probabilities(scores, labels, torch.arange(len(labels)))
    bad = tuple(BadSample(0, label, "", "") for label in bad)
    return EvaluationResult(found, bad, scores.shape[1], {}, 1, 1.0, 0.0)


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
    found, names = result_of(scores, labels), list(range(classes))
    for k in range(1, min(classes, 6)):
        # scikit-learn wants (N,) scores of two classes, and warns where k is all classes
        y_score = scores.numpy() if classes > 2 else scores[:, 1].numpy()
        right = sklearn.top_k_accuracy_score(labels, y_score, k=k, labels=names, normalize=False)
        assert found.top_k_error(k) == 100 * (number - int(right)) / number
    expected = sklearn.confusion_matrix(labels, scores.argmax(1), labels=names)
    assert found.confusion.tolist() == expected.tolist()
    options = dict(average=None, zero_division=np.nan)
    recall = sklearn.recall_score(labels, scores.argmax(1), labels=names, **options)
    for error, expected in zip(found.per_class_error, recall, strict=True):
        assert (error is None) == math.isnan(expected)
        assert error is None or error == pytest.approx(100 * (1 - expected), abs=1e-9)
    loss = sklearn.log_loss(labels, scores.numpy(), labels=names)
    assert found.cross_entropy == pytest.approx(loss, rel=1e-12)


def test_ties_go_to_the_lower_class_and_zero_has_a_finite_loss():
    scores = torch.full((2, 8), 0.125, dtype=torch.float64)
    found = result_of(scores, torch.tensor([4, 5]))
    assert found.predictions.classes.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert found.top5_error == 50.0
    partly = torch.tensor([[0.2, 0.4, 0.0, 0.4]], dtype=torch.float64)
    assert result_of(partly, torch.tensor([3])).predictions.classes.tolist() == [[1, 3, 0, 2]]
    zero = result_of(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 700 < zero.cross_entropy < 710


@settings(max_examples=30, deadline=None)
@given(scored(), st.integers(1, 7))
def test_merged_parts_are_the_whole(case, world):
    scores, labels = case
    whole = Predictions.from_probabilities(scores, labels, torch.arange(len(labels)))
    shares = [torch.arange(len(labels))[rank::world] for rank in range(world)]  # some may be empty
    merged = Predictions.merge(
        [Predictions.from_probabilities(scores[mine], labels[mine], mine) for mine in shares]
    )
    for name in Predictions.__dataclass_fields__:
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name


def test_unreadable_images_count_as_wrong():
    scores, labels = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    assert result_of(scores, labels).top1_error == 0.0
    assert result_of(scores, labels, [2]).top1_error == 25.0
    assert result_of(scores, labels, [2, 2, 2]).per_class_error == [0.0, 0.0, 75.0]
    assert result_of(torch.eye(3, 4), labels, [3]).per_class_error == [0.0, 0.0, 0.0, 100.0]
