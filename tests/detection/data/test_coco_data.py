"""Data sets in COCO's format: what is read, what is left out, and how they are registered."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from drawn_images import coco_json
from PIL import Image

from resnet_backbone.detection.data import apply_policy, register_coco, scan_coco, scan_voc
from resnet_backbone.detection.data.arguments import _adopt, set_up_data
from resnet_backbone.detection.data.formats.coco import clean_coco, read_coco
from resnet_backbone.runtime.errors import DataError, UsageError


def load(scanned, on_bad="drop"):
    """What a loader gives of what a scan found."""
    records, report = scanned
    apply_policy(report, on_bad)
    return records


def kinds(report):
    return [problem.kind for problem in report.problems]


@pytest.fixture
def coco(tmp_path):
    """A folder with two images of 20x10 and `write(**changes)` for its JSON."""
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    images = {0: ("a.jpg", 20, 10), 1: ("b.jpg", 20, 10)}
    boxes = [(0, 90, [0, 0, 20, 10]), (1, 7, [3, 3, 4, 4])]
    content = coco_json({90: "dog", 7: "cat"}, images, boxes)

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
    areas = [one.pop("area") for record in records for one in record["annotations"]]
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    assert sorted(areas) == sorted(one["area"] for one in content["annotations"])
    assert records == load_coco_json(*arguments, "data_check_test_reference")


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
        ({"annotations": None}, "no list of annotations"),
        ({"categories": []}, "it has no usable category"),
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
        ("annotations", 7, "bad-box", "annotations[2] is not an annotation"),
        ("annotations", coco_annotation(1, category_id=5), "bad-box", "category_id 5 is not in"),
        ("annotations", coco_annotation(1, bbox=[1, 2, 3]), "bad-box", "is not four numbers"),
        ("annotations", coco_annotation(1, bbox=None), "bad-box", "bbox None is not four"),
        ("annotations", coco_annotation(1, bbox=[1, 1, 9, 10**400]), "bad-box", "is not four"),
        ("annotations", coco_annotation(1, image_id="9" * 5000), "bad-box", "is of image '999"),
        ("annotations", coco_annotation(1, image_id="x"), "bad-box", "is of image 'x'"),
        ("images", {"id": 0, "file_name": "c.jpg"}, "duplicate-id", "image id 0 occurs again"),
        ("images", {"id": 5, "file_name": 5}, "bad-entry", "the file_name 5, which is not a text"),
        ("images", {"id": 5, "file_name": "a\0.jpg"}, "unreadable-image", "null byte"),
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


POLYGONS = [[[]], [[1, 1, 5, 5]], "", [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, float("nan")]]]
RUNS = [{"counts": one, "size": [10, 20]} for one in ([5, 5], [201, -1], "", {})]
RUNS += [{"counts": [0, 200]}, {"counts": [5, 5], "size": [2, 5]}]
ODD = [dict(segmentation=one) for one in [*POLYGONS, *RUNS]]
ODD += [dict(area="25"), dict(area=10**400), dict(iscrowd=None), dict(keypoints=[1, "x", 2])]
ODD += [dict(category_id="7", image_id="0"), dict(bbox=["1", "1", 5, 5.0])]
ODD += [dict(id=1)]  # which is another's


@pytest.mark.parametrize("change", ODD, ids=str)
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
        ([(90, 1), (7, "dog")], ["dog", "1"], "the name of category 90 is not a text"),
        ([(90, "Dog"), (7, "dog")], ["dog", "Dog"], "classes that differ only in case"),
        ([(90, "dog"), (7, "cat"), (0, "pets")], ["cat", "dog"], "category 'pets' is left out"),
    ],
)
def test_odd_categories_are_used_and_said(coco, entries, names, remark):
    categories = [{"id": number, "name": name, "supercategory": "pets"} for number, name in entries]
    if entries[-1] == (0, "pets"):
        categories[-1]["supercategory"] = "none"
    records, report = scan_coco(coco(categories=categories), coco.root)
    assert sum(len(record["annotations"]) for record in records) == 2 and not report.problems
    assert sorted(report.boxes) == sorted(names) and remark in "; ".join(report.remarks())


def test_a_parent_with_a_parent_is_a_class(coco):
    """Roboflow's own has none. This one may have boxes in the other file of the data set."""
    names = [(7, "car", "vehicle"), (90, "vehicle", "vehicle")]
    categories = [{"id": i, "name": name, "supercategory": above} for i, name, above in names]
    cars = [one for one in coco.content["annotations"] if one["category_id"] == 7]
    _, report = scan_coco(coco(categories=categories, annotations=cars), coco.root)
    assert report.boxes == {"car": 1, "vehicle": 0} and not report.notes


def test_boxes_beside_others_with_keypoints_have_none_that_is_labeled(coco):
    points = [2, 2, 2, 0, 0, 0]
    boxes = [*coco.content["annotations"], coco_annotation(3, keypoints=points, num_keypoints=1)]
    path = coco(annotations=boxes)
    records = load(scan_coco(path, coco.root))
    points = [one["keypoints"][2::3] for record in records for one in record["annotations"]]
    assert points == [[0, 0], [2, 0], [0, 0]]
    written = clean_coco(*read_coco(path)[:3])["annotations"]
    assert sorted(one["num_keypoints"] for one in written) == [0, 0, 1]


def test_a_mask_without_an_area_has_its_own(coco):
    triangle = dict(segmentation=[[1, 1, 5, 1, 1, 5]])
    rows = dict(segmentation={"counts": [0, 30, 170], "size": [10, 20]})
    boxes = [coco_annotation(n, **one) for n, one in enumerate((triangle, rows))]
    records = load(scan_coco(coco(annotations=boxes), coco.root))
    assert [one["area"] for one in records[0]["annotations"]] == [8, 30]


def test_data_sets_of_ones_own_registration(coco, make_cfg):
    """Detectron2's loader is replaced by ours, the user's own is not, and metadata stay."""
    path, names = coco(), dict(keypoint_names=["p0", "p1"], keypoint_flip_map=[("p0", "p1")])
    register_coco_instances("of_detectron2", names, path, coco.root)
    record = {"file_name": f"{coco.root}/a.jpg", "image_id": 5, "annotations": []}
    DatasetCatalog.register("of_a_user", lambda: [record])
    metadata = dict(json_file=path, image_root=coco.root, thing_classes=["x"])
    MetadataCatalog.get("of_a_user").set(evaluator_type="coco", **metadata)
    for name in ("of_detectron2", "of_a_user"):
        _adopt(name, make_cfg(), "refuse")
    assert len(DatasetCatalog.get("of_detectron2")) == 2
    assert MetadataCatalog.get("of_detectron2").thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("of_detectron2").keypoint_names == ["p0", "p1"]
    assert DatasetCatalog.get("of_a_user") == [record]
    assert MetadataCatalog.get("of_a_user").thing_classes == ["x"]


def test_shares_in_place_of_pixels_are_said(coco):
    path = coco(annotations=[coco_annotation(1, bbox=[0.1, 0.2, 0.5, 0.5])])
    assert "lie between 0 and 1" in "; ".join(scan_coco(path, coco.root)[1].remarks())


def test_what_nobody_expected_is_one_line_with_the_file(coco, make_voc, monkeypatch):
    """A KeyError and such anywhere in reading; its origin stays for the traceback."""

    def fail(*_, **__):
        raise KeyError("odd")

    root, path = make_voc({"a": [("dog", (2, 3, 10, 8))]}), coco()
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
    (tmp_path / "text.json").write_text("{")
    wrong = {"no.json": "does not exist", "": "is a folder; give", "text.json": "is not JSON"}
    for name, message in wrong.items():
        with pytest.raises(DataError, match=message):
            register_coco("data_check_test_wrong", str(tmp_path / name), coco.root)


def test_wrong_image_root_is_one_line_that_names_an_image(coco, tmp_path):
    with pytest.raises(DataError) as caught:
        load(scan_coco(coco(), str(tmp_path / "elsewhere")))
    message = str(caught.value)
    assert "no usable image (missing image 2x), such as " in message and "\n" not in message
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
