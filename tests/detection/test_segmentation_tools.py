"""Label pictures, training and demo with masks, labels and panoptic segments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util

from resnet_backbone.cli import demo, prepare_data
from resnet_backbone.detection.inference.pictures import class_color, draw_output
from resnet_backbone.detection.inference.predictor import describe_output

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "segmentation" / "coco"
SMALL = """MODEL.RESNETS.DEPTH 18 MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN
MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32
MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TEST 20
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SEED 1
DATALOADER.NUM_WORKERS 0 TEST.DETECTIONS_PER_IMAGE 5 MODEL.DEVICE cpu""".split()
SMALL += ["MODEL.WEIGHTS", ""]
STUFF = "RESNET_BACKBONE.STUFF_CLASS_NAMES"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, tiny_voc, tiny_coco) -> Path:
    """Four of the tiny pictures, their instances with outlines, their labels."""
    root = tmp_path_factory.mktemp("scenes")
    (root / "images").symlink_to(tiny_voc / "JPEGImages")
    file = tiny_coco(root / "instances.json", range(4))
    prepare_data.main(["labels", "--coco-json", file, "--output", str(root / "labels")])
    return root


def data(scenes, kind):
    instances = ["--coco-json", *[str(scenes / "instances.json")] * 2]
    panoptic = ["--panoptic-json", *[str(scenes / "labels" / "panoptic.json")] * 2]
    folder = scenes / "labels" / ("stuff" if kind == "panoptic" else "semantic")
    labels = ["--sem-seg", *[str(folder)] * 2]
    words = {"instances": instances, "semantic": labels, "panoptic": instances + panoptic + labels}
    return ["--image-root", str(scenes / "images"), *words[kind]]


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def run(train_net, scenes, folder, config, kind, *overrides):
    words = [*data(scenes, kind), "--output-dir", str(folder), *SMALL, *overrides]
    return train_net(CONFIGS / config, *words)


def draw(scenes, folder, output):
    numbers = output.with_suffix(".json")
    words = ["--run", folder, "--input", scenes / "images" / "000001.jpg", "--output", output]
    demo.main([*map(str, words), "--json", str(numbers), "--confidence", "0"])
    return json.loads(numbers.read_text())["images"][0]["detections"]


def test_panoptic_from_labels_to_picture(train_net, scenes, tmp_path):
    folder, picture = tmp_path / "run", tmp_path / "drawn.png"
    run(train_net, scenes, folder, "panoptic_R_50_FPN.yaml", "panoptic")
    found = results(folder)
    assert found.keys() == {"bbox", "segm", "sem_seg", "panoptic_seg"}
    assert found["panoptic_seg"].keys() >= {"PQ", "SQ", "RQ", "PQ_th", "PQ_st"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    assert config["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"] == 2
    assert config["RESNET_BACKBONE"]["STUFF_CLASS_NAMES"] == ["things", "background"]
    entries = draw(scenes, folder, picture)
    assert entries and all(entry["mask"]["size"] == [64, 96] for entry in entries)
    assert Image.open(picture).height == 480


def test_semantic_from_labels_to_picture(train_net, scenes, tmp_path):
    folder, picture = tmp_path / "run", tmp_path / "drawn.png"
    run(train_net, scenes, folder, "semantic_R_50_FPN.yaml", "semantic")
    assert 0 <= results(folder)["sem_seg"]["mIoU"] <= 100
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["RESNET_BACKBONE"]["STUFF_CLASS_NAMES"] == ["background", "box", "bar"]
    entries = draw(scenes, folder, picture)
    assert {entry["class"] for entry in entries} <= {"background", "bar", "box"}
    assert sum(entry["share"] for entry in entries) == pytest.approx(1, abs=1e-4)
    assert picture.is_file()
    weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    again = [*data(scenes, "semantic"), "--eval-only", "--output-dir", str(folder), *weights]
    train_net(folder / "config.yaml", *again)
    assert results(folder / "eval") == results(folder)


OTHERS = {"deeplab_v3plus_R_50_OS16.yaml": "semantic", "deeplab_v3_R_50_OS8.yaml": "semantic"}
OTHERS |= {"pointrend_R_50_FPN.yaml": "instances", "mask_rcnn_R_50_C4.yaml": "instances"}


@pytest.mark.slow
@pytest.mark.parametrize("config, kind", OTHERS.items())
def test_other_families_run(train_net, scenes, tmp_path, config, kind):
    overrides = ["MODEL.RESNETS.RES5_MULTI_GRID", "[1, 2]"] if "deeplab" in config else []
    overrides += ["MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", "32"] if "deeplab" in config else []
    run(train_net, scenes, tmp_path, config, kind, *overrides)
    assert ("sem_seg" if kind == "semantic" else "segm") in results(tmp_path)
    draw(scenes, tmp_path, tmp_path / "drawn.png")  # reads the project's keys of config.yaml


@pytest.mark.parametrize(
    "config, kind, overrides, words",
    [
        ("semantic_R_50_FPN.yaml", "instances", [], "has no label images, which SemanticSeg"),
        ("panoptic_R_50_FPN.yaml", "semantic", [], "needs --coco-json, --panoptic-json, and --sem"),
        ("mask_rcnn_R_50_FPN.yaml", "semantic", [], "GeneralizedRCNN does not use label"),
        ("mask_rcnn_R_50_FPN.yaml", "boxes", [], "none of the 8 boxes has a usable one"),
        ("mask_rcnn_R_50_FPN.yaml", "rle", [], "8 of 8 masks are run-length encoded: set INPUT.M"),
        ("semantic_R_50_FPN.yaml", "semantic", [STUFF, "['a', 'b', 'c']"], STUFF + " has ['a', 'b"),
    ],
)
def test_data_that_do_not_suit(train_net, scenes, tmp_path, config, kind, overrides, words):
    words_of_data = data(scenes, "instances" if kind in ("boxes", "rle") else kind)
    if kind in ("boxes", "rle"):
        content = json.loads((scenes / "instances.json").read_text())
        for entry in content["annotations"]:
            entry.pop("segmentation")
            if kind == "rle":
                entry["segmentation"] = {"size": [64, 96], "counts": [0, 64 * 96]}
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        words_of_data[-2:] = [file, file]
    keys = ["--output-dir", tmp_path, *SMALL, *overrides]
    lines = train_net(CONFIGS / config, *words_of_data, *keys, code=2)
    assert lines[-1].startswith("error: ") and words in lines[-1], lines[-1]


def test_overrides_behind_the_image_folders(train_net, scenes, tmp_path):
    root, labels = data(scenes, "semantic")[:2], data(scenes, "semantic")[2:]
    words = ["--output-dir", tmp_path, *SMALL, *labels, *root]
    train_net(CONFIGS / "semantic_R_50_FPN.yaml", *words, "SEED", "7")
    assert "SEED: 7" in (tmp_path / "config.yaml").read_text()
    words[1] = tmp_path / "another"
    lines = train_net(CONFIGS / "semantic_R_50_FPN.yaml", *words, "second", "third", code=2)
    assert "second third" in lines[-1]


def test_label_tool_needs_one_input(capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(["labels", "--output", "x"])
    assert "--coco-json --panoptic-json is required" in capsys.readouterr().err


GREY = np.full((480, 640, 3), 100, np.uint8)  # large enough not to be enlarged


def near(pixel, color):
    return np.abs(np.asarray(pixel, int) - np.asarray(color)).max() <= 3


def half(index):
    """A class's color on gray 100, half transparent."""
    return [50 + 255 * value / 2 for value in class_color(index)]


def test_masks_are_painted_where_they_are():
    masks = torch.zeros(2, 480, 640, dtype=torch.bool)
    masks[0, 100:300, 100:300] = True
    masks[1, 200:400, 200:400] = True
    boxes = Boxes(torch.tensor([[100.0, 100, 300, 300], [200, 200, 400, 400]]))
    scores, classes = torch.tensor([0.9, 0.3]), torch.tensor([0, 1])
    fields = dict(pred_boxes=boxes, pred_masks=masks, scores=scores, pred_classes=classes)
    output = {"instances": Instances((480, 640), **fields)}
    drawn = draw_output(GREY, output, ("cat", "dog"), threshold=0.2)
    assert near(drawn[150, 150], half(0))
    assert near(drawn[350, 350], half(1))
    assert near(drawn[50, 500], (100, 100, 100)) and (GREY == 100).all()
    assert near(draw_output(GREY, output, threshold=0.5)[350, 350], (100, 100, 100))
    first, second = describe_output(output, ("cat", "dog"))
    assert (first["class"], second["class"]) == ("cat", "dog")
    assert np.array_equal(mask_util.decode(first["mask"]), masks[0].numpy())


NOTHING = Instances((480, 640), scores=torch.zeros(0), pred_classes=torch.zeros(0))
NOTHING.pred_boxes = Boxes(torch.zeros(0, 4))


def test_keypoints_are_drawn_and_described():
    fields = dict(scores=torch.tensor([0.9]), pred_classes=torch.tensor([0]))
    fields["pred_boxes"] = Boxes(torch.tensor([[100.0, 100, 300, 300]]))
    points = torch.tensor([[[150.5, 200.5, 0.8], [250.5, 200.5, 0.01], [200.5, 150.5, 0.8]]])
    for number in (3, 17):  # 17 are joined by lines
        some = points[:, [0, 1, 2][:number] + [2] * (number - 3)]
        output = {"instances": Instances((480, 640), pred_keypoints=some, **fields)}
        drawn = draw_output(GREY, output, ("person",)).astype(int)
        assert (drawn[198:203, 148:153] != 100).any() and (drawn[198:203, 248:253] == 100).all()
        (one,) = describe_output(output, ("person",))
        expected = [150.5, 200.5, 0.8, 250.5, 200.5, 0.01]
        assert one["keypoints"][:6] == expected and len(one["keypoints"]) == 3 * number


def test_labels_are_painted_and_background_is_not():
    scores = torch.zeros(3, 480, 640)
    scores[0] = 1
    scores[2, 100:300, 100:300] = 2
    drawn = draw_output(GREY, {"sem_seg": scores}, label_names=("background", "cat", "dog"))
    assert near(drawn[120, 120], half(2)) and near(drawn[400, 500], (100,) * 3)
    unnamed = draw_output(GREY, {"sem_seg": scores})
    assert near(unnamed[400, 20], half(0))
    entries = describe_output({"sem_seg": scores}, label_names=("background", "cat", "dog"))
    assert [entry["class"] for entry in entries] == ["background", "dog"]
    assert entries[1]["share"] == pytest.approx(200 * 200 / (480 * 640), abs=1e-5)


def test_panoptic_segments_are_painted():
    ids = torch.zeros(480, 640, dtype=torch.int32)
    ids[:240], ids[300:, :200] = 1, 2
    segments = [
        {"id": 1, "isthing": False, "category_id": 1, "area": 240 * 640},
        {"id": 2, "isthing": True, "category_id": 1, "score": 0.9, "instance_id": 0},
    ]
    drawn = draw_output(GREY, {"panoptic_seg": (ids, segments)}, ("a", "cat"), ("things", "sky"))
    assert near(drawn[320, 20], half(1))
    assert near(drawn[270, 300], (100,) * 3)
    assert not near(drawn[10, 10], (100,) * 3) and not near(drawn[10, 10], drawn[320, 20])
    output = {"panoptic_seg": (ids, segments), "instances": NOTHING}
    assert describe_output(output, ("a", "cat"), ("things", "sky")) == [
        {"class": "sky", "share": 0.5}
    ]


@pytest.mark.data
@pytest.mark.slow
def test_coco_images(train_net, data_root, tmp_path):
    """Crowds, many sizes, images without an annotated mask: the real files, end to end."""
    coco, words = data_root / "coco_mini", []
    for split in ("train", "val"):
        file = str(coco / "annotations" / f"instances_{split}2017.json")
        out = str(tmp_path / split)
        prepare_data.main(["labels", "--coco-json", file, "--output", out])
        words.append((file, str(coco / f"{split}2017"), f"{out}/panoptic.json", f"{out}/stuff"))
    options = ("--coco-json", "--image-root", "--panoptic-json", "--sem-seg")
    pairs = zip(*words, strict=True)
    given = [word for option, pair in zip(options, pairs, strict=True) for word in (option, *pair)]
    config = CONFIGS / "panoptic_R_50_FPN.yaml"
    train_net(config, *given, "--output-dir", tmp_path / "run", *SMALL)
    assert results(tmp_path / "run").keys() == {"bbox", "segm", "sem_seg", "panoptic_seg"}
