"""Checking data sets, and that loaders leave out exactly what is reported."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from resnet_backbone.detection.data import (
    apply_policy,
    find_voc_classes,
    register_coco,
    scan_coco,
    scan_voc,
    voc,
)
from resnet_backbone.detection.data.arguments import set_up_data
from resnet_backbone.detection.data.formats.coco import read_coco
from resnet_backbone.detection.data.scans import registered_scan
from resnet_backbone.runtime.errors import DataError, UsageError

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


def load(scanned, on_bad="drop"):
    """What a loader gives of what a scan found."""
    records, report = scanned
    apply_policy(report, on_bad)
    return records


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
    _, report = scan_voc(
        make_voc({name: [("dog", (5, 5, 5, 5))] for name in "ab"}), "train", ["dog"]
    )
    with pytest.raises(DataError, match="--bad-data drop.*a.xml.*b.xml"):
        apply_policy(report, "refuse")
    apply_policy(report, "drop")
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2 and "a.xml" in logged[0] and "b.xml" in logged[1]


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
    with pytest.raises(DataError, match="^.* cannot be used: empty-split: .*: no usable image$"):
        apply_policy(report, policy)


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
    size = {"width": 20, "height": 10}
    content = {
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        "images": [{"id": i, "file_name": f"{n}.jpg", **size} for i, n in enumerate("ab")],
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
    records, report = scan_coco(*arguments, decode=True)
    assert not report.problems and report.num_images == 30
    name = "data_check_test_reference"
    areas = [one.pop("area") for record in records for one in record["annotations"]]
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    assert sorted(areas) == sorted(one["area"] for one in content["annotations"])
    assert records == load_coco_json(*arguments, name)
    MetadataCatalog.pop(name)


def test_coco_boxes_and_files(coco):
    bad = ([2, 2, 0, 5], [2, 2, 5, -1], [2, 2, float("nan"), 5], [-9, 2, 5, 5], [25, 2, 20, 5])
    extra = [coco_annotation(10 + i, bbox=box) for i, box in enumerate(bad)]
    images = [*coco.content["images"], {"id": 9, "file_name": "no.jpg", "width": 1, "height": 1}]
    extra += [*coco.content["annotations"], coco_annotation(30, image_id=77)]
    path = coco(images=images, annotations=extra)
    records, report = scan_coco(path, coco.root)
    assert sorted(kinds(report)) == ["bad-box"] * 6 + ["missing-image"]
    assert report.boxes == {"cat": 1, "dog": 1}
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[1], [0]]
    with pytest.raises(DataError, match="no.jpg"):
        load(scan_coco(path, coco.root), "refuse")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": None}, "no list annotations"),
        ({"categories": []}, "the list of categories has no usable one"),
        ({"categories": [{"id": None, "name": "a"}]}, r"categories\[0\] has no id or no name"),
    ],
)
def test_a_file_of_which_nothing_can_be_used(coco, changes, message):
    path = coco(**changes)
    assert "broken-json" in kinds(scan_coco(path, coco.root)[1])
    for on_bad in ("drop", "refuse"):
        with pytest.raises(DataError, match="cannot be used"):
            load(scan_coco(path, coco.root), on_bad)
    with pytest.raises(DataError, match=message):
        register_coco("data_check_test_broken", path, coco.root)
    assert "data_check_test_broken" not in DatasetCatalog


@pytest.mark.parametrize(
    "section, entry, kind, detail",
    [
        ("annotations", 7, "bad-box", "annotations[2] is no annotation"),
        ("annotations", coco_annotation(1, category_id=5), "bad-box", "category_id 5 is not in"),
        ("annotations", coco_annotation(1, bbox=[1, 2, 3]), "bad-box", "is not four numbers"),
        ("annotations", coco_annotation(1, bbox=None), "bad-box", "bbox None is not four"),
        ("annotations", coco_annotation(1, bbox=[1, 1, 9, 10**400]), "bad-box", "is not four"),
        ("annotations", coco_annotation(1, image_id="9" * 5000), "bad-box", "is of image '999"),
        ("annotations", coco_annotation(1, image_id="x"), "bad-box", "is of image 'x'"),
        ("images", {"id": 0, "file_name": "c.jpg"}, "duplicate-id", "image id 0 occurs again"),
        ("images", {"id": 5, "file_name": 5}, "bad-entry", "the file_name 5, which is no text"),
        ("images", {"file_name": "c.jpg"}, "bad-entry", "images[2] has no id"),
        ("categories", {"id": 90, "name": "x"}, "duplicate-id", "category id 90 occurs again"),
        ("categories", {"id": 91}, "bad-entry", "categories[2] has no id or no name"),
    ],
)
def test_a_bad_entry_among_good_ones(coco, section, entry, kind, detail):
    records, report = scan_coco(coco(**{section: [*coco.content[section], entry]}), coco.root)
    (problem,) = report.problems
    assert problem.kind == kind and detail in problem.detail
    assert [len(record["annotations"]) for record in records] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        dict(segmentation=[[]]),
        dict(segmentation=[[1, 1, 5, 5]]),
        dict(segmentation=""),
        dict(segmentation={"counts": [-1], "size": [10, 20]}),
        dict(area="25"),
        dict(category_id="7", image_id="0"),
        dict(iscrowd=None),
        dict(bbox=["1", "1", 5, 5.0]),
        dict(id=1),  # which is another's
        dict(keypoints=[1, "x", 2]),
        dict(area=10**400),
        dict(segmentation={"counts": {}, "size": [10, 20]}),
    ],
    ids=str,
)
def test_odd_fields_cost_no_box(coco, change):
    path = coco(annotations=[*coco.content["annotations"], coco_annotation(3, **change)])
    records, report = scan_coco(path, coco.root)
    assert not report.problems and report.boxes == {"cat": 2, "dog": 1}
    box = records[0]["annotations"][1]
    assert [box["bbox"], box["area"], box["iscrowd"]] == [[1, 1, 5, 5], 25, 0]
    assert not {"segmentation", "keypoints"} & box.keys()


@pytest.mark.parametrize(
    "mask", [[[1, 1, 5, 1, 5, 5], [1]], [1, 1, 5, 1, 5, 5]], ids=["one of two", "a flat list"]
)
def test_what_is_good_of_a_mask_stays(coco, mask):
    path = coco(annotations=[coco_annotation(3, segmentation=mask, ignore=1)])
    (record, _), _ = scan_coco(path, coco.root)
    (box,) = record["annotations"]
    assert box["segmentation"] == [[1, 1, 5, 1, 5, 5]] and box["iscrowd"] == 1


def test_odd_files_and_images_are_read(coco, tmp_path):
    images = [dict(i, file_name=f".\\{i['file_name']}", width="20") for i in coco.content["images"]]
    del images[1]["height"]
    path = Path(coco(images=images))
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(json.loads(path.read_bytes())), encoding=encoding)
        records, report = scan_coco(str(path), coco.root)
        assert not report.problems and len(records) == 2


@pytest.mark.parametrize(
    "entries, names, remark",
    [
        ([(90, "dog"), (7, "dog")], ["dog", "dog 2"], "category 7 is a second 'dog'"),
        ([(90, 1), (7, "dog")], ["dog", "1"], "the name of category 90 is no text"),
        ([(90, "Dog"), (7, "dog")], ["dog", "Dog"], "classes that differ in case alone"),
        ([(90, "dog"), (7, "cat"), (0, "pets")], ["cat", "dog"], "category 'pets' is left out"),
    ],
)
def test_odd_categories_are_used_and_said(coco, entries, names, remark):
    categories = [
        {"id": number, "name": name, "supercategory": "none" if number == 0 else "pets"}
        for number, name in entries
    ]
    records, report = scan_coco(coco(categories=categories), coco.root)
    assert sum(len(record["annotations"]) for record in records) == 2 and not report.problems
    assert sorted(report.boxes) == sorted(names) and remark in "; ".join(report.remarks())


def test_shares_in_place_of_pixels_are_said(coco):
    path = coco(annotations=[coco_annotation(1, bbox=[0.1, 0.2, 0.5, 0.5])])
    assert "lie between 0 and 1" in "; ".join(scan_coco(path, coco.root)[1].remarks())


def test_a_name_that_no_file_can_have(coco):
    images = [*coco.content["images"], {"id": 9, "file_name": "a\0.jpg"}]
    _, report = scan_coco(coco(images=images), coco.root)
    assert kinds(report) == ["unreadable-image"] and "null byte" in report.problems[0].detail


def test_what_nobody_expected_is_one_line_with_the_file(coco, make_voc, monkeypatch):
    """A KeyError and such anywhere in reading; its origin stays for the traceback."""

    def fail(*_, **__):
        raise KeyError("odd")

    root, path = make_voc({"a": [("dog", BOX)]}), coco()
    found = read_coco(path)
    monkeypatch.setattr("resnet_backbone.detection.data.formats.coco.absent_keys", fail)
    for module in ("coco", "voc"):
        monkeypatch.setattr(f"resnet_backbone.detection.data.{module}.fit_box", fail)
    for name, call in (
        (path, lambda: register_coco("data_check_test_odd", path, coco.root)),
        (path, lambda: scan_coco(path, coco.root, found=found)),
        (str(root), lambda: scan_voc(root, "train", ["dog"])),
    ):
        with pytest.raises(DataError, match="cannot be read .KeyError: 'odd'") as caught:
            call()
        assert name in str(caught.value) and isinstance(caught.value.__cause__, KeyError)


def test_coco_file_itself(coco, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        register_coco("data_check_test_absent", str(tmp_path / "no.json"), coco.root)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        register_coco("data_check_test_text", str(tmp_path / "text.json"), coco.root)


def test_wrong_image_root_is_one_line_that_names_an_image(coco, tmp_path):
    with pytest.raises(DataError) as caught:
        load(scan_coco(coco(), str(tmp_path / "elsewhere")))
    message = str(caught.value)
    assert "no usable image: 2 missing-image, such as " in message and "\n" not in message
    assert str(tmp_path / "elsewhere") in message


def test_register_coco(coco):
    name, path = "data_check_test_registered", coco()
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


def test_data_sets_with_other_class_orders_are_refused(make_cfg, coco):
    orders = {"one": ("cat", "dog"), "two": ("dog", "cat")}
    for name, classes in orders.items():
        categories = [{"id": i, "name": c} for i, c in zip((7, 90), classes, strict=True)]
        register_coco(name, coco(categories=categories), coco.root)
    cfg = make_cfg(None, DATASETS__TRAIN=("one",), DATASETS__TEST=("two",))
    paths = dict(voc_root=None, coco_json=None, sem_seg=None, eval_only=False, bad_data="drop")
    with pytest.raises(UsageError, match="same names in the same order"):
        set_up_data(cfg, Namespace(opts=[], **paths))


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
