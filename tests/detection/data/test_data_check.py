"""Checking data sets, and that loaders leave out exactly what is reported."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from resnet_backbone.detection.data import apply_policy, find_voc_classes, scan_voc, voc
from resnet_backbone.detection.data.scans import registered_scan
from resnet_backbone.runtime.errors import DataError

BOX = (2, 3, 10, 8)
BCCD_BAD = ["BloodImage_00338.xml", "BloodImage_00343.xml"]


def check(root, classes=("cat", "dog"), **options):
    """Report on "train", after a look that the records are what the report says is left."""
    records, report = scan_voc(root, "train", classes, **options)
    lost_images = {
        p.file for p in report.bad_files if p.kind not in ("duplicate-id", "empty-split")
    }
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
    records, reports = zip(*(scan_voc(root, s, classes) for s in ("trainval", "test")), strict=True)
    bad = [p for report in reports for p in report.bad_boxes]
    assert [p.file.rsplit("/", 1)[-1] for p in bad] == BCCD_BAD
    assert all("zero or negative size" in p.detail for p in bad)
    assert not any(report.bad_files for report in reports)
    assert sum(r.num_images for r in reports) == 364
    assert sum(sum(r.boxes.values()) for r in reports) == 4888 - 2
    assert sum(len(r["annotations"]) for r in records[0]) == sum(reports[0].boxes.values())


def test_policies(make_voc, caplog):
    root = make_voc({name: [("dog", (5, 5, 5, 5))] * 6 for name in "ab"})
    report = check(root)
    with pytest.raises(DataError, match="--bad-data drop.*a.xml.*b.xml.*; and 2 more") as error:
        apply_policy(report, "refuse")
    assert str(error.value).count(".xml") == 10
    apply_policy(report, "drop")
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 12 and "a.xml" in logged[0] and "b.xml" in logged[-1]
    with pytest.raises(ValueError, match="unknown bad-data policy 'ignore'"):
        apply_policy(report, "ignore")


@pytest.mark.data
def test_real_voc_is_good(data_root):
    _, report = scan_voc(data_root / "VOCdevkit", "mini_train", ["dog"])
    assert set(kinds(report)) == {"unknown-class"}  # all but dogs
    classes = find_voc_classes(data_root / "VOCdevkit", ["mini_train"])
    _, report = scan_voc(data_root / "VOCdevkit", "mini_train", classes, decode=True)
    assert not report.problems and sum(report.difficult.values()) > 0


def test_good_set(make_voc):
    report = check(make_voc({"a": [("dog", BOX, 0), ("dog", BOX, 1)], "b": []}))
    assert not report.problems
    assert (report.num_images, report.boxes["dog"], report.difficult["dog"]) == (2, 1, 1)
    apply_policy(report, "refuse")


NO_SIZE = [(5, 3, 5, 8), (5, 8, 10, 8), (10, 3, 5, 8)]
PAST = [(-0.5, 3, 10, 8), (2, -1, 10, 8), (2, 3, 21.5, 8), (2, 3, 10, 12)]
OUTSIDE = [(-9, 3, 0, 8), (2, -9, 10, -1), (21, 3, 25, 8), (2, 11, 10, 12)]
NO_NUMBERS = [("nan", 3, 10, 8), (2, 3, "inf", 8), ("x", 3, 10, 8), ("", 3, 10, 8)]


def test_bad_boxes(make_voc):
    bad = [*NO_SIZE, *OUTSIDE, *NO_NUMBERS]
    report = check(make_voc({"a": [("dog", box) for box in (*bad, BOX)]}))
    assert kinds(report) == ["bad-box"] * len(bad) and report.bad_boxes[0].file.endswith("a.xml")
    assert report.boxes == {"cat": 0, "dog": 1} and not report.clipped


def test_boxes_past_the_edge_are_clipped_and_said(make_voc):
    root = make_voc({"a": [("dog", box) for box in (*PAST, BOX)]})
    (record,), report = scan_voc(root, "train", ["dog"])
    assert not report.problems and report.boxes == {"dog": len(PAST) + 1}
    boxes = [tuple(one["bbox"]) for one in record["annotations"]]
    assert boxes == [(0, 2, 10, 8), (1, 0, 10, 8), (1, 2, 20, 8), (1, 2, 10, 10), (1, 2, 10, 8)]
    (remark,) = report.remarks()
    assert remark.startswith(f"{len(PAST)} boxes ran past the edge") and "a.xml" in remark


def test_boxes_within_a_pixel_are_good(make_voc):
    boxes = (0, 0, 21, 11), (1, 1, 20, 10), (5, 5, 5.5, 6)
    assert not check(make_voc({"a": [("dog", box) for box in boxes]})).problems


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
    assert report.boxes == {"cat": 1, "dog": 0}


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
    assert [f"{p.kind} {p.file.rsplit('/', 1)[-1]}" for p in report.bad_files] == [
        *("missing-image a.jpg", "missing-xml b.xml", "broken-xml c.xml"),
        *("unreadable-image d.jpg", "size-mismatch e.jpg", "duplicate-id train.txt"),
    ]
    assert not report.bad_boxes and report.num_images == 7


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
    ((record,), _) = scan_voc(root, "train", ["dog"])
    assert (record["width"], record["height"]) == (10, 20)


@pytest.mark.parametrize("policy", ["refuse", "drop"])
def test_empty_split_is_refused_by_every_policy(make_voc, policy):
    root = make_voc({})
    report = check(root)
    assert kinds(report) == ["empty-split"]
    with pytest.raises(DataError, match="^.* cannot be used: no usable image$"):
        apply_policy(report, policy)


def test_a_registered_set_is_scanned_once(make_voc, monkeypatch, caplog):
    """The loader, as often as it is asked, and the evaluator share one scan and its warnings."""
    boxes = [("dog", (1, 1, 9, 9)), ("dog", (2, 2, 2, 5)), ("dog", (3, 3, 9, 9), 1)]
    root, name, scans = make_voc({"a": boxes}), "data_check_test_once", []
    monkeypatch.setattr(voc, "_scan", lambda *a, f=voc._scan: scans.append(a) or f(*a))
    voc.register_voc(name, root, "train", ["dog"], use_difficult=False)
    first = DatasetCatalog.get(name)
    first[0]["annotations"][0]["bbox"] = "changed by its user"
    (again,) = DatasetCatalog.get(name)
    assert [entry["bbox"] for entry in again["annotations"]] == [[0, 0, 9, 9]]
    records, report = registered_scan(name).scan()
    assert len(records[0]["annotations"]) == 2 and report.boxes["dog"] == 1
    assert len(report.problems) == 1
    assert len(scans) == 1 and caplog.text.count("left out: bad-box") == 1
    assert registered_scan("voc_2007_test") is None and registered_scan("no such set") is None
