"""tools/quickstart.sh: its command line, its table, and once the whole path in small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "quickstart.sh"


def quickstart(*arguments):
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)


def test_help_names_every_option():
    done = quickstart("--help")
    assert done.returncode == 0
    for word in ("--seed N", "--compare", "--output DIR", "key=value", "KEY VALUE", "pre-trains"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed", "one"], "--seed one is not a whole number"),
        (["--output"], "--output needs a value"),
        (["--quick"], "unknown option --quick"),
        (["SOLVER.MAX_ITER=3"], "write 'SOLVER.MAX_ITER 3', not 'SOLVER.MAX_ITER=3'"),
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER needs a value"),
        (["data.std", "one"], "data.std is neither key=value"),
    ],
)
def test_wrong_words_end_it_at_once(arguments, message):
    done = quickstart(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def set_up(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "setup_env.sh"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_set_up_explains_itself_and_installs_nothing(tmp_path):
    done = set_up("--help", VENV=str(tmp_path / "venv"))
    assert done.returncode == 0 and "PYTHON=python3.12 bash tools/setup_env.sh" in done.stdout
    assert "#" not in done.stdout.splitlines()[0] and not (tmp_path / "venv").exists()
    done = set_up("--now", VENV=str(tmp_path / "venv"))
    assert done.returncode and "unknown argument --now" in done.stderr


def test_set_up_takes_a_newer_python(tmp_path):
    """Where 3.15 is the only one; this one has no ensurepip, which ends the set-up."""
    script = """#!/bin/sh
    case "$2" in
        *"< (3, 10)"*) exit 0 ;;
        *"%d.%d"*) echo 3.15 ;;
        *) exit 1 ;;
    esac
    """
    for minor in ("", *(f".{n}" for n in range(10, 15))):
        (tmp_path / f"python3{minor}").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3.15").write_text(script)
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = set_up(PATH=path, VENV=str(tmp_path / "venv"))
    assert "python3.15 cannot create environments" in done.stderr


@pytest.mark.parametrize("compared", [True, False])
def test_table_is_read_from_the_runs(tmp_path, make_voc, compared):
    """The program inside the script, on results that were made up: one digit of two is found."""
    pytest.importorskip("detectron2")
    pattern = r"print_results\(\).*?<<'PYTHON'\n(.*?)\nPYTHON\n"
    program = re.search(pattern, SCRIPT.read_text(), re.S)
    digits = [(name, (1, 1, 10, 10)) for name in ("one", "two")]
    data = make_voc({"a": digits}, "data", "test")

    def find(score):
        box = {"box": [0, 0, 10, 9], "score": score}
        detections = [{**box, "class": digit} for digit in ("one", "three") if score]
        file = tmp_path / f"found_{score}.json"
        images = [{"file": "x/a.jpg", "detections": detections}]
        file.write_text(json.dumps({"confidence": 0.5, "images": images}))
        return str(file)

    def run(name, **content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    def detector(name, ap50):
        bbox = {"AP50": ap50, "AP50-11pt": 10.0, "AP": 5.5, "AP75": None}
        return run(name, results=dict(bbox=bbox), iterations=9, images_per_batch=8)

    classifier = dict(val_top1_error=12.34, evaluated_on="test crops", iterations=6, batch_size=4)
    folders = [str(data), find(0.9), run("pretrain", **classifier)]
    folders += [detector("run", 60.5), *([detector("scratch", 1.25)] if compared else [])]
    command = [sys.executable, "-c", program[1]]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=True)
    rows = {line[:14].strip(): line[14:].split() for line in done.stdout.splitlines()}
    assert "classifier: 12.3 % error on test crops, 6 iterations of 4 images" in done.stdout
    assert "detector: 9 iterations of 8 scenes" in done.stdout
    assert rows["pre-trained"] == ["60.5", "10.0", "5.5", "none"]
    if compared:
        assert rows["from scratch"] == ["1.2", "10.0", "5.5", "none"]
        assert rows["gain"] == ["+59.2", "+0.0", "+0.0", "none"]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("found 1 of 2 digits on the held-out scenes, with 1 wrong boxes")
    nothing = [folders[0], find(0), *folders[2:]]
    done = subprocess.run([*command, *nothing], capture_output=True, text=True)
    assert done.returncode == 1 and "the detector found no digit" in done.stderr


@pytest.fixture
def without_set_up(tmp_path):
    """Function (argument...) -> the script, run with this environment, nothing installed."""
    pytest.importorskip("detectron2")
    text = SCRIPT.read_text()
    for old, new in (
        ('ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"', f'ROOT="{ROOT}"'),
        ("bash tools/setup_env.sh\n", "true\n"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "quickstart.sh").write_text(text)
    words = ["bash", str(tmp_path / "quickstart.sh"), "--output", str(tmp_path / "output")]
    environment = os.environ | {"VENV": sys.prefix}

    def run(*arguments):
        return subprocess.run(
            [*words, *map(str, arguments)], capture_output=True, text=True, env=environment
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "word, message",
    [
        (["SOLVER.MAX_ITERS", "3"], "the nearest is SOLVER.MAX_ITER"),
        (["schedule.iteration=3"], "did you mean schedule.iterations?"),
    ],
)
def test_unknown_keys_end_it_before_training(without_set_up, tmp_path, word, message):
    done = without_set_up(*word)
    assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_the_whole_path_in_small(without_set_up, tmp_path):
    """Two iterations of each training; what it leaves is what it names."""
    output = tmp_path / "output"
    small = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "0"]
    small += ["schedule.iterations=2", "schedule.warmup_iterations=0", "evaluation.every=0"]
    done = without_set_up("--compare", "--seed", 3, *small)
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 or "error: the detector found no digit" in said, said
    for name in ("pretrain/final.safetensors", "run/model_final.pth", "scratch/results.json"):
        assert (output / name).is_file()
    for name in ("curves.png", "detections.png"):
        assert (output / name).stat().st_size > 10_000
    run, scratch = (
        json.loads((output / x / "results.json").read_text()) for x in ("run", "scratch")
    )
    assert run["weights"] == str(output / "pretrain" / "final.safetensors")
    assert scratch["weights"] == "" and run["seed"] == scratch["seed"] == 3
    assert run["iterations"] == scratch["iterations"] == 2
    assert json.loads((output / "pretrain" / "results.json").read_text())["seed"] == 3
    assert "gain" in done.stdout and "weights: INPUT.FORMAT BGR -> RGB" in done.stdout
    log = (output / "run" / "log.txt").read_text()
    assert "Loaded the backbone from" in log
