"""CIFAR-10 files and the in-memory source, against torchvision's reader and transforms."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from resnet_backbone.classification.config import load_config
from resnet_backbone.classification.data.arrays import (
    PAD,
    ArraySource,
    channel_statistics,
    mean_image,
)
from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.build import build_data
from resnet_backbone.classification.data.cifar import (
    CLASS_NAMES,
    TEST_FILES,
    TRAIN_FILES,
    read_cifar10,
)
from resnet_backbone.classification.data.stream import SampleStream
from resnet_backbone.weights.preprocessing import InputNormalizer

PER_FILE = 12
BASE = Path(__file__).parents[3] / "configs/classification/cifar10/Base-CIFAR10.yaml"


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote them: so are the official files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def pixels_and_labels(number: int):
    rng = np.random.default_rng(number)
    return (
        rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8),
        rng.integers(0, 10, PER_FILE).astype(np.uint8),
    )


@pytest.fixture
def both_versions(tmp_path):
    """The same images in the binary and in the Python version, as they are published."""
    binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-py"
    binary.mkdir(), python.mkdir()
    for number, name in enumerate((*TRAIN_FILES, *TEST_FILES)):
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
    # red first, row by row
    assert torch.equal(first[0][0].flatten(), torch.from_numpy(pixels_and_labels(5)[0][0]))


def test_agrees_with_torchvision(both_versions, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    theirs = CIFAR10(str(both_versions[1].parent), train=True)
    images, labels = read_cifar10(both_versions[1], train=True)
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert labels.tolist() == theirs.targets


def test_the_official_folder_is_found_from_above(both_versions):
    binary, python = both_versions
    assert len(read_cifar10(binary.parent, train=False)[1]) == PER_FILE


def test_damaged_files_are_named(both_versions, tmp_path):
    binary, python = both_versions
    with pytest.raises(DataError, match="no CIFAR-10 here"):
        read_cifar10(tmp_path / "elsewhere", train=True)
    short = binary / "data_batch_3.bin"
    short.write_bytes(short.read_bytes()[:-7])
    with pytest.raises(DataError, match="data_batch_3.bin.*whole records"):
        read_cifar10(binary, train=True)
    short.unlink()
    with pytest.raises(DataError, match="data_batch_3.bin: cannot be read"):
        read_cifar10(binary, train=True)
    (python / "test_batch").write_bytes(b"nothing")
    with pytest.raises(DataError, match="test_batch: not a file"):
        read_cifar10(python, train=False)


def test_a_pickle_runs_nothing(both_versions, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (both_versions[1] / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match="asks for"):
        read_cifar10(both_versions[1], train=False)
    assert not (tmp_path / "made").exists()


def test_a_label_above_nine_is_no_cifar10(both_versions):
    records = np.zeros((2, 3073), np.uint8)
    records[1, 0] = 57
    (both_versions[0] / "test_batch.bin").write_bytes(records.tobytes())
    with pytest.raises(DataError, match="CIFAR-100"):
        read_cifar10(both_versions[0], train=False)


def source(images, augmentation, batch_size=8, rank=0, world=1, padding=None) -> ArraySource:
    stream = SampleStream(len(images), batch_size, 7, rank, world)
    labels = torch.arange(len(images))
    return ArraySource(
        images, labels, stream, CLASS_NAMES, augmentation=augmentation, padding=padding
    )


@pytest.fixture
def images():
    return torch.from_numpy(pixels_and_labels(1)[0].reshape(-1, 3, 32, 32).copy())


@pytest.mark.parametrize(("augmentation", "flips"), [("pad_crop", True), ("shift", False)])
def test_crops_are_torchvisions_pad_crop_flip(images, augmentation, flips):
    """Each image is one of the 81 crops (and their mirror images) that torchvision can make."""
    found = set()
    made = source(images, augmentation)
    for iteration in range(30):
        batch = made.batch(iteration)
        for pixels, label in zip(batch.images, batch.labels, strict=True):
            padded = F.pad(images[label], [PAD])
            for place in range(81):
                crop = F.crop(padded, place // 9, place % 9, 32, 32)
                if torch.equal(pixels, crop):
                    found.add((place, False))
                    break
                if torch.equal(pixels, F.hflip(crop)):
                    found.add((place, True))
                    break
            else:
                pytest.fail("not a crop of the padded image")
    assert {place for place, _ in found} > set(range(0, 81, 8))
    assert any(flipped for _, flipped in found) == flips
    if flips:
        share = sum(flipped for _, flipped in found) / len(found)
        assert 0.3 < share < 0.7


@pytest.mark.parametrize("mean", ["pixel", "channel"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_padding_is_zero_once_the_mean_is_subtracted(both_versions, mean, order):
    """To half a grey level; black padding, which was the only one, is far from it."""
    options = [f"data.root={both_versions[0]}", f"data.mean={mean}", f"data.channel_order={order}"]
    options.append("train.batch_size=8")
    for padding, largest in (("mean", 0.5), ("black", 255)):
        config = load_config([BASE], [*options, f"data.padding={padding}"])
        data = build_data(config, Path("."))
        normalize = InputNormalizer(data.preprocessing)
        outside = []
        for iteration in range(20):
            rows, columns = data.source._windows(iteration, 8)
            lost = ((rows < 0) | (rows > 31))[:, :, None] | ((columns < 0) | (columns > 31))[
                :, None
            ]
            pixels = normalize(data.source.batch(iteration).images).permute(0, 2, 3, 1)
            outside.append(pixels[lost].abs())
        assert 0 < torch.cat(outside).max() <= largest
        assert padding == "mean" or torch.cat(outside).max() > 10


def test_without_augmentation_images_stay(images):
    batch = source(images, "none").batch(0)
    assert torch.equal(batch.images, images[batch.labels])


def test_source_starts_anywhere_and_processes_share(images):
    whole = source(images, "pad_crop")
    iterator = whole.batches(0)
    expected = [next(iterator) for _ in range(5)]
    late = next(whole.batches(4))
    assert torch.equal(late.images, expected[4].images)
    parts = [source(images, "pad_crop", rank=rank, world=2).batch(4) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.images for part in parts]), late.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), late.labels)


def test_statistics_against_numpy(images):
    values = images.numpy().astype(np.float64)
    np.testing.assert_allclose(mean_image(images), values.mean(0), atol=1e-4)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-9)


def test_unknown_augmentation(images):
    with pytest.raises(DataError, match="pad_crop, shift or none"):
        source(images, "flip")
