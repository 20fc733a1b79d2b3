"""Listing of class folders and of flat folders with a label list."""

import pickle

import numpy as np
import pytest
from PIL import Image

from resnet_backbone.classification.data.decode import BadImage
from resnet_backbone.classification.data.imagenet import (
    check_same_classes,
    class_indices,
    read_class_list,
    read_flat_folder,
    read_image_folder,
)
from resnet_backbone.runtime.errors import DataError

CLASSES = {"n03": ["a.JPEG", "b.jpg"], "n01": ["c.png"], "n02": ["d.JPEG", "e.Jpeg", "f.webp"]}


@pytest.fixture
def root(tmp_path):
    for name, files in CLASSES.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / name / file)
    return tmp_path / "train"


@pytest.fixture
def flat(tmp_path):
    (tmp_path / "val").mkdir()
    for number in (3, 1, 2):
        Image.new("RGB", (4, 4)).save(tmp_path / "val" / f"v{number}.JPEG")
    return tmp_path / "val"


def labels(tmp_path, text):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    return path


def test_classes_are_counted_in_sorted_order(root):
    dataset = read_image_folder(root)
    assert dataset.class_names == ("n01", "n02", "n03") and dataset.num_classes == 3
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


def test_names_beyond_ascii_and_pickling(root):
    Image.new("RGB", (4, 4)).save(root / "n01" / "bär.jpg")
    dataset = pickle.loads(pickle.dumps(read_image_folder(root)))
    assert len(dataset[0].data) > 100 and dataset.name(0).endswith("bär.jpg")


def test_a_selection_keeps_the_indices_of_the_whole(root):
    classes = {"n01": 7, "n02": 217, "n03": 482}
    dataset = read_image_folder(root, classes, 1000)
    assert dataset.labels.tolist() == [7, 217, 217, 217, 482, 482]
    assert dataset.num_classes == 1000 and dataset.class_names[217] == "n02"
    assert dataset.class_names[0] == "class 0"
    with pytest.raises(DataError, match="num_classes is 100"):
        read_image_folder(root, classes, 100)


@pytest.mark.parametrize(
    "text",
    ["n01 0\nn02 1\nn03 2\n", "n01\nn02\nn03\n", "n01 tench, Tinca\nn02 x\nn03 y\n", "n03 2\n"],
)
def test_class_lists(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    assert read_class_list(path)["n03"] == 2


@pytest.mark.parametrize("text", ["", "n01 0\nn02\n", "n01 0\nn02 0\n", "n01\nn01\n"])
def test_unclear_class_lists_are_refused(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match="classes.txt"):
        read_class_list(path)


def test_missing_empty_and_unlisted_folders_are_errors(root, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folders"):
        read_image_folder(root / "n01")
    with pytest.raises(DataError, match="n03 is not in the class list"):
        read_image_folder(root, {"n01": 0, "n02": 1})
    (root / "n04").mkdir()
    with pytest.raises(DataError, match="n04 holds no images"):
        read_image_folder(root)


def test_a_missing_file_is_a_bad_image(root):
    dataset = read_image_folder(root)
    (root / "n01" / "c.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        dataset[0]


@pytest.mark.parametrize(
    "text", ["v1.JPEG n02\nv2.JPEG n01\nv3.JPEG n02\n", "v3.JPEG\t1\nv2.JPEG 0\n\nv1.JPEG 1\n"]
)
def test_flat_folder(flat, tmp_path, text):
    dataset = read_flat_folder(flat, labels(tmp_path, text))
    assert dataset.labels.tolist() == [1, 0, 1] and dataset.num_classes == 2
    assert [sample.label for sample in (dataset[i] for i in range(3))] == [1, 0, 1]
    assert dataset.name(2) == str(flat / "v3.JPEG")


def test_flat_folder_with_the_classes_of_training(flat, root, tmp_path):
    train = read_image_folder(root)
    path = labels(tmp_path, "v1.JPEG n03\nv2.JPEG n01\nv3.JPEG 1\n")
    val = read_flat_folder(flat, path, class_indices(train))
    assert val.labels.tolist() == [2, 0, 1]
    check_same_classes(train, val)


@pytest.mark.parametrize(
    "text, message",
    [
        ("490\n361\n171\n", "prepare_data.py imagenet --devkit"),
        ("", "empty"),
        ("v1.JPEG n01\nv2.JPEG\nv3.JPEG n01\n", "line 2"),
        ("v1.JPEG n01\nv1.JPEG n02\n", "twice"),
        ("v1.JPEG n01\n", "2 images that .* does not list, the first is v2.JPEG"),
        ("v1.JPEG 0\nv2.JPEG 0\nv3.JPEG 0\nv4.JPEG 0\n", "not in .*v4.JPEG"),
        ("v1.JPEG n01\nv2.JPEG n09\nv3.JPEG n01\n", "n09 is not in the class list"),
        ("v1.JPEG 0\nv2.JPEG 3\nv3.JPEG 0\n", "label 3, but there are 3 classes"),
    ],
)
def test_unusable_label_lists_are_refused(flat, tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read_flat_folder(flat, labels(tmp_path, text), {"n01": 0, "n02": 1, "n03": 2})
    assert "\n" not in str(caught.value)


def test_different_classes_of_training_and_validation_are_refused(root, tmp_path):
    (tmp_path / "other" / "n09").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "other" / "n09" / "a.png")
    train, val = read_image_folder(root), read_image_folder(tmp_path / "other")
    with pytest.raises(DataError, match="3 only in training .*n01.* 1 only in validation .*n09"):
        check_same_classes(train, val)


@pytest.mark.data
def test_real_selection_of_ten_classes(data_root, tmp_path):
    root = data_root / "imagenet_val500"
    if not root.is_dir():
        pytest.skip("no imagenet_val500")
    path = tmp_path / "ten.txt"
    path.write_text(
        "\n".join(f"{folder.name} {i}" for i, folder in enumerate(sorted(root.iterdir()), 3))
    )
    dataset = read_image_folder(root, read_class_list(path), 1000)
    assert len(dataset) == 500 and dataset.num_classes == 1000
    assert set(dataset.labels.tolist()) == set(range(3, 13))
