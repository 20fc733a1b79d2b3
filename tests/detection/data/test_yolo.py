"""YOLO's lines and class names as tools write them."""

import pytest
from PIL import Image

from resnet_backbone.detection.data.formats.yolo import parse_yolo_line, read_yolo_data
from resnet_backbone.detection.data.own import read_own


@pytest.mark.parametrize(
    "line", ["0 .5 .5 .2 .2 .91", "0 .5 .5 .2 .2 .3 .4 2 .1 .1 0 .2", "0 .5 .5 .2 .2 .3 .4 1"]
)
def test_confidences_and_keypoints_are_no_polygons(line):
    with pytest.raises(ValueError, match="take the confidence out|keypoints are not read"):
        parse_yolo_line(line, 2, (100, 100))


ELEVEN = ["a", "class 1", "b", *(f"class {n}" for n in range(3, 10)), "c"]
NAMES = {"{1: cat, 2: dog}": ["class 0", "cat", "dog"], "{'0': a, '2': b, '10': c}": ELEVEN}


@pytest.mark.parametrize("text, names", NAMES.items())
def test_class_names_by_number(tmp_path, text, names):
    (tmp_path / "data.yaml").write_text(f"names: {text}\n")
    assert read_yolo_data(tmp_path / "data.yaml", tmp_path) == (names, {})


def test_equal_class_names_are_told_apart(tmp_path):
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("1 .5 .5 .25 .25\n")
    (tmp_path / "classes.txt").write_text("owl\nowl\n")
    _, names, report = read_own(tmp_path, tmp_path)
    assert names == ["owl", "owl 2"] and "second 'owl'" in report.notes[0]
