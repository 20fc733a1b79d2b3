"""Class folders, flat folders with a label list, and tar shards, here and on other file systems."""

import os
import pickle
import re
import shutil
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch
from drawn_images import fill
from PIL import Image

from resnet_backbone.classification.data import imagenet
from resnet_backbone.classification.data.archives import index_shards, write_shards
from resnet_backbone.classification.data.augment import PaperAugmentation
from resnet_backbone.classification.data.imagenet import TarShards, read_image_folder
from resnet_backbone.classification.data.loader import LoaderSource
from resnet_backbone.classification.data.sources import SampleStream
from resnet_backbone.runtime.errors import DataError
from resnet_backbone.runtime.images import BadImage

CLASSES = {"n03": ["a.JPEG", "b.jpg"], "n01": ["c.png"], "n02": ["d.JPEG", "e.Jpeg", "f.webp"]}


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def root(tmp_path):
    for name, files in CLASSES.items():
        for file in files:
            save(tmp_path / "train" / name / file)
    return tmp_path / "train"


@pytest.fixture
def flat(tmp_path):
    for number in (3, 1, 2):
        save(tmp_path / "val" / f"v{number}.JPEG")
    return tmp_path / "val"


@pytest.fixture
def lines(tmp_path):
    """Function: text -> a file of it."""

    def write(text):
        path = tmp_path / "lines.txt"
        path.write_text(text)
        return path

    return write


def test_classes_are_counted_in_sorted_order(root):
    dataset = read_image_folder(root)
    assert dataset.class_names == ("n01", "n02", "n03")
    assert dataset.labels.tolist() == [0, 1, 1, 1, 2, 2] and dataset.labels.dtype == np.int64
    assert dataset.name(0) == str(root / "n01" / "c.png") and len(dataset) == 6
    sample = dataset[4]
    assert (sample.label, sample.name) == (2, str(root / "n03" / "a.JPEG"))
    assert sample.data == (root / "n03" / "a.JPEG").read_bytes()
    assert dataset.samples[0] == (root / "n01" / "c.png", 0)


def test_hidden_and_foreign_files_are_left_out(root):
    for name in (".DS_Store", "._a.JPEG", "notes.txt"):
        (root / "n01" / name).write_bytes(b"x")
    (root / ".n01.partial").mkdir()
    (root / "readme.txt").write_text("x")
    assert len(read_image_folder(root)) == 6
    # names beyond ASCII, and pickling
    save(root / "n01" / "bär.jpg")
    dataset = pickle.loads(pickle.dumps(read_image_folder(root)))
    assert len(dataset[0].data) > 100 and dataset.name(0).endswith("bär.jpg")


def test_a_selection_keeps_the_indices_of_the_whole(root):
    classes = {"n01": 7, "n02": 217, "n03": 482}
    dataset = read_image_folder(root, classes, 1000)
    assert dataset.labels.tolist() == [7, 217, 217, 217, 482, 482]
    assert len(dataset.class_names) == 1000
    assert (dataset.class_names[217], dataset.class_names[0]) == ("n02", "class 0")
    with pytest.raises(DataError, match="num_classes is 100"):
        read_image_folder(root, classes, 100)


@pytest.mark.parametrize(
    "text",
    ["n01 0\nn02 1\nn03 2\n", "n01\nn02\nn03\n", "n01 tench, Tinca\nn02 x\nn03 y\n", "n03 2\n"],
)
def test_class_lists(lines, text):
    assert imagenet.read_class_list(lines(text))["n03"] == 2


@pytest.mark.parametrize(
    "text",
    [
        "tabby cat 1\ngolden retriever 0\n",
        "golden retriever\ntabby cat\n",
        "golden retriever\t0 \ntabby cat\t1\n",
    ],
)
def test_class_lists_of_names_with_spaces(tmp_path, lines, text):
    expected = {"golden retriever": 0, "tabby cat": 1}
    for name in expected:
        save(tmp_path / "pets" / name / "a.png")
    assert imagenet.read_class_list(lines(text), tmp_path / "pets") == expected


def test_class_lists_with_descriptions(flat, lines):
    text = "v1.JPEG golden retriever\nv2.JPEG\ttabby\nv3.JPEG tabby\n"
    labels = lines(text).rename(flat.with_name("labels.txt"))
    assert imagenet.read_flat_folder(flat, labels).class_names == ("golden retriever", "tabby")
    labels.write_text(text.replace(" retriever", ""))
    for text in ("tabby felis catus\ngolden canis\n", "golden 1 canis\ntabby 0 felis catus\n"):
        found = imagenet.read_class_list(lines(text), flat, labels)
        assert found == {"tabby": 0, "golden": 1}
    assert imagenet.read_class_list(lines("n01 Boeing 747\n")) == {"n01": 0}


@pytest.mark.parametrize(
    "text", ["", "n01 0\nn02\n", "n01 0\nn02 0\n", "n01\nn01\n", "tabby cat\ngolden hamster\n"]
)
def test_unclear_class_lists_are_refused(lines, text):
    with pytest.raises(DataError, match="lines.txt"):
        imagenet.read_class_list(lines(text))


def test_missing_empty_and_unlisted_folders_are_errors(root, tmp_path):
    (root / "n04" / "empty").mkdir(parents=True)
    for folder, classes, message in (
        (tmp_path / "nowhere", None, "no such folder"),
        (root / "n01", None, "no class folders"),
        (root, {"n01": 0, "n02": 1}, "n03 is not in the class list"),
        (root, None, "n04 holds no images"),
    ):
        with pytest.raises(DataError, match=message):
            read_image_folder(folder, classes)
    (root / "n04" / "empty").rmdir(), (root / "n04").rmdir()
    dataset = read_image_folder(root)
    (root / "n01" / "c.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        dataset[0]


@pytest.mark.parametrize(
    "text", ["v1.JPEG n02\nv2.JPEG n01\nv3.JPEG n02\n", "v3.JPEG\t1\nv2.JPEG 0\n\nv1.JPEG 1\n"]
)
def test_flat_folder(flat, lines, text):
    dataset = imagenet.read_flat_folder(flat, lines(text))
    assert dataset.labels.tolist() == [dataset[i].label for i in range(3)] == [1, 0, 1]
    assert dataset.name(2) == str(flat / "v3.JPEG")


def test_flat_folder_with_the_classes_of_training(flat, root, lines):
    path = lines("v1.JPEG n03\nv2.JPEG n01\nv3.JPEG n02\n")
    val = imagenet.read_flat_folder(flat, path, {"n01": 0, "n02": 1, "n03": 2})
    assert val.labels.tolist() == [2, 0, 1]
    imagenet.check_same_classes(read_image_folder(root), val)


def test_a_number_that_is_a_class_name_is_no_index(flat, lines):
    classes = {name: index for index, name in enumerate(sorted(map(str, range(12))))}
    for text, labels in (
        ("v1.JPEG 10\nv2.JPEG 2\nv3.JPEG 1\n", [2, 4, 1]),
        ("v1.JPEG 0\nv2.JPEG 0\nv3.JPEG 11\n", [0, 0, 3]),
    ):
        assert imagenet.read_flat_folder(flat, lines(text), classes).labels.tolist() == labels


@pytest.mark.parametrize(
    "text, message",
    [
        ("490\n361\n171\n", "prepare-data imagenet --devkit"),
        ("", "empty"),
        ("v1.JPEG n01\nv2.JPEG\nv3.JPEG n01\n", "line 2 is not 'image label'"),
        ("v1.JPEG n01\nv1.JPEG n02\n", "twice"),
        ("v1.JPEG n01\n", "differ in 2 images; the first, v2.JPEG, is only in .*val"),
        ("v1.JPEG 0\nv2.JPEG 0\nv3.JPEG 0\nv4.JPEG 0\n", "v4.JPEG, is only listed in .*lines"),
        ("v1.JPEG n01\nv2.JPEG n09\nv3.JPEG n01\n", "n09 is none of the 3 classes"),
        ("v1.JPEG n01\nv2.JPEG 1\nv3.JPEG n02\n", "1 is a class index, n01 a class name"),
        ("v1.JPEG 0\nv2.JPEG 3\nv3.JPEG 0\n", "label 3, but there are 3 classes"),
    ],
)
def test_unusable_label_lists_are_refused(flat, lines, text, message):
    with pytest.raises(DataError, match=message) as caught:
        imagenet.read_flat_folder(flat, lines(text), {"n01": 0, "n02": 1, "n03": 2})
    assert "\n" not in str(caught.value)


def test_different_classes_of_training_and_validation_are_refused(root, tmp_path):
    save(tmp_path / "other" / "n09" / "a.png")
    train, val = read_image_folder(root), read_image_folder(tmp_path / "other")
    with pytest.raises(DataError, match="only one of them has n01, n02, n03"):
        imagenet.check_same_classes(train, val)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return read_image_folder(fill(tmp_path_factory.mktemp("images"), count=12, size=(30, 40)))


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    pytest.importorskip("webdataset")
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
    return sorted(dataset[i][:2] for i in range(len(dataset)))


def test_shards_hold_exactly_the_samples_of_the_folder(folder, shards):
    dataset = TarShards(shards)
    assert dataset.group_sizes == (5, 5, 5, 5, 4) and len(dataset) == 24
    assert dataset.class_names == ("n01", "n02")
    assert contents(dataset) == contents(folder)
    assert dataset.labels.tolist() == [dataset[i].label for i in range(24)]
    assert dataset.labels.tolist() != sorted(dataset.labels.tolist())  # they were dealt out
    webdataset = pytest.importorskip("webdataset")
    read = webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False)
    assert sorted((s["jpeg"], int(s["cls"])) for s in read) == contents(folder)


def write_tar(path, *samples):
    """A shard by webdataset, from (key, its files by extension)."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(path)) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})


def test_shards_of_webdataset_can_be_indexed(folder, tmp_path):
    samples = [folder[3], folder[17]]
    files = [{"jpg": sample.data, "cls": str(sample.label)} for sample in samples]
    write_tar(tmp_path / "x.tar", ("dir/s3", files[0]), ("dir/s17", files[1]))
    index_shards(tmp_path, ["cat", "dog"])
    dataset = TarShards(tmp_path)
    assert [dataset[i][:2] for i in range(2)] == [sample[:2] for sample in samples]
    assert dataset.class_names == ("cat", "dog")
    assert dataset.name(1) == f"{tmp_path}/x.tar/dir/s17.jpg"


def test_remote_shards_by_ranges_and_through_a_cache(shards, remote):
    expected = contents(TarShards(shards))
    assert contents(TarShards(remote)) == expected
    cached = TarShards(f"simplecache::{remote}")
    assert contents(cached) == expected
    fsspec.filesystem("memory").rm("/bucket/shard-000000.tar")
    assert contents(cached) == expected
    with pytest.raises(BadImage, match="shard-000000.tar"):
        contents(TarShards(remote))


def test_what_servers_and_missing_libraries_cause(shards, monkeypatch):
    dataset, answers = TarShards(shards), []

    class Server:
        def cat_file(self, path, start, end):
            if isinstance(answers[-1], Exception):
                raise answers[-1]
            return answers[-1]

    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (Server(), url))
    for answer, message in (
        (RuntimeError("429,\ntoo many requests"), "429, too many requests"),
        (TimeoutError(), "TimeoutError"),
    ):
        answers.append(answer)
        with pytest.raises(BadImage, match=f"shard-000000.tar/.*: .*{message}"):
            dataset[0]
    answers.append(bytes(10**5))
    with pytest.raises(DataError, match="the server sends whole shards: give simplecache::"):
        dataset[0]

    def missing(*_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", missing)
    with pytest.raises(DataError, match=r"Install s3fs to access S3 \(pip install it\)"):
        TarShards("s3://bucket")


def test_exact_epochs_and_resume_with_groups(shards):
    dataset = TarShards(shards)
    stream = SampleStream(24, 5, seed=1, group_sizes=dataset.group_sizes, groups_together=2)
    augment = PaperAugmentation(size=16, short_side=(18, 30))

    def some(first, count, workers):
        source = LoaderSource(dataset, stream, augment, workers=workers)
        return list(islice(source.batches(first), count))

    whole = some(0, 6, 0)
    for ours, theirs in zip(some(3, 3, 2), whole[3:], strict=True):
        assert torch.equal(ours.images, theirs.images)
    labels = torch.cat([batch.labels for batch in whole])[:24]
    assert sorted(labels.tolist()) == sorted(dataset.labels.tolist())


def test_damaged_shards_and_indices_are_told(shards, folder, tmp_path):
    with pytest.raises(DataError, match="prepare-data shards index"):
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
    (copy / imagenet.INDEX_NAME).write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="index.npz cannot be read"):
        TarShards(copy)
    write_tar(tmp_path / "x.tar", ("s1", {"jpg": b"x", "cls": "0"}), ("s2", {"jpg": b"x"}))
    with pytest.raises(DataError, match="needs <key>.*s2"):
        index_shards(tmp_path)


def test_interrupted_shards_leave_nothing_behind(tmp_path):
    pytest.importorskip("webdataset")
    dataset = read_image_folder(fill(tmp_path / "images", count=2, size=(30, 40)))
    os.remove(dataset.name(3))
    with pytest.raises(BadImage, match=re.escape(dataset.name(3))):
        write_shards(dataset, tmp_path / "shards", samples_per_shard=1, seed=None)
    assert not list((tmp_path / "shards").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"images", "shards"}
