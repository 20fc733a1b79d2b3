"""Detections beside the ground truth: curves and misses against loops over the boxes."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.data import MetadataCatalog

from resnet_backbone.detection.evaluation.voc import summarize
from resnet_backbone.detection.evaluation.voc_ap import evaluate_voc
from resnet_backbone.report import boxes, detections
from resnet_backbone.report.detection_table import METRICS
from resnet_backbone.report.detector_runs import load_detector_run
from resnet_backbone.report.improvements import change_intervals


def load(folder):
    run = load_detector_run(folder)
    truth = boxes.load_truth(run)
    return truth, boxes.load_detections(run, truth)


def iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def matches(truth, folder, class_id):
    """(score, image, place in it or None) of a class's detections, best first."""
    rows = json.loads((folder / "inference/test:test/detections.json").read_text())
    images = {image["image_id"]: image for image in truth.images}
    found = []
    for row in rows:
        if row["category_id"] != class_id:
            continue
        x, y, width, height = row["bbox"]
        box, image = (x + 1, y + 1, x + width, y + height), images[row["image_id"]]
        overlaps = [
            (iou(box, other), -place)
            for place, other in enumerate(image["boxes"])
            if image["classes"][place] == class_id
        ]
        best, place = max(overlaps, default=(0.0, 0))
        found.append((row["score"], row["image_id"], -place if best > 0.5 else None))
    return sorted(found, key=lambda entry: -entry[0])


def curve_by_loop(truth, folder, class_id, levels) -> list[float]:
    images = {image["image_id"]: image for image in truth.images}
    pairs = [zip(i["classes"], i["difficult"], strict=True) for i in truth.images]
    objects = sum(kind == class_id and not hard for image in pairs for kind, hard in image)
    taken, right, wrong, points = set(), 0, 0, []
    for _, image, place in matches(truth, folder, class_id):
        if place is not None and images[image]["difficult"][place]:
            pass
        elif place is None or (image, place) in taken:
            wrong += 1
        else:
            taken.add((image, place))
            right += 1
        if right + wrong:
            points.append((right / objects, right / (right + wrong)))
    return [max((p for r, p in points if r >= level), default=0.0) for level in levels]


def test_curves_equal_a_loop(make_voc_run):
    folder = make_voc_run("r50", 1, 0.7)
    truth, evidence = load(folder)
    levels = np.linspace(0, 1, 21)
    curves = detections.interpolated_precision(evidence.numbers, 21)
    for class_id in range(3):
        expected = curve_by_loop(truth, folder, class_id, levels)
        assert curves[class_id].tolist() == pytest.approx(expected)
    assert 0 < curves.mean() < 1


def test_a_class_without_objects_has_no_curve():
    recall = [np.array([0.5, 1.0]), np.array([np.nan])]
    precision = [np.array([1.0, 0.4]), np.array([0.0])]
    numbers = {"recall": recall, "precision": precision, "num_ground_truth": np.array([2, 0])}
    curves = detections.interpolated_precision(numbers, 3)
    assert curves[0].tolist() == [1.0, 1.0, 0.4] and np.isnan(curves[1]).all()


def misses_by_loop(truth, finder, other, score) -> dict[tuple[str, int], float]:
    """(image, place) -> gap, by the rule that the report states."""
    best = {}
    for folder in (*finder, *other):
        best[folder] = {}
        for class_id in range(3):
            for value, image, place in matches(truth, folder, class_id):
                key = image, place
                best[folder][key] = max(value, best[folder].get(key, 0.0))
    gaps = {}
    for image in truth.images:
        for place, hard in enumerate(image["difficult"]):
            key = image["image_id"], place
            mine = [best[folder].get(key, 0.0) for folder in finder]
            theirs = [best[folder].get(key, 0.0) for folder in other]
            found = sum(value >= score for value in mine)
            if not hard and 2 * found > len(mine) and not any(v >= score for v in theirs):
                gaps[key] = sum(mine) / len(mine) - max(theirs)
    return gaps


@pytest.mark.parametrize("score", [0.3, 0.6])
def test_misses_equal_a_loop(make_voc_run, score):
    finder = [make_voc_run("r50", seed, 0.95) for seed in (1, 2, 3)]
    other = [make_voc_run("vgg", seed, 0.4) for seed in (1, 2)]
    truth, _ = load(finder[0])
    runs = [[load(folder)[1] for folder in group] for group in (finder, other)]
    gaps = detections.find_misses(*runs, score)
    table = runs[0][0].truth
    starts = np.searchsorted(table["image"], table["image"])
    found = {
        (truth.images[table["image"][row]]["image_id"], row - starts[row]): gaps[row]
        for row in np.flatnonzero(~np.isnan(gaps))
    }
    expected = misses_by_loop(truth, finder, other, score)
    assert found == pytest.approx(expected) and len(expected) > 2
    selected = detections.select_misses(*runs, 10, score)
    seen, wanted = set(), []  # one of a class and of an image, largest gap first
    images = {image["image_id"]: image for image in truth.images}
    for (image, place), gap in sorted(expected.items(), key=lambda item: -item[1]):
        kind = images[image]["classes"][place]
        if not {("class", kind), ("image", image)} & seen:
            seen |= {("class", kind), ("image", image)}
            wanted.append(gap)
    assert [gaps[row] for row, _ in selected] == pytest.approx(wanted)
    assert len(detections.select_misses(*runs, 1, score)) == 1
    for row, run in selected:
        assert detections.object_scores(run)[row] >= score


def test_resampling_equals_repeated_images(make_voc_run):
    """A draw's metrics against VOC's evaluation of a set that really has the copies."""
    truth, run = load(make_voc_run("r50", 1, 0.8))
    counts = detections.draw_images(len(truth.images), 30)
    assert counts.shape == (30, 12) and (counts.sum(axis=1) == 12).all()
    counts[0] = 0
    counts[0, [2, 5]] = 1, 11  # classes without objects
    found = detections.resample(run, counts)
    for draw, row in enumerate(counts):
        images = [(place, copy) for place, count in enumerate(row) for copy in range(count)]
        objects = [{**truth.images[place], "image_id": f"{place} {n}"} for place, n in images]
        keys = ("boxes", "scores", "classes")
        boxes = [
            {key: run.found[key][run.found["image"] == place] for key in keys}
            | {"image_id": f"{place} {copy}"}
            for place, copy in images
        ]
        expected = summarize("", evaluate_voc(boxes, objects, truth.classes))["summary"]
        assert {key: value[draw] for key, value in found.items()} == pytest.approx(expected)


def test_changes_are_of_paired_draws(make_voc_run, voc):
    """Rows of evaluate-detector: equal detections never differ, whatever images are drawn."""
    folders = [make_voc_run("vgg", 1), make_voc_run("r50", 2, 0.9)]
    rows = []
    for folder in folders:
        bbox = json.loads((folder / "results.json").read_text())["results"]
        rows.append({"config": (folder / "config.yaml").read_text(), "results": bbox})
    MetadataCatalog.get("test:test").set(dirname=str(voc))
    try:
        same, change = change_intervals([rows[0], *rows], [folders[0], *folders])[1:]
    finally:
        MetadataCatalog.pop("test:test")
    assert same == dict.fromkeys(METRICS, (0, 0))
    (truth, before), (_, after) = map(load, folders)
    counts = detections.draw_images(len(truth.images))
    first, second = (detections.resample(run, counts) for run in (before, after))
    for key in METRICS:
        assert change[key] == pytest.approx(np.percentile(second[key] - first[key], [2.5, 97.5]))
        assert change[key][0] < change[key][1]


def test_boxes_in_coco_format_give_the_same(make_voc_run, make_coco_run):
    """Curves, objects, errors and intervals of one set of boxes, written in either format."""
    before = make_voc_run("r50", 1)
    truth, run = load(before)
    counts = detections.draw_images(len(truth.images), 20)
    expected = detections.resample(run, counts)
    shutil.rmtree(before)
    _, found = load(make_coco_run("r50", 1))
    for key in ("errors", "classes"):
        mine = [{k: v for k, v in row.items() if "AP" not in k} for row in run.run.details[key]]
        for row in mine:
            row.pop("detections", None)
        assert found.run.details[key] == mine
    assert found.run.objects == run.run.objects and truth.classes == list(found.run.objects)
    for key, values in detections.resample(found, counts).items():
        assert values == pytest.approx(expected[key])


def test_other_annotations_are_refused(make_voc_run, voc):
    folder = make_voc_run("r50", 1)
    for xml in sorted((voc / "Annotations").iterdir())[:4]:
        xml.write_text(xml.read_text().replace("<object>", "<object><difficult>1</difficult>"))
    with pytest.raises(ValueError, match="gives AP50 .* give the --voc-root"):
        load(folder)


def test_another_json_is_refused(make_coco_run, voc):
    folder, file = make_coco_run("r50", 1), voc.parent / "val.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][::2]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gives AP50 .* give the --coco-json"):
        load(folder)
    file.unlink()
    with pytest.raises(boxes.NoDetections, match="there is no .*val.json; .* --coco-json"):
        load(folder)


def test_what_is_missing_is_named(make_voc_run, voc, tmp_path, monkeypatch):
    folder = make_voc_run("r50", 1)
    run = load_detector_run(folder)
    truth = boxes.load_truth(run)
    with pytest.raises(boxes.NoDetections, match="no /nowhere; .* with --voc-root"):
        boxes.load_truth(run, {"voc_root": "/nowhere"})
    assert len(boxes.load_truth(run, {"voc_root": str(voc)}).images) == len(truth.images) == 12
    (folder / "inference/test:test/detections.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"detections\.json is damaged"):
        boxes.load_detections(run, truth)
    (folder / "inference/test:test/detections.json").unlink()
    with pytest.raises(boxes.NoDetections, match=r"r50_s1 has no detections\.json"):
        boxes.load_detections(run, truth)
    run.results["command"] = "python tools/train_net.py"
    with pytest.raises(boxes.NoDetections, match="has no path; .* with --voc-root"):
        boxes.load_truth(run)
    run.results["test"] = ["voc_2007_test"]  # Detectron2's own name
    monkeypatch.setenv("DETECTRON2_DATASETS", str(voc.parent))
    assert len(boxes.load_truth(run).images) == 12
