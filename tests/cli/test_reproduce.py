"""reproduce: plans, the hashes of steps, and what happens when they are interrupted."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from resnet_backbone.cli import COMMANDS, reproduce
from resnet_backbone.cli.reproduce import main, read_plan
from resnet_backbone.runtime import files
from resnet_backbone.runtime.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PLANS = sorted(reproduce.PLANS.glob("[!B]*.yaml"))
START = "title: x\nsteps:\n  report: {command: report, makes: a"


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if before[name].key != after[name].key}


def with_prefix(steps: dict, *prefixes: str) -> set[str]:
    return {name for name in steps if name.startswith(prefixes)}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_makes_steps(path, steps_of, tmp_path):
    (tmp_path / "w").touch()
    networks = read_plan(path)["networks"]
    given = [f"{name}={tmp_path / 'w'}" for name, step in networks.items() if not step]
    steps = steps_of(path, *(word for pair in given for word in ("--weights", pair)))
    assert len({step.folder for step in steps.values()}) == len(steps)
    done = set()
    for step in steps.values():
        assert step.words[0] in COMMANDS and "{" not in (text := " ".join(step.words))
        assert {s.name for s in step.inputs} == {n for n in done if str(steps[n].folder) in text}
        done.add(step.name)
    assert list(steps)[-1] == "report" or list(steps.values())[-1].node["goal"]


@pytest.mark.parametrize(
    "plan, published",
    [
        ("paper", "73.2 76.4"),
        ("paper_voc12", "70.4 73.8"),
        ("paper_coco", "41.5 21.2 48.4 27.2 49.9 29.9 51.1 30.0 53.8 32.5"),
        ("paper_coco_voc", "55.7 34.9 59.0 37.4 85.6 83.8"),
        ("imagenet_det", "60.5 63.6 58.8 62.1"),
    ],
)
def test_plans_show_the_papers_numbers(plan, published, tmp_path, run_command):
    """Of Tables 7 to 12: each where its system is trained or tested."""
    status, shown, _ = run_command(main, "--scale", plan, "--imagenet", tmp_path, "--plan")
    numbers = re.findall(r"\d\d\.\d", "".join(re.findall(r"published: (.*)", shown)))
    assert status == 0 and numbers == published.split()


def test_a_plan_builds_on_another_and_has_goals(tmp_path, steps_of):
    (tmp_path / "base.yaml").write_text(
        "title: base\nwords: {w: --a 1, v: --b}\nsteps:\n"
        "  A: {command: 'report {w}', makes: a}\n  B: {command: 'report {A} {v}', makes: b}\n"
    )
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "_BASE_: base.yaml\ntitle: plan\nwords: {v: --c}\nsteps:\n"
        "  C: {command: 'report {B}', makes: c, goal: true}\n  D: {command: report, makes: d}\n"
        "  E: {command: 'report {A}', makes: e, goal: true}\n"
    )
    steps = steps_of(plan)
    assert list(steps) == ["A", "B", "C", "E"]
    assert steps["A"].words == ("report", "--a", "1") and steps["B"].words[-1] == "--c"


def test_detectors_differ_in_network_and_seed_alone(steps_of):
    steps = steps_of("mini", "--seeds", 1, 2)
    vgg, resnet = (steps[f"detect_{name}_seed2"].words for name in ("VGG-16", "ResNet-18"))
    assert [w for w in vgg if w not in resnet and "VGG" not in w] == []
    extra = [w for w in resnet if w not in vgg and "R_18" not in w and "ResNet-18" not in w]
    assert extra == ["MODEL.RESNETS.NORM", "FrozenBN"]  # what VGG's config says itself
    runs = [str(steps[f"detect_VGG-16_seed{seed}"].folder) for seed in (1, 2)]
    words = steps["report"].words
    assert list(words[words.index("--run") + 1 :][:2]) == runs
    assert steps["improve_VGG-16"].words[2] == runs[0]


def test_weights_flow_from_stage_to_stage(steps_of):
    steps = steps_of()
    bn, convert = steps["bn_ResNet-18"], steps["convert_ResNet-18"]
    assert str(steps["pretrain_ResNet-18"].folder) in bn.words
    assert str(bn.product) in convert.words
    assert str(convert.product) in steps["detect_ResNet-18_seed1"].words
    assert "train.recompute_bn=False" in steps["pretrain_ResNet-18"].words


def test_the_plans_note_stands_on_its_page(steps_of, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(START.replace("report,", "'report --note {note}',") + "}\nnote: As {x}.\n")
    assert steps_of(plan)["report"].words[1:] == ("--note", "As {x}.")
    assert any("short" in word for word in steps_of()["report"].words)


def test_a_key_changes_with_what_a_step_depends_on_and_not_with_places(steps_of, tmp_path):
    before = steps_of()
    assert not changed(before, steps_of(output=tmp_path / "elsewhere"))
    detectors = with_prefix(before, "detect", "improve", "report")
    assert changed(before, steps_of("mini", "--set", "SOLVER.MAX_ITER", 7)) == detectors
    pretrained = set(before) - {"data"}
    assert changed(before, steps_of("mini", "--set", "schedule.scale=0.5")) == pretrained
    words = steps_of("mini", "--set", "schedule.scale=0.5", "VERSION", "2")
    assert words["pretrain_VGG-16"].words[-1] == "schedule.scale=0.5"
    assert words["detect_VGG-16_seed1"].words[-2:] == ("VERSION", "2")


def test_a_key_changes_with_a_config_and_with_those_it_builds_on(steps_of, tmp_path, monkeypatch):
    before = steps_of()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "resnet_backbone")
    assert not changed(steps_of(), before)
    base = tmp_path / "configs" / "detection" / "Base-RCNN-FPN.yaml"
    base.write_text(base.read_text() + "# another\n")
    found = changed(before, steps_of())
    assert found == with_prefix(before, "detect", "improve", "report")


def test_given_weights_take_the_place_of_the_classifier(steps_of, tmp_path):
    files = [tmp_path / "one.pth", tmp_path / "moved.pth"]
    for file in files:
        file.write_bytes(b"one")
    stated = ["--preprocessing", "VGG-16=caffe_vgg", "--weights"]
    before, moved = (steps_of("mini", *stated, f"VGG-16={file}") for file in files)
    assert not with_prefix(before, "pretrain_VGG", "bn_VGG", "convert_VGG")
    detect = before["detect_VGG-16_seed1"]
    assert str(files[0]) in detect.words
    assert detect.words[-2:] == ("RESNET_BACKBONE.WEIGHTS_PREPROCESSING", "caffe_vgg")
    assert "caffe_vgg" not in before["detect_ResNet-18_seed1"].words
    assert not changed(before, moved)  # the place does not enter
    files[0].write_bytes(b"two")
    after = steps_of("mini", *stated, f"VGG-16={files[0]}")
    assert changed(before, after) == {"detect_VGG-16_seed1", "improve_VGG-16", "report"}


def test_voc07_is_the_experiment_of_its_configs(steps_of, tmp_path, run_command):
    files = {name: tmp_path / f"{name}.pth" for name in ("VGG-16", "ResNet-50")}
    words = []
    for (name, file), stated in zip(files.items(), ("caffe_vgg", "msra"), strict=True):
        file.write_text(name)
        words += ["--weights", f"{name}={file}", "--preprocessing", f"{name}={stated}"]
    steps = steps_of("voc07", *words)
    detectors = [f"detect_{name}_seed1" for name in files]
    tested = [f"test_{name}_seed1" for name in files]
    wanted = ["convert_VGG-16", *detectors, *tested, "improve_ResNet-50", "report"]
    assert list(steps) == wanted
    convert, vgg, resnet, *tests, rows, report = (
        " ".join(step.words[1:]) for step in steps.values()
    )
    product = steps["convert_VGG-16"].product
    settings = "--unit-responses --size 320 --overwrite --preprocessing caffe_vgg"
    assert convert == f"convert {files['VGG-16']} {product} {settings}"
    data = f"--voc-root {tmp_path / 'datasets/VOC2007'} --train-set trainval --test-set test"
    curve = f"{data}_every10th"
    for found, config, weights in ((vgg, "VGG_16", product), (resnet, "R_50", files["ResNet-50"])):
        assert f"voc07/faster_rcnn_{config}_FPN" in found.split()
        assert curve in found and f"--weights {weights} " in f"{found} "
    for found, detector, test in zip(tests, detectors, tested, strict=True):
        assert f"--eval-only --weights {steps[detector].folder}/model_final.pth" in found
        assert found.endswith(data) and f"--run {steps[test].folder}" in report
    assert "WEIGHTS_PREPROCESSING" not in vgg  # the converted file carries its input
    assert resnet.endswith(" msra")
    assert data in rows and "--alone --rows baseline flip refinement multi-scale soft-nms" in rows
    other = steps_of("voc07", *words, "--voc-root", tmp_path, "--seeds", "1", "2")
    assert str(tmp_path) in other["report"].words
    for seed in (1, 2):  # each is tested with its own weights
        folder = other[f"detect_VGG-16_seed{seed}"].folder
        assert f"{folder}/model_final.pth" in other[f"test_VGG-16_seed{seed}"].words
    status, shown, _ = run_command(main, "--scale", "voc07", "--plan", *words)
    assert "about 9.5 hours of one core: one core of an AMD EPYC with AVX512-bf16" in shown
    assert status == 0 and "about 16 hours" in shown


def test_data_of_the_plan_enter_the_key_and_their_places_do_not(steps_of, tmp_path, monkeypatch):
    before, mini = steps_of("paper"), steps_of()
    (tmp_path / "datasets" / "coco" / "more").mkdir()  # not of this plan
    assert not changed(before, steps_of("paper"))
    (tmp_path / "datasets" / "VOC2007" / "ImageSets" / "Main").mkdir()
    after = steps_of("paper")
    assert changed(before, after) == with_prefix(before, "detect", "improve", "report")
    moved = (tmp_path / "imagenet").rename(tmp_path / "moved")
    assert not changed(after, steps_of("paper", "--imagenet", moved))
    (moved / "train").mkdir()
    assert changed(after, steps_of("paper", "--imagenet", moved)) == set(before)
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert not changed(mini, steps_of())


def test_only_what_is_left_to_do_needs_a_gpu(steps_of, tmp_path, monkeypatch, run_command):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(reproduce, "run", lambda *args: 0)
    words = ["--scale", "paper", "--imagenet", tmp_path / "imagenet", "--output", tmp_path / "out"]
    for stage, expected, message in (
        ("report", 0, ""),
        ("detect", 2, "plan is for GPUs"),
        ("data", 2, "the stages of this plan are pretrain, bn, detect"),
    ):
        status, _, error = run_command(main, *words, "--stage", stage)
        assert status == expected and message in error


def test_what_cannot_be_meant_is_refused(steps_of, tmp_path):
    weights, absent = "--weights", tmp_path / "absent.pth"
    for words, changes, message in (
        (("mini", weights, f"VGG_16={tmp_path}"), {}, "no VGG_16; its networks: VGG-16, ResNet-18"),
        (("mini", weights, f"VGG-16={absent}"), {}, "missing: .*absent.pth .--plan"),
        (("paper",), {"imagenet": None}, "missing: --imagenet DIR"),
        (("paper",), {"imagenet": absent}, "missing: .*absent.pth .--plan"),
        (("voc07",), {}, "--weights ResNet-50=FILE, --weights VGG-16=FILE"),
        (("voc07", "--plan", "--set", "schedule.scale=1"), {}, "scale=1: no step .* train-class"),
        (("mini", "--preprocessing", "VGG-16=msra"), {}, "give --weights VGG-16=FILE, too"),
        (("mini", "--set", "SOLVER.MAX_ITR", "8"), {}, "the nearest is SOLVER.MAX_ITER"),
        (("mini", "--set", "SOLVER.MAX_ITER"), {}, "SOLVER.MAX_ITER has no value"),
        (("mini", "--set", "SEED", "7"), {}, "SEED: the plan sets it, seeds from --seeds"),
        (("mini", "--set", "schedule.scal=1"), {}, "did you mean schedule.scale"),
    ):
        with pytest.raises(UsageError, match=message):
            steps_of(*words, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\n", "the key steps is missing"),
        ("title: x\nsteps: {A: {comand: 1}}\n", "A: the key comand is unknown"),
        ("title: x\nsteps: [A]\n", "steps: give at least one"),
        (f"{START}, batch: two}}\n", "batch 'two': expected a value, such as 0"),
        (f"{START}}}\nseeds: [1, 1]\n", "give integers, each once"),
        (f"{START}}}\nseeds: 3\n", "seeds 3: expected a list, such as [1]"),
        (f"{START}}}\n".replace("report,", "'report {B}',"), "{B} is neither a step nor"),
        (f"{START}}}\n".replace("report,", "'report {report}',"), "in a circle"),
        (f"{START}}}\n".replace("report,", "report.py,"), "has no command report.py"),
        ("[1]", "expected keys"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_plans_are_refused_in_one_line(tmp_path, text, message, refusal):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    assert message in refusal(main, "--scale", path, "--output", tmp_path / "out")


def test_a_plan_is_shown_before_its_data_are_there(tmp_path, monkeypatch, run_command):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    words = ["--scale", "paper", "--imagenet", tmp_path / "imagenet", "--output", tmp_path / "out"]
    status, shown, _ = run_command(main, *words, "--num-gpus", 8, "--plan")
    assert "expected: about 129 hours of one H100" in shown  # 38 + 15.3 + 31 + 45
    assert "--num-gpus 8" in shown and "--num-gpus 2" in shown  # detectors: 2 images a step
    assert status == 0 and not (tmp_path / "out").exists()
    absent = shown.partition("missing: ")[2]
    for name in ("/imagenet", "/datasets/VOC2007", "/datasets/VOC2012"):
        assert f"{tmp_path}{name}" in absent
    status, _, error = run_command(main, *words)
    assert status == 2 and f"missing: {tmp_path}/imagenet" in error
    monkeypatch.delenv("DETECTRON2_DATASETS")
    status, shown, _ = run_command(main, "--scale", "voc07", "--plan")
    assert status == 0 and "--weights FILE" in shown and "--voc-root DIR" in shown
    needed = "--voc-root DIR, --weights ResNet-50=FILE, --weights VGG-16=FILE"
    assert f"missing: {needed};" in shown


# -- running: with a command of a few lines --------------------------------------------------------

STUB = """
import os, signal, sys, time
from pathlib import Path
name, *words = sys.argv[1:]
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
if name == os.environ.get("NOTHING"):
    sys.exit()
files = {{"prepare-data": "dataset.json", "train-classifier": "final.safetensors",
    "train-net": "results.json", "evaluate-detector": "results.json"}}
path = place / files[name] if name in files else place
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text("done")
"""

STAGES = ("data", "pretrain", "bn", "convert", "detect", "improve", "report")


class Project:
    """The plan "mini" with a command that only notes that it ran."""

    def __init__(self, folder: Path, steps_of):
        self.output, self.log, self.steps_of = folder / "out", folder / "log", steps_of
        self.log.touch()

    def run(self, stages=STAGES, words=()) -> int:
        steps = self.steps_of("mini", *words)
        return reproduce.run(list(steps.values()), stages, self.output)

    @property
    def ran(self) -> list[str]:
        return self.log.read_text().split()


@pytest.fixture
def project(tmp_path, monkeypatch, steps_of):
    made, stub = Project(tmp_path, steps_of), tmp_path / "stub.py"
    stub.write_text(STUB.format(log=str(made.log)))
    monkeypatch.setattr(reproduce, "START", [sys.executable, str(stub)])
    return made


ALL = ["prepare-data", *["train-classifier"] * 2, *["recompute-bn"] * 2,
       *["convert-weights"] * 2, *["train-net"] * 2,
       *["evaluate-detector"] * 2, "report"]  # fmt: skip


def test_each_step_runs_once(project, steps_of):
    for _ in range(2):
        assert project.run() == 0
        assert project.ran == ALL
    assert project.run(words=("--set", "VERSION", "2")) == 0
    assert project.ran[len(ALL) :] == ALL[-5:]
    step = steps_of()["bn_VGG-16"]
    content = json.loads((step.folder / "step.json").read_text())
    assert content["key"] == step.key
    assert content["command"].startswith("resnet-backbone recompute-bn --run ")


def test_stages_run_alone_and_say_what_they_need(project):
    assert project.run(("data", "pretrain")) == 0
    assert project.ran == ALL[:3]
    with pytest.raises(UsageError, match="convert_VGG-16 needs bn_VGG-16: add --stage bn"):
        project.run(("convert",))
    assert project.ran == ALL[:3]


def test_a_failed_step_ends_the_run_and_is_done_again(project, monkeypatch):
    monkeypatch.setenv("FAIL", "recompute-bn")
    assert project.run() == 3
    assert project.ran == ALL[:4]
    monkeypatch.delenv("FAIL")
    assert project.run() == 0
    assert project.ran == [*ALL[:4], *ALL[3:]]


def test_a_command_that_leaves_nothing_is_an_error(project, steps_of, monkeypatch):
    monkeypatch.setenv("NOTHING", "recompute-bn")
    with pytest.raises(UsageError, match="bn_VGG-16 left no .*true_bn.safetensors"):
        project.run()
    assert not steps_of()["bn_VGG-16"].is_done


@pytest.mark.parametrize(("status", "redone"), [("75", True), ("", True), ("0", False)])
def test_sigterm_reaches_the_tool_and_two_runs_do_not_mix(project, monkeypatch, status, redone):
    """Also where the tool dies of it, and where it ends before it takes notice."""
    monkeypatch.setenv("SLOW", "train-net")
    monkeypatch.setenv("STATUS", status)
    refusals, missed = [], []

    def interrupt():
        deadline = time.monotonic() + 60
        while not Path(f"{project.log}.slow").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            project.run()
        except BlockingIOError as error:
            refusals.append(str(error))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: missed.append(1))
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert project.run() == 75
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert "another process uses" in refusals[0] and not missed
    monkeypatch.delenv("SLOW")
    assert project.run() == 0
    assert project.ran == [*ALL[:8], *ALL[7 if redone else 8 :]]
