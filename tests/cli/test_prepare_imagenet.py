"""prepare-data for ImageNet and tar shards, on miniature archives."""

import errno
import importlib
import io
import os
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.classification.data import archives as imagenet_archives
from resnet_backbone.classification.data import imagenet
from resnet_backbone.classification.data.imagenet import TarShards, read_image_folder
from resnet_backbone.cli import prepare_data
from resnet_backbone.runtime.errors import DataError

from packed import noise_jpeg, tar_of  # isort: skip

# The kit's numbers, in an order that is not that of the wnids.
IDS = {1: "n00000003", 2: "n00000001", 3: "n00000002"}
TRUTH = [3, 1, 1, 2, 3, 2]
ANY = ["--train-images", "0", "--val-images", "0", "--classes", "0"]


@pytest.fixture
def run(run_command):
    return partial(run_command, prepare_data.main)


jpeg = partial(noise_jpeg, height=8, width=9)


def meta_mat() -> bytes:
    savemat = pytest.importorskip("scipy.io").savemat
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in IDS.items()]
    rows.append((4, "n00000009", "animal", "an inner node", 3))
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    synsets = np.array(rows, dtype=kinds).reshape(-1, 1)
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets})
    return stream.getvalue()


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpeg(10 * n + i) for i in range(2 + n)})
        for n, wnid in enumerate(IDS.values())
    }
    (folder / "train.tar").write_bytes(tar_of(inner))
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(1, len(TRUTH) + 1)}
    (folder / "val.tar").write_bytes(tar_of(val))
    kit = {
        "kit/data/meta.mat": meta_mat(),
        "kit/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode(),
    }
    (folder / "devkit.tar.gz").write_bytes(tar_of(kit, "w:gz"))
    return folder


@pytest.fixture
def unpack(run, archives, tmp_path):

    def call(*options, train=True, labels=True, folder=tmp_path) -> tuple[int, str]:
        arguments = ["imagenet", folder / "imagenet", "--val-archive", archives / "val.tar"]
        arguments += ["--train-archive", archives / "train.tar"] if train else []
        arguments += ["--devkit", archives / "devkit.tar.gz"] if labels else []
        status, _, error = run(*arguments, *options)
        return status, error

    return call


EXPECTED = [sorted(IDS.values()).index(IDS[number]) for number in TRUTH]


def labels_by_name(images) -> list[int]:
    found = {Path(path).name: label for path, label in images.samples}
    return [found[name] for name in sorted(found)]


def test_the_kits_numbers_become_the_right_classes(tmp_path, archives, unpack):
    assert unpack(*ANY)[0] == 0
    train = read_image_folder(tmp_path / "imagenet" / "train")
    val = read_image_folder(tmp_path / "imagenet" / "val")
    assert train.class_names == val.class_names == ("n00000001", "n00000002", "n00000003")
    assert Counter(train.labels.tolist()) == {0: 3, 1: 4, 2: 2}
    assert labels_by_name(val) == EXPECTED
    assert [number - 1 for number in TRUTH] != EXPECTED  # the trap
    with tarfile.open(archives / "val.tar") as tar:
        member = tar.extractfile("ILSVRC2012_val_00000002.JPEG").read()
    name = tmp_path / "imagenet/val" / IDS[TRUTH[1]] / "ILSVRC2012_val_00000002.JPEG"
    assert name.read_bytes() == member


def test_flat_layout(tmp_path, unpack):
    assert unpack("--flat-val", *ANY)[0] == 0
    root = tmp_path / "imagenet"
    val = imagenet.read_flat_folder(root / "val", root / "val_labels.txt")
    assert val.labels.tolist() == EXPECTED


@pytest.mark.parametrize("named", [True, False])
def test_labels_from_a_file_of_wnids(tmp_path, unpack, named):
    names = [f"ILSVRC2012_val_{i:08d}.JPEG " if named else "" for i in range(1, 7)]
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{n}{IDS[k]}\n" for n, k in zip(names, TRUTH, strict=True)))
    assert unpack("--val-labels", path, *ANY, labels=False, train=False)[0] == 0
    assert labels_by_name(read_image_folder(tmp_path / "imagenet" / "val")) == EXPECTED


def test_a_file_of_numbers_is_refused(tmp_path):
    path = tmp_path / "truth.txt"
    path.write_text("490\n361\n")
    with pytest.raises(DataError, match="'490' is not a wnid .* --devkit"):
        imagenet_archives.read_labels(path)


def test_an_interrupted_call_goes_on(tmp_path, unpack):
    root = tmp_path / "imagenet"
    partial = root / "train" / ".n00000002.partial"
    partial.mkdir(parents=True)
    (partial / "half.JPEG").write_bytes(b"half an image")
    assert unpack(*ANY)[0] == 0
    kept = root / "train" / "n00000001" / "n00000001_0.JPEG"
    kept.write_bytes(b"untouched")
    lost = next((root / "val" / "n00000003").iterdir())
    content = lost.read_bytes()
    lost.unlink()
    assert unpack(*ANY)[0] == 0
    assert kept.read_bytes() == b"untouched" and lost.read_bytes() == content
    assert not partial.exists() and len(read_image_folder(root / "train")) == 9


def test_wrong_counts_are_told(unpack):
    status, errors = unpack()
    assert status == 1
    assert "has 9 images instead of 1,281,167" in errors
    assert "has 6 images instead of 50,000" in errors
    assert "3 classes instead of 1000" in errors


def test_right_counts_of_classes():
    train = {f"n{i:08d}": 1300 for i in range(985)} | {f"n{i:08d}": 732 for i in range(985, 1000)}
    train["n00000000"] += imagenet_archives.TRAIN_IMAGES - sum(train.values()) - 60
    found = imagenet_archives.check_counts(train, imagenet_archives.TRAIN_IMAGES, 1000, "train")
    assert len(found) == 2 and "n00000000 has" in found[1]
    val = {f"n{i:08d}": 50 for i in range(1000)}
    assert imagenet_archives.check_counts(val, imagenet_archives.VAL_IMAGES, 1000, "val") == []
    val["n00000003"], val["n00000004"] = 49, 51
    assert len(imagenet_archives.check_counts(val, imagenet_archives.VAL_IMAGES, 1000, "val")) == 2


def test_check_images_lists_the_bad_ones(tmp_path, run, unpack):
    assert unpack(*ANY)[0] == 0
    root = tmp_path / "imagenet"
    broken = root / "train" / "n00000002" / "n00000002_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    odd = root / "val" / "n00000001" / "ILSVRC2012_val_00000004.JPEG"
    Image.open(odd).convert("CMYK").save(odd)
    status, out, _ = run("imagenet", root, "--check-images", "--workers", 1, *ANY)
    assert status == 1 and "1 bad images, 1 unusual ones" in out
    lines = sorted((root / "bad_images.txt").read_text().splitlines())
    assert lines[0].startswith(f"bad\t{broken}\t") and lines[1] == f"converted\t{odd}\tCMYK"


@pytest.mark.parametrize("archive", ["train.tar", "val.tar", "devkit.tar.gz"])
def test_damaged_and_exchanged_archives_are_one_line(tmp_path, archives, unpack, archive):
    path = archives / archive
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    status, error = unpack(*ANY)
    line = error.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and archive in line
    path.write_bytes(tar_of({"readme.txt": b"x"}))
    status, error = unpack(*ANY, folder=tmp_path / "other")
    assert status == 2 and archive in error.strip().splitlines()[-1]


def test_a_full_disk_is_not_the_archives_fault(unpack, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile, "copyfileobj", write)
    status, error = unpack(*ANY)
    line = error.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and "the disk is full" in line
    assert "imagenet/val/" in line and "archive" not in line


def test_members_cannot_leave_the_folder(tmp_path, archives, unpack):
    inner = tar_of({"../../../evil.JPEG": jpeg(0)})
    (archives / "train.tar").write_bytes(tar_of({"../n00000005.tar": inner}))
    assert unpack(*ANY)[0] == 1  # its classes are not those of val
    assert (tmp_path / "imagenet/train/n00000005/evil.JPEG").is_file()
    assert not list(tmp_path.glob("evil*")) and not list(tmp_path.parent.glob("evil*"))


def test_missing_arguments_and_folders(tmp_path, archives, refusal):
    for options, message in (
        (["--val-archive", archives / "val.tar"], "needs --devkit or --val-labels"),
        (["--workers", "0"], "--workers: at least 1"),
        ([], "neither train nor val"),
    ):
        assert message in refusal(prepare_data.main, "imagenet", tmp_path, *options)


def test_make_shards(tmp_path, unpack, run):
    pytest.importorskip("webdataset")
    unpack(*ANY)
    train, folder = tmp_path / "imagenet/train", tmp_path / "shards"
    assert run("shards", "write", train, folder, "--samples-per-shard", 4)[0] == 0
    dataset = TarShards(folder)
    assert dataset.group_sizes == (4, 4, 1)
    assert Counter(dataset.labels.tolist()) == {0: 3, 1: 4, 2: 2}
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\nbird\n")
    assert run("shards", "index", folder, "--class-list", classes)[0] == 0
    assert TarShards(folder).class_names == ("cat", "dog", "bird")
    status, _, error = run("shards", "write", train, folder)
    assert status == 2 and "not empty" in error


def test_imagenet_and_shards_need_no_detectron2(unpack, monkeypatch):
    for name in ("detectron2", "fvcore", "resnet_backbone.detection"):
        monkeypatch.setitem(sys.modules, name, None)  # an ImportError for whoever imports it
    importlib.reload(prepare_data)
    assert unpack(*ANY)[0] == 0


@pytest.mark.parametrize("kind", ["voc", "coco", "imagenet", "shards", "digits", "labels"])
def test_each_kind_explains_itself(kind, run):
    status, out, _ = run(kind, "--help")
    assert status == 0 and f"resnet-backbone prepare-data {kind} " in out
