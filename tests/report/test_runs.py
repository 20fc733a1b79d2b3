"""Metrics, run folders of detectors, and their groups."""

import json

import numpy as np
import pytest

from resnet_backbone.report.detection_table import results_section
from resnet_backbone.report.detector_runs import load_detector_run, load_detector_runs
from resnet_backbone.report.gain import group_runs
from resnet_backbone.report.runs import load_metrics, smooth

AP = {"cat": 20.0, "dog": 40.0}
LOSSES = [{"iteration": i, "total_loss": 3 - 0.02 * i, "lr": 0.01} for i in range(3)]
DC5 = {"MODEL.BACKBONE.NAME": "build_paper_resnet_backbone", "MODEL.RESNETS.DEPTH": 101}
DC5["MODEL.ROI_HEADS.IN_FEATURES"] = ["res5"]


def groups(*folders):
    return group_runs(load_detector_runs(folders))


@pytest.mark.parametrize(
    "config, title, head",
    [
        ({}, "R-50-FPN", "FPN"),
        ({"MODEL.BACKBONE.NAME": "build_paper_resnet_backbone"}, "R-50-C4", "C4"),
        (DC5, "R-101-DC5", "DC5"),
        ({"MODEL.BACKBONE.NAME": "build_vgg_backbone"}, "VGG-16", "C4"),
        ({"MODEL.BACKBONE.NAME": "build_vgg_fpn_backbone"}, "VGG-16-FPN", "FPN"),
        ({"RESNET_BACKBONE.SHORTCUT": "none"}, "plain-50-FPN", "FPN"),
    ],
)
def test_titles(make_detector, config, title, head):
    run = load_detector_run(make_detector("a", 1, AP, config=config))
    assert (run.title, run.head) == (title, head)


def test_numbers(make_detector):
    rows = [dict({"class": "cat"}, ground_truth=3, difficult=1)]
    run = load_detector_run(make_detector("a", 7, AP, details={"classes": rows}))
    assert (run.seed, run.iterations, run.weights) == (7, 600, "weights.pth")
    assert run.classes == AP and run.class_metric == "AP50"  # without the 11-point mean
    assert run.objects == {"cat": 3}


@pytest.mark.parametrize("place", ["r/eval", "elsewhere/eval"])
def test_an_evaluation_has_the_facts_of_its_training(make_detector, place):
    """In the run's own folder or in another one, by the weights that it measured."""
    folder = make_detector("r", 7, AP, log={"train:train": 50}, results={"iterations": 900})
    (folder / "metrics.json").write_text('{"iteration": 0, "total_loss": 2.0}\n')
    weights = {"MODEL.WEIGHTS": str(folder / "model_final.pth")}
    found = {"cat": 30.0, "dog": 60.0}
    options = dict(config=weights, results={"iterations": None}, log={"test:test": 8})
    written = make_detector(place, 7, found, **options)
    (run,) = load_detector_runs([written.parent if place.startswith("else") else written])
    assert (run.weights, run.iterations, run.home) == ("weights.pth", 900, folder)
    assert run.classes == found and list(run.metrics()["total_loss"][1]) == [2.0]
    assert run.images_of(run.train) == 50 and run.images_of(run.test) == 8
    (group,) = groups(folder)
    assert group.first.home == group.first.folder and group.first.classes == AP


def test_coco_has_ap_per_class(make_detector):
    bbox = {"AP": 3.0, "AP50": 5.0, "APs": 1.0, "AP-cat": 2.0, "AP-dog": 4.0}
    run = load_detector_run(make_detector("a", 1, AP, results={"results": {"bbox": bbox}}))
    assert (run.class_metric, run.classes) == ("AP", {"cat": 2.0, "dog": 4.0})


def test_seeds_of_one_recipe_are_one_group(make_detector):
    moved = {"OUTPUT_DIR": "x", "MODEL.WEIGHTS": "/elsewhere/weights.pth", "MODEL.DEVICE": "cuda"}
    second = make_detector("b", 2, {"cat": 30.0, "dog": 50.0}, config=moved)
    (group,) = groups(second, make_detector("a", 1, AP))
    assert [run.seed for run in group.runs] == [1, 2] and group.label == "R-50-FPN"
    assert group.values("AP50") == [30.0, 40.0]
    assert group.class_values("dog") == [40.0, 50.0]


def test_recipes_are_told_apart(make_detector):
    slow = make_detector("b", 1, AP, config={"SOLVER.BASE_LR": 0.001})
    long = make_detector("c", 1, AP, results={"iterations": 900})
    found = groups(make_detector("a", 1, AP), slow, long)
    assert [group.label for group in found] == ["R-50-FPN a", "R-50-FPN b", "R-50-FPN c"]
    assert found[1].particulars == ("SOLVER.BASE_LR 0.001", "600 iterations")
    assert found[2].particulars == ("SOLVER.BASE_LR 0.005", "900 iterations")


def test_an_early_end_does_not_separate_seeds(make_detector):
    config = {"SOLVER.MAX_ITER": 600}
    early = make_detector("b", 2, AP, config=config, results={"iterations": 400})
    (group,) = groups(make_detector("a", 1, AP, config=config), early)
    assert [run.seed for run in group.runs] == [1, 2]
    assert "| 400 to 600 |" in results_section([group], [])


def test_vgg_comes_first(make_detector):
    deep = make_detector("a", 1, AP, config={"MODEL.RESNETS.DEPTH": 101})
    found = groups(deep, make_detector("b", 1, AP), make_detector("c", 1, AP, vgg=True))
    assert [group.label for group in found] == ["VGG-16-FPN", "R-50-FPN", "R-101-FPN"]


def test_a_folder_of_seeds(make_detector, tmp_path):
    for seed in (10, 2, 1):
        make_detector(f"runs/seed_{seed}", seed, AP)
    (tmp_path / "runs" / "seeds.json").write_text("{}")
    runs = load_detector_runs([tmp_path / "runs"])
    assert [run.seed for run in runs] == [1, 2, 10]
    (tmp_path / "runs" / "seed_2" / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"seed_2 has no results\.json.*--resume"):
        load_detector_runs([tmp_path / "runs"])


def test_sizes_are_the_logs_last(make_detector):
    folder = make_detector("a", 1, AP)
    run = load_detector_run(folder)
    assert run.images_of(["test:test"]) is None
    text = "data set test:test: 5 images, 9 boxes\ndata set test:test: 800 images, 2411 boxes\n"
    (folder / "log.txt").write_text(text + "data set test:test2: 7 images, 7 boxes\n")
    run = load_detector_run(folder)
    assert run.images_of(["test:test"]) == 800 and run.images_of([]) is None
    assert run.images_of(["test:test", "test:test2"]) == 807


def test_refusals(make_detector, tmp_path):
    first, again = make_detector("a", 1, AP), make_detector("b", 1, AP)
    with pytest.raises(ValueError, match="a and .*b have the same recipe and seed 1"):
        groups(first, again)
    other = make_detector("c", 2, AP, config={"DATASETS.TEST": ["test:val"]})
    with pytest.raises(ValueError, match="different test sets.*test:test.*test:val"):
        groups(first, other)
    with pytest.raises(ValueError, match=r"different test sets \(classes\)"):
        groups(first, make_detector("d", 2, {"cat": 1.0, "cow": 2.0}))
    rows = [[{"class": "cat", "ground_truth": n, "difficult": 0}] for n in (3, 4)]
    few, more = (make_detector(f"e{n}", n, AP, details={"classes": r}) for n, r in enumerate(rows))
    with pytest.raises(ValueError, match=r"different test sets \(objects\)"):
        groups(few, more)


def test_broken_folders(make_detector):
    folder = make_detector("a", 1, AP, results={"results": {}})
    with pytest.raises(ValueError, match="has no results of bbox"):
        load_detector_run(folder)
    (folder / "results.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"results\.json .*not hold a mapping"):
        load_detector_run(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        load_detector_run(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        load_detector_run(folder)


def test_load(metrics_file):
    path = metrics_file(*LOSSES, {"iteration": 2, "bbox/AP50": 41.5, "note": "text"})
    metrics = load_metrics(path)
    assert set(metrics) == {"iteration", "total_loss", "lr", "bbox/AP50"}
    assert [a.tolist() for a in metrics["total_loss"]] == [[0, 1, 2], [3, 2.98, 2.96]]
    assert [a.tolist() for a in metrics["bbox/AP50"]] == [[2], [41.5]]


def test_resumed_run_keeps_the_last_value(metrics_file):
    again = [{"iteration": i, "total_loss": 9.0} for i in (1, 2, 3)]
    metrics = load_metrics(metrics_file(*LOSSES, *again))
    assert [a.tolist() for a in metrics["total_loss"]] == [[0, 1, 2, 3], [3, 9, 9, 9]]


@pytest.mark.parametrize("tail", ['{"iteration": 3, "total_l', "17\n", '{"total_loss": 1}\n', "\n"])
def test_incomplete_lines_are_skipped(metrics_file, tail, caplog):
    metrics = load_metrics(metrics_file(*LOSSES, tail=tail))
    assert metrics["total_loss"][0].tolist() == [0, 1, 2]
    assert ("line 4 is incomplete" in caplog.text) == bool(tail.strip())


def test_smooth():
    values = np.array([0.0, 3.0, 6.0, np.nan, 12.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3, 4.5, 9, 12])
    np.testing.assert_array_equal(smooth(values, 1), values)
    np.testing.assert_allclose(smooth(values, 4), [3, 3, 7, 9, 12])
