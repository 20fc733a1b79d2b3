"""Data in VOC layout: loaded, registered, checked."""

import copy

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances as reference_loader
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

from resnet_backbone.detection.data import apply_policy, voc
from resnet_backbone.detection.data.scans import registered_scan
from resnet_backbone.detection.data.voc import VOC_CLASSES, find_voc_classes, register_voc, scan_voc
from resnet_backbone.runtime.errors import DataError

BOX = (2, 3, 10, 8)


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "test"])
def test_real_voc_equals_detectron2(data_root, split):
    folder = str(data_root / "VOCdevkit" / "VOC2007")
    ours = scan_voc(folder, split, VOC_CLASSES)[0]
    stripped = copy.deepcopy(ours)
    for annotation in (a for record in stripped for a in record["annotations"]):
        assert annotation.pop("difficult") in (0, 1)
    assert stripped == reference_loader(folder, split, VOC_CLASSES)
    hard = sum(a["difficult"] for r in ours for a in r["annotations"])
    text = [open(f"{folder}/Annotations/{r['image_id']}.xml").read() for r in ours]
    assert hard == sum(t.count("<difficult>1") for t in text) > 0


@pytest.mark.data
def test_real_voc_without_difficult(data_root):
    devkit = str(data_root / "VOCdevkit")
    everything, _ = scan_voc(devkit, "mini_train", VOC_CLASSES)
    register_voc("voc_data_test", devkit, "mini_train", VOC_CLASSES, use_difficult=False)
    expected = [[a for a in r["annotations"] if not a["difficult"]] for r in everything]
    assert [r["annotations"] for r in DatasetCatalog.get("voc_data_test")] == expected
    assert sum(map(len, expected)) < sum(len(r["annotations"]) for r in everything)


@pytest.mark.data
def test_real_class_names(data_root):
    assert find_voc_classes(data_root / "VOCdevkit", ["train", "test"]) == list(VOC_CLASSES)
    assert find_voc_classes(data_root / "BCCD", ["train"]) == ["Platelets", "RBC", "WBC"]


def test_dict(make_voc):
    root = make_voc({"a": [("dog", BOX, 1), ("cat", (1.5, 1, 20, 10))]})
    ((record,), _) = scan_voc(root, "train", ["cat", "dog"])
    dog = {"category_id": 1, "bbox": [1.0, 2.0, 10.0, 8.0], "difficult": 1}
    cat = {"category_id": 0, "bbox": [0.5, 0.0, 20.0, 10.0], "difficult": 0}
    mode = {"bbox_mode": BoxMode.XYXY_ABS}
    assert record.pop("annotations") == [dog | mode, cat | mode]
    name = str(root / "JPEGImages" / "a.jpg")
    assert record == {"file_name": name, "image_id": "a", "height": 10, "width": 20}


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_size_comes_from_the_image_where_the_xml_has_none(make_voc, size):
    root = make_voc({"a": [("dog", BOX)]}, size=size)
    (record,) = scan_voc(root, "train", ["dog"])[0]
    assert (record["width"], record["height"]) == (20, 10)


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".JPG", ".bmp"])
def test_image_suffixes(make_voc, suffix):
    root = make_voc({"a": [("dog", BOX)]}, suffix=suffix)
    xml = root / "Annotations" / "a.xml"
    assert scan_voc(root, "train", ["dog"])[0][0]["file_name"].endswith("a" + suffix)
    xml.write_text(xml.read_text().replace(f"a{suffix}", "a.tif"))  # a <filename> that is wrong
    assert scan_voc(root, "train", ["dog"])[0][0]["file_name"].endswith("a" + suffix)


SPLITS = {"a -1\nb  1\n\n": "ab", "b  0\r\n  \r\na  1": "ba", "a\n\n\nb": "ab", "\ufeffa\nb": "ab"}


@pytest.mark.parametrize("text, ids", SPLITS.items())
def test_split_file_forms(make_voc, text, ids):
    root = make_voc({"a": [("dog", BOX)], "b": []})
    (root / "ImageSets/Main/train.txt").write_text(text, encoding="utf-8")
    assert [r["image_id"] for r in scan_voc(root, "train", ["dog"])[0]] == [*ids]


def test_image_ids_may_end_in_a_number_after_a_space(make_voc):
    root = make_voc({"photo 1": [("dog", BOX)], "photo 2": []})
    ids = [r["image_id"] for r in scan_voc(root, "train", ["dog"])[0]]
    assert ids == ["photo 1", "photo 2"]


@pytest.mark.parametrize("entries", ["x/1\ny/1", "x/1.jpg\nJPEGImages/y/1.xml", "X\\1\ny/1"])
def test_image_ids_may_have_folders(make_voc, entries):
    root = make_voc({})
    for folder in ("x", "y"):
        for part in ("Annotations", "JPEGImages"):
            (root / part / folder).mkdir()
    make_voc({"1": [("cat", BOX)], "x/1": [("dog", BOX)], "y/1": [("dog", BOX)]})
    (root / "ImageSets/Main/train.txt").write_text(entries)
    records, report = scan_voc(root, "train", ["cat", "dog"])
    assert [r["image_id"] for r in records] == ["x/1", "y/1"] and not report.problems
    assert report.boxes == {"cat": 0, "dog": 2}


def test_nested_roots(make_voc, tmp_path):
    make_voc({"a": [("dog", BOX)]}, folder="VOCdevkit/VOC2012")
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        assert len(scan_voc(root, "train", ["dog"])[0]) == 1
    make_voc({"a": [("dog", BOX)]}, folder="VOCdevkit/VOC2007")
    with pytest.raises(DataError, match=r"several.*VOC2007.*VOC2012"):
        scan_voc(tmp_path / "VOCdevkit", "train", ["dog"])[0]


def test_wrong_root_and_split(make_voc, tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(DataError, match="is not a VOC folder"):
            scan_voc(root, "train", ["dog"])[0]
    with pytest.raises(DataError, match="splits there: train"):
        scan_voc(make_voc({"a": []}), "val", ["dog"])[0]


def test_class_names(make_voc):
    root = make_voc({"a": [("zebra", BOX)]})
    make_voc({"b": [("ant", BOX), ("zebra", BOX)]}, split="test")
    assert find_voc_classes(root, ["train"]) == ["zebra"]
    assert find_voc_classes(root, ["train", "test"]) == ["ant", "zebra"]
    with pytest.raises(DataError, match="no object with a class name"):
        find_voc_classes(make_voc({"c": []}, folder="other"), ["train"])


def test_register(make_voc):
    root = make_voc({"a": [("dog", BOX)], "b": [("cat", BOX, 1)]}, folder="VOC2012")
    register_voc("voc_data_test", root, "train", ["cat", "dog"], use_difficult=False)
    register_voc("voc_data_test", str(root), "train", ("cat", "dog"), use_difficult=False)
    assert [len(r["annotations"]) for r in DatasetCatalog.get("voc_data_test")] == [1, 0]
    metadata = MetadataCatalog.get("voc_data_test")
    assert metadata.thing_classes == ["cat", "dog"]
    assert (metadata.dirname, metadata.split, metadata.year) == (str(root), "train", 2012)
    assert metadata.evaluator_type == "voc"


OTHERS = dict(thing_classes={"class_names": ["dog"]}, split={"split": "test"})
OTHERS |= dict(use_difficult={"use_difficult": False}, decode={"decode": True})


@pytest.mark.parametrize("what, change", OTHERS.items())
def test_register_again_with_other_arguments(make_voc, what, change):
    root = make_voc({"a": [("dog", BOX), ("cat", BOX)]})
    make_voc({"b": []}, split="test")
    arguments = {"split": "train", "class_names": ["cat", "dog"]}
    register_voc("voc_data_test", root, **arguments)
    with pytest.raises(ValueError, match=f"already registered with another {what}"):
        register_voc("voc_data_test", root, **{**arguments, **change})


def test_detectron2s_own_names_are_not_overwritten(make_voc):
    with pytest.raises(ValueError, match="already registered"):
        register_voc("voc_2007_test", make_voc({"a": [("dog", BOX)]}), "train")


# Checks: loaders leave out exactly what is reported


BCCD_BAD = ["BloodImage_00338.xml", "BloodImage_00343.xml"]


def check(root, classes=("cat", "dog"), **options):
    """Report on "train", after a look that the records are what the report says is left."""
    records, report = scan_voc(root, "train", classes, **options)
    used = ("duplicate-id", "empty-split")
    lost_images = {p.file for p in report.bad_files if p.kind not in used}
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
    register_voc(name, root, "train", ["dog"], use_difficult=False)
    first = DatasetCatalog.get(name)
    first[0]["annotations"][0]["bbox"] = "changed by its user"
    (again,) = DatasetCatalog.get(name)
    assert [entry["bbox"] for entry in again["annotations"]] == [[0, 0, 9, 9]]
    records, report = registered_scan(name).scan()
    assert len(records[0]["annotations"]) == 2 and report.boxes["dog"] == 1
    assert len(report.problems) == 1
    assert len(scans) == 1 and caplog.text.count("left out: bad-box") == 1
    assert registered_scan("voc_2007_test") is None and registered_scan("no such set") is None
