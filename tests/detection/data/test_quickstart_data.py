"""The built-in detection set: valid VOC layout, tight boxes, honest separation, no half sets."""

import filecmp
import hashlib
import json
import sys
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
from detectron2.structures import Boxes, pairwise_iou

from resnet_backbone.cli import prepare_data
from resnet_backbone.detection.data import quickstart, scan_voc
from resnet_backbone.runtime import builtin

NUMBERS = {"num_train": 12, "num_test": 6, "image_size": 128, "seed": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "data"
    return output, quickstart.generate(output, **NUMBERS)


def test_layout_is_voc(built):
    """Our reader finds what was drawn: the classes, the boxes, the source of each picture."""
    output, summary = built
    labels = builtin.load_scans()[1]
    for split, total in (("train", 12), ("test", 6)):
        records, report = scan_voc(output, split, builtin.CLASS_NAMES, decode=True)
        assert not report.problems and len(records) == total and not report.difficult
        for index, record in enumerate(records):
            assert record["file_name"].endswith(".jpg")
            assert (record["width"], record["height"]) == (128, 128)
            source = summary["images"][record["image_id"]]
            found = record["annotations"]
            assert [one["category_id"] for one in found] == [labels[i] for i in source["digits"]]
            scene = quickstart.compose_scene(split, index, 128, NUMBERS["seed"])
            assert [tuple(one["bbox"]) for one in found] == [digit.box for digit in scene.digits]
            assert 1 <= len(found) <= 5
            xml = output / "Annotations" / f"{record['image_id']}.xml"
            assert f"{source['background']}</image>" in xml.read_text()


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_are_tight_around_the_ink(split):
    for index in range(15):
        scene = quickstart.compose_scene(split, index)
        for digit in scene.digits:
            ys, xs = np.nonzero(digit.ink >= builtin.VISIBLE)
            assert digit.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_boxes_are_where_the_picture_differs_from_the_photograph():
    """Independent of the generator's own masks: compares the pixels with the bare photograph."""
    for index in range(15):
        scene = quickstart.compose_scene("train", index)
        change = np.abs(scene.image.astype(int) - scene.photograph).max(axis=2)
        outside = np.ones(change.shape, bool)
        for x0, y0, x1, y1 in (digit.box for digit in scene.digits):
            edge = (y1 - y0) // 8 + 1  # the outline
            outside[max(0, y0 - edge) : y1 + edge, max(0, x0 - edge) : x1 + edge] = False
            rows, columns = change[[y0, y1 - 1], x0:x1], change[y0:y1, [x0, x1 - 1]]
            sides = (*rows.max(1), *columns.max(0))
            assert min(sides) > 10, "a side of the box touches no ink"
        assert change[outside].max(initial=0) == 0


def test_boxes_hardly_overlap():
    for index in range(30):
        scene = quickstart.compose_scene("train", index)
        boxes = Boxes(torch.tensor([digit.box for digit in scene.digits]).float())
        assert pairwise_iou(boxes, boxes).triu(1).max() < 0.2


def test_train_and_test_share_no_digit_and_no_photograph(built):
    _, summary = built
    digits, photographs = {}, {}
    for split in ("train", "test"):
        sources = [s for name, s in summary["images"].items() if name.startswith(split)]
        digits[split] = {index for source in sources for index in source["digits"]}
        photographs[split] = {source["background"] for source in sources}
        assert digits[split] <= set(builtin.digit_indices(split))
    assert not digits["train"] & digits["test"]
    assert not photographs["train"] & photographs["test"]
    assert not set(builtin.digit_indices("train")) & set(builtin.digit_indices("test"))
    assert not set(builtin.BACKGROUNDS["train"]) & set(builtin.BACKGROUNDS["test"])


def test_photographs_differ_in_their_pixels():
    names = [name for split in builtin.BACKGROUNDS.values() for name in split]
    assert len({builtin.load_photograph(name).tobytes() for name in names}) == len(names)


def test_the_seed_decides_each_picture_also_of_a_larger_set(built, tmp_path):
    output, summary = built
    quickstart.generate(tmp_path / "larger", **(NUMBERS | {"num_train": 14}))
    files = [path.relative_to(output) for path in output.rglob("t*_*.*")]
    assert len(files) == 2 * 18
    assert filecmp.cmpfiles(output, tmp_path / "larger", files, shallow=False)[0] == files
    other = quickstart.generate(tmp_path / "other", **(NUMBERS | {"seed": 4}))
    assert other["images"] != summary["images"]


@pytest.mark.parametrize(
    "split, expected",
    [("train", "add081b4d76c54a47548400a3fe43d28"), ("test", "74a6f215281aa4b4e58fb5d8c1d94ad7")],
)
def test_the_pictures_stay_the_same(split, expected):
    """The numbers in docs/results rest on them."""
    versions = [library.__version__.partition(".")[0] for library in (PIL, np)]
    if versions != ["13", "2"]:
        pytest.skip("other versions of Pillow and NumPy may draw slightly other pixels")
    found = hashlib.sha256()
    for index in range(4):
        scene = quickstart.compose_scene(split, index)
        found.update(scene.image.tobytes())
        digits = [(digit.name, digit.index, digit.box) for digit in scene.digits]
        found.update(repr((scene.background, digits)).encode())
    assert found.hexdigest()[:32] == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, error):
    stop = Mock(side_effect=[*[None] * 13, error])
    with pytest.raises(error):
        quickstart.generate(tmp_path / "data", **NUMBERS, on_image=stop)
    assert list(tmp_path.iterdir()) == []
    assert not quickstart.is_complete(tmp_path / "data", NUMBERS)


def test_an_interrupted_replacement_keeps_the_old_set(tmp_path):
    quickstart.generate(tmp_path / "data", **NUMBERS)
    stop = Mock(side_effect=KeyboardInterrupt)
    numbers = NUMBERS | {"seed": 9}
    with pytest.raises(KeyboardInterrupt):
        quickstart.generate(tmp_path / "data", **numbers, overwrite=True, on_image=stop)
    assert quickstart.is_complete(tmp_path / "data", NUMBERS)


def test_existing_folders_are_safe(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="data"):
            quickstart.generate(tmp_path / "data", **NUMBERS, overwrite=overwrite)
    assert (tmp_path / "data" / "thesis.tex").exists()


@pytest.mark.parametrize("change", [{"num_train": 0}, {"image_size": 95}, {"seed": -1}])
def test_bad_numbers_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        quickstart.generate(tmp_path / "data", **(NUMBERS | change))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(monkeypatch):
    for module in ("skimage", "skimage.data"):  # which other tests may have imported
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'resnet_backbone\[quickstart\]'"):
        builtin.load_photograph.__wrapped__("coffee")


def test_command_line(tmp_path, capsys):
    output = tmp_path / "data"
    arguments = ["digits", "--output", str(output), "--num-train", "2", "--num-test", "1"]
    assert prepare_data.main(arguments) == 0
    assert json.loads((output / quickstart.SUMMARY).read_text())["settings"]["num_train"] == 2
    assert prepare_data.main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main([*arguments, "--seed", "5"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert prepare_data.main([*arguments, "--seed", "5", "--overwrite"]) == 0
