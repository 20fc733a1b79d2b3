"""ImageNet's boxes: the folders of DET and CLS-LOC, LOC's table, val1 and val2, one class."""

import json

import pytest
from drawn_images import voc_xml
from PIL import Image

from resnet_backbone.cli import prepare_data as tool

CAT, DOG = "n02121808", "n02084071"
BOX = (0, 5, 9, 47)  # inclusive, counted from 0: 10 x 43 pixels


@pytest.fixture
def ilsvrc(tmp_path):
    """ILSVRC's folders with two training images and six of val, one of them without objects."""
    contents = {f"train/ILSVRC2013_train/{kind}/{kind}_1": [kind] for kind in (CAT, DOG)}
    contents |= {f"val/ILSVRC2012_val_{n:08d}": [CAT, DOG][n % 2 : n % 2 + 1] for n in range(4)}
    contents |= {"val/ILSVRC2012_val_00000004": [CAT, DOG], "val/ILSVRC2012_val_00000005": []}
    for name, kinds in contents.items():
        image = tmp_path / "Data/DET" / f"{name}.JPEG"
        xml = tmp_path / "Annotations/DET" / f"{name}.xml"
        for path in (image, xml):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(image, "JPEG")
        xml.write_text(voc_xml(image.stem, (64, 48), [(kind, BOX) for kind in kinds]))
    return tmp_path


def prepare(folder, *options):
    output = folder / "out"
    common = ["own", "--format", "imagenet", "--output", output, "--images", folder / "Data/DET"]
    assert tool.main([str(word) for word in [*common, *options]]) == 0
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


def stems(content):
    return {image["file_name"].rpartition("/")[2][:-5] for image in content["images"]}


def test_det_with_halves_of_val(ilsvrc, capsys):
    (ilsvrc / "map_det.txt").write_text(f"{CAT} 1 domestic_cat\n{DOG} 2 dog\n")
    folder = ["--annotations", ilsvrc / "Annotations/DET", "--classes", ilsvrc / "map_det.txt"]
    found = prepare(ilsvrc, *folder, "--val1", "balanced")
    told = capsys.readouterr().out
    assert set(found) == {"train", "val2"} and "our own halves of val" in told
    assert "--config-file imagenet_det/faster_rcnn_R_50 " in told
    assert [one["name"] for one in found["train"]["categories"]] == ["dog", "domestic cat"]
    assert len(found["train"]["images"]) == 5 and len(found["val2"]["images"]) == 3
    assert not stems(found["train"]) & stems(found["val2"])
    boxes = [one["bbox"] for part in found.values() for one in part["annotations"]]
    assert len(boxes) == 8 and all(box == [0, 5, 10, 43] for box in boxes)


def test_det_with_a_list_of_val1(ilsvrc):
    lines = "ILSVRC2012_val_00000001 1", "val/ILSVRC2012_val_00000005.JPEG", ""
    (ilsvrc / "val1.txt").write_text("\n".join(lines))
    options = ["--annotations", ilsvrc / "Annotations/DET", "--val1", ilsvrc / "val1.txt"]
    found = prepare(ilsvrc, *options)
    assert stems(found["val2"]) == {f"ILSVRC2012_val_{n:08d}" for n in (0, 2, 3, 4)}
    assert "ILSVRC2012_val_00000005" in stems(found["train"])  # without objects, and kept


def test_images_of_one_class(ilsvrc):
    found = prepare(ilsvrc, "--annotations", ilsvrc / "Annotations/DET", "--one-class")
    assert set(found) == {"train", "val"}
    assert stems(found["val"]) == {f"ILSVRC2012_val_{n:08d}" for n in range(4)}


def test_table_of_localization(ilsvrc, run_command):
    table = ilsvrc / "LOC_val_solution.csv"
    sides = " ".join(map(str, BOX))
    rows = [f"ILSVRC2012_val_0000000{n},{CAT} {sides} {CAT} 1 1 3 3 " for n in range(3)]
    table.write_text("\n".join(["ImageId,PredictionString", *rows, f"absent,{CAT} {sides}"]))
    found = prepare(ilsvrc, "--annotations", table, "--val", "0.4")
    boxes = [one["bbox"] for part in found.values() for one in part["annotations"]]
    assert sorted(boxes) == [[0, 5, 10, 43]] * 3 + [[1, 1, 3, 3]] * 3
    assert "absent" in (ilsvrc / "out/left_out.txt").read_text()
    table.write_text("name,box\na,b\n")
    options = ["own", "--images", ilsvrc, "--annotations", table, "--output", ilsvrc / "none"]
    status, _, errors = run_command(tool.main, *options)
    assert status == 2 and "no rows with ImageId and PredictionString" in errors
