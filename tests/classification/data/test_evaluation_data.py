"""Evaluation sets and their loader: every image exactly once, nothing in place of a bad one."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_backbone.classification.data import evaluation
from resnet_backbone.classification.data.evaluation import EvaluationFiles, EvaluationLoader
from resnet_backbone.runtime.errors import DataError


def arrays(count, size=4):
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return evaluation.EvaluationArrays(images, torch.arange(count) % 7)


@pytest.fixture
def files(tmp_path):
    """Six images of three sizes, of which "3.png" is cut off, and their pixels."""
    rng = np.random.default_rng(0)
    samples, pixels = [], []
    for number, (height, width) in enumerate([(20, 30), (25, 20), (20, 30), (20, 30), (20, 20)]):
        path = tmp_path / f"{number}.png"
        pixels.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        Image.fromarray(pixels[-1]).save(path)
        samples.append((path, number + 10))
    path.with_name("3.png").write_bytes(path.with_name("3.png").read_bytes()[:200])
    return samples, pixels


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7))
def test_every_image_exactly_once(count, batch_size, world):
    data = arrays(count)
    seen = collections.Counter()
    for rank in range(world):
        loader = EvaluationLoader(data, batch_size, rank=rank, world=world)
        batches = list(loader)
        assert len(batches) == len(loader) and loader.num_images == count
        assert all(len(batch.labels) == batch_size for batch in batches[:-1])
        for batch in batches:
            seen.update(batch.indices.tolist())
            assert torch.equal(batch.images[0], data.images[batch.indices])
            assert data.name_of(int(batch.indices[0])) == f"image {batch.indices[0]}"
            assert torch.equal(batch.labels, data.labels[batch.indices])
    assert seen == collections.Counter(range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_files(files, workers):
    samples, pixels = files
    data = EvaluationFiles(samples, (None, 10))
    loader = EvaluationLoader(data, 2, workers=workers)
    first, second, last = loader
    assert isinstance(first.images[0], list) and isinstance(first.images[1], list)
    for image, original in zip(first.images[0], pixels, strict=False):
        assert torch.equal(image, torch.from_numpy(original).permute(2, 0, 1))
    assert [tuple(image.shape) for image in first.images[1]] == [(3, 10, 15), (3, 12, 10)]
    assert first.labels.tolist() == [10, 11] and first.indices.tolist() == [0, 1]
    assert second.images[0].shape == (1, 3, 20, 30)  # its neighbor is bad
    assert second.labels.tolist() == [12] and second.indices.tolist() == [2]
    (bad,) = second.bad
    assert bad[:3] == (3, 13, str(samples[3][0])) and "truncated" in bad.reason
    assert last.images[1].shape == (1, 3, 10, 10) and not last.bad
    assert loader.name_of(4) == str(samples[4][0])


def test_files_are_shared_by_processes(files):
    found = []
    for rank in range(2):
        for batch in EvaluationLoader(EvaluationFiles(files[0]), 2, rank=rank, world=2):
            found += batch.indices.tolist() + [bad.index for bad in batch.bad]
    assert found == [0, 2, 4, 1, 3]


def crop(image):
    return image[:, :5, :5]


def test_prepared_images_are_stacked(files):
    (batch,) = EvaluationLoader(EvaluationFiles(files[0], (10,), crop), 5, workers=1)
    assert batch.images[0].shape == (4, 3, 5, 5)


def test_bad_images_only():
    data = EvaluationFiles([("a.jpg", 1), ("b.jpg", 2)])
    (batch,) = EvaluationLoader(data, 2)
    assert [bad.name for bad in batch.bad] == ["a.jpg", "b.jpg"]
    assert len(batch.labels) == 0 and batch.images == ()
    assert isinstance(data[0], evaluation.BadSample)


@pytest.mark.parametrize(
    "data, size, message",
    [(arrays(3), 0, "batch size 0"), (EvaluationFiles([]), 2, "has no images")],
)
def test_wrong_use(data, size, message):
    with pytest.raises(DataError, match=message):
        EvaluationLoader(data, size)
