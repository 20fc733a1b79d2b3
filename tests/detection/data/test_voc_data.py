"""Loading and registering data in VOC layout."""

import copy

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances as reference_loader
from detectron2.structures import BoxMode

from resnet_backbone.detection.data import VOC_CLASSES, find_voc_classes, register_voc, scan_voc
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


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".JPG"])
def test_image_suffixes(make_voc, suffix):
    root = make_voc({"a": [("dog", BOX)]}, suffix=suffix)
    xml = root / "Annotations" / "a.xml"
    assert scan_voc(root, "train", ["dog"])[0][0]["file_name"].endswith("a" + suffix)
    xml.write_text(xml.read_text().replace(f"a{suffix}", "a.tif"))  # a <filename> that is wrong
    assert scan_voc(root, "train", ["dog"])[0][0]["file_name"].endswith("a" + suffix)


@pytest.mark.parametrize(
    "text, ids",
    [
        ("a -1\nb  1\n\n", ["a", "b"]),
        ("b  0\r\n  \r\na  1", ["b", "a"]),
        ("a\n\n\nb", ["a", "b"]),
        ("\ufeffa\nb", ["a", "b"]),
    ],
)
def test_split_file_forms(make_voc, text, ids):
    root = make_voc({"a": [("dog", BOX)], "b": []})
    (root / "ImageSets/Main/train.txt").write_text(text, encoding="utf-8")
    assert [r["image_id"] for r in scan_voc(root, "train", ["dog"])[0]] == ids


def test_image_ids_may_end_in_a_number_after_a_space(make_voc):
    root = make_voc({"photo 1": [("dog", BOX)], "photo 2": []})
    ids = [r["image_id"] for r in scan_voc(root, "train", ["dog"])[0]]
    assert ids == ["photo 1", "photo 2"]


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


@pytest.mark.parametrize(
    "change, what",
    [
        ({"class_names": ["dog"]}, "thing_classes"),
        ({"split": "test"}, "split"),
        ({"use_difficult": False}, "use_difficult"),
        ({"decode": True}, "decode"),
    ],
)
def test_register_again_with_other_arguments(make_voc, change, what):
    root = make_voc({"a": [("dog", BOX), ("cat", BOX)]})
    make_voc({"b": []}, split="test")
    arguments = {"split": "train", "class_names": ["cat", "dog"]}
    register_voc("voc_data_test", root, **arguments)
    with pytest.raises(ValueError, match=f"already registered with another {what}"):
        register_voc("voc_data_test", root, **{**arguments, **change})


def test_detectron2s_own_names_are_not_overwritten(make_voc):
    with pytest.raises(ValueError, match="already registered"):
        register_voc("voc_2007_test", make_voc({"a": [("dog", BOX)]}), "train")
