"""The order of samples; data sets in memory: CIFAR-10, its crops against torchvision's, digits."""

import hashlib
import itertools
import pickle
import struct
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as F

from resnet_backbone.classification.config import load_config
from resnet_backbone.classification.data import sources
from resnet_backbone.classification.data.build import build_data
from resnet_backbone.classification.data.sources import ArraySource, SampleStream, read_cifar10
from resnet_backbone.runtime import builtin
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.weights.preprocessing import InputNormalizer

PER_FILE = 12


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 5))
def test_every_sample_once_an_epoch(num_samples, batch_size, seed):
    stream = SampleStream(num_samples, batch_size, seed)
    drawn = np.concatenate([stream.batch(i)[0] for i in range(-(-3 * num_samples // batch_size))])
    for part in drawn[: 3 * num_samples].reshape(3, -1):
        assert sorted(part) == list(range(num_samples))


@given(st.integers(1, 40), st.sampled_from([2, 3, 4]), st.integers(1, 5))
def test_processes_share_each_batch(num_samples, world, local):
    whole = SampleStream(num_samples, world * local, seed=3)
    parts = [SampleStream(num_samples, world * local, 3, rank, world) for rank in range(world)]
    for iteration in range(5):
        joined = np.concatenate([part.batch(iteration)[0] for part in parts])
        np.testing.assert_array_equal(joined, whole.batch(iteration)[0])


def test_epochs_and_seeds_differ():
    stream = SampleStream(100, 100, seed=1)
    assert (stream.epoch_order(0) != stream.epoch_order(1)).any()
    assert (stream.epoch_order(0) != SampleStream(100, 100, seed=2).epoch_order(0)).any()
    # a batch over the end of an epoch says so
    indices, epochs = SampleStream(5, 4, seed=0).batch(1)
    assert epochs.tolist() == [0, 1, 1, 1] and len(set(indices[1:])) == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_shards_are_read_whole_and_neighbors_together(sizes, together):
    total = sum(sizes)
    groups = {"group_sizes": tuple(sizes), "groups_together": together}
    order = SampleStream(total, 1, seed=4, **groups).epoch_order(2)
    assert sorted(order) == list(range(total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order].tolist()
    shards = list(dict.fromkeys(shard_of))
    last = {shard: place for place, shard in enumerate(shard_of)}
    for first in range(0, len(shards), together):  # each group ends before the next one begins
        ends = max(last[shard] for shard in shards[first : first + together])
        assert not set(shard_of[ends + 1 :]) & set(shards[: first + together])
        assert set(shard_of[: ends + 1]) == set(shards[: first + together])


def test_impossible_streams_are_refused():
    for (samples, world), hint in (((0, 1), "no samples"), ((9, 3), "cannot be divided")):
        with pytest.raises(DataError, match=hint):
            SampleStream(samples, batch_size=4, world=world)


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2, 3)]
    *draws, again = [sources.sample_rng(*key).random() for key in keys]
    assert len(set(draws)) == 4 and again == draws[0]


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote them: so are the official files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def pixels_and_labels(number: int):
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
    return pixels, rng.integers(0, 10, PER_FILE).astype(np.uint8)


@pytest.fixture
def both_versions(tmp_path):
    """The same images in the binary and in the Python version, as they are published."""
    binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-py"
    binary.mkdir(), python.mkdir()
    for number, name in enumerate((*sources.TRAIN_FILES, *sources.TEST_FILES)):
        pixels, labels = pixels_and_labels(number)
        records = np.concatenate([labels[:, None], pixels], axis=1)
        (binary / f"{name}.bin").write_bytes(records.tobytes())
        table = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}
        with (python / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(table)
    return binary, python


def test_both_versions_give_the_same_images(both_versions):
    for train, count in ((True, 5 * PER_FILE), (False, PER_FILE)):
        first, second = (read_cifar10(folder, train) for folder in both_versions)
        assert first[0].shape == (count, 3, 32, 32) and first[0].dtype == torch.uint8
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(read_cifar10(both_versions[0].parent, train=False)[0], first[0])
    # red first, row by row
    assert torch.equal(first[0][0].flatten(), torch.from_numpy(pixels_and_labels(5)[0][0]))


@pytest.mark.parametrize(
    "version, name, content, message",
    [
        (0, "data_batch_3.bin", bytes(3073 - 7), "data_batch_3.bin.*whole number of records"),
        (0, "data_batch_3.bin", None, "data_batch_3.bin: .*No such file"),
        (0, "data_batch_3.bin", bytes([57]) + bytes(3072), "CIFAR-100"),
        (0, "data_batch_1.bin", None, "no CIFAR-10 here"),
        (1, "data_batch_3", b"nothing", "data_batch_3: not a file"),
    ],
)
def test_damaged_files_are_named(both_versions, version, name, content, message):
    path = both_versions[version] / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_cifar10(path.parent, train=True)


def test_a_pickle_runs_nothing(both_versions, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (both_versions[1] / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match="asks for"):
        read_cifar10(both_versions[1], train=False)
    assert not (tmp_path / "made").exists()


def source(images, augmentation, batch_size=8, rank=0, world=1, padding=None) -> ArraySource:
    stream = SampleStream(len(images), batch_size, 7, rank, world)
    labels = torch.arange(len(images))
    return ArraySource(images, labels, stream, augmentation=augmentation, padding=padding)


@pytest.fixture
def images():
    return torch.from_numpy(pixels_and_labels(1)[0].reshape(-1, 3, 32, 32).copy())


@pytest.mark.parametrize(("augmentation", "flips"), [("pad_crop", True), ("shift", False)])
def test_crops_are_torchvisions_pad_crop_flip(images, augmentation, flips):
    """Each image is one of the 81 crops (and their mirror images) that torchvision can make."""
    crops = {}
    for (label, image), place in itertools.product(enumerate(images), range(81)):
        crop = F.crop(F.pad(image, [sources.PAD]), place // 9, place % 9, 32, 32)
        crops[label, F.hflip(crop).numpy().tobytes()] = place, True
        crops[label, crop.numpy().tobytes()] = place, False
    found, made = set(), source(images, augmentation)
    for iteration in range(30):
        batch = made.batch(iteration)
        for pixels, label in zip(batch.images, batch.labels.tolist(), strict=True):
            found.add(crops[label, pixels.contiguous().numpy().tobytes()])
    assert {place for place, _ in found} > set(range(0, 81, 8))
    assert any(flipped for _, flipped in found) == flips
    if flips:
        share = sum(flipped for _, flipped in found) / len(found)
        assert 0.3 < share < 0.7


@pytest.mark.parametrize("mean", ["pixel", "channel"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_padding_is_zero_once_the_mean_is_subtracted(both_versions, mean, order):
    """To half a gray level; black padding, which was the only one, is far from it."""
    options = [f"data.root={both_versions[0]}", f"data.mean={mean}", f"data.channel_order={order}"]
    for padding, largest in (("mean", 0.5), ("black", 255)):
        words = [*options, "train.batch_size=8", f"data.padding={padding}"]
        config = load_config(["cifar10/Base-CIFAR10"], words)
        data = build_data(config, Path("."))
        normalize = InputNormalizer(data.preprocessing)
        outside = []
        for iteration in range(20):
            rows, columns = data.source._windows(iteration, 8)
            rows, columns = (places != places.clamp(0, 31) for places in (rows, columns))
            lost = rows[:, :, None] | columns[:, None]
            pixels = normalize(data.source.batch(iteration).images).permute(0, 2, 3, 1)
            outside.append(pixels[lost].abs())
        assert 0 < torch.cat(outside).max() <= largest
        assert padding == "mean" or torch.cat(outside).max() > 10


def test_source_starts_anywhere_and_processes_share(images):
    whole = source(images, "pad_crop")
    *_, expected = itertools.islice(whole.batches(0), 5)
    late = next(whole.batches(4))
    assert torch.equal(late.images, expected.images)
    parts = [source(images, "pad_crop", rank=rank, world=2).batch(4) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.images for part in parts]), late.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), late.labels)
    plain = source(images, "none").batch(0)
    assert torch.equal(plain.images, images[plain.labels])


@pytest.fixture(scope="module")
def digits():
    """A quarter of the built-in digits, which take seconds to draw, and what they are drawn from.

    Returns:
        For each split images, labels, indices of scans, names of photographs.
    """
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    found, patch = {}, pytest.MonkeyPatch()
    patch.setattr(sources, "COPIES", {"train": 1, "test": 1})
    sources.read_digits.cache_clear()
    for split in ("train", "test"):
        with patch.context() as spies:
            used = [Mock(wraps=draw) for draw in (builtin.render_ink, builtin.crop_photograph)]
            for name, spy in zip(("render_ink", "crop_photograph"), used, strict=True):
                spies.setattr(builtin, name, spy)
            drawn = sources.read_digits(split == "train")
        found[split] = *drawn, *({call.args[0] for call in spy.call_args_list} for spy in used)
    yield found
    patch.undo()
    sources.read_digits.cache_clear()


@pytest.mark.parametrize(("split", "count"), [("train", 1258), ("test", 539)])
def test_digits(digits, split, count):
    images, labels, scans, photographs = digits[split]
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (count, 3, 64, 64))
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (count,))
    assert images.is_contiguous() and labels.bincount(minlength=10).min() > 0.08 * count
    assert len({image.numpy().tobytes() for image in images}) == count
    assert labels.tolist() == list(builtin.load_scans()[1][builtin.digit_indices(split)])
    assert scans == set(builtin.digit_indices(split))
    assert photographs == set(builtin.BACKGROUNDS[split])
    for other in digits.keys() - {split}:
        assert not (scans | photographs) & set().union(*digits[other][2:])
    assert sources.read_digits(split == "train")[0] is images  # kept in memory


def test_more_drawings_keep_the_first_ones_and_differ(digits, monkeypatch):
    monkeypatch.setattr(sources, "digit_indices", lambda split: builtin.digit_indices(split)[:40])
    monkeypatch.setattr(sources, "COPIES", {"test": 2})
    images, labels = sources.read_digits.__wrapped__(False)
    assert torch.equal(images[:40], digits["test"][0][:40])
    assert torch.equal(labels[:40], labels[40:])
    assert (images[:40] != images[40:]).flatten(1).any(1).all()


def test_every_digit_lies_inside_and_is_visible(digits, monkeypatch):
    """Against the bare photograph, drawn with the same random numbers."""
    heights, centers = [], []
    monkeypatch.setattr(builtin, "draw_ink", lambda canvas, *_: (canvas, None))
    for number, index in enumerate(list(builtin.digit_indices("train"))[:150]):
        drawn = digits["train"][0][number].permute(1, 2, 0).numpy().astype(int)
        change = np.abs(drawn - builtin.draw_digit_crop("train", number, index)).max(axis=2)
        rows, columns = np.nonzero(change > 10)
        assert len(rows) > 40 and change.max() > 50
        heights.append(np.ptp(rows) + 1)
        centers.append((rows.mean(), columns.mean()))
    assert 30 <= min(heights) <= 40 and 48 <= max(heights) <= 64
    assert (np.std(centers, axis=0) > 2).all(), "digits are moved off the middle"
    assert (np.abs(np.array(centers) - 32) < 6 + 6).all(), "and stay near it"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'resnet_backbone\[quickstart\]'"):
        builtin.load_scans.__wrapped__()


def test_digits_as_training_data(digits, tmp_path):
    words = "data.format=digits data.augmentation=shift data.std=channel train.batch_size=16"
    config = load_config([], [*words.split(), "evaluation.protocol=full"])
    data = build_data(config, tmp_path)
    assert data.class_names == builtin.CLASS_NAMES
    assert (data.source.num_samples, data.evaluated_on) == (1258, "built-in digits, test")
    images = digits["train"][0].float()
    assert data.preprocessing.channel_order == "RGB"
    assert data.preprocessing.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.01)
    std = images.transpose(0, 1).flatten(1).std(1).tolist()
    assert data.preprocessing.std == pytest.approx(std, abs=0.01)
    assert tuple(data.source.batch(0).images.shape) == (16, 3, 64, 64)


def test_pixels_of_digits_stay_the_same(digits):
    """Numbers in docs/results rest on them; with these versions of Pillow and NumPy."""
    if PIL.__version__.partition(".")[0] != "13" or np.__version__.partition(".")[0] != "2":
        pytest.skip("other versions draw slightly other pixels")
    found = hashlib.sha256(digits["test"][0][:20].numpy().tobytes()).hexdigest()
    assert found[:16] == "6d445484da56c62f"
