"""A data set is scanned once, by one process, and again only after something has changed."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from resnet_backbone.detection.data import register_coco, register_voc, scan_coco, scan_voc, scans
from resnet_backbone.detection.data.problems import in_threads
from resnet_backbone.detection.data.records import BOX_COLUMNS, Records, load_plain
from resnet_backbone.detection.data.scans import registered_scan

NAME, CLASSES = "scans_test", ["cat", "dog"]
BOXES = [("dog", (2, 3, 10, 8)), ("cat", (3, 3, 30, 9), 1)]
BOXES += [("dog", (5, 5, 5, 5)), ("cow", (1, 1, 9, 9))]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Scans are kept also of a few images; each looks at its images, whose paths are collected."""
    monkeypatch.setattr(scans, "KEPT_FROM", 0)
    looked_at = []

    def spy(work, arguments):
        for result in in_threads(work, arguments):
            looked_at.append(result)
            yield result

    for module in ("coco", "voc"):
        monkeypatch.setattr(f"resnet_backbone.detection.data.{module}.in_threads", spy)
    return looked_at


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("RESNET_BACKBONE_CACHE", str(folder))
    return folder


@pytest.fixture
def voc(make_voc):
    return make_voc({"a": BOXES, "b": [], "c": BOXES[:1]})


@pytest.fixture
def coco(voc):
    """COCO's format beside the images of `voc`: texts as ids, a mask, bad entries."""
    sides = {"width": 20, "height": 10}
    images = [{"id": f"id {n}", "file_name": f"JPEGImages/{n}.jpg", **sides} for n in "abcd"]
    box = {"image_id": "id a", "category_id": 7, "bbox": [1, 1, 5.5, 5], "iscrowd": 0}
    mask = {"size": [10, 20], "counts": [1, 19, 180]}
    boxes = [box, {**box, "bbox": [15, 5, 9, 3], "segmentation": mask}, {**box, "bbox": None}]
    categories = [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (voc / "all.json").write_text(json.dumps(content))
    return voc


def start(root, kind, on_bad="drop"):
    """Registers a data set as a new process would: what its scan gives."""
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    if kind == "coco":
        register_coco(NAME, str(root / "all.json"), str(root), on_bad)
    else:
        register_voc(NAME, root, "train", CLASSES, use_difficult=False, on_bad=on_bad)
    return registered_scan(NAME).scan()


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_a_second_start_finds_what_the_first_has_scanned(coco, kind, counted):
    records, report = start(coco, kind)
    metadata, taken = MetadataCatalog.get(NAME).as_dict(), DatasetCatalog.get(NAME)
    first = len(counted)
    again, second = start(coco, kind)
    assert len(counted) == first > 0
    assert list(again) == list(records) and second == report and report.problems and report.clipped
    assert MetadataCatalog.get(NAME).as_dict() == metadata and DatasetCatalog.get(NAME) == taken
    if kind == "coco":
        fresh, found = scan_coco(str(coco / "all.json"), str(coco))
    else:
        fresh, found = scan_voc(coco, "train", CLASSES)
        assert sum(len(record["annotations"]) for record in taken) == 2 < found.boxes.total() + 1
    assert list(again) == fresh and second == found
    assert isinstance(again[0]["annotations"][0]["bbox_mode"], BoxMode)


@pytest.mark.data
def test_real_records_are_the_same_from_a_kept_scan(data_root):
    root = data_root / "coco_mini"
    arguments = str(root / "annotations/instances_val2017.json"), str(root / "val2017")
    register_coco(NAME, *arguments)
    first = list(registered_scan(NAME).scan()[0])
    DatasetCatalog.remove(NAME)
    register_coco(NAME, *arguments)
    assert DatasetCatalog.get(NAME) == first == scan_coco(*arguments)[0]


CHANGES = {
    "an image": lambda root: Image.new("RGB", (20, 11)).save(root / "JPEGImages/a.jpg"),
    "an image away": lambda root: (root / "JPEGImages/b.jpg").unlink(),
    "a missing image": lambda root: Image.new("RGB", (20, 10)).save(root / "JPEGImages/d.jpg"),
    "the JSON": lambda root: edit(root / "all.json", '"dog"', '"dogs"'),
    "an XML": lambda root: edit(root / "Annotations/c.xml", "dog", "cat"),
    "the split": lambda root: edit(root / "ImageSets/Main/train.txt", "b\n", ""),
    "an XML's time": lambda root: os.utime(root / "Annotations/c.xml", ns=(1, 1)),
}


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_what_changed_is_scanned_again(coco, kind, change, counted, caplog):
    caplog.set_level("INFO")
    old = start(coco, kind)[1]
    CHANGES[change](coco)
    counted.clear()
    records, report = start(coco, kind)
    if change in {"coco": ("an XML", "the split", "an XML's time"), "voc": ("the JSON",)}[kind]:
        assert report == old and not counted  # of no concern to it
        return
    assert "is old: " in caplog.text and "checked again" in caplog.text
    fresh = scan_coco(str(coco / "all.json"), str(coco)) if kind == "coco" else None
    assert (list(records), report) == (fresh or scan_voc(coco, "train", CLASSES))
    counted.clear()
    assert start(coco, kind)[1] == report and not counted


def damage(kind, file):
    content = bytearray(file.read_bytes())
    if kind == "a byte":
        content[-9] ^= 1
    elif kind == "its header":
        place = content.index(b"digest") + 12
        content[place] = ord("0" if content[place] != ord("0") else "1")
    elif kind == "truncated":
        del content[len(content) // 2 :]
    else:
        content = b"" if kind == "empty" else b"no kept scan"
    file.unlink()  # what is mapped into memory keeps its pages
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["a byte", "its header", "truncated", "empty", "another file"])
def test_a_damaged_file_is_ignored_and_written_again(coco, kind, own_cache, counted, caplog):
    caplog.set_level("INFO")
    records, report = start(coco, "coco")
    (file,) = own_cache.glob("*.scan")
    whole = file.read_bytes()
    damage(kind, file)
    counted.clear()
    again, second = start(coco, "coco")
    assert counted and list(again) == list(records) and second == report
    assert sum("is damaged" in record.getMessage() for record in caplog.records) == 1
    assert file.read_bytes() == whole and list(own_cache.iterdir()) == [file]


def test_another_version_scans_again(coco, counted, monkeypatch):
    start(coco, "coco")
    counted.clear()
    monkeypatch.setattr(scans, "code_digest", lambda: "another")
    start(coco, "coco")
    assert counted


@pytest.mark.parametrize("place", ["a file", "a folder that is a file's"])
def test_where_nothing_can_be_kept_each_start_scans(coco, place, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / ("" if place == "a file" else "below")
    monkeypatch.setenv("RESNET_BACKBONE_CACHE", str(folder))
    assert list(start(coco, "coco")[0]) == list(start(coco, "coco")[0])
    assert caplog.text.count("cannot be kept") == 2


def test_a_policy_is_that_of_each_start(coco, counted):
    start(coco, "coco")
    with pytest.raises(ValueError, match="has 2 problems"):
        start(coco, "coco", "refuse")


def test_small_sets_are_not_kept_and_unused_files_go(coco, own_cache, monkeypatch):
    old, recent = own_cache / "old.scan", own_cache / "recent.scan"
    for file in (old, recent):
        file.write_text("")
    os.utime(old, (1, 1))
    monkeypatch.setattr(scans, "KEPT_FROM", 5)
    start(coco, "coco")
    assert sorted(own_cache.iterdir()) == [old, recent]
    monkeypatch.setattr(scans, "KEPT_FROM", 4)
    start(coco, "coco")
    assert recent.exists() and not old.exists() and len(list(own_cache.iterdir())) == 2


def test_nothing_is_executed_from_a_kept_record():
    assert load_plain(pickle.dumps({"mode": BoxMode.XYWH_ABS}))["mode"] is BoxMode.XYWH_ABS
    with pytest.raises(pickle.UnpicklingError, match="posix.system is not a plain value"):
        load_plain(pickle.dumps(os.system))


def test_facts_of_records_are_those_of_the_dicts():
    mask = {"size": [2, 2], "counts": b"04"}
    boxes = [
        {"category_id": 3, "segmentation": [[1, 2, 3, 4, 5, 6]], "keypoints": [1, 1, 2, 3, 3, 0]},
        {"category_id": 1, "iscrowd": 1, "segmentation": mask, "difficult": 1},
        {"category_id": 2, "segmentation": []},
    ]
    sides = {"width": 4, "height": 3}
    images = [{**sides, "annotations": boxes[:2]}, {**sides, "annotations": []}]
    images += [{"annotations": boxes[2:], "sem_seg_file_name": "x"}]
    records = Records.pack(images)
    assert list(records) == images and records.image_column("width").tolist() == [4, 4, -1]
    assert records.image_column("has_labels").tolist() == [0, 0, 1]
    columns = {name: records.box_column(name).tolist() for name in BOX_COLUMNS}
    assert columns == {
        **{"image": [0, 0, 2], "category": [3, 1, 2], "crowd": [0, 1, 0]},
        **{"mask": [1, 2, 0], "points": [1, 0, 0], "difficult": [0, 1, 0]},
    }
    objects = records.select(boxes=records.store.boxes[:, 2] == 0)
    last = objects.select(images=np.array([False, True, True]))
    assert [len(record["annotations"]) for record in objects] == [1, 0, 1]
    assert list(last) == [images[1], images[2]] and last.box_column("image").tolist() == [1]
    assert last.per_image(last.box_column("category")).tolist() == [0, 2]


TOOL = """
import json, sys
from argparse import Namespace
from pathlib import Path
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from resnet_backbone.detection import add_resnet_backbone_config
from resnet_backbone.detection.data import problems
from resnet_backbone.detection.data.arguments import set_up_data
from resnet_backbone.detection.data.formats import coco
from resnet_backbone.detection.data.scans import dataset_records
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.launch import Launch, _free_port, local_size, run_processes

def count(module, name, calls):
    function = getattr(module, name)
    setattr(module, name, lambda *arguments: calls.append(name) or function(*arguments))

def run(root):
    comm.create_local_process_group(local_size())
    calls = []
    count(coco, "read_json", calls)
    count(problems, "read_image_size", calls)
    args = Namespace(coco_json=[f"{root}/all.json"] * 2, image_root=[root], opts=[], voc_root=None,
                     sem_seg=None, panoptic_json=None, panoptic_root=None, eval_only=False)
    for args.bad_data in ("drop", "refuse"):
        set_up_data(add_resnet_backbone_config(get_cfg()), args)
        found = [len(calls), repr(list(dataset_records("train:coco")))]
        Path(root, f"found{comm.get_rank()}").write_text(json.dumps(found))
        for name in ("train:coco", "test:coco"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

if __name__ == "__main__":
    url = f"tcp://127.0.0.1:{_free_port()}"
    one_line_errors(run_processes)(Launch(2, url=url), run, sys.argv[1])
"""


def test_of_several_processes_one_scans(coco, own_cache):
    """Really started ones: they have the same records, and what one finds wrong is said once."""
    (coco / "tool.py").write_text(TOOL)
    command = [sys.executable, "-W", "ignore", str(coco / "tool.py"), str(coco)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("has 2 problems") == 1, done.stderr
    found = [json.loads((coco / f"found{rank}").read_text()) for rank in range(2)]
    (first, records), (second, others) = found
    # one file and its four images, to train and to test on
    assert (first, second) == (2 * (1 + 4), 0) and records == others
    assert len(list(own_cache.glob("*.scan"))) == 2
