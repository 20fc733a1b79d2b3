"""Tar shards: the same samples as the folder, here and on other file systems."""

import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from resnet_backbone.classification.data.augment import PaperAugmentation
from resnet_backbone.classification.data.decode import BadImage
from resnet_backbone.classification.data.imagenet import read_image_folder
from resnet_backbone.classification.data.loader import LoaderSource
from resnet_backbone.classification.data.shards import (
    INDEX_NAME,
    TarShards,
    index_shards,
    write_shards,
)
from resnet_backbone.classification.data.stream import SampleStream
from resnet_backbone.runtime.errors import DataError

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("n01", "n02"):
        (root / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((30, 40)).save(root / name / f"{name}_{i}.JPEG")
    return read_image_folder(root)


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    url = tmp_path_factory.mktemp("shards") / "train"
    write_shards(folder, url, samples_per_shard=5)
    return url


@pytest.fixture
def remote(shards):
    """The shards in fsspec's file system in memory."""
    filesystem = fsspec.filesystem("memory")
    for path in shards.iterdir():
        filesystem.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    filesystem.rm("/bucket", recursive=True)


def contents(dataset):
    return sorted(
        (sample.data, sample.label) for sample in (dataset[i] for i in range(len(dataset)))
    )


def test_shards_hold_exactly_the_samples_of_the_folder(folder, shards):
    dataset = TarShards(shards)
    assert dataset.group_sizes == (5, 5, 5, 5, 4) and len(dataset) == 24
    assert dataset.class_names == ("n01", "n02") and dataset.num_classes == 2
    assert contents(dataset) == contents(folder)
    assert dataset.labels.tolist() == [dataset[i].label for i in range(24)]
    assert dataset.labels.tolist() != sorted(dataset.labels.tolist())  # they were dealt out


def test_webdataset_reads_them(folder, shards):
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    read = webdataset.WebDataset(urls, shardshuffle=False)
    assert sorted((s["jpeg"], int(s["cls"])) for s in read) == contents(folder)


def test_shards_of_webdataset_can_be_indexed(folder, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for i in (3, 17):
            sample = folder[i]
            writer.write({"__key__": f"dir/s{i}", "jpg": sample.data, "cls": str(sample.label)})
    index_shards(tmp_path, ["cat", "dog"])
    dataset = TarShards(tmp_path)
    assert [dataset[i][:2] for i in range(2)] == [folder[3][:2], folder[17][:2]]
    assert dataset.class_names == ("cat", "dog")
    assert dataset.name(1) == f"{tmp_path}/x.tar/dir/s17.jpg"


def test_remote_shards_by_ranges_and_through_a_cache(shards, remote, tmp_path):
    expected = contents(TarShards(shards))
    assert contents(TarShards(remote)) == expected
    cache = tmp_path / "cache"
    assert contents(TarShards(remote, cache)) == expected
    assert sorted(p.name for p in cache.iterdir()) == sorted(p.name for p in shards.glob("*.tar"))
    fsspec.filesystem("memory").rm("/bucket/shard-000000.tar")
    assert contents(TarShards(remote, cache)) == expected  # from the cache
    with pytest.raises(BadImage, match="shard-000000.tar"):
        contents(TarShards(remote))


def test_exact_epochs_and_resume_with_groups(shards):
    dataset = TarShards(shards)
    stream = SampleStream(24, 5, seed=1, group_sizes=dataset.group_sizes, groups_together=2)
    augment = PaperAugmentation(size=16, short_side=(18, 30))

    def some(first, count, workers):
        source = LoaderSource(dataset, stream, augment, workers=workers)
        batches = source.batches(first)
        return [next(batches) for _ in range(count)]

    whole = some(0, 6, 0)
    for ours, theirs in zip(some(3, 3, 2), whole[3:], strict=True):
        assert torch.equal(ours.images, theirs.images)
    labels = torch.cat([batch.labels for batch in whole])[:24]
    assert sorted(labels.tolist()) == sorted(dataset.labels.tolist())


def test_pickled_and_forked_readers_open_their_own_files(shards):
    dataset = TarShards(shards)
    first = dataset[0]
    assert pickle.loads(pickle.dumps(dataset))[0] == first
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"same" if dataset[0] == first else b"else")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 4) == b"same" and dataset[0] == first


def test_damaged_shards_and_indices_are_told(shards, folder, tmp_path):
    with pytest.raises(DataError, match="prepare_data.py shards index"):
        TarShards(tmp_path)
    with pytest.raises(DataError, match="no .tar files"):
        index_shards(tmp_path)
    with pytest.raises(DataError, match="not empty"):
        write_shards(folder, shards)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    last = copy / "shard-000004.tar"
    last.write_bytes(last.read_bytes()[:700])
    with pytest.raises(BadImage, match="shorter than its index says"):
        TarShards(copy)[23]
    with pytest.raises(DataError, match="shard-000004.tar"):
        index_shards(copy)
    (copy / INDEX_NAME).write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="damaged"):
        TarShards(copy)


def test_samples_without_a_class_are_refused(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "s1", "jpg": b"x", "cls": "0"})
        writer.write({"__key__": "s2", "jpg": b"x"})
    with pytest.raises(DataError, match="s2 has only one of them"):
        index_shards(tmp_path)
