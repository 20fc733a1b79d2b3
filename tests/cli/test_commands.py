"""resnet-backbone: its commands, and the same commands as scripts of a checkout."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from resnet_backbone import cli
from resnet_backbone.runtime import records
from resnet_backbone.runtime.files import find_config

ROOT = Path(__file__).parents[2]
PLANS = sorted(path.stem for path in (ROOT / "configs/reproduction").glob("[!B]*.yaml"))
GUIDES = [str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "guides").glob("*.md")]


def test_help_lists_every_command_without_torch():
    code = "import sys; from resnet_backbone.cli import main; main(['--help']); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    words = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert words == set(cli.COMMANDS) and max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_and_a_door(name):
    module = name.replace("-", "_")
    assert importlib.util.find_spec(f"resnet_backbone.cli.{module}")
    door = (ROOT / "tools" / f"{module}.py").read_text()
    assert f"from resnet_backbone.cli.{module} import main\n" in door
    assert len(door.splitlines()) < 10


@pytest.mark.parametrize(
    "words, message",
    [
        (["train-nett"], "error: no command 'train-nett'; did you mean train-net? "),
        (["convert_weigths"], "did you mean convert-weights? "),
        (["xyz"], "error: no command 'xyz'; See resnet-backbone --help"),
    ],
)
def test_unknown_commands(words, message, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


class Parsed(BaseException):
    """What is raised in place of a command's work."""


@pytest.fixture
def parsers(monkeypatch) -> list:
    """All parsers that are made from now on; they only parse, and data need not be there."""
    from resnet_backbone.cli import report

    made, initialize = [], cli.CommandParser.__init__

    def keep(self, *args, **options):
        initialize(self, *args, **options)
        made.append(self)

    def parse_only(parse):
        def parse_and_stop(self, *args):
            raise Parsed(parse(self, *args))

        return parse_and_stop

    monkeypatch.setattr(cli.CommandParser, "__init__", keep)
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(cli.CommandParser, name, parse_only(getattr(ArgumentParser, name)))
    monkeypatch.setattr(report, "parse_run", str)
    return made


def check_examples(text: str) -> int:
    """Runs the parser of each command that a text has on a line or in a table; counts them."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^[ !]*resnet-backbone (.+)$", joined, re.MULTILINE)
    lines += re.findall(r"\| `resnet-backbone ([^`]+)` \|", joined)  # of a table
    for line in lines:
        words = shlex.split(line, comments=True)
        with pytest.raises((Parsed, SystemExit)) as ended:
            cli.main(words)
        assert ended.type is Parsed or ended.value.code == 0, line
        task = "classification" if words[0] == "train-classifier" else "detection"
        for option, name in zip(words, words[1:], strict=False):
            if option == "--config-file" and name != "..." and not name.startswith("output/"):
                find_config(name, task)
    return len(lines)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_the_help_parse(name, parsers, capsys, detectron2):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    texts = [parser.format_help() for parser in parsers]
    assert sum(map(check_examples, texts)) and not capsys.readouterr().err
    assert not [text for text in texts if re.search(r"tools/|docs/guides|python [\w/]*\.py", text)]


@pytest.mark.parametrize("page", ["README.md", *sorted(GUIDES)])
def test_examples_of_the_documents_parse(page, parsers, detectron2):
    check_examples((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("plan", PLANS)
def test_steps_of_the_plans_parse(plan, request, monkeypatch, tmp_path, capsys, detectron2):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "w").touch()
    words = ["--scale", plan, "--imagenet", str(tmp_path), "--num-gpus", "8", "--plan"]
    if plan == "voc07":
        words += [f"--weights={name}={tmp_path / 'w'}" for name in ("VGG-16", "ResNet-50")]
    assert cli.main(["reproduce", *words]) == 0
    shown = capsys.readouterr().out
    request.getfixturevalue("parsers")
    assert f": {check_examples(shown)} steps" in shown


def test_examples_of_the_configs_parse(parsers, detectron2):
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "configs").rglob("*.yaml")]
    uncommented = [re.sub("^#", "", text.replace("\\\n#", " "), flags=re.M) for text in texts]
    assert sum(map(check_examples, uncommented)) > 150


@pytest.mark.parametrize("outcome, status", [(None, 0), (0, 0), (3, 3), (SystemExit(75), 75)])
def test_commands_return_a_status_or_exit(outcome, status, monkeypatch):
    before = list(sys.argv)

    def command():
        assert sys.argv == ["resnet-backbone demo", "--x", "1"]
        if isinstance(outcome, SystemExit):
            raise outcome
        return outcome

    module = SimpleNamespace(main=command)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    try:
        found = cli.main(["demo", "--x", "1"])
    except SystemExit as stopped:
        found = stopped.code
    assert found == status and sys.argv == before


def test_what_is_not_installed_is_one_line(monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError("No module named 'omegaconf'", name="omegaconf")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["train-classifier"]) == 2
    error = capsys.readouterr().err
    assert "No module named 'omegaconf'; pip install 'resnet_backbone[all]'" in error


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["tools/demo.py", "a b"], "python tools/demo.py 'a b'"),
        (["resnet-backbone train-net", "--x"], "resnet-backbone train-net --x"),
        ([f"{ROOT}/resnet_backbone/cli/train_net.py", "--x"], "python tools/train_net.py --x"),
    ],
)
def test_the_command_that_runs_can_be_typed_again(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert records.command_line() == expected


def test_another_command_is_written_as_this_one_was(monkeypatch, tmp_path):
    words = ["convert", "a b"]
    monkeypatch.setattr(sys, "argv", ["tools/demo.py"])
    door = records.command_line("convert-weights", words)
    assert shlex.split(door) == ["python", "tools/convert_weights.py", *words]
    for argv, source in ((["resnet-backbone demo"], ROOT), (["python"], tmp_path)):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(records, "SOURCE", source)
        found = shlex.split(records.command_line("convert-weights", words))
        assert found == ["resnet-backbone", "convert-weights", *words]


def test_an_installed_package_has_no_revision(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(records, "SOURCE", tmp_path / "site-packages")
    assert records.source_revision() == "unknown"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the package, from a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    names = ("resnet_backbone", "configs", "setup.py", "pyproject.toml", "README.md")
    source.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True
    )
    subprocess.run(["rm", "-r", source], check=True)
    return site


@pytest.mark.slow
def test_a_wheel_trains_without_the_checkout(installed, make_voc, tmp_path, detectron2):
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore"}

    def run(*words):
        command = [sys.executable, installed / "bin" / "resnet-backbone", *words]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    voc = make_voc({f"{i}": [("a", (3, 3, 15, 9))] for i in range(4)})
    data = ["--voc-root", voc, "--train-set", "train", "--test-set", "train"]
    small = "MODEL.WEIGHTS '' MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN SOLVER.MAX_ITER 2"
    small += " SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (32,) INPUT.MIN_SIZE_TEST 32"
    small += " MODEL.ROI_BOX_HEAD.FC_DIM 8 MODEL.FPN.OUT_CHANNELS 8 DATALOADER.NUM_WORKERS 0"
    small += " SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 MODEL.DEVICE cpu"
    config = ["--config-file", "voc/faster_rcnn_R_18_FPN"]
    done = run("train-net", *config, *data, "--output-dir", "out", *shlex.split(small))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work / "out" / "model_final.pth").is_file()
    command = '"command": "resnet-backbone train-net --config-file voc/faster_rcnn_R_18_FPN'
    assert command in (work / "out" / "results.json").read_text()
    code = "import resnet_backbone; print(resnet_backbone.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(installed))
    plan = work / "plan.yaml"
    step = "command: 'prepare-data digits --num-train 2 --num-test 1 --output {here}/scenes'"
    plan.write_text(f"title: scenes\nsteps: {{data: {{{step}, makes: scenes/dataset.json}}}}\n")
    done = run("reproduce", "--scale", plan)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resnet-backbone prepare-data digits" in done.stdout
    (made,) = (work / "output" / "reproduction" / "plan").glob("data-*/scenes/dataset.json")
    done = run("train-classifier", "--config-file", "cifar10/resnet20.yml")
    assert done.returncode == 2 and "did you mean cifar10/resnet20?" in done.stderr
    done = run("train-classifier", "--config-file", "cifar10/resnet20", "data.root=nowhere")
    assert done.returncode == 2 and "nowhere: no CIFAR-10 here" in done.stderr
