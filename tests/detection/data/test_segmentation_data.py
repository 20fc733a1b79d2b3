"""Ground truth made from instances, and data sets with label pictures, on examples by hand."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from drawn_images import coco_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resnet_backbone.detection.data import panoptic, scans
from resnet_backbone.detection.data.arguments import register_paths
from resnet_backbone.detection.data.panoptic import IGNORE, decode_ids, encode_ids
from resnet_backbone.detection.data.segmentation import register_panoptic, register_semantic
from resnet_backbone.runtime.errors import DataError


def annotation(category, x0, y0, x1, y1, crowd=0):
    """A box of the image with id 1, as ``coco_json`` takes it."""
    mask = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    if crowd:
        pixels = np.zeros((6, 8), np.uint8)
        pixels[y0:y1, x0:x1] = 1
        changes = np.flatnonzero(np.diff(pixels.ravel(order="F"), prepend=0, append=2))
        mask = {"size": [6, 8], "counts": np.diff(changes, prepend=0).tolist()}
    more = {"iscrowd": crowd, "area": (x1 - x0) * (y1 - y0), "segmentation": mask}
    return 1, category, (x0, y0, x1 - x0, y1 - y0), more


def edit(file, change):
    """Changes the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def label(root):
    return panoptic.make_labels(str(root / "instances.json"), str(root / "labels"))


@pytest.fixture
def labeled(scene):
    label(scene)
    return scene


@pytest.fixture
def scene(tmp_path):
    """One image 8 wide and 6 high: a large and a small cat that overlap, two crowds of dogs, the
    first partly below the large cat, and a second image without anything."""
    cats = [annotation(7, 3, 1, 5, 3), annotation(7, 0, 0, 4, 4)]
    dogs = [annotation(9, 2, 3, 8, 5, crowd=1), annotation(9, 7, 0, 8, 1, crowd=1)]
    images = {1: ("a/one.jpg", 8, 6), 2: ("two.jpg", 5, 4)}
    content = coco_json({9: "dog", 7: "cat"}, images, [*cats, *dogs])
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name, *size in images.values():
        Image.new("RGB", size).save(tmp_path / "images" / name)
    return tmp_path


def read(path):
    return np.asarray(Image.open(path))


SEMANTIC = [  # 0 background, 1 cat, 2 dog; 255 its crowds
    [1, 1, 1, 1, 0, 0, 0, 255],
    [1, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 255, 255, 255, 255],
    [0, 0, 255, 255, 255, 255, 255, 255],
    [0, 0, 0, 0, 0, 0, 0, 0],
]


def test_semantic_labels_of_overlaps_and_crowds(scene):
    counts = label(scene)
    assert counts == {"images": 2, "segments": 5, "hidden": 0}
    labels = scene / "labels"
    assert read(labels / "semantic/a/one.png").tolist() == SEMANTIC
    assert not read(labels / "semantic/two.png").any()
    assert (labels / "semantic/classes.txt").read_text().split() == ["background", "cat", "dog"]
    stuff = read(labels / "stuff/a/one.png")  # crowds are things
    assert stuff.tolist() == (np.array(SEMANTIC) == 0).astype(int).tolist()
    assert (labels / "stuff/classes.txt").read_text().split() == ["things", "background"]


def test_panoptic_segments_of_overlaps_and_crowds(labeled):
    content = json.loads((labeled / "labels/panoptic.json").read_text())
    assert "made from instances" in content["info"]["description"].lower()
    assert [(c["id"], c["isthing"]) for c in content["categories"]] == [(7, 1), (9, 1), (10, 0)]
    entry = content["annotations"][0]
    ids = decode_ids(read(labeled / "labels/panoptic" / entry["file_name"]))
    found = {s["id"]: s for s in entry["segments_info"]}
    assert set(np.unique(ids).tolist()) == set(found)
    small, large = found[ids[1, 3]], found[ids[0, 0]]
    assert small["bbox"] == [3, 1, 2, 2] and small["area"] == 4  # whole: it lies on top
    assert large["bbox"] == [0, 0, 4, 4] and large["area"] == 16 - 2
    crowd, background = found[ids[4, 4]], found[ids[5, 0]]
    assert ids[0, 7] == crowd["id"] and crowd["iscrowd"] == 1  # both dogs' crowds in one
    assert crowd["area"] == 12 - 2 + 1 and crowd["category_id"] == 9
    assert background["category_id"] == 10 and not background["iscrowd"]
    assert sum(s["area"] for s in found.values()) == 48


def test_what_is_wholly_hidden_has_no_segment():
    whole, part = np.ones((2, 2), bool), np.array([[1, 1], [0, 0]], bool)
    crowd = {"iscrowd": 1}
    painted = panoptic.paint_instances((2, 2), [{}, {}, crowd], [part, whole, whole])
    assert painted.tolist() == [[1, 1], [2, 2]]
    assert panoptic.paint_instances((2, 2), [{}, {}], [whole, whole]).tolist() == [[2, 2], [2, 2]]


def test_stuff_labels_of_a_panoptic_file(labeled):
    """From our own panoptic file they are what is made from the instances directly."""
    labels, again = labeled / "labels", labeled / "again"
    assert panoptic.make_stuff(str(labels / "panoptic.json"), str(again)) == 2
    for name in ("a/one.png", "two.png"):
        assert np.array_equal(read(again / name), read(labels / "stuff" / name))
    void = decode_ids(read(labels / "panoptic/two.png")) * 0
    Image.fromarray(encode_ids(void)).save(labels / "panoptic/two.png")
    panoptic.make_stuff(str(labels / "panoptic.json"), str(again))
    assert (read(again / "two.png") == IGNORE).all()


@given(st.lists(st.integers(0, 256**3 - 1), min_size=1, max_size=20))
def test_ids_survive_the_picture(numbers):
    ids = np.array([numbers], np.int32)
    assert np.array_equal(decode_ids(encode_ids(ids)), ids)


NO_CATEGORY = r"annotations\[0\] \(a/one.png\): a segment is of category 99, which is not in"
MANY = [{"id": i, "name": str(i), "isthing": 0} for i in range(100, 360)]
BELOW = "is not below the image folder"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["annotations"][0].pop("segmentation"), "1 annotations have no usable mask"),
        (lambda c: c["images"][1].update(file_name="a/one.png"), "label image a/one.png"),
        (lambda c: c["images"][1].update(file_name="../../two.jpg"), f"'../../two.jpg' {BELOW}"),
        (lambda c: c["images"][1].update(file_name="/two.jpg"), f"'/two.jpg' {BELOW}"),
        (lambda c: c["images"][1].pop("width"), "two.jpg has no width and height"),
        (lambda c: c["images"][1].update(file_name=""), "images[1] has the file_name ''"),
        (lambda c: c.pop("categories"), "cannot be used"),
        (lambda c: c["categories"].extend(MANY), "do not fit into 8-bit labels"),
    ],
)
def test_instances_that_give_no_labels(scene, change, words):
    edit(scene / "instances.json", change)
    with pytest.raises(DataError, match=re.escape(words)):
        label(scene)
    assert not (scene / "labels").exists()


def test_broken_run_lengths_are_named(scene):
    broken = {"segmentation": {"counts": "\x01\x02", "size": [6, 8]}}
    edit(scene / "instances.json", lambda c: c["annotations"][1].update(broken))
    with pytest.raises(DataError, match="a/one.jpg: a mask's run lengths cannot be"):
        label(scene)


def test_polygons_without_an_area_are_left_out(scene):
    """Detectron2's loader trains without them, too."""
    line = [1, 2, 3, 4]
    edit(scene / "instances.json", lambda c: c["annotations"][0]["segmentation"].insert(0, line))
    label(scene)
    assert read(scene / "labels/semantic/a/one.png").tolist() == SEMANTIC


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, one: c.pop("annotations"), "no list of annotations"),
        (lambda c, one: one.pop("file_name"), r"annotations\[0\] has no file_name"),
        (lambda c, one: c["categories"][0].pop("id"), r"categories\[0\] has no id"),
        (lambda c, one: one.update(file_name="../one.png"), "'../one.png' is not below"),
        (lambda c, one: one.update(segments_info=3), "a/one.png.: it has no list of segments_info"),
        (lambda c, one: one["segments_info"][0].update(category_id=99), NO_CATEGORY),
        (lambda c, one: c["categories"].extend(MANY), "261 classes of stuff do not fit"),
    ],
)
def test_panoptic_files_that_give_no_labels(labeled, change, words):
    """Changed is the content, or its first annotation."""
    file = labeled / "labels/panoptic.json"
    edit(file, lambda content: change(content, content["annotations"][0]))
    with pytest.raises(DataError, match=words):
        panoptic.make_stuff(str(file), str(labeled / "again/stuff"))
    assert not (labeled / "again").exists()


def semantic_set(root, name="seg", images="images", labels="labels/semantic", **options):
    register_semantic(name, str(root / images), str(root / labels), **options)
    return DatasetCatalog.get(name)


def panoptic_set(root, name="pan", **options):
    parts = "instances.json", "images", "labels/stuff", "labels/panoptic.json"
    register_panoptic(name, *(str(root / part) for part in parts), **options)
    return DatasetCatalog.get(name)


def test_semantic_data_set(labeled):
    records = semantic_set(labeled, on_bad="refuse")
    assert [(r["height"], r["width"]) for r in records] == [(6, 8), (4, 5)]
    assert records[0]["sem_seg_file_name"].endswith("semantic/a/one.png")
    assert MetadataCatalog.get("seg").stuff_classes == ["background", "cat", "dog"]


def test_panoptic_data_set(labeled):
    records = panoptic_set(labeled, on_bad="refuse")
    assert [len(r["annotations"]) for r in records] == [4, 0]
    assert records[0]["image_id"] == 1 and records[0]["sem_seg_file_name"].endswith("a/one.png")
    meta = MetadataCatalog.get("pan")
    assert meta.thing_classes == ["cat", "dog"] and meta.stuff_classes == ["things", "background"]
    assert meta.stuff_dataset_id_to_contiguous_id == {0: 0, 10: 1}
    edit(labeled / "labels/panoptic.json", lambda c: c["categories"][0].update(isthing=0))
    with pytest.raises(DataError, match="they need the same things"):
        panoptic_set(labeled, "pan2")


@pytest.mark.parametrize("register, part", [(semantic_set, "semantic"), (panoptic_set, "panoptic")])
def test_a_kept_scan_is_used_until_a_label_changes(labeled, register, part, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(scans, "KEPT_FROM", 0)
    first = register(labeled, "first")
    assert register(labeled, "second") == first and len(first) == 2
    assert caplog.text.count("is kept in") == 1
    picture = labeled / "labels" / part / "two.png"
    Image.new("RGB" if part == "panoptic" else "L", (8, 6)).save(picture)
    assert register(labeled, "third") == first[:1]
    picture.unlink()
    assert register(labeled, "fourth") == first[:1]
    assert caplog.text.count("is kept in") == 3


OTHER_SIZE = "panoptic image .*two.png: the annotation states 5x4, but the image is 8x6"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, picture: c["annotations"].pop(1), "image id 2 is not in annotations of"),
        (lambda c, picture: picture.unlink(), "panoptic image .*two.png: no such file"),
        (lambda c, picture: Image.new("RGB", (8, 6)).save(picture), OTHER_SIZE),
    ],
)
def test_images_without_panoptic_segments(labeled, caplog, change, words):
    """They would end the evaluation, after all the training."""
    edit(labeled / "labels/panoptic.json", lambda c: change(c, labeled / "labels/panoptic/two.png"))
    assert [record["image_id"] for record in panoptic_set(labeled)] == [1]
    assert re.search(f"left out: missing-panoptic: .*two.jpg: {words}", caplog.text)
    with pytest.raises(DataError, match=words):
        panoptic_set(labeled, "strict", on_bad="refuse")


def test_no_image_with_panoptic_segments(labeled):
    """Such as the JSON of another split."""
    edit(labeled / "labels/panoptic.json", lambda c: c["annotations"].clear())
    with pytest.raises(DataError, match="no usable image with its"):
        panoptic_set(labeled)


def in_palette(pixels):
    """Detectron2 would read a palette's brightness in place of its index, without a word."""
    return Image.fromarray(pixels.copy()).convert("P")


@pytest.mark.parametrize(
    "picture, words",
    [
        (in_palette, "two.png is an image of mode P: labels are 8-bit gray"),
        (lambda p: Image.fromarray(p + np.uint8(3)), "two.png has label 3; there are 3 classes"),
    ],
)
def test_pictures_that_are_no_labels_are_refused(labeled, picture, words):
    path = labeled / "labels/semantic/two.png"
    picture(read(path)).save(path)
    with pytest.raises(DataError, match=words):
        semantic_set(labeled)


def test_damaged_labels_are_left_out(labeled, caplog):
    path = labeled / "labels/semantic/two.png"
    content = path.read_bytes()
    place = content.index(b"IDAT") + 4
    path.write_bytes(content[:place] + b"\x00" * 4 + content[place + 4 :])
    assert len(semantic_set(labeled)) == 1
    assert re.search("unreadable-image: .*two.jpg: its label: ", caplog.text)


def test_every_label_is_checked(labeled):
    """The last but one of 402."""
    for folder, suffix in ((labeled / "images", "jpg"), (labeled / "labels/semantic", "png")):
        for number in range(400):
            shutil.copy(folder / f"two.{suffix}", folder / f"x{number:03}.{suffix}")
    path = labeled / "labels/semantic/x398.png"
    Image.fromarray(np.full_like(read(path), 7)).save(path)
    with pytest.raises(DataError, match="x398.png has label 7; there are 3 classes"):
        semantic_set(labeled)


def to_5x5(label):
    for path in (label, label.with_name("three.png")):
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(path)


STATED = "two.jpg: the annotation states 5x5, but the image is 5x4"
ABSENT = "missing-label: .*two.jpg: no label image two.png"


@pytest.mark.parametrize(
    "change, words",
    [(to_5x5, [STATED, "missing-image: .*three.png"]), (Path.unlink, [ABSENT])],
)
def test_bad_pairs_are_left_out_or_refused(labeled, caplog, change, words):
    change(labeled / "labels/semantic/two.png")
    assert names(semantic_set(labeled)) == PAIRS[:1]
    assert all(re.search(f"left out: .*{text}", caplog.text) for text in words)
    with pytest.raises(DataError, match=f"{len(words)} problems"):
        semantic_set(labeled, "strict", on_bad="refuse")


def names(records):
    keys = "file_name", "sem_seg_file_name"
    return [tuple(Path(record[key]).name for key in keys) for record in records]


PAIRS = [("one.jpg", "one.png"), ("two.jpg", "two.png")]


def test_images_and_labels_in_one_folder(labeled):
    """The labels are not taken for images, which have their names as PNG."""
    labels = labeled / "labels/semantic"
    shutil.copytree(labeled / "images", labels, dirs_exist_ok=True)
    one = dict(images="labels/semantic", labels="labels/semantic")
    assert names(semantic_set(labeled, **one, on_bad="refuse")) == PAIRS


@pytest.mark.parametrize("images, labels", [("x", "x/labels"), ("x/images", "x")])
def test_one_folder_inside_the_other(labeled, images, labels):
    """PNG images, too, are told from labels by where they lie."""
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(labeled / "images/two.png")
    (labeled / "images/two.jpg").unlink()
    for source, name in ("images", images), ("labels/semantic", labels):
        shutil.copytree(labeled / source, labeled / name, dirs_exist_ok=True)
    records = semantic_set(labeled, images=images, labels=labels, on_bad="refuse")
    assert names(records) == [PAIRS[0], ("two.png", "two.png")]


def test_two_images_of_one_label_are_refused(labeled):
    shutil.copy(labeled / "images/two.jpg", labeled / "images/two.jpeg")
    both = "two.jpeg and .*two.jpg would have the same label image, two"
    with pytest.raises(DataError, match=both):
        semantic_set(labeled)


def test_one_image_folder_for_both_splits(labeled):
    """The labels of each split say which images are its own."""
    for split, name in (("train", "a/one.png"), ("test", "two.png")):
        (labeled / split / "a").mkdir(parents=True)
        for file in (name, "classes.txt"):
            shutil.copy(labeled / "labels/semantic" / file, labeled / split / file)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    labels = [str(labeled / split) for split in ("train", "test")]
    paths = dict(voc_root=None, sem_seg=labels, image_root=[str(labeled / "images")])
    register_paths(cfg, Namespace(**paths, bad_data="refuse"))
    assert names(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])) == PAIRS[:1]
    assert names(DatasetCatalog.get(cfg.DATASETS.TEST[0])) == PAIRS[1:]


def test_labels_without_names_are_refused(labeled):
    (labeled / "labels/semantic/classes.txt").unlink()
    with pytest.raises(DataError, match="classes.txt does not exist: write the classes"):
        semantic_set(labeled)
