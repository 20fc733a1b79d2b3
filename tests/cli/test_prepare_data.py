"""prepare-data for VOC, on miniature archives, and on real data."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

from drawn_images import voc_xml
from PIL import Image

from resnet_backbone.cli import prepare_data as tool
from resnet_backbone.detection.data import archives

from packed import jpeg, tree_of, write_tar, write_zip  # isort: skip

TRAINVAL, TEST = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"
DOG = [("dog", (1, 1, 20, 30)), ("cat", (5, 5, 30, 35), 1)]


def voc_files(splits, objects=DOG) -> dict[str, bytes]:
    """Archive names -> contents of a VOC 2007 with these {split: ids}."""
    files = {}
    for split, ids in splits.items():
        files[f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt"] = "\n".join(ids).encode()
        files[f"VOCdevkit/VOC2007/ImageSets/Main/dog_{split}.txt"] = f"{ids[0]}  1".encode()
        for image_id in ids:
            xml = voc_xml(f"{image_id}.jpg", (60, 40), objects)
            files[f"VOCdevkit/VOC2007/Annotations/{image_id}.xml"] = xml.encode()
            files[f"VOCdevkit/VOC2007/JPEGImages/{image_id}.jpg"] = jpeg(int(image_id))
    return files


@pytest.fixture
def voc(tmp_path, declare, monkeypatch):
    """Both official archives of 2007, in small, and their counts."""
    counts = {"trainval": archives.Counts(3, 3, 3), "test": archives.Counts(2, 2, 2)}
    counts = {("VOC2007", split): count for split, count in counts.items()}
    monkeypatch.setattr("resnet_backbone.detection.data.trees.COUNTS", counts)
    (tmp_path / "archives").mkdir()
    first = voc_files({"trainval": ("000001", "000002", "000003")})
    contents = {TRAINVAL: first, TEST: voc_files({"test": ("000004", "000005")})}
    return [declare(write_tar(tmp_path / "archives" / k, v)) for k, v in contents.items()]


def test_archives_become_detectron2s_folders(run, voc, tmp_path):
    root, report, pictures = tmp_path / "data", tmp_path / "report.json", tmp_path / "pictures"
    options = ["--json", report, "--pictures", pictures]
    code, out, _ = run("voc", root, "--archives", *voc, *options)
    assert code == 0, out
    assert "sha256 is the official archive's" in out and "complete and readable" in out
    assert out.splitlines()[-4] == f"for the configs: export DETECTRON2_DATASETS={root}"
    with tarfile.open(voc[1]) as tar:
        stored = tar.extractfile("VOCdevkit/VOC2007/JPEGImages/000004.jpg").read()
    assert (root / "VOC2007/JPEGImages/000004.jpg").read_bytes() == stored
    assert len(tree_of(root)) == 14 and not [name for name in tree_of(root) if ".part" in name]
    (found,) = json.loads(report.read_text())
    assert (found["official"], found["damaged"], found["decoded_images"]) == ("VOC2007", False, 5)
    assert found["splits"].keys() == {"trainval", "test"}, "lists of a class are no splits"
    assert found["splits"]["trainval"]["boxes_per_class"]["dog"] == 3
    assert found["splits"]["trainval"]["difficult_per_class"] == {"cat": 3}
    names = {"VOC2007_classes.png", "VOC2007_test.jpg", "VOC2007_trainval.jpg"}
    assert tree_of(pictures) == names
    assert all(min(Image.open(pictures / name).size) > 300 for name in names)


def test_a_second_call_changes_nothing(run, voc, tmp_path):
    root = tmp_path / "data"
    run("voc", root, "--archives", *voc)
    image = root / "VOC2007/JPEGImages/000001.jpg"
    image.write_bytes(image.read_bytes()[::-1])  # of the same size
    other = root / "VOC2007/Annotations/000002.xml"
    other.write_text("<annotation/>")
    (root / "VOC2007/JPEGImages/000003.jpg").unlink()
    before = image.read_bytes()
    code, out, _ = run("voc", root, "--archives", *voc)
    assert "1 files unpacked, 6 were there" in out and "0 files unpacked, 6 were there" in out
    assert image.read_bytes() == before and other.read_text() == "<annotation/>"
    assert f"1 files were there with another size and stay as they are, the first is {other}" in out
    assert code == 1 and f"{image}: cannot identify image file" in out


def test_an_interrupted_call_leaves_whole_files_only(run, voc, tmp_path, monkeypatch):
    root, copy, calls = tmp_path / "data", archives.shutil.copyfileobj, []

    def stop(source, target, length):
        calls.append(1)
        if len(calls) == 5:
            target.write(source.read(100))
            raise KeyboardInterrupt
        copy(source, target, length)

    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "copyfileobj", stop)
        assert run("voc", root, "--archives", *voc)[0] == 130
    assert len(tree_of(root)) == 4
    (root / "VOC2007/JPEGImages/.000003.jpg.part").write_bytes(b"killed while writing")
    code, out, _ = run("voc", root, "--archives", *voc)
    assert code == 0 and "4 files unpacked, 4 were there" in out
    assert len(tree_of(root)) == 14


def test_another_archive_is_refused_before_anything_is_written(run, voc, tmp_path):
    root, path = tmp_path / "data", voc[1]
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    code, _, err = run("voc", root, "--archives", *voc)
    assert code == 2 and not root.exists()
    assert str(path) in err and "download it again" in err
    assert hashlib.sha256(content).hexdigest() in err and archives.ARCHIVES[TEST][1] in err
    path.write_bytes(content[:-1024])
    code, _, err = run("voc", root, "--archives", *voc)
    assert code == 2 and "stopped early: go on with it" in err and not root.exists()


def test_unverified_and_unpublished_archives(run, voc, tmp_path):
    archives.ARCHIVES.pop(TEST)
    write_tar(voc[0], voc_files({"trainval": ("000001", "000002", "000003")}, DOG[:1]))
    code, out, _ = run("voc", tmp_path / "data", "--archives", *voc, "--unverified")
    sha256 = hashlib.sha256(voc[1].read_bytes()).hexdigest()
    assert f"{TEST}: sha256 {sha256}; none is published for a file of this name" in out
    assert f"{TRAINVAL}: NOT the official archive" in out
    assert code == 1 and "0 difficult boxes, officially 3" in out


def truncated_tar(folder, after):
    path = write_tar(folder / TRAINVAL, voc_files({"trainval": ("000001", "000002")}))
    with tarfile.open(path) as tar:
        start = tar.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[: start + after])
    return path


def damaged_tar(folder, kind, damage):
    """Also one that can be read to the end, where only the checksum tells."""
    noise = {"VOC2007/JPEGImages/1.jpg": np.random.default_rng(0).bytes(200_000)}
    path = write_tar(folder / f"mine.tar.{kind}", noise, f"w:{kind}")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    path.write_bytes(content[:middle] if damage == "cut" else content)
    return path


def changed_zip(folder, *places):
    path = write_zip(folder / "mine.zip", {"val2017/1.jpg": jpeg(1)})
    content = bytearray(path.read_bytes())
    for mark, place, bits in places:
        content[content.find(mark) + place] ^= bits
    path.write_bytes(content)
    return path


def leading_out(folder, write, name):
    return write(folder / "a", {"VOC2007/1": b"", name: b"2"})


ENCRYPTED = (b"PK\x03\x04", 6, 1), (b"PK\x01\x02", 8, 1)
OUTSIDE = ("../evil.jpg", "/tmp/evil.jpg", "VOC2007/../../evil.jpg", "C:/evil")
DAMAGED = "{path} is damaged or not an archive"
UNUSABLE = [
    *((truncated_tar, [after], DAMAGED) for after in (0, 100, 700)),  # none, or part of a file
    *((damaged_tar, [k, d], DAMAGED) for k in ("gz", "xz", "bz2") for d in ("flipped", "cut")),
    (changed_zip, ENCRYPTED, "password"),
    (changed_zip, [(b"PK\x03\x04", 200, 255)], "Bad CRC-32"),  # its list of files is whole
    *((leading_out, [write_tar, n], f"{n!r}, which leads out of the folder") for n in OUTSIDE),
    *((leading_out, [write_zip, n], f"{n!r}, which leads out of the folder") for n in OUTSIDE),
    (lambda folder: write_zip(folder / "x", {"val2017/1.jpg": b""}), [], "not an archive of VOC"),
    (lambda folder: folder / "no.tar", [], "no such archive"),
]


@pytest.mark.parametrize("make, arguments, message", UNUSABLE)
def test_an_archive_that_cannot_be_used_writes_nothing(run, tmp_path, make, arguments, message):
    path = make(tmp_path, *arguments)
    kind = "coco" if path.suffix == ".zip" else "voc"
    code, _, err = run(kind, tmp_path / "data", "--archives", path, "--unverified")
    assert code == 2 and err.count("\n") == 1 and message.format(path=path) in err
    assert not tree_of(tmp_path / "data") and not list(tmp_path.rglob("evil*"))


def test_links_and_hidden_files_are_left_out(run, voc, tmp_path):
    with tarfile.open(voc[0], "a") as tar:
        link = tarfile.TarInfo("VOCdevkit/VOC2007/JPEGImages/000009.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("VOCdevkit/VOC2007/._JPEGImages"))
    run("voc", tmp_path / "data", "--archives", voc[0], "--unverified")
    assert len(tree_of(tmp_path / "data")) == 8


def test_a_full_disk_is_told_before(run, voc, tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: type("usage", (), {"free": 20000}))
    code, _, err = run("voc", tmp_path / "data", "--archives", *voc)
    assert code == 2 and "8 files need 0.0 GB" in err and "free some space" in err
    assert not (tmp_path / "data").exists()


def test_what_is_missing_and_corrupt_is_named(run, voc, tmp_path):
    root, report = tmp_path / "data", tmp_path / "report.json"
    run("voc", root, "--archives", *voc)
    folder = root / "VOC2007"
    image = folder / "JPEGImages/000002.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    (folder / "Annotations/000001.xml").unlink()
    (folder / "JPEGImages/000004.jpg").unlink()
    (folder / "JPEGImages/000099.jpg").write_bytes(jpeg(9))
    code, out, _ = run("voc", root, "--json", report)
    assert code == 1 and "something is missing or corrupt" in out
    (found,) = json.loads(report.read_text())
    kinds = {
        name: [(p["kind"], Path(p["file"]).name) for p in split["problems"]]
        for name, split in found["splits"].items()
    }
    assert kinds == {
        "trainval": [("missing-xml", "000001.xml"), ("unreadable-image", "000002.jpg")],
        "test": [("missing-image", "000004.jpg")],
    }
    assert [Path(file).name for file in found["unlisted_images"]] == ["000099.jpg"]
    assert "1 images are in no split and are not used; the first is " in out
    assert f"missing-xml: resnet-backbone prepare-data voc {root} --archives {TRAINVAL}" in out
    assert f"missing-image: resnet-backbone prepare-data voc {root} --archives {TEST}" in out
    assert "unreadable-image: delete these files, then resnet-backbone" in out
    assert "trainval: 2 boxes, officially 3" in out
    code, out, _ = run("voc", root, "--quick", "--splits", "trainval")
    assert code == 1 and "unreadable-image" not in out, "its header is whole"
    assert "only the headers" in out and "missing-image" not in out


def test_data_of_ones_own(run, make_voc, tmp_path):
    root = make_voc({"a": [("dog", (1, 1, 9, 9))], "b": [("cat", (2, 2, 2, 5))]})
    code, out, _ = run("voc", root)
    assert code == 0 and "as data of your own" in out and "bad-box: 1" in out
    assert "training leaves these boxes out" in out and "officially" not in out
    (root / "JPEGImages/b.jpg").unlink()
    code, out, _ = run("voc", root)
    assert code == 1 and "remove them from train" in out
    renamed = root.rename(tmp_path / "VOC2007")
    assert "officially" not in run("voc", renamed, "--own")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "flat"], "give the kind of data first (own, voc, "),
        (["voc", "nowhere"], "is not a VOC folder"),
        (["coco", "nowhere"], "neither nowhere nor nowhere/coco has annotations/"),
        (["coco", "."], "has annotations/"),
        (["coco", "--coco-json", "a.json"], "belong together"),
        (["voc", "--coco-json", "a.json", "--image-root", "b"], "is for 'coco'"),
        (["coco", "--coco-json", "a", "b", "c", "--image-root", "x", "y"], "one for each file"),
        (["coco", "--coco-json", "no.json", "--image-root", "x"], "no.json does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err.splitlines()[-1]


def test_the_default_folder_is_detectron2s(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
    assert tool.parse_arguments(["voc"]).root == Path("/somewhere")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert tool.parse_arguments(["voc"]).root == Path("datasets")


def test_official_numbers_agree_with_one_another():
    counts = archives.COUNTS
    for year in ("VOC2007", "VOC2012"):
        train, val, both = (counts[year, split] for split in ("train", "val", "trainval"))
        for what in ("images", "boxes", "difficult"):
            assert getattr(train, what) + getattr(val, what) == getattr(both, what)
    for what in ("images", "boxes"):  # 2017 is another division of 2014
        of = {split: getattr(count, what) for (_, split), count in counts.items()}
        first, second = (of[f"instances_train{n}"] + of[f"instances_val{n}"] for n in (2014, 2017))
        assert first == second
    digests = {sha256 for _, sha256 in archives.ARCHIVES.values()}
    assert len(digests) == len(archives.ARCHIVES) == 16 and set(map(len, digests)) == {64}
    for folder, split in counts:
        assert archives.archive_of(folder, split)
        assert archives.archive_of(folder, split, images=True)


def test_folders_are_detectron2s():
    from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO

    for folder, file in _PREDEFINED_SPLITS_COCO["coco"].values():
        assert f"coco/{archives.coco_image_folder(Path(file).stem)}" == folder


@pytest.mark.data
def test_real_archives(run, data_root, declare, tmp_path):
    source = data_root / "VOCdevkit/VOC2007"
    ids = (source / "ImageSets/Main/mini_test.txt").read_text().split()[:12]
    files = {"VOCdevkit/VOC2007/ImageSets/Main/test.txt": "\n".join(ids).encode()}
    for part in [f"Annotations/{i}.xml" for i in ids] + [f"JPEGImages/{i}.jpg" for i in ids]:
        files[f"VOCdevkit/VOC2007/{part}"] = (source / part).read_bytes()
    path = declare(write_tar(tmp_path / TEST, files))
    code, out, _ = run("voc", tmp_path / "data", "--archives", path)
    assert code == 1 and "12 images, officially 4,952" in out
    assert run("voc", tmp_path / "data", "--own")[0] == 0


@pytest.mark.data
def test_real_folders(run, data_root, tmp_path):
    code, out, _ = run("voc", data_root / "VOCdevkit", "--quick", "--splits", "test")
    assert code == 1 and "test: 800 images, officially 4,952" in out
    assert "test: 1,961 boxes, officially 12,032" in out
    code, out, _ = run("voc", data_root / "BCCD", "--quick")
    assert code == 0 and "bad-box: 2" in out and "data of your own: only the headers" in out
    report = tmp_path / "r.json"
    root = data_root / "coco_mini"
    pair = ["--coco-json", root / "annotations/instances_val2017.json"]
    code, out, _ = run("coco", *pair, "--image-root", root / "val2017", "--json", report)
    (found,) = json.loads(report.read_text())
    boxes = len(json.loads(Path(pair[1]).read_text())["annotations"])
    assert code == 0 and found["splits"]["instances_val2017"]["boxes"] == boxes
    code, out, _ = run("coco", root, "--quick")
    assert code == 1 and "30 images, officially 118,287" in out
    assert f"rename this folder to coco, export DETECTRON2_DATASETS={root.parent.resolve()}" in out
