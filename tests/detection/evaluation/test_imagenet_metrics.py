"""ImageNet's detection and localization metrics, against loops and by hand."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from resnet_backbone.detection.evaluation import imagenet
from resnet_backbone.runtime.errors import DataError

NAMES = ["cat", "dog", "owl"]


@pytest.fixture
def register(request):
    """Registers images, each [(x0, y0, x1, y1, class), ...], and returns the data set's name."""

    def add(images):
        name, records, mode = request.node.name, [], {"bbox_mode": BoxMode.XYXY_ABS}
        for number, boxes in enumerate(images):
            found = [{"bbox": box[:4], "category_id": box[4]} | mode for box in boxes]
            one = {"image_id": number, "file_name": f"somewhere/img{number}.jpg"}
            records.append(one | {"annotations": found})
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).thing_classes = NAMES
        return name

    return add


def evaluate(evaluator, images):
    """What an evaluator says of detections of the form [(x0, y0, x1, y1, class, score), ...]."""
    for number, found in enumerate(images):
        table = torch.tensor(found, dtype=torch.float32).reshape(-1, 6)
        instances = Instances((500, 500), pred_boxes=Boxes(table[:, :4]))
        instances.pred_classes, instances.scores = table[:, 4].long(), table[:, 5]
        evaluator.process([{"image_id": number}], [{"instances": instances}])
    return evaluator.evaluate()


def test_threshold_of_small_objects():
    """min(0.5, w h / ((w + 10) (h + 10))): 10 x 10 pixels need a quarter, 100 x 100 a half."""
    boxes = np.array([[0, 0, 10, 10], [5, 5, 105, 105], [0, 0, 10, 90]], dtype=float)
    assert imagenet.small_thresholds(boxes) == pytest.approx([0.25, 0.5, 0.45])


def test_det_by_hand(register):
    """A small object found with IoU 0.3, a large one missed with 0.4, a second box on the first."""
    name = register([[(0, 0, 10, 10, 0), (100, 100, 200, 200, 0)], [(0, 0, 50, 50, 1)]])
    first = [
        (0, 0, 10, 3, 0, 0.9),  # IoU 0.3, above 0.25
        (0, 0, 10, 10, 0, 0.8),  # the object is taken
        (100, 100, 200, 140, 0, 0.7),  # IoU 0.4, below 0.5
    ]
    second = [(0, 0, 50, 50, 1, 0.6), (0, 0, 50, 50, 0, 0.95)]  # the last is of another class
    results = evaluate(imagenet.DETEvaluator(name), [first, second])["bbox"]
    # cat by falling score: wrong, right, wrong, wrong; recall 1/2 with precision 1/2
    assert results["AP50-cat"] == pytest.approx(25)
    assert results["AP50-dog"] == pytest.approx(100)
    assert math.isnan(results["AP50-owl"])
    assert results["AP50"] == pytest.approx(62.5)


def devkit(boxes, scores, classes, objects, object_classes):
    """The rules of ILSVRC's development kit as plain loops, with its inclusive pixels."""
    taken, right = set(), [False] * len(boxes)
    for j in sorted(range(len(boxes)), key=lambda k: (-scores[k], k)):
        best, choice = -1.0, None
        for k, (x0, y0, x1, y1) in enumerate(objects):
            if classes[j] != object_classes[k] or k in taken:
                continue
            w, h = x1 - x0 + 1, y1 - y0 + 1
            a0, b0, a1, b1 = boxes[j]
            iw, ih = min(a1, x1) - max(a0, x0) + 1, min(b1, y1) - max(b0, y0) + 1
            if iw <= 0 or ih <= 0:
                continue
            iou = iw * ih / ((a1 - a0 + 1) * (b1 - b0 + 1) + w * h - iw * ih)
            if iou >= min(0.5, w * h / ((w + 10) * (h + 10))) and iou > best:
                best, choice = iou, k
        if choice is not None:
            taken.add(choice)
            right[j] = True
    return right


@pytest.mark.parametrize("seed", range(20))
def test_det_matches_as_the_development_kit(seed):
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner, side = rng.integers(0, 20, (count, 2)), rng.integers(1, 40, (count, 2))
        return np.hstack([corner, corner + side - 1]).astype(float)  # inclusive

    found, objects = boxes(30), boxes(8)
    scores, classes, kinds = rng.random(30).round(1), rng.integers(0, 2, 30), rng.integers(0, 2, 8)
    grow = np.array([0, 0, 1, 1])
    ours = imagenet.match_small(found + grow, scores, classes, objects + grow, kinds)
    assert ours.tolist() == devkit(found, scores, classes, objects, kinds)
    assert ours.any() and not ours.all()


def test_a_class_without_detections_has_no_precision():
    none = [np.zeros(0, kind) for kind in (float, int, bool)]
    assert imagenet.det_precisions(*none, np.array([3])) == [0.0]


def test_localization_by_hand(register, tmp_path):
    """Four images: found and guessed first; found and guessed third; not found; never guessed."""
    one, far = (0, 0, 100, 100), (200, 200, 300, 300)  # a box on any object is right
    name = register([[(*far, 0), (*one, 0)], [(*one, 1)], [(*one, 2)], [(*one, 0), (*far, 0)]])
    good, bad = (0, 0, 100, 60), (0, 0, 100, 40)  # IoU 0.6 and 0.4
    found = [
        [(*good, 0, 0.9), (*bad, 0, 0.8)],  # the best box of a class counts
        [(*good, 1, 0.2), (*bad, 2, 0.9)],
        [(*bad, 2, 0.9), (*good, 2, 0.8)],
        [(*good, 0, 0.9)],
    ]
    guesses = {"img0": [0, 1], "img1": [2, 0, 1], "img2": [2], "img3": [1, 2]}
    results = evaluate(imagenet.LOCEvaluator(name, str(tmp_path), guesses), found)["localization"]
    assert results == {"true_class_error": 25.0, "top1_error": 75.0, "top5_error": 50.0}
    assert json.loads((tmp_path / "loc_results.json").read_text()) == {"images": 4, **results}
    rows = json.loads((tmp_path / "localizations.json").read_text())
    assert [(row["class"], row["rank"], row["iou"]) for row in rows] == [
        (NAMES[0], 1, 0.6), (NAMES[1], 3, 0.6), (NAMES[2], 1, 0.4), (NAMES[0], None, 0.6)
    ]  # fmt: skip
    assert rows[0]["box"] == [*good] and rows[0]["objects"] == [[*far], [*one]]
    del guesses["img3"]
    with pytest.raises(DataError, match="no guess for somewhere/img3.jpg"):
        imagenet.LOCEvaluator(name, None, guesses)
    without = evaluate(imagenet.LOCEvaluator(name), found[:3])["localization"]
    assert without == {"true_class_error": 50.0}  # the fourth image was not looked at


def test_localization_refuses_images_of_several_classes(register):
    name = register([[(0, 0, 9, 9, 0), (0, 0, 9, 9, 1)]])
    with pytest.raises(DataError, match="image 0 shows 2 classes.*--one-class"):
        evaluate(imagenet.LOCEvaluator(name), [[]])


def test_guesses_are_those_of_evaluate_classifier(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("index,image,class1,name1,score1,class2,name2\n0,/a/img7.png,9,owl,0.9,1,cat\n")
    assert imagenet.read_guesses(str(path), NAMES) == {"img7": [2, 0]}
    path.write_text("image,name1\n/a/img7.png,cat\n/b/img7.png,owl\n")
    with pytest.raises(DataError, match="two images are named img7"):
        imagenet.read_guesses(str(path), NAMES)
    path.write_text("image,name1\nimg7.png,cow\n")
    with pytest.raises(DataError, match="'cow'"):
        imagenet.read_guesses(str(path), NAMES)
