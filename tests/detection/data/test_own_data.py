"""A user's own boxes: every format gives the same data set, and nothing is lost without a word."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from detectron2.structures import BoxMode
from drawn_images import coco_json
from own_boxes import (
    BOXES,
    HEIGHT,
    NAMES,
    WIDTH,
    coco_file,
    coco_of_a_folder_inside,
    found,
    images,
    voc_apart,
    voc_beside,
    write_coco,
    write_yolo,
    yolo_beside,
    yolo_folders,
    yolo_of_one_split,
)
from PIL import ExifTags, Image

from resnet_backbone.detection.data import scan_coco
from resnet_backbone.detection.data.own import read_own

MAKERS = [voc_beside, voc_apart, coco_file, coco_of_a_folder_inside]
MAKERS += [yolo_folders, yolo_of_one_split, yolo_beside]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_format_gives_the_same_boxes(tmp_path, make):
    splits, names, report = read_own(*make(tmp_path))
    assert found(splits, names) == BOXES and list(splits) == [""]
    assert names == NAMES and report.problems == []
    boxes = [one for record in splits[""] for one in record["annotations"]]
    assert {one["bbox_mode"] for one in boxes} == {BoxMode.XYXY_ABS}


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


def test_pixels_in_place_of_shares_and_nothing_else(tmp_path, prepare_own):
    """The reason is said; where all is wrong, it is the error."""
    folder, _ = yolo_beside(tmp_path)
    (folder / "b.txt").write_text("1 40 20 20 10\n")
    _, _, report = read_own(folder, folder)
    text = "; ".join(map(str, report.problems))
    assert "is not within the image: YOLO's are shares" in text
    assert "none of its 1 boxes can be used: the image is left out" in text
    for name in BOXES:
        (folder / f"{name}.txt").write_text("1 .5 .5 .2 .2 .93\n")
    code, _, error = prepare_own("--images", folder, "--output", tmp_path / "out")
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
def test_nothing_is_used_twice(tmp_path, prepare_own, make, problems):
    folder, _ = make(tmp_path)
    splits, names, report = read_own(folder, folder)
    assert found(splits, names) == BOXES
    assert Counter(problem.kind for problem in report.problems) == problems
    assert prepare_own("--images", folder, "--output", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/left_out.txt").read_text().count("\n") == sum(problems.values())


def test_boxes_that_several_files_repeat_are_used_once(tmp_path):
    """As COCO's own folder has them, for instances and keypoints."""
    write_coco(tmp_path / "json" / "instances.json")
    write_coco(tmp_path / "json" / "person_keypoints.json", ["a", "b"])
    splits, names, report = read_own(images(tmp_path / "data"), tmp_path / "json")
    assert found(splits, names) == BOXES and len(splits[""]) == 4
    assert "used once: 3" in report.notes[0]


def test_masks_keep_their_area_and_paths_may_be_absolute(tmp_path, prepare_own, monkeypatch):
    folder = images(tmp_path / "data")
    write_coco(tmp_path / "all.json", prefix=f"{folder}/")
    content = json.loads((tmp_path / "all.json").read_text())
    content["annotations"][0] |= {"area": 17.5, "segmentation": [[0, 0, 20, 0, 20, 30]]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    words = ["--annotations", "all.json", "--output", "out", "--val", "0.25"]
    code, _, error = prepare_own("--images", "data", *words)
    assert code == 0, error
    files = [json.loads(Path("out", f"{name}.json").read_text()) for name in ("train", "val")]
    names = {one["file_name"] for file in files for one in file["images"]}
    assert names == {f"{name}.jpg" for name in BOXES}
    assert 17.5 in [one["area"] for file in files for one in file["annotations"]]
    code, _, error = prepare_own("--images", images(tmp_path / "other"), *words, "--overwrite")
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
def test_wrong_input_is_one_line(tmp_path, prepare_own, prepare, arguments, message):
    folder = prepare(tmp_path)[0]
    code, _, error = prepare_own("--images", folder, "--output", tmp_path / "out", *arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_training_reads(tmp_path, prepare_own):
    folder, _ = voc_beside(tmp_path)
    arguments = ["--images", folder, "--output", tmp_path / "out", "--val", "0.25"]
    code, printed, _ = prepare_own(*arguments)
    assert code == 0 and "--coco-json" in printed and "resnet-backbone train-net" in printed
    assert (tmp_path / "out" / "out_train.jpg").is_file()
    files = [str(tmp_path / "out" / f"{name}.json") for name in ("train", "val")]
    assert [len(scan_coco(file, str(folder))[0]) for file in files] == [3, 1]
    before = (tmp_path / "out" / "train.json").read_bytes()
    assert prepare_own(*arguments)[0] == 2  # what is there stays
    assert prepare_own(*arguments, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "train.json").read_bytes() == before


def test_one_verdict_with_all_that_a_user_should_know(tmp_path, prepare_own):
    folder, _ = voc_beside(tmp_path)
    xml = folder / "a.xml"
    for old, new in (("cat</name>", "cat</name><difficult>1</difficult>"), (">80<", ">99<")):
        xml.write_text(xml.read_text().replace(old, new))
    (folder / "b.jpg").write_bytes(b"no image")
    arguments = ["--images", folder, "--output", tmp_path / "out", "--val", "0.4"]
    code, printed, _ = prepare_own(*arguments)
    assert code == 0 and f"{tmp_path / 'out'}: 3 images, each of them decoded\n" in printed
    assert "left out: 1 x a file, 0 x a box; " in printed and "unreadable-image: " in printed
    assert "note: boxes marked difficult (VOC) or crowd (COCO): 1; training leaves" in printed
    assert "note: 1 boxes ran past the edge of their image and were clipped" in printed
    table = [line.split() for line in printed.splitlines()[1:8]]
    assert ["split", "images", "boxes", "difficult"] in table  # without the official numbers
    assert not any(text in printed for text in ("headers", "in no split", "complete and"))


def test_sheets_of_wide_images_are_wide(tmp_path, prepare_own):
    folder, _ = voc_beside(tmp_path)
    for image in folder.glob("*.jpg"):
        Image.new("RGB", (1600, 100)).save(image)
    prepare_own("--images", folder, "--output", tmp_path / "out", "--val", "0.25")
    with Image.open(tmp_path / "out" / "out_train.jpg") as sheet:
        assert sheet.width > 1600


@pytest.mark.data
def test_blood_cells(data_root):
    splits, names, report = read_own(data_root / "BCCD", data_root / "BCCD")
    assert names == ["Platelets", "RBC", "WBC"]
    assert sum(len(record["annotations"]) for record in splits[""]) == 4886
    assert [problem.kind for problem in report.problems] == ["bad-box"] * 2


def test_crowds_as_run_lengths_are_written_too(tmp_path, prepare_own):
    """COCO's own, and a byte order mark, as some tools write it."""
    folder, file = coco_file(tmp_path)
    content = json.loads(file.read_text())
    mask = {"counts": [10, 5, WIDTH * HEIGHT - 15], "size": [HEIGHT, WIDTH]}
    content["annotations"][0] |= {"iscrowd": 1, "segmentation": mask}
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    out = tmp_path / "out"
    code, _, _ = prepare_own(
        "--images", folder, "--annotations", file, "--val", "0.25", "--output", out
    )
    assert code == 0
    files = (str(out / f"{name}.json") for name in ("train", "val"))
    records = [record for file in files for record in scan_coco(file, str(folder))[0]]
    boxes = [one for record in records for one in record["annotations"]]
    (crowd,) = (one for one in boxes if one["iscrowd"])
    assert len(boxes) == 5 and crowd["segmentation"]["size"] == [HEIGHT, WIDTH]
