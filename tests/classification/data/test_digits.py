"""The built-in digits as classification data: labels, separation, determinism, use in training."""

import hashlib
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from resnet_backbone.classification.config import load_config
from resnet_backbone.classification.data import digits
from resnet_backbone.classification.data.build import build_data
from resnet_backbone.runtime import builtin


@pytest.fixture(scope="module", autouse=True)
def one_drawing_each():
    """A quarter of the set: drawing all of it takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(digits, "COPIES", {"train": 1, "test": 1})
    digits._draw_all.cache_clear()
    yield
    patch.undo()
    digits._draw_all.cache_clear()


def test_arrays():
    for train, count in ((True, 1258), (False, 539)):
        images, labels = digits.read_digits(train)
        assert (images.dtype, tuple(images.shape)) == (torch.uint8, (count, 3, 64, 64))
        assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (count,))
        assert images.is_contiguous()
        assert labels.bincount(minlength=10).min() > 0.08 * count
        assert len(images.flatten(1).unique(dim=0)) == count
    assert digits.CLASS_NAMES == builtin.CLASS_NAMES and len(digits.CLASS_NAMES) == 10


def test_labels_are_those_of_the_scans():
    labels = digits.read_digits(False)[1]
    assert labels.tolist() == list(builtin.load_scans()[1][builtin.digit_indices("test")])


def test_kept_in_memory():
    assert digits.read_digits(True)[0] is digits.read_digits(True)[0]


def spy_on(monkeypatch, name):
    """Lets a function that draws record its first argument."""
    seen, original = set(), getattr(digits, name)

    def spy(first, *rest):
        seen.add(first)
        return original(first, *rest)

    monkeypatch.setattr(digits, name, spy)
    return seen


def test_train_and_test_share_no_scan_and_no_photograph(monkeypatch):
    used = {}
    for split in ("train", "test"):
        photographs = spy_on(monkeypatch, "crop_photograph")
        scans = spy_on(monkeypatch, "render_ink")
        digits._draw_all.__wrapped__(split)
        assert photographs == set(builtin.BACKGROUNDS[split])
        assert scans == set(builtin.digit_indices(split))
        used[split] = scans | photographs
        monkeypatch.undo()
    assert not used["train"] & used["test"]


def test_more_drawings_keep_the_first_ones_and_differ(monkeypatch):
    first = digits.read_digits(False)[0]
    monkeypatch.setattr(digits, "COPIES", {"test": 2})
    images, labels = digits._draw_all.__wrapped__("test")
    assert torch.equal(images[: len(first)], first)
    assert torch.equal(labels[: len(first)], labels[len(first) :])
    assert (images[: len(first)] != images[len(first) :]).flatten(1).any(1).all()


def test_every_digit_lies_inside_and_is_visible(monkeypatch):
    """Against the bare photograph, drawn with the same random numbers."""
    heights, centres = [], []
    for number, index in enumerate(list(builtin.digit_indices("train"))[:150]):
        drawn = digits.draw_crop("train", number, index).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(digits, "draw_ink", lambda canvas, *_: (canvas, None))
            bare = digits.draw_crop("train", number, index)
        change = np.abs(drawn - bare).max(axis=2)
        rows, columns = np.nonzero(change > 10)
        assert len(rows) > 40 and change.max() > 50
        heights.append(np.ptp(rows) + 1)
        centres.append((rows.mean(), columns.mean()))
    assert 30 <= min(heights) <= 40 and 48 <= max(heights) <= 64
    assert (np.std(centres, axis=0) > 2).all(), "digits are moved off the middle"
    assert (np.abs(np.array(centres) - 32) < 6 + 6).all(), "and stay near it"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install resnet_backbone\[quickstart\]"):
        builtin.load_scans.__wrapped__()


def test_as_training_data(tmp_path):
    config = load_config([], ["data.format=digits", "data.augmentation=shift", "data.std=channel",
                              "evaluation.protocol=full", "train.batch_size=16"])  # fmt: skip
    data = build_data(config, tmp_path)
    assert data.class_names == builtin.CLASS_NAMES
    assert (data.source.num_samples, data.evaluated_on) == (1258, "built-in digits, test")
    images = digits.read_digits(True)[0].float()
    assert data.preprocessing.channel_order == "RGB"
    assert data.preprocessing.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.01)
    assert data.preprocessing.std == pytest.approx(
        images.transpose(0, 1).flatten(1).std(1).tolist(), abs=0.01
    )
    batch = data.source.batch(0)
    assert tuple(batch.images.shape) == (16, 3, 64, 64)


def test_pixels_stay_the_same():
    """Numbers in docs/results rest on them; with these versions of Pillow and NumPy."""
    import PIL

    if PIL.__version__.partition(".")[0] != "13" or np.__version__.partition(".")[0] != "2":
        pytest.skip("other versions draw slightly other pixels")
    images = digits.read_digits(False)[0][:20]
    found = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert found[:16] == "a6f978d9f9c21b73"
