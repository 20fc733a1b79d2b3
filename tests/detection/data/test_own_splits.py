"""A user's own boxes: the splits that folders, lists and a data.yaml name, or that are drawn."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_boxes import BOXES, found, images, roboflow, write_coco, write_voc, write_yolo

from resnet_backbone.cli import prepare_data
from resnet_backbone.detection.data import apply_policy, scan_coco
from resnet_backbone.detection.data.own import read_own, split_records


@pytest.mark.parametrize(
    "write",
    [write_voc, write_yolo, lambda f, names: write_coco(f / "_annotations.coco.json", names)],
    ids=["voc", "yolo", "coco"],
)
def test_folders_of_roboflow_stay_splits(tmp_path, write):
    splits, names, _ = read_own(*roboflow(write)(tmp_path))
    assert found(splits, names) == BOXES
    assert {key: len(found) for key, found in splits.items()} == dict(train=2, val=1, test=1)


def test_splits_with_the_same_names_of_images(tmp_path, prepare_own):
    """Each file's images are in the folder of its split; in two folders of any name, it is said."""
    for name in ("train", "val"):
        write_coco(tmp_path / "json" / f"instances_{name}.json", ["a", "b"])
        images(tmp_path / "data" / name, ["a", "b"])
    splits, _, _ = read_own(tmp_path / "data", tmp_path / "json")
    assert {k: {Path(r["file_name"]).parent.name for r in v} for k, v in splits.items()} == {
        "train": {"train"},
        "val": {"val"},
    }
    (tmp_path / "data/val").rename(tmp_path / "data/more")
    words = "--images", tmp_path / "data", "--annotations", tmp_path / "json"
    code, _, error = prepare_own(*words, "--output", tmp_path / "out")
    assert code == 2 and "are in" in error and "with --images FOLDER" in error


def test_named_splits_need_no_validation_set(tmp_path, prepare_own):
    """A folder test is not trained on, unless there is nothing else than it and val."""
    folder = tmp_path / "data"
    for split, names in (("training", ["a", "b", "c.d"]), ("testing", ["e"])):
        write_voc(images(folder / split, names), names)
    splits, _, _ = read_own(folder, folder)
    assert {key: len(found) for key, found in splits.items()} == {"train": 3, "test": 1}
    output = tmp_path / "out"
    code, printed, _ = prepare_own("--images", folder, "--output", output, "--val", "0.34")
    assert code == 0 and "there is no validation set: it is 0.34 of train" in printed
    files = [output / f"{split}.json" for split in ("train", "val", "test")]
    assert [len(json.loads(file.read_text())["images"]) for file in files] == [2, 1, 1]
    (folder / "training").rename(folder / "more")  # what is in no named folder is for training
    splits, _, _ = read_own(folder, folder)
    assert {key: len(found) for key, found in splits.items()} == {"test": 1, "train": 3}
    (folder / "more").rename(folder / "val")
    splits, _, report = read_own(folder, folder)
    assert list(splits) == [""] and "only test and val is named" in report.notes[0]


LISTED = {"train": ["a", "b"], "val": ["c.d"], "test": ["e"]}


def in_folders(root):
    for split, names in LISTED.items():
        write_yolo(root / "data/labels" / f"{split}2017", names)
        images(root / "data/images" / f"{split}2017", names)
    return "names: [cat, dog]"


def in_folders_of_other_names(root):
    text = "names: [cat, dog]"
    for split, names in LISTED.items():
        write_yolo(root / "data/labels/sites" / split[::-1], names)
        images(root / "data/images/sites" / split[::-1], names)
        text += f"\n{split}: images/sites/{split[::-1]}"
    return text


def in_lists(root):
    write_yolo(root / "data/labels")
    images(root / "data/images")
    for split, names in LISTED.items():
        lines = "".join(f"./images/{name}.jpg\n" for name in names)
        (root / f"data/{split}.txt").write_text(lines)
    splits = "".join(f"{split}: {split}.txt\n" for split in LISTED)
    return f"path: /where/it/was\n{splits}names: [cat, dog]"


@pytest.mark.parametrize("write", [in_folders, in_folders_of_other_names, in_lists])
@pytest.mark.parametrize("name", ["data.yaml", "blood.yaml"])
def test_splits_of_a_data_yaml(tmp_path, write, name):
    text = write(tmp_path)
    (tmp_path / "data" / name).write_text(text)
    splits, names, report = read_own(tmp_path / "data", tmp_path / "data")
    stems = {key: sorted(Path(r["file_name"]).stem for r in some) for key, some in splits.items()}
    assert stems == LISTED and not report.problems and not report.notes
    assert found(splits, names) == BOXES


def test_of_a_folder_that_is_named_twice_the_first_split_counts(tmp_path):
    """Test as val, or all as one: then the validation set is drawn as without a data.yaml."""
    for folder, names in (("one", ["a", "b"]), ("two", ["c.d", "e"])):
        write_yolo(images(tmp_path / "data" / folder, names), names)
    for named, wanted in (
        ("train: one\nval: two\ntest: two\n", {"train": 2, "val": 2}),
        ("train: [one, two]\nval: [one, two]\n", {"": 4}),
    ):
        (tmp_path / "data/data.yaml").write_text(f"names: [cat, dog]\n{named}")
        splits, names, _ = read_own(tmp_path / "data", tmp_path / "data")
        assert {key: len(some) for key, some in splits.items()} == wanted
        assert found(splits, names) == BOXES


def test_splits_that_are_not_used_are_said(tmp_path):
    for name, some in (("train", ["a", "b"]), ("rest", ["c.d", "e"])):
        write_coco(tmp_path / "json" / f"{name}.json", some)
    splits, _, report = read_own(images(tmp_path / "data"), tmp_path / "json")
    assert [*splits] == [""] and "only train is named as a split" in report.notes[0]
    (tmp_path / "json/rest.json").rename(tmp_path / "json/dev.json")
    assert {*read_own(tmp_path / "data", tmp_path / "json")[0]} == {"train", "val"}


def test_folders_inside_annotations_and_images(tmp_path):
    for split, names in (("train", ["a", "b"]), ("val", ["a", "e"])):
        write_voc(tmp_path / "data/annotations" / split, names)
        images(tmp_path / "data/images" / split, names)
    splits, _, report = read_own(tmp_path / "data", tmp_path / "data")
    assert {key: len(some) for key, some in splits.items()} == {"train": 2, "val": 2}
    assert not report.problems


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 9))
def test_a_split_takes_its_share_of_every_class(number, share, seed):
    names = {f"{n}.jpg": [{"category_id": n % 3}] for n in range(number)}
    records = [{"file_name": name, "annotations": boxes} for name, boxes in names.items()]
    if not 1 <= round(share * number) < number:
        return
    train, val = split_records(records, share, seed)
    assert sorted(r["file_name"] for r in train + val) == sorted(r["file_name"] for r in records)
    assert abs(len(val) - share * number) <= 1
    for category in range(3):
        of_class = [r for r in records if r["annotations"][0]["category_id"] == category]
        taken = [r for r in val if r["annotations"][0]["category_id"] == category]
        assert abs(len(taken) - share * len(of_class)) <= 1.5
    assert split_records(records[::-1], share, seed)[1] == val[::-1]


def test_notes_of_the_files_of_a_data_set_are_said_once(tmp_path, prepare_own, run_command, caplog):
    """Three files that have Roboflow's parent of all classes: converted, checked, trained on."""

    def write(folder, names):
        path = folder / "_annotations.coco.json"
        write_coco(path, names)
        content = json.loads(path.read_text())
        for one in content["categories"]:
            one["supercategory"] = "pets"
        content["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})
        path.write_text(json.dumps(content))

    folder, _ = roboflow(write)(tmp_path)
    note = "category 'pets' is left out"
    code, printed, _ = prepare_own("--images", folder, "--output", tmp_path / "out")
    assert code == 0 and printed.count(note) == 1
    splits = [folder / split for split in ("train", "valid", "test")]
    files = [split / "_annotations.coco.json" for split in splits]
    words = ["coco", "--coco-json", *files, "--image-root", *splits]
    _, printed, _ = run_command(prepare_data.main, *words)
    assert printed.count(note) == 1
    for file, split in zip(files, splits, strict=True):
        apply_policy(scan_coco(str(file), str(split))[1], "drop")
    assert caplog.text.count(note) == 1
