"""Files that are whole or not there, after a power cut as well; configs by path and by name."""

import errno
import os
from pathlib import Path

import pytest
import torch

from resnet_backbone.runtime import files
from resnet_backbone.runtime.files import config_folder, find_config
from resnet_backbone.runtime.records import METRICS, RunFolder


@pytest.fixture
def steps(monkeypatch):
    """What was done to the disk, in order: ("fsync", file name, its size), ("replace", names)."""
    done, replace = [], os.replace

    def note_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        size = None if os.path.isdir(path) else os.path.getsize(path)
        done.append(("fsync", os.path.basename(path), size))

    def note_replace(old, new):
        done.append(("replace", os.path.basename(old), os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return done


def test_text_is_on_the_disk_before_it_has_its_name(tmp_path, steps):
    files.write_text(tmp_path / "a.txt", "four")
    temporary = f".a.txt.{os.getpid()}.tmp"
    expected = [("fsync", temporary, 4), ("replace", temporary, "a.txt")]
    assert steps == [*expected, ("fsync", tmp_path.name, None)]
    assert (tmp_path / "a.txt").read_text() == "four"


def test_a_folder_and_what_is_in_it(tmp_path, steps):
    (tmp_path / "new" / "sub").mkdir(parents=True)
    (tmp_path / "new" / "sub" / "state").write_text("12")
    files.put_in_place(tmp_path / "new", tmp_path / "5")
    expected = [("fsync", "sub", None), ("fsync", "state", 2), ("fsync", "new", None)]
    expected += [("replace", "new", "5")]
    assert steps == [*expected, ("fsync", tmp_path.name, None)]
    assert (tmp_path / "5" / "sub" / "state").read_text() == "12"


def test_file_systems_that_cannot_wait_for_folders(tmp_path, monkeypatch):
    def fail(code, only_folders):
        def fsync(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}") or not only_folders:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    fail(errno.EINVAL, True)
    files.write_text(tmp_path / "a.txt", "four")
    assert (tmp_path / "a.txt").read_text() == "four"
    for code, only_folders in ((errno.EIO, True), (errno.EINVAL, False)):
        fail(code, only_folders)
        with pytest.raises(OSError, match=os.strerror(code)):
            files.write_text(tmp_path / "b.txt", "four")


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as from the system: without a name


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "four"),
        lambda path: files.write_json(path, [4]),
        lambda path: RunFolder(path.parent, tensorboard=False).add_metrics({"iteration": 1}),
    ],
)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch, write):
    (tmp_path / "a").write_text("old")
    (tmp_path / METRICS).symlink_to("/dev/full")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/({METRICS}|a)'"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {METRICS, "a"}


def test_a_full_disk_is_named_where_pytorch_writes(tmp_path):
    written = pytest.raises(OSError, match=f"{tmp_path}/a cannot be written")
    with written, files.naming(tmp_path / "a"):
        torch.save(torch.zeros(10**6), "/dev/full")
    with pytest.raises(RuntimeError, match="shapes"), files.naming(tmp_path / "a"):
        raise RuntimeError("shapes differ")


def test_rows_that_are_kept(tmp_path):
    path = tmp_path / "rows"
    assert files.keep_rows(path, lambda row: True) == ([], 0) and not path.exists()
    path.write_text('{"a": 1}\n{"a": 2}\nnonsense\n{"a": 1}')
    assert files.keep_rows(path, lambda row: row["a"] < 2) == ([{"a": 1}], 2)
    assert path.read_text() == '{"a": 1}\n'


CONFIGS = Path(__file__).parents[2] / "configs"
FILE = CONFIGS / "detection" / "voc" / "faster_rcnn_R_50_FPN.yaml"
MEANT = "did you mean voc/faster_rcnn_R_50_FPN?"


NAMES = """voc/faster_rcnn_R_50_FPN voc/faster_rcnn_R_50_FPN.yaml
    detection/voc/faster_rcnn_R_50_FPN configs/detection/voc/faster_rcnn_R_50_FPN.yaml"""


@pytest.mark.parametrize("name", [*NAMES.split(), FILE])
def test_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name, "detection") == FILE
    other = find_config("cifar10/resnet20", "classification")
    assert other == CONFIGS / "classification" / "cifar10" / "resnet20.yaml"


def test_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()
    own = Path("voc", "faster_rcnn_R_50_FPN.yaml")
    own.write_text("")
    assert find_config(own, "detection") == own


@pytest.mark.parametrize(
    "name, hint",
    [
        ("voc/fastr_rcnn_R_50_FPN", MEANT),
        ("configs/detection/voc/faster_rcnn_R50_FPN.yaml", MEANT),
        ("/nowhere/else", f"no such config file; The configs are in {CONFIGS / 'detection'}"),
    ],
)
def test_typos(name, hint):
    with pytest.raises(ValueError) as caught:
        find_config(name, "detection")
    assert str(caught.value).startswith(f"{name}: no such config file; ")
    assert hint in str(caught.value)


def test_what_the_wheel_has_comes_first(tmp_path, monkeypatch):
    assert config_folder() == CONFIGS
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr("resnet_backbone.runtime.files.PACKAGE", tmp_path)
    assert config_folder() == tmp_path / "configs"
