"""Tables of detection results and their provenance."""

import json

import pytest

from resnet_backbone.report import detection_table as tables
from resnet_backbone.report import improvements
from resnet_backbone.report.detector_runs import load_detector_runs
from resnet_backbone.report.gain import find_gains, group_runs
from resnet_backbone.report.published import DETECTORS, IMPROVEMENTS, TASKS, VOC_CLASSES
from resnet_backbone.report.table import show_commands

# Typed from the paper's Tables 7, 8, 9 and 12, not read from the package.
PAPER = {("voc", 16): 73.2, ("voc", 101): 76.4, ("coco", 16): 21.2, ("coco", 101): 27.2}
PAPER["det", 101] = 60.5
TABLE_9 = [((48.4, 27.2), None), ((49.9, 29.9), None), ((51.1, 30.0), (53.3, 32.2))]
TABLE_9 += [((53.8, 32.5), (55.7, 34.9)), (None, (59.0, 37.4))]
TF = {("voc", 16): 75.7, ("voc", 101): 79.8, ("coco", 16): 30.2, ("coco", 152): 36.1}


def test_published_numbers():
    single = [p for p in DETECTORS if p.over is None]
    assert {(p.task, p.network[1]): p.paper.value for p in single if p.paper} == PAPER
    found = {(p.task, p.network[1]): p.public for p in single if p.public}
    assert {k: n.value for k, n in found.items() if "tf-faster-rcnn" in n.source} == TF
    assert [(row.val, row.test_dev) for row in IMPROVEMENTS] == TABLE_9
    assert all(n.data and n.source for p in DETECTORS for n in (p.paper, p.public) if n)
    gains = {p.task: (p.paper.value, p.public.value) for p in DETECTORS if p.over}
    assert gains == {"voc": (3.2, 4.1), "coco": (6.0, 5.2)}


@pytest.fixture
def voc_groups(make_detector):
    """Groups of a ResNet-50 with AP50 30, 32, 34 and a VGG-16 with 20, 23 of VOC's classes."""
    made = [("r", s, v) for s, v in enumerate((30.0, 32.0, 34.0))]
    made += [("v", s, v) for s, v in enumerate((20.0, 23.0))]
    folders, options = [], dict(log={"test:test": 800, "train:train": 2400})
    versions = {"torch": "2.1.0", "detectron2": "0.6"}
    options["results"] = {"hardware": {"cpu": "a CPU"}, "versions": versions}
    for name, seed, value in made:
        classes = dict.fromkeys(VOC_CLASSES, value)
        folders.append(make_detector(f"{name}{seed}", seed, classes, name == "v", **options))
        (folders[-1] / "events.out.tfevents.1735819200.host.1.0").write_text("")
    return group_runs(load_detector_runs(folders))


def test_results(cells, voc_groups):
    header, _, vgg, resnet, gain = cells(tables.results_section(voc_groups, find_gains(voc_groups)))
    assert header[4:] == ["AP50", "AP50, 11-point", "AP", "AP75"]
    assert vgg[:4] == ["VGG-16-FPN (reduced)", "vgg.pth", "0, 1", "600"]
    assert vgg[4] == "21.50 ± 2.12" and resnet[4:6] == ["32.00 ± 2.00", "33.00 ± 2.00"]
    assert gain[0] == "**R-50-FPN minus VGG-16-FPN**"
    assert gain[4] == "**+10.50 ± 1.89 (+7.00 to +14.00)**"  # sqrt(4 / 3 + 4.5 / 2) = 1.893


def test_a_single_seed_has_no_spread(cells, make_detector):
    folders = [make_detector("r", 1, {"cat": 30.0}), make_detector("v", 1, {"cat": 35.0}, vgg=True)]
    groups = group_runs(load_detector_runs(folders))
    _, _, vgg, resnet, gain = cells(tables.results_section(groups, find_gains(groups)))
    assert (vgg[0], vgg[4], resnet[4], gain[4]) == ("VGG-16-FPN", "35.00", "30.00", "**−5.00**")


@pytest.fixture
def on_voc_2007(make_detector):
    """Function: depth and AP50 of ResNets -> their groups and a VGG-16's, on VOC 2007 test."""

    def make(depths, images=4952):
        log = {"test:test": images, "train:train": 5011}
        vgg = dict.fromkeys(VOC_CLASSES, 70.0)
        folders = [make_detector("v", 1, vgg, vgg=True, log=log)]
        for depth, value in depths.items():
            config, found = {"MODEL.RESNETS.DEPTH": depth}, dict.fromkeys(VOC_CLASSES, value)
            folders.append(make_detector(f"r{depth}", 1, found, config=config, log=log))
        groups = group_runs(load_detector_runs(folders))
        return groups, find_gains(groups)

    return make


def test_beside_published_numbers(cells, on_voc_2007):
    text = tables.published_section(*on_voc_2007({101: 74.5, 18: 60.0}))
    assert "COCO" not in text
    rows = {row[0]: row for row in cells(text)}
    ours = "`train` (5,011 images) → `test` (4,952 images), 320 px"
    assert rows["VGG-16"][1] == "73.2" and rows["VGG-16"][3] == "75.7"
    assert rows["VGG-16"][5:] == ["70.00 (VGG-16-FPN)", ours]
    assert rows["ResNet-50"][1:3] == ["none", "-"] and rows["ResNet-50"][5] == "not measured"
    assert rows["ResNet-101"][5] == "74.50 (R-101-FPN)"
    assert rows["ResNet-18"][1:5] == ["none", "-"] * 2 and rows["ResNet-18"][5][:5] == "60.00"
    gain = rows["gain, ResNet-101 over VGG-16"]
    assert (gain[1], gain[3]) == ("+3.2", "+4.1") and gain[5].startswith("+4.50 (R-101-FPN minus")


def test_self_supervised_weights_stand_beside_their_own_numbers(cells, make_detector):
    folders = []
    for file, value in {"R-50.pkl": 81.0, "moco_v2_800ep_pretrain.pth.tar": 82.0}.items():
        options = dict(config={"MODEL.WEIGHTS": f"https://x/{file}"}, log={"test:test": 4952})
        folders.append(make_detector(file, 1, dict.fromkeys(VOC_CLASSES, value), **options))
    text = tables.published_section(group_runs(load_detector_runs(folders)), [])
    rows = {row[0]: row for row in cells(text)}
    moco = rows["ResNet-50 from moco_v2_800ep_pretrain.pth.tar"]
    assert (moco[3], moco[5][:5]) == ("82.5", "82.00") and "swav" not in text
    assert (rows["ResNet-50"][3], rows["ResNet-50"][5][:5]) == ("81.3", "81.00")


def test_the_gain_of_another_network_has_a_row_of_its_own(cells, on_voc_2007):
    rows = {row[0]: row for row in cells(tables.published_section(*on_voc_2007({50: 75.0})))}
    assert rows["gain, ResNet-101 over VGG-16"][5] == "not measured"
    assert rows["gain, ResNet-50 over VGG-16"][1:5] == ["none", "-"] * 2
    assert rows["gain, ResNet-50 over VGG-16"][5] == "+5.00 (R-50-FPN minus VGG-16-FPN)"


def test_other_images_stand_beside_nothing(on_voc_2007, make_detector):
    assert "73.2" not in tables.published_section(*on_voc_2007({50: 75.0}, images=800))
    own = {f"AP-{name}": 30.0 for name in VOC_CLASSES}  # COCO's format, with VOC's classes
    for name, numbers in (("r", {"AP50-cat": 30.0}), ("c", {"AP": 30.0, **own})):
        run = make_detector(name, 1, results={"results": {"bbox": numbers}})
        groups = group_runs(load_detector_runs([run]))
        assert tables.published_section(groups, []) == "" and tables.reductions(groups[0]) == []
    assert TASKS["voc"].has_test_set(["voc_2007_test"], None)
    assert not TASKS["voc"].has_test_set(["voc_2012_val"], None)
    assert TASKS["coco"].has_test_set(["coco_2017_val"], 5000)


def test_classes(cells, make_detector):
    details = {"classes": [{"class": c, "ground_truth": n} for c, n in (("cat", 3), ("dog", 4))]}
    folders = [
        make_detector("r1", 1, {"cat": 30.0, "dog": 10.0}, details=details),
        make_detector("r2", 2, {"cat": 34.0, "dog": 20.0}, details=details),
        make_detector("v1", 1, {"cat": 20.0, "dog": 40.0}, vgg=True, details=details),
    ]
    groups = group_runs(load_detector_runs(folders))
    header, _, cat, dog, mean = cells(tables.class_section(groups, find_gains(groups)))
    assert header[:2] == ["class", "objects"]
    assert cat == ["cat", "3", "20.00", "32.00 ± 2.83", "+12.00"]
    assert dog == ["dog", "4", "40.00", "15.00 ± 7.07", "−25.00"]
    assert mean == ["**mean**", "7", "30.00", "23.50 ± 4.95", "−6.50"]


def test_reduced_runs_say_how(voc_groups):
    assert tables.reductions(voc_groups[0]) == [
        "1,200 images seen in training, not 160,000",
        "trained on 2,400 images, not 5,011",
        "measured on 800 images, not 4,952",
        "short side 320 px, not 600",
    ]


def test_full_runs_are_not_reduced(make_detector):
    config = {"INPUT.MIN_SIZE_TEST": 600}
    results = {"iterations": 18_000, "images_per_batch": 16}
    classes = dict.fromkeys(VOC_CLASSES, 80.0)
    log = {"test:test": 4952, "train:train": 16551}
    folder = make_detector("r", 1, classes, config=config, results=results, log=log)
    (group,) = group_runs(load_detector_runs([folder]))
    assert tables.reductions(group) == []


def test_provenance(voc_groups):
    commands = show_commands(run.results["command"] for group in voc_groups for run in group.runs)
    text = tables.provenance_section(voc_groups, commands)
    assert "**R-50-FPN**: evaluated on 800 images." in text
    line = "- seed 2, AP50 34.00; a CPU; PyTorch 2.1.0, Detectron2 0.6; 2025-01-02  \n"
    assert line + "  `python tools/train_net.py --voc-root VOC SEED 2`" in text
    assert "/home" not in text


def test_an_evaluation_beside_its_training(make_detector):
    training = make_detector("run", 1, {"cat": 50.0}, results={"iterations": 70})
    (training / "metrics.json").write_text("")
    own = {"command": "train-net --eval-only", "revision": "1a2b", "date": "2026-02-03T04:05:06"}
    own |= {"iterations": None}
    (run,) = load_detector_runs([make_detector("run/eval", 1, {"cat": 60.0}, results=own)])
    trained = json.loads((training / "results.json").read_text())["command"]
    assert (run.home, run.iterations) == (training, 70)
    assert run.commands == [trained, own["command"]] and run.numbers["AP50"] == 60
    text = tables.run_facts(run, {command: command for command in run.commands}, "seed 1")
    known = "- seed 1; hardware not recorded; commit 1a2b; 2026-02-03"
    assert text == f"{known}  \n  `{trained}`  \n  `train-net --eval-only`"


def test_detectron2_is_named_by_its_date(voc_groups):
    run = voc_groups[0].first
    run.results["versions"] = {"sal-detectron2": "0.7.2"}
    assert tables.versions(run) == "Detectron2 main of 2024-04-17 (sal-detectron2 0.7.2)"


def test_improvements(cells, tmp_path):
    file = tmp_path / "results.json"
    numbers = {"baseline": (20.0, 9.0), "+refinement": (21.0, 9.5), "soft-NMS": (20.5, 9.1)}
    rows = [
        {"name": name, "results": {"bbox": {"AP50": ap50, "AP": ap}}}
        for name, (ap50, ap) in (numbers | {"+multi-scale": (24.0, None)}).items()
    ]
    for row in rows:
        row["config"] = "DATASETS: {TEST: [coco_2014_val]}"
    rows[0]["seconds_per_image"], rows[2]["seconds_per_image"] = 0.5, 1
    rows[1] |= {"hardware": {"gpu": "a GPU"}, "precision": "fp32"}
    rows[3]["date"] = "2025-01-02T10:00:00+00:00"
    command = "python /a/tools/x.py --run /b/r50"
    file.write_text(json.dumps({"command": command, "rows": rows}))
    header, _, *found = cells(improvements.improvements_section(improvements.load_rows(file)))
    assert header[1:4] == ["**ours**, AP50", "**ours**, AP", "s/image"]
    assert found[0] == ["baseline", "20.00", "9.00", "0.5", "48.4 / 27.2", "-"]
    assert found[1] == ["+ refinement", "21.00", "9.50", "not measured", "49.9 / 29.9", "-"]
    assert found[2][0] == "soft-NMS" and found[2][4:] == ["-", "-"]
    unmeasured = ["not measured"] * 3
    assert found[3] == ["+ global context", *unmeasured, "51.1 / 30.0", "53.3 / 32.2"]
    assert [row[0] for row in found[4:]] == ["+ multi-scale", "ensemble of 3"]
    assert improvements.rows_provenance(file, show_commands([command])) == (
        "Improvements in testing: a GPU; fp32; 2025-01-02  \n`python tools/x.py --run $ROOT/r50`"
    )
    rows[0]["config"] = "DATASETS: {TEST: [voc_2007_test]}"  # the paper's are of COCO
    file.write_text(json.dumps({"rows": rows}))
    header, _, *found = cells(improvements.improvements_section(improvements.load_rows(file)))
    assert header[-1] == "s/image" and len(found) == 4
    rows[0]["intervals"], rows[1]["intervals"] = {"AP50": [0, 0]}, {"AP50": [-0.25, 2.0]}
    file.write_text(json.dumps({"rows": rows}))
    text = improvements.improvements_section(improvements.load_rows(file))
    assert "| baseline | 20.00 | 9.00 |" in text and "Each row adds" in text
    assert "| + refinement | 21.00 (+1.00 [−0.25, +2.00]) | 9.50 |" in text
    rows[1]["name"] = "refinement"  # alone, so the paper's sums are no match
    for row in rows:
        row["name"], row["config"] = row["name"].strip("+"), "DATASETS: {TEST: [coco_2014_val]}"
    file.write_text(json.dumps({"rows": rows}))
    text = improvements.improvements_section(improvements.load_rows(file))
    assert "paper" not in text and "one improvement alone" in text


@pytest.mark.parametrize("content", [{}, {"rows": []}, {"rows": [{"name": "a"}]}, {"rows": [3]}])
def test_files_without_rows(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no rows"):
        improvements.load_rows(file)
