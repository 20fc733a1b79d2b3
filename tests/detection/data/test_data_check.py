"""Checking data sets, and that loaders leave out exactly what is reported."""

import json

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from resnet_backbone.detection.data import (
    apply_policy,
    check_coco,
    check_voc,
    find_voc_classes,
    load_coco_instances,
    load_voc_instances,
    register_coco,
    voc,
)
from resnet_backbone.detection.data.problems import registered_scan
from resnet_backbone.runtime.errors import DataError

BOX = (2, 3, 10, 8)
BCCD_BAD = ["BloodImage_00338.xml", "BloodImage_00343.xml"]


def check(root, classes=("cat", "dog"), **options):
    """Report on "train", after a look that the loader gives what the report says is left."""
    report = check_voc(root, "train", classes, progress=False, **options)
    if not any(p.kind == "empty-split" for p in report.problems):
        records = load_voc_instances(root, "train", classes, **options)
        lost_images = {p.file for p in report.bad_files if p.kind != "duplicate-id"}
        assert len(records) == report.num_images - len(lost_images)
        kept = sum(len(r["annotations"]) for r in records)
        assert kept == sum(report.boxes.values()) + sum(report.difficult.values())
    return report


def kinds(report):
    return [p.kind for p in report.problems]


@pytest.mark.data
def test_bccd_has_two_bad_boxes(data_root):
    root = data_root / "BCCD"
    classes = find_voc_classes(root, ["trainval", "test"])
    reports = [check_voc(root, s, classes, progress=False) for s in ("trainval", "test")]
    bad = [p for report in reports for p in report.bad_boxes]
    assert [p.file.rsplit("/", 1)[-1] for p in bad] == BCCD_BAD
    assert all("zero or negative size" in p.detail for p in bad)
    assert not any(report.bad_files for report in reports)
    assert sum(r.num_images for r in reports) == 364
    assert sum(sum(r.boxes.values()) for r in reports) == 4888 - 2
    for report in reports:
        assert all(name in report.summary() for name in classes)
    loaded = load_voc_instances(root, "trainval", classes)
    assert sum(len(r["annotations"]) for r in loaded) == sum(reports[0].boxes.values())


@pytest.mark.data
def test_bccd_policies(data_root, caplog):
    root = data_root / "BCCD"
    report = check_voc(root, "trainval", ["Platelets", "RBC", "WBC"], progress=False)
    with pytest.raises(DataError, match="--bad-data drop") as error:
        apply_policy(report, "refuse")
    assert all(name in str(error.value) for name in BCCD_BAD)
    with caplog.at_level("WARNING"):
        apply_policy(report, "drop")
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2
    assert all(name in line for name, line in zip(BCCD_BAD, logged, strict=True))


@pytest.mark.data
def test_real_voc_is_good(data_root):
    report = check_voc(data_root / "VOCdevkit", "mini_train", ["dog"], progress=False)
    assert set(kinds(report)) == {"unknown-class"}  # all but dogs
    classes = find_voc_classes(data_root / "VOCdevkit", ["mini_train"])
    report = check_voc(data_root / "VOCdevkit", "mini_train", classes, decode=True, progress=False)
    assert not report.problems and sum(report.difficult.values()) > 0


def test_good_set(make_voc):
    report = check(make_voc({"a": [("dog", BOX, 0), ("dog", BOX, 1)], "b": []}))
    assert not report.problems
    assert (report.num_images, report.boxes["dog"], report.difficult["dog"]) == (2, 1, 1)
    apply_policy(report, "refuse")


@pytest.mark.parametrize(
    "box",
    [
        (5, 3, 5, 8),
        (5, 8, 10, 8),
        (10, 3, 5, 8),
        ("nan", 3, 10, 8),
        (2, 3, "inf", 8),
        (-0.5, 3, 10, 8),
        (2, -1, 10, 8),
        (2, 3, 21.5, 8),
        (2, 3, 10, 12),
        ("x", 3, 10, 8),
        ("", 3, 10, 8),
    ],
)
def test_bad_boxes(make_voc, box):
    report = check(make_voc({"a": [("dog", box), ("dog", BOX)]}))
    assert kinds(report) == ["bad-box"] and report.bad_boxes[0].file.endswith("a.xml")
    assert report.boxes == {"cat": 0, "dog": 1}


@pytest.mark.parametrize("box", [(0, 0, 21, 11), (1, 1, 20, 10), (5, 5, 5.5, 6)])
def test_boxes_within_a_pixel_are_good(make_voc, box):
    assert not check(make_voc({"a": [("dog", box)]})).problems


def test_object_without_name_or_box(make_voc):
    root = make_voc({"a": [("dog", BOX), ("cat", BOX)]})
    xml = root / "Annotations" / "a.xml"
    text = xml.read_text().replace("<name>dog</name>", "")
    xml.write_text(text.replace("</annotation>", "<object><name>cat</name></object></annotation>"))
    report = check(root)
    assert kinds(report) == ["bad-box", "bad-box"] and report.boxes == {"cat": 1, "dog": 0}


def test_unknown_class_names_the_nearest(make_voc):
    report = check(make_voc({"a": [("Dog", BOX), ("cat", BOX)]}))
    (problem,) = report.bad_boxes
    assert problem.kind == "unknown-class" and "'Dog'" in problem.detail
    assert "nearest is 'dog'" in problem.detail
    assert ["dog", "0", "0"] in map(str.split, report.summary().splitlines())


def test_files(make_voc):
    root = make_voc({name: [("dog", BOX)] for name in "abcdefg"})
    images, xmls = root / "JPEGImages", root / "Annotations"
    (images / "a.jpg").unlink()
    (xmls / "b.xml").unlink()
    (xmls / "c.xml").write_text("<annotation><object>")
    (images / "d.jpg").write_bytes(b"no image")
    Image.new("RGB", (10, 20)).save(images / "e.jpg")
    with open(root / "ImageSets/Main/train.txt", "a") as file:
        file.write("g\n")
    report = check(root)
    assert [(p.kind, p.file.rsplit("/", 1)[-1]) for p in report.bad_files] == [
        ("missing-image", "a.jpg"),
        ("missing-xml", "b.xml"),
        ("broken-xml", "c.xml"),
        ("unreadable-image", "d.jpg"),
        ("size-mismatch", "e.jpg"),
        ("duplicate-id", "train.txt"),
    ]
    assert not report.bad_boxes and report.num_images == 7
    assert all(str(problem) in report.summary() for problem in report.problems)


def test_truncated_image_needs_decoding(make_voc):
    root = make_voc({"a": [("dog", BOX)], "b": [("dog", BOX)]}, size=None)
    path = root / "JPEGImages" / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert not check(root).problems
    assert kinds(check(root, decode=True)) == ["unreadable-image"]


def test_turned_photographs_have_detectron2s_size(make_voc):
    from detectron2.data.detection_utils import read_image

    root = make_voc({"a": [("dog", (1, 1, 9, 19))]}, size=(10, 20))
    path = root / "JPEGImages" / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    assert read_image(str(path)).shape[:2] == (20, 10)
    assert not check(root).problems
    (record,) = load_voc_instances(root, "train", ["dog"])
    assert (record["width"], record["height"]) == (10, 20)


@pytest.mark.parametrize("policy", ["refuse", "drop"])
def test_empty_split_is_refused_by_every_policy(make_voc, policy):
    root = make_voc({})
    report = check(root)
    assert kinds(report) == ["empty-split"]
    with pytest.raises(DataError, match="^.* cannot be used: empty-split: .*: no usable image$"):
        apply_policy(report, policy)
    with pytest.raises(DataError, match="no usable image"):
        load_voc_instances(root, "train", ["dog"], on_bad=policy)


def test_refusal_lists_ten_and_counts_the_rest(make_voc):
    report = check(make_voc({"a": [("dog", (5, 5, 5, 5))] * 12 + [("dog", BOX)]}))
    with pytest.raises(DataError) as error:
        apply_policy(report, "refuse")
    assert str(error.value).count("a.xml") == 10 and "2 more" in str(error.value)
    with pytest.raises(ValueError, match="'ignore' is not known"):
        apply_policy(report, "ignore")


@pytest.fixture
def coco(tmp_path):
    """A folder with two images of 20x10 and `write(**changes)` for its JSON."""
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    content = {
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "width": 20, "height": 10}
            for i, n in enumerate("ab")
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 90, "bbox": [0, 0, 20, 10]},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [3, 3, 4, 4]},
        ],
    }

    def write(**changes):
        path = tmp_path / f"set{len(list(tmp_path.glob('*.json')))}.json"
        path.write_text(json.dumps({**content, **changes}))
        return str(path)

    write.content, write.root = content, str(tmp_path)
    return write


def coco_annotation(number, **changes):
    return {"id": number, "image_id": 0, "category_id": 7, "bbox": [1, 1, 5, 5], **changes}


@pytest.mark.data
def test_real_coco_equals_detectron2(data_root):
    root = data_root / "coco_mini"
    arguments = str(root / "annotations/instances_val2017.json"), str(root / "val2017")
    report = check_coco(*arguments, decode=True, progress=False)
    assert not report.problems and report.num_images == 30
    name = "data_check_test_reference"
    assert load_coco_instances(*arguments) == load_coco_json(*arguments, name)
    MetadataCatalog.pop(name)


def test_coco_boxes_and_files(coco):
    bad = ([2, 2, 0, 5], [2, 2, 5, -1], [2, 2, float("nan"), 5], [-2, 2, 5, 5], [2, 2, 20, 5])
    extra = [coco_annotation(10 + i, bbox=box) for i, box in enumerate(bad)]
    images = [*coco.content["images"], {"id": 9, "file_name": "no.jpg", "width": 1, "height": 1}]
    path = coco(
        images=images,
        annotations=[*coco.content["annotations"], *extra, coco_annotation(30, image_id=77)],
    )
    report = check_coco(path, coco.root, progress=False)
    assert sorted(kinds(report)) == ["bad-box"] * 6 + ["missing-image"]
    assert report.boxes == {"cat": 1, "dog": 1}
    records = load_coco_instances(path, coco.root)
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[1], [0]]
    with pytest.raises(DataError, match="no.jpg"):
        load_coco_instances(path, coco.root, on_bad="refuse")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": None}, "no list annotations"),
        ({"categories": []}, "categories is empty"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, r"images\[0\] has no height, width"),
        ({"annotations": [coco_annotation(1, category_id=5)]}, "category_id 5"),
        ({"annotations": [coco_annotation(1), coco_annotation(1)]}, "id 1 occurs 2 times"),
        ({"annotations": [coco_annotation(1, bbox=[1, 2, 3])]}, "not four numbers"),
        ({"annotations": [coco_annotation(1, ignore=1)]}, "ignore"),
    ],
)
def test_coco_structure(coco, changes, message):
    path = coco(**changes)
    assert set(kinds(check_coco(path, coco.root, progress=False))) == {"broken-json"}
    for on_bad in ("drop", "refuse"):
        with pytest.raises(DataError, match=message):
            load_coco_instances(path, coco.root, on_bad=on_bad)
    with pytest.raises(DataError, match=message):
        register_coco("data_check_test_broken", path, coco.root)
    assert "data_check_test_broken" not in DatasetCatalog


def test_coco_file_itself(coco, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        register_coco("data_check_test_absent", str(tmp_path / "no.json"), coco.root)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        register_coco("data_check_test_text", str(tmp_path / "text.json"), coco.root)


def test_wrong_image_root_is_one_line_that_names_an_image(coco, tmp_path):
    with pytest.raises(DataError) as caught:
        load_coco_instances(coco(), str(tmp_path / "elsewhere"))
    message = str(caught.value)
    assert "no usable image: 2 missing-image, such as " in message and "\n" not in message
    assert str(tmp_path / "elsewhere") in message


def test_register_coco(coco):
    name, path = "data_check_test_registered", coco()
    try:
        register_coco(name, path, coco.root)
        register_coco(name, path, coco.root)
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["cat", "dog"]
        assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 90: 1}
        assert metadata.evaluator_type == "coco"
        classes = [a["category_id"] for r in DatasetCatalog.get(name) for a in r["annotations"]]
        assert classes == [1, 0]
        with pytest.raises(ValueError, match="another json_file"):
            register_coco(name, coco(), coco.root)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def test_a_registered_set_is_scanned_once(make_voc, monkeypatch, caplog):
    """The loader, as often as it is asked, and the evaluator share one scan and its warnings."""
    boxes = [("dog", (1, 1, 9, 9)), ("dog", (2, 2, 2, 5)), ("dog", (3, 3, 9, 9), 1)]
    root, name, scans = make_voc({"a": boxes}), "data_check_test_once", []
    monkeypatch.setattr(voc, "scan_voc", lambda *a, f=voc.scan_voc: scans.append(a) or f(*a))
    try:
        voc.register_voc(name, root, "train", ["dog"], use_difficult=False)
        first = DatasetCatalog.get(name)
        first[0]["annotations"][0]["bbox"] = "changed by its user"
        (again,) = DatasetCatalog.get(name)
        assert [entry["bbox"] for entry in again["annotations"]] == [[0, 0, 9, 9]]
        records, report = registered_scan(name).scan()
        assert len(records[0]["annotations"]) == 2 and report.boxes["dog"] == 1
        assert len(report.problems) == 1
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    assert len(scans) == 1 and caplog.text.count("left out: bad-box") == 1
    assert registered_scan("voc_2007_test") is None and registered_scan("no such set") is None
