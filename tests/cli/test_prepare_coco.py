"""prepare-data for COCO, on miniature archives."""

import json

import pytest

pytest.importorskip("detectron2")

from drawn_images import coco_json

from resnet_backbone.detection.data import archives

from packed import jpeg, tree_of, write_zip  # isort: skip


@pytest.fixture
def coco(tmp_path, declare, monkeypatch):
    """Archives of COCO 2017, in small: two training images, one of val, two of test."""
    counts = {"instances_train2017": (2, 2), "instances_val2017": (1, 1)}
    counts |= {"image_info_test-dev2017": (1,)}
    counts = {("coco", split): archives.Counts(*count) for split, count in counts.items()}
    monkeypatch.setattr("resnet_backbone.detection.data.trees.COUNTS", counts)
    folder = tmp_path / "archives"
    folder.mkdir()
    ids = {"train2017": (1, 2), "val2017": (3,), "test2017": (4, 5)}
    contents = {
        f"{name}.zip": {f"{name}/{i:012d}.jpg": jpeg(i) for i in numbers}
        for name, numbers in ids.items()
    }

    def listing(*numbers, annotated=True) -> bytes:
        boxes = [(i, 18, (2, 3, 10, 10), {"iscrowd": 0, "area": 100}) for i in numbers]
        content = coco_json({18: "dog"}, {i: (f"{i:012d}.jpg", 60, 40) for i in numbers}, boxes)
        if not annotated:
            del content["annotations"]
        return json.dumps(content).encode()

    contents["annotations_trainval2017.zip"] = {
        "annotations/instances_train2017.json": listing(1, 2),
        "annotations/instances_val2017.json": listing(3),
        "annotations/captions_val2017.json": b"{}",
    }
    contents["image_info_test2017.zip"] = {
        "annotations/image_info_test-dev2017.json": listing(4, annotated=False)
    }
    return {name: declare(write_zip(folder / name, files)) for name, files in contents.items()}


def test_coco(run, coco, tmp_path):
    root, report = tmp_path / "data", tmp_path / "report.json"
    code, out, _ = run("coco", root, "--archives", *coco.values(), "--json", report)
    assert code == 0, out
    folders = {"annotations", "train2017", "val2017", "test2017"}
    assert {path.name for path in (root / "coco").iterdir()} == folders
    (found,) = json.loads(report.read_text())
    splits = found["splits"]
    assert {name: (s["images"], s["boxes"]) for name, s in splits.items()} == {
        "instances_train2017": (2, 2),
        "instances_val2017": (1, 1),
        "image_info_test-dev2017": (1, None),
    }
    (unlisted,) = found["unlisted_images"]
    assert unlisted == str(root / "coco/test2017/000000000005.jpg"), "it is not in test-dev"
    (root / "coco/train2017/000000000002.jpg").write_bytes(jpeg(2)[:-300])
    code, out, _ = run("coco", root / "coco")
    assert code == 1 and "000000000002.jpg: truncated" in out
    assert f"then resnet-backbone prepare-data coco {root} --archives train2017.zip" in out


def test_coco_without_its_images(run, coco, tmp_path):
    root = tmp_path / "data"
    archives = [coco["annotations_trainval2017.zip"], coco["val2017.zip"]]
    code, out, _ = run("coco", root, "--archives", *archives)
    assert code == 1 and "train2017, the images of instances_train2017, does not exist" in out
    assert "unpack train2017.zip, or name the splits that you have with --splits" in out
    assert run("coco", root, "--splits", "instances_val2017")[0] == 0


def test_json_files_of_ones_own(run, coco, tmp_path):
    root = tmp_path / "data"
    run("coco", root, "--archives", *coco.values())
    files = [tmp_path / part / "labels.json" for part in ("train", "val")]
    for file in files:
        file.parent.mkdir()
        (root / f"coco/annotations/instances_{file.parent.name}2017.json").rename(file)
    folders = [root / "coco/train2017", root / "coco/val2017"]
    options = ["--pictures", tmp_path / "pictures"]
    code, out, _ = run("coco", "--coco-json", *files, "--image-root", *folders, *options)
    assert code == 0 and "as data of your own" in out
    names = {"coco_classes.png", "coco_train_labels.jpg", "coco_val_labels.jpg"}
    assert tree_of(tmp_path / "pictures") == names
