"""tools/reproduce.py: plans, the hashes of steps, and what happens when they are interrupted."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_backbone.cli.reproduction import PlanError, Runner, build_steps, read_plan
from resnet_backbone.cli.reproduction.runner import is_done
from resnet_backbone.cli.reproduction.steps import STAGES, Options

ROOT = Path(__file__).resolve().parents[2]
PLANS = sorted((ROOT / "configs" / "reproduction").glob("*.yaml"))


START = "title: x\ndata: built-in\nnetworks: {A: {detect: {config: [a.yaml]}}}\n"


@pytest.fixture
def tool():
    module = importlib.import_module("resnet_backbone.cli.reproduce")
    return module


@pytest.fixture
def options(tmp_path) -> Options:
    (tmp_path / "imagenet").mkdir()
    return Options(ROOT, tmp_path / "output", imagenet=tmp_path / "imagenet")


def mini(options: Options, **changes):
    plan = read_plan(ROOT / "configs" / "reproduction" / "mini.yaml")
    return {step.name: step for step in build_steps(plan, replace(options, **changes))}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name].key != after[name].key}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_makes_steps_whose_configs_are_there(path, options):
    steps = build_steps(read_plan(path), options)
    assert [s.stage for s in steps] == sorted((s.stage for s in steps), key=STAGES.index)
    for step in steps:
        assert (ROOT / "tools" / step.command[0]).is_file()
        for word in step.command:
            assert not word.startswith("configs/") or (ROOT / word).is_file()
    places = {step.folder for step in steps}
    assert len(places) == len(steps)


def test_detectors_differ_in_network_and_seed_alone(options):
    steps = mini(options)
    vgg, resnet = (steps[f"detect_{name}_seed1"].command for name in ("VGG-16", "ResNet-18"))
    assert [w for w in vgg if w not in resnet and "VGG" not in w] == []
    extra = [w for w in resnet if w not in vgg and "R_18" not in w and "ResNet-18" not in w]
    assert extra == ["MODEL.RESNETS.NORM", "FrozenBN"]  # what VGG's config says itself


def test_weights_flow_from_stage_to_stage(options):
    steps = mini(options)
    bn, convert = steps["bn_ResNet-18"], steps["convert_ResNet-18"]
    assert str(steps["pretrain_ResNet-18"].folder) in bn.command
    assert str(bn.path) in convert.command
    assert str(convert.path) in steps["detect_ResNet-18_seed1"].command
    assert "train.recompute_bn=False" in steps["pretrain_ResNet-18"].command


def test_the_plans_note_stands_on_its_page(options, tmp_path):
    plan = read_plan(ROOT / "configs" / "reproduction" / "mini.yaml")
    with_note, without = (build_steps(replace(plan, note=n), options)[-1] for n in ("As {x}.", ""))
    place = with_note.command.index("--note")
    assert with_note.words()[place + 1] == "As {x}."
    assert with_note.command[:place] + with_note.command[place + 2 :] == without.command
    assert "short" in plan.note


def test_a_key_changes_with_what_a_step_depends_on_and_not_with_places(options, tmp_path):
    before = mini(options)
    assert not changed(before, mini(options, output=tmp_path / "elsewhere"))
    detectors = {name for name in before if name.startswith(("detect", "improve", "report"))}
    assert changed(before, mini(options, detection=["SOLVER.MAX_ITER", "7"])) == detectors
    pretrained = set(before) - {"data"}
    assert changed(before, mini(options, classification=["schedule.scale=0.5"])) == pretrained


def test_a_key_changes_with_a_config_and_with_those_it_builds_on(options, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    before = mini(options, root=tmp_path)
    assert not changed(mini(options), before)
    (tmp_path / "configs").unlink()
    subprocess.run(["cp", "-r", ROOT / "configs", tmp_path / "configs"], check=True)
    base = tmp_path / "configs" / "detection" / "Base-RCNN-FPN.yaml"
    base.write_text(base.read_text() + "# another\n")
    found = changed(before, mini(options, root=tmp_path))
    assert found == {name for name in before if name.startswith(("detect", "improve", "report"))}


def test_given_weights_take_the_place_of_the_classifier(options, tmp_path):
    weights = tmp_path / "vgg.pth"
    weights.write_bytes(b"one")
    given = {"weights": {"VGG-16": weights}, "preprocessing": {"VGG-16": "caffe_vgg"}}
    steps = mini(options, **given)
    assert not {"pretrain_VGG-16", "bn_VGG-16", "convert_VGG-16"} & steps.keys()
    detect = steps["detect_VGG-16_seed1"]
    assert str(weights) in detect.command
    assert detect.command[-4:] == (
        "RESNET_BACKBONE.WEIGHTS_PREPROCESSING",
        "caffe_vgg",
        "SEED",
        "1",
    )
    weights.write_bytes(b"two")
    assert changed(steps, mini(options, **given)) == {
        "detect_VGG-16_seed1",
        "improve_VGG-16",
        "report",
    }


def test_places_of_weights_and_data_do_not_enter_the_key(options, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vgg.pth").write_bytes(b"the same")
    one, two = (
        mini(options, weights={"VGG-16": tmp_path / name / "vgg.pth"}) for name in ("one", "two")
    )
    assert not changed(one, two)
    paper = read_plan(ROOT / "configs" / "reproduction" / "paper.yaml")
    before = {step.name: step for step in build_steps(paper, options)}
    options.imagenet.rename(tmp_path / "moved")
    moved = replace(options, imagenet=tmp_path / "moved")
    assert not changed(before, {step.name: step for step in build_steps(paper, moved)})


def test_official_data_do_not_matter_to_a_plan_on_built_in_data(options, tmp_path):
    before = mini(options)
    assert not changed(before, mini(options, datasets=tmp_path / "absent"))


def test_of_the_official_data_those_of_the_plan_count(options, tmp_path):
    plan = read_plan(ROOT / "configs" / "reproduction" / "paper.yaml")
    (tmp_path / "VOC2007" / "ImageSets").mkdir(parents=True)
    (tmp_path / "VOC2012").mkdir()

    def keys():
        steps = build_steps(plan, replace(options, datasets=tmp_path))
        return {step.name: step.key for step in steps}

    before = keys()
    (tmp_path / "coco").mkdir()
    assert keys() == before
    (tmp_path / "VOC2007" / "ImageSets" / "Main").mkdir()
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith(("detect", "improve", "report"))
    }


def test_words_of_a_plan_may_be_numbers_and_single(options, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "title: x\ndata: built-in\nseeds: 3\nnetworks:\n  A:\n    detect:\n"
        "      config: configs/detection/quickstart/faster_rcnn_R_18_FPN.yaml\n"
        "      overrides: [SOLVER.MAX_ITER, 2]\n"
    )
    weights = tmp_path / "weights"
    weights.touch()
    steps = build_steps(read_plan(path), replace(options, weights={"A": weights}))
    (step,) = (step for step in steps if step.stage == "detect")
    assert step.folder.name == f"detect_A_seed3-{step.key}"
    assert step.command[step.command.index("SOLVER.MAX_ITER") + 1] == "2"


def test_only_what_is_left_to_do_needs_a_gpu(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(Runner, "run", lambda self, steps, stages: 0)
    (tmp_path / "imagenet").mkdir()
    words = ["--scale", "paper", "--imagenet", str(tmp_path / "imagenet"), "--output"]
    assert tool.main([*words, str(tmp_path / "out"), "--stage", "report"]) == 0
    assert tool.main([*words, str(tmp_path / "out"), "--stage", "detect"]) == 1
    assert "meant for GPUs" in capsys.readouterr().err


def test_what_cannot_be_meant_is_refused(options, tmp_path):
    with pytest.raises(PlanError, match="no VGG_16; its networks: VGG-16, ResNet-18"):
        mini(options, weights={"VGG_16": tmp_path})
    paper = read_plan(ROOT / "configs" / "reproduction" / "paper.yaml")
    with pytest.raises(PlanError, match="give --weights VGG-16=FILE"):
        build_steps(paper, replace(options, imagenet=None))
    with pytest.raises(PlanError, match="no such folder"):
        build_steps(paper, replace(options, imagenet=tmp_path / "absent"))
    with pytest.raises(PlanError, match="absent.pth"):
        mini(options, weights={"VGG-16": tmp_path / "absent.pth"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\ndata: official\n", "the key networks is missing"),
        ("title: x\ndata: official\nnetworks: {A: {detec: 1}}\n", "A: unknown key detec"),
        ("title: x\ndata: mine\nnetworks: {}\n", "data is built-in or official"),
        ("title: x\ndata: built-in\nnetworks: [A]\n", "networks: give at least one"),
        (f"{START}seeds: [1, 1]\n", "give integers, each once"),
        (f"{START}improvements: [contxt]\n", "no improvement 'contxt'; known are baseline"),
        ("[1]", "expected keys"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_plans_are_refused_in_one_line(tmp_path, text, message, tool, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    assert tool.main(["--scale", str(path), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_plan_is_printed_with_hours_and_nothing_is_run(tool, tmp_path, capsys):
    (tmp_path / "imagenet").mkdir()
    words = ["--scale", "paper", "--imagenet", str(tmp_path / "imagenet"), "--num-gpus", "8"]
    assert tool.main([*words, "--output", str(tmp_path / "out"), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "expected: about 84 hours of one H100" in shown  # 38 + 15.3 + 31
    assert "--num-gpus 8" in shown
    assert "--num-gpus 2" in shown  # detectors: 2 images a step
    assert not (tmp_path / "out").exists()


def test_a_plan_is_shown_before_its_data_are_there(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    words = ["--scale", "paper", "--imagenet", str(tmp_path / "imagenet"), "--output"]
    assert tool.main([*words, str(tmp_path / "out"), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "expected: about 84 hours" in shown
    absent = shown.partition("not there yet: ")[2]
    assert all(
        name in absent for name in ("/imagenet, ", "/datasets/VOC2007, ", "/datasets/VOC2012")
    )
    assert tool.main([*words, str(tmp_path / "out")]) == 1
    assert "imagenet: no such folder of data" in capsys.readouterr().err


# -- running: with tools of a few lines ------------------------------------------------------------

STUB = """
import os, signal, sys, time
from pathlib import Path
words, name = sys.argv[1:], Path(__file__).stem
with open({log!r}, "a") as file:
    print(name, file=file)
if name == os.environ.get("FAIL"):
    sys.exit(3)
if name == os.environ.get("SLOW"):
    status = os.environ.get("STATUS", "75")  # "": dies of the signal
    if status:
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    Path({log!r} + ".slow").touch()
    end = time.monotonic() + 60
    while not (status and asked) and time.monotonic() < end:
        time.sleep(0.02)
    if status != "0":
        sys.exit(75)
flag = next((flag for flag in ("--output-dir", "--output") if flag in words), "convert")
place = Path(words[words.index(flag) + (2 if flag == "convert" else 1)])
files = dict(make_quickstart_data="dataset.json", train_classifier="final.safetensors",
    train_net="results.json", evaluate_detector="results.json")
path = place / files[name] if name in files else place
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text("done")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the real configs and tools that note that they ran."""
    root, log = tmp_path / "project", tmp_path / "log"
    (root / "tools").mkdir(parents=True)
    (root / "configs").symlink_to(ROOT / "configs")
    text = STUB.format(log=str(log))
    for step in mini(Options(root, tmp_path / "out")).values():
        (root / "tools" / step.command[0]).write_text(text)
    log.touch()
    return Options(root, tmp_path / "out"), log


def ran(log: Path) -> list[str]:
    return log.read_text().split()


def run(options: Options, stages=STAGES) -> int:
    return Runner(options.root, options.output).run(list(mini(options).values()), stages)


ALL = ["make_quickstart_data", *["train_classifier"] * 2, *["recompute_bn"] * 2,
       *["convert_weights"] * 2, *["train_net"] * 2,
       *["evaluate_detector"] * 2, "report"]  # fmt: skip


def test_each_step_runs_once(project):
    options, log = project
    assert run(options) == 0
    assert ran(log) == ALL
    assert run(options) == 0
    assert ran(log) == ALL
    assert run(replace(options, detection=("SEED2", "1"))) == 0
    assert ran(log)[len(ALL) :] == ALL[-5:]
    step = mini(options)["bn_VGG-16"]
    content = json.loads((step.folder / "step.json").read_text())
    assert content["key"] == step.key
    assert content["command"].startswith("python tools/recompute_bn.py --run ")


def test_stages_run_alone_and_say_what_they_need(project):
    options, log = project
    assert run(options, ("data", "pretrain")) == 0
    assert ran(log) == ALL[:3]
    with pytest.raises(PlanError, match="convert_VGG-16 needs bn_VGG-16: add --stage bn"):
        run(options, ("convert",))
    assert ran(log) == ALL[:3]


def test_a_failed_step_ends_the_run_and_is_done_again(project, monkeypatch):
    options, log = project
    monkeypatch.setenv("FAIL", "recompute_bn")
    assert run(options) == 3
    assert ran(log) == ALL[:4]
    monkeypatch.delenv("FAIL")
    assert run(options) == 0
    assert ran(log) == [*ALL[:4], *ALL[3:]]


def test_a_tool_that_leaves_nothing_is_an_error(project):
    options, log = project
    (options.root / "tools" / "recompute_bn.py").write_text("")
    with pytest.raises(PlanError, match="bn_VGG-16 left no .*true_bn.safetensors"):
        run(options)
    assert not is_done(mini(options)["bn_VGG-16"])


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_reproduce as t
sys.exit(t.run(t.Options(Path({root!r}), Path({output!r}))))
"""


@pytest.mark.parametrize(("status", "redone"), [("75", True), ("", True), ("0", False)])
def test_sigterm_reaches_the_tool_and_two_runs_do_not_mix(project, status, redone):
    """Also where the tool dies of it, and where it ends before it takes notice."""
    options, log = project
    code = CHILD.format(
        tests=str(ROOT / "tests"), root=str(options.root), output=str(options.output)
    )
    environment = {**os.environ, "SLOW": "train_net", "STATUS": status}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not Path(f"{log}.slow").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(BlockingIOError, match="another process works in"):
            run(options)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
    assert run(options) == 0
    assert ran(log) == [*ALL[:8], *ALL[7 if redone else 8 :]]
