"""A user's own boxes: every format gives the same data set, and nothing is lost without a word."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from detectron2.structures import BoxMode
from drawn_images import coco_json, voc_xml
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from resnet_backbone.cli import prepare_data
from resnet_backbone.detection.data import apply_policy, scan_coco
from resnet_backbone.detection.data.own import read_own, split_records

WIDTH, HEIGHT = 80, 40
BOXES = {  # image -> (class, box as x0 y0 x1 y1 from 0)
    "a": [("cat", (0, 0, 20, 30)), ("dog", (8, 4, 80, 40))],
    "b": [("dog", (10, 20, 30, 40))],
    "c.d": [("cat", (4, 4, 12, 36))],
    "e": [("cat", (16, 8, 40, 24))],
}
NAMES = ["cat", "dog"]


def images(folder: Path, names=BOXES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.jpg")
    return folder


def write_voc(folder: Path, names=BOXES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        boxes = [(c, (x0 + 1, y0 + 1, x1, y1)) for c, (x0, y0, x1, y1) in BOXES[name]]
        (folder / f"{name}.xml").write_text(voc_xml(f"{name}.jpg", None, boxes))


def write_yolo(folder: Path, names=BOXES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        lines = [
            f"{NAMES.index(c)} {(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT} "
            f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}\n"
            for c, (x0, y0, x1, y1) in BOXES[name]
        ]
        (folder / f"{name}.txt").write_text("".join(lines))


def write_coco(file: Path, names=BOXES, prefix="") -> None:
    ids, boxes = {"dog": 7, "cat": 9}, []
    for name in names:
        for kind, (x0, y0, x1, y1) in BOXES[name]:
            boxes.append((name, ids[kind], (x0, y0, x1 - x0, y1 - y0)))
    sizes = {name: (f"{prefix}{name}.jpg", WIDTH, HEIGHT) for name in names}
    content = coco_json({7: "dog", 9: "cat"}, sizes, boxes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def voc_beside(root):
    write_voc(images(root / "data"))
    return root / "data", root / "data"


def voc_apart(root):
    write_voc(root / "xml" / "deep")
    return images(root / "data"), root / "xml"


def coco_file(root, prefix="sub/"):
    write_coco(root / "all.json", prefix=prefix)
    images(root / "data" / "sub")
    return root / "data", root / "all.json"


def coco_of_a_folder_inside(root):
    return coco_file(root, prefix="")


def yolo_folders(root):
    write_yolo(root / "data" / "labels")
    images(root / "data" / "images")
    (root / "data" / "data.yaml").write_text("names: {0: cat, 1: dog}\nnc: 2\n")
    return root / "data", root / "data"


def yolo_of_one_split(root):
    write_yolo(root / "data" / "labels" / "train")
    (root / "data" / "data.yaml").write_text("names: [cat, dog]\n")
    return images(root / "data" / "images" / "train"), root / "data" / "labels" / "train"


def yolo_beside(root):
    write_yolo(images(root / "data"))
    (root / "data" / "classes.txt").write_text("cat\ndog\n")
    return root / "data", root / "data"


def roboflow(write):
    def make(root):
        for folder, names in (("train", ["a", "b"]), ("valid", ["c.d"]), ("test", ["e"])):
            write(images(root / "data" / folder, names), names)
        (root / "data" / "data.yaml").write_text("names: [cat, dog]\n")
        (root / "data" / "README.roboflow.txt").write_text("0 0 0 0 0\n")
        return root / "data", root / "data"

    return make


def found(splits, names):
    """Image -> its boxes, as in ``BOXES``."""
    return {
        Path(record["file_name"]).stem: [
            (names[one["category_id"]], tuple(round(side, 3) for side in one["bbox"]))
            for one in record["annotations"]
        ]
        for records in splits.values()
        for record in records
    }


MAKERS = [voc_beside, voc_apart, coco_file, coco_of_a_folder_inside]
MAKERS += [yolo_folders, yolo_of_one_split, yolo_beside]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_format_gives_the_same_boxes(tmp_path, make):
    splits, names, report = read_own(*make(tmp_path))
    assert found(splits, names) == BOXES and list(splits) == [""]
    assert names == NAMES and report.problems == []
    boxes = [one for record in splits[""] for one in record["annotations"]]
    assert {one["bbox_mode"] for one in boxes} == {BoxMode.XYXY_ABS}


@pytest.mark.parametrize(
    "write",
    [write_voc, write_yolo, lambda f, names: write_coco(f / "_annotations.coco.json", names)],
    ids=["voc", "yolo", "coco"],
)
def test_folders_of_roboflow_stay_splits(tmp_path, write):
    splits, names, _ = read_own(*roboflow(write)(tmp_path))
    assert found(splits, names) == BOXES
    assert {key: len(found) for key, found in splits.items()} == dict(train=2, val=1, test=1)


def test_splits_with_the_same_names_of_images(tmp_path, run):
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
    code, _, error = run(*words, "--output", tmp_path / "out")
    assert code == 2 and "are in" in error and "with --images FOLDER" in error


def test_named_splits_need_no_validation_set(tmp_path, run):
    """A folder test is not trained on, unless there is nothing else than it and val."""
    folder = tmp_path / "data"
    for split, names in (("training", ["a", "b", "c.d"]), ("testing", ["e"])):
        write_voc(images(folder / split, names), names)
    splits, _, _ = read_own(folder, folder)
    assert {key: len(found) for key, found in splits.items()} == {"train": 3, "test": 1}
    output = tmp_path / "out"
    code, printed, _ = run("--images", folder, "--output", output, "--val", "0.34")
    assert code == 0 and "there is no validation set: it is 0.34 of train" in printed
    files = [output / f"{split}.json" for split in ("train", "val", "test")]
    assert [len(json.loads(file.read_text())["images"]) for file in files] == [2, 1, 1]
    (folder / "training").rename(folder / "more")  # what is in no named folder is for training
    splits, _, _ = read_own(folder, folder)
    assert {key: len(found) for key, found in splits.items()} == {"test": 1, "train": 3}
    (folder / "more").rename(folder / "val")
    splits, _, report = read_own(folder, folder)
    assert list(splits) == [""] and "only test and val is named" in report.notes[0]


def test_what_is_left_out_is_named(tmp_path):
    folder, _ = yolo_folders(tmp_path)
    (folder / "labels" / "a.txt").write_text("0 .5 .5 .25 .25\n5 .5 .5 .1 .1\n0 .5 .5 0 .1\nx\n")
    (folder / "labels" / "b.txt").unlink()
    (folder / "labels" / "gone.txt").write_text("0 .5 .5 .25 .25\n")
    (folder / "images" / "e.jpg").write_bytes(b"no image")
    splits, names, report = read_own(folder, folder)
    kinds = sorted(problem.kind for problem in report.problems)
    assert kinds == ["bad-box"] * 3 + ["missing-image", "unreadable-image"]
    boxes = {"a": [("cat", (30, 15, 50, 25))], "b": [], "c.d": BOXES["c.d"]}
    assert found(splits, names) == boxes, "an image without a .txt is one without boxes"
    (note,) = report.notes
    assert note.startswith("images without boxes: 1; training uses them with DATALOADER.FILTER_")


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


def test_splits_that_are_not_used_are_said(tmp_path):
    for name, some in (("train", ["a", "b"]), ("rest", ["c.d", "e"])):
        write_coco(tmp_path / "json" / f"{name}.json", some)
    splits, _, report = read_own(images(tmp_path / "data"), tmp_path / "json")
    assert [*splits] == [""] and "only train is named as a split" in report.notes[0]
    (tmp_path / "json/rest.json").rename(tmp_path / "json/dev.json")
    assert {*read_own(tmp_path / "data", tmp_path / "json")[0]} == {"train", "val"}


def test_class_names_of_cvat_and_label_studio(tmp_path):
    folder, _ = yolo_beside(tmp_path)
    (folder / "classes.txt").rename(folder / "obj.names")
    (folder / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}]}')
    splits, names, _ = read_own(folder, folder)
    assert names == NAMES and found(splits, names) == BOXES
    (folder / "obj.names").rename(tmp_path / "my.names")
    splits, names, _ = read_own(folder, folder / ".." / "my.names")
    assert names == NAMES and splits


def test_names_of_images_with_a_prefix_of_another_place(tmp_path):
    """Label Studio's: the upload's folder. Two images of one name stay missing."""
    write_coco(tmp_path / "all.json", prefix="../../media/upload/1/")
    images(tmp_path / "data" / "deep")
    images(tmp_path / "data" / "again", ["e"])
    splits, names, report = read_own(tmp_path / "data", tmp_path / "all.json")
    assert found(splits, names) == {name: BOXES[name] for name in ("a", "b", "c.d")}
    assert "3 images are found by their names" in report.notes[0]
    assert [problem.kind for problem in report.problems] == ["missing-image"]


def test_pixels_in_place_of_shares_and_nothing_else(tmp_path, run):
    """The reason is said; where all is wrong, it is the error."""
    folder, _ = yolo_beside(tmp_path)
    (folder / "b.txt").write_text("1 40 20 20 10\n")
    _, _, report = read_own(folder, folder)
    text = "; ".join(map(str, report.problems))
    assert "is not within the image: YOLO's are shares" in text
    assert "none of its 1 boxes can be used: the image is left out" in text
    for name in BOXES:
        (folder / f"{name}.txt").write_text("1 .5 .5 .2 .2 .93\n")
    code, _, error = run("--images", folder, "--output", tmp_path / "out")
    assert code == 2 and "no image with a box" in error and "none of its 1 boxes" in error


def test_boxes_that_occur_twice_are_used_once(tmp_path):
    folder, _ = yolo_beside(tmp_path)
    text = (folder / "b.txt").read_text()
    (folder / "b.txt").write_text(text * 2)
    splits, names, report = read_own(folder, folder)
    assert found(splits, names) == BOXES
    assert ["occurs again" in problem.detail for problem in report.problems] == [True]


def test_turned_photographs_are_named_where_no_size_is_stated(tmp_path):
    folder, _ = yolo_beside(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "e.jpg", exif=exif)
    _, _, report = read_own(folder, folder)
    assert ["orientation turns: 1" in note for note in report.notes] == [True]


def test_folders_inside_annotations_and_images(tmp_path):
    for split, names in (("train", ["a", "b"]), ("val", ["a", "e"])):
        write_voc(tmp_path / "data/annotations" / split, names)
        images(tmp_path / "data/images" / split, names)
    splits, _, report = read_own(tmp_path / "data", tmp_path / "data")
    assert {key: len(some) for key, some in splits.items()} == {"train": 2, "val": 2}
    assert not report.problems


def test_corners_in_place_of_width_and_height_are_suspected(tmp_path):
    boxes = [(n, 1, (40, 20, 60 + n, 35)) for n in range(3)]
    content = coco_json({1: "cat"}, {n: (f"{n}.jpg", WIDTH, HEIGHT) for n in range(3)}, boxes)
    (tmp_path / "all.json").write_text(json.dumps(content))
    _, report = scan_coco(str(tmp_path / "all.json"), str(images(tmp_path, range(3))))
    assert "are they corners, where width and height" in "; ".join(report.remarks())


def two_of_one_name(root):
    folder, _ = voc_beside(root)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    return folder, folder


def old_labels_beside(root):
    folder, _ = yolo_folders(root)
    write_yolo(folder / "a_old", ["a", "e"])
    return folder, folder


def name_in_latin_1(root):
    folder, _ = voc_beside(root)
    data = (folder / "a.jpg").read_bytes()
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.jpg")).write_bytes(data)
    return folder, folder


PROBLEMS = {two_of_one_name: {"duplicate-id": 1}, old_labels_beside: {"duplicate-id": 2}}
PROBLEMS[name_in_latin_1] = {"missing-xml": 1}


@pytest.mark.parametrize("make, problems", PROBLEMS.items())
def test_nothing_is_used_twice(tmp_path, run, make, problems):
    folder, _ = make(tmp_path)
    splits, names, report = read_own(folder, folder)
    assert found(splits, names) == BOXES
    assert Counter(problem.kind for problem in report.problems) == problems
    assert run("--images", folder, "--output", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/left_out.txt").read_text().count("\n") == sum(problems.values())


def test_boxes_that_several_files_repeat_are_used_once(tmp_path):
    """As COCO's own folder has them, for instances and keypoints."""
    write_coco(tmp_path / "json" / "instances.json")
    write_coco(tmp_path / "json" / "person_keypoints.json", ["a", "b"])
    splits, names, report = read_own(images(tmp_path / "data"), tmp_path / "json")
    assert found(splits, names) == BOXES and len(splits[""]) == 4
    assert "used once: 3" in report.notes[0]


def test_masks_keep_their_area_and_paths_may_be_absolute(tmp_path, run, monkeypatch):
    folder = images(tmp_path / "data")
    write_coco(tmp_path / "all.json", prefix=f"{folder}/")
    content = json.loads((tmp_path / "all.json").read_text())
    content["annotations"][0] |= {"area": 17.5, "segmentation": [[0, 0, 20, 0, 20, 30]]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    words = ["--annotations", "all.json", "--output", "out", "--val", "0.25"]
    code, _, error = run("--images", "data", *words)
    assert code == 0, error
    files = [json.loads(Path("out", f"{name}.json").read_text()) for name in ("train", "val")]
    names = {one["file_name"] for file in files for one in file["images"]}
    assert names == {f"{name}.jpg" for name in BOXES}
    assert 17.5 in [one["area"] for file in files for one in file["annotations"]]
    code, _, error = run("--images", images(tmp_path / "other"), *words, "--overwrite")
    assert code == 2 and "is not below" in error and error.count("\n") == 1


def test_a_polygon_gives_its_box(tmp_path):
    folder, _ = yolo_beside(tmp_path)
    (folder / "classes.txt").write_text("traffic light\n dog \n\n")
    (folder / "b.txt").write_text("1 .125 .5 .375 .5 .25 1\n")
    splits, names, _ = read_own(folder, folder)
    assert found(splits, names)["b"] == [("dog", (10, 20, 30, 40))]
    (record,) = (r for r in splits[""] if r["file_name"].endswith("b.jpg"))
    (box,) = record["annotations"]
    assert (box["segmentation"], box["area"]) == ([[10, 20, 30, 20, 20, 40]], 200)


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


@pytest.fixture
def run(run_command):
    """Function (argument...) -> exit status of the subcommand own, what it printed, its errors."""
    return lambda *arguments: run_command(prepare_data.main, "own", *arguments)


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (voc_beside, ["--val", "1"], "--val 1"),
        (voc_beside, ["--val", "0.01"], "cannot be split with --val 0.01"),
        (lambda root: (images(root / "data"),), [], "has no .xml (VOC), .json (COCO), .txt"),
        (voc_beside, ["--format", "coco"], "has no .json (COCO); give"),
        (voc_beside, ["--format", "yolo"], "has no .txt (YOLO) with boxes; give"),
        (lambda root: (root / "data",), [], "does not exist"),
        (lambda r: write_yolo(voc_beside(r)[0]) or (r / "data",), [], "choose one with --format"),
        (lambda r: write_yolo(images(r / "data")) or (r / "data",), [], "no data.yaml or classes"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, run, prepare, arguments, message):
    folder = prepare(tmp_path)[0]
    code, _, error = run("--images", folder, "--output", tmp_path / "out", *arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_notes_of_the_files_of_a_data_set_are_said_once(tmp_path, run, run_command, caplog):
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
    code, printed, _ = run("--images", folder, "--output", tmp_path / "out")
    assert code == 0 and printed.count(note) == 1
    splits = [folder / split for split in ("train", "valid", "test")]
    files = [split / "_annotations.coco.json" for split in splits]
    words = ["coco", "--coco-json", *files, "--image-root", *splits]
    _, printed, _ = run_command(prepare_data.main, *words)
    assert printed.count(note) == 1
    for file, images in zip(files, splits, strict=True):
        apply_policy(scan_coco(str(file), str(images))[1], "drop")
    assert caplog.text.count(note) == 1


def test_the_command_writes_what_training_reads(tmp_path, run):
    folder, _ = voc_beside(tmp_path)
    arguments = ["--images", folder, "--output", tmp_path / "out", "--val", "0.25"]
    code, printed, _ = run(*arguments)
    assert code == 0 and "--coco-json" in printed and "resnet-backbone train-net" in printed
    assert (tmp_path / "out" / "out_train.jpg").is_file()
    files = [str(tmp_path / "out" / f"{name}.json") for name in ("train", "val")]
    assert [len(scan_coco(file, str(folder))[0]) for file in files] == [3, 1]
    before = (tmp_path / "out" / "train.json").read_bytes()
    assert run(*arguments)[0] == 2  # what is there stays
    assert run(*arguments, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "train.json").read_bytes() == before


def test_one_verdict_with_all_that_a_user_should_know(tmp_path, run):
    folder, _ = voc_beside(tmp_path)
    xml = folder / "a.xml"
    for old, new in (("cat</name>", "cat</name><difficult>1</difficult>"), (">80<", ">99<")):
        xml.write_text(xml.read_text().replace(old, new))
    (folder / "b.jpg").write_bytes(b"no image")
    arguments = ["--images", folder, "--output", tmp_path / "out", "--val", "0.4"]
    code, printed, _ = run(*arguments)
    assert code == 0 and f"{tmp_path / 'out'}: 3 images, each of them decoded\n" in printed
    assert "left out: 1 x a file, 0 x a box; " in printed and "unreadable-image: " in printed
    assert "note: boxes marked difficult (VOC) or crowd (COCO): 1; training leaves" in printed
    assert "note: 1 boxes ran past the edge of their image and were clipped" in printed
    table = [line.split() for line in printed.splitlines()[1:8]]
    assert ["split", "images", "boxes", "difficult"] in table  # without the official numbers
    assert not any(text in printed for text in ("headers", "in no split", "complete and"))


def test_sheets_of_wide_images_are_wide(tmp_path, run):
    folder, _ = voc_beside(tmp_path)
    for image in folder.glob("*.jpg"):
        Image.new("RGB", (1600, 100)).save(image)
    run("--images", folder, "--output", tmp_path / "out", "--val", "0.25")
    with Image.open(tmp_path / "out" / "out_train.jpg") as sheet:
        assert sheet.width > 1600


@pytest.mark.data
def test_blood_cells(data_root):
    splits, names, report = read_own(data_root / "BCCD", data_root / "BCCD")
    assert names == ["Platelets", "RBC", "WBC"]
    assert sum(len(record["annotations"]) for record in splits[""]) == 4886
    assert [problem.kind for problem in report.problems] == ["bad-box"] * 2


def test_crowds_as_run_lengths_are_written_too(tmp_path, run):
    """COCO's own, and a byte order mark, as some tools write it."""
    folder, file = coco_file(tmp_path)
    content = json.loads(file.read_text())
    mask = {"counts": [10, 5, WIDTH * HEIGHT - 15], "size": [HEIGHT, WIDTH]}
    content["annotations"][0] |= {"iscrowd": 1, "segmentation": mask}
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    out = tmp_path / "out"
    code, _, _ = run("--images", folder, "--annotations", file, "--val", "0.25", "--output", out)
    assert code == 0
    files = (str(out / f"{name}.json") for name in ("train", "val"))
    records = [record for file in files for record in scan_coco(file, str(folder))[0]]
    boxes = [one for record in records for one in record["annotations"]]
    (crowd,) = (one for one in boxes if one["iscrowd"])
    assert len(boxes) == 5 and crowd["segmentation"]["size"] == [HEIGHT, WIDTH]
