"""Tables of results beside the paper's."""

import os
import shlex
import subprocess
import sys

import pytest

from resnet_backbone.models import list_models
from resnet_backbone.report.published import ERRORS, parse_network, published, recipe_iterations
from resnet_backbone.report.runs import load_run
from resnet_backbone.report.table import group_runs, mean_and_spread, results_table, show_commands

# Typed from the paper's tables, not read from the package.
PAPER = {
    **{"cifar_resnet20": "8.75", "cifar_resnet32": "7.51", "cifar_resnet44": "7.17"},
    **{"cifar_resnet56": "6.97", "cifar_resnet110": "6.43, mean 6.61 ± 0.16"},
    **{"cifar_resnet1202": "7.93", "resnet50": "22.85 / 6.71", "resnet101": "21.75 / 6.05"},
    **{"resnet152": "21.43 / 5.71", "plain18": "27.94 / -", "plain34": "28.54 / 10.02"},
    "vgg16": "28.07 / 9.33",
}
PAPER_34 = {"A": ("25.03 / 7.76", ""), "B": ("24.52 / 7.46", "21.84 / 5.71")}
PAPER_34["C"] = ("24.19 / 7.40", "21.53 / 5.60")
SHOWN = "python tools/t.py configs/a.yaml $ROOT/x $ROOT/y/z"  # a command without folders


def test_published_numbers():
    assert {name: published(parse_network(name)).error for name in PAPER} == PAPER
    for shortcut, expected in PAPER_34.items():
        found = published(parse_network("resnet34", {"shortcut": shortcut}))
        assert (found.error, found.multi_scale) == expected
    assert published(parse_network("resnet18", {"shortcut": "A"})).error == "27.88 / -"
    multi_scale = [published(parse_network(f"resnet{d}")).multi_scale for d in (50, 101, 152)]
    assert multi_scale == ["20.74 / 5.25", "19.87 / 4.60", "19.38 / 4.49"]
    plain = [published(parse_network(f"cifar_plain{d}")).error for d in (20, 56, 110)]
    assert plain == ["about 9", "about 13", "above 60"]


def test_every_published_network_can_be_built():
    for name, _ in ERRORS:
        assert name in list_models() or name == "torchvision/googlenet"


@pytest.mark.parametrize(
    "name, options, title, blocks",
    [
        ("cifar_resnet110", {}, "ResNet-110", 18),
        ("cifar_resnet20", {"shortcut": "B"}, "ResNet-20 B", 3),
        ("cifar_resnet56", {"shortcut": "none"}, "plain-56", 9),
        ("resnet34", {"shortcut": "B"}, "ResNet-34", None),
        ("resnet34", {"shortcut": "highway"}, "ResNet-34 highway", None),
        ("resnet50", {"stride_in_1x1": False}, "ResNet-50 (stride_in_1x1=False)", None),
        ("vgg16", None, "VGG-16", None),
        ("vgg16_bn", None, "vgg16_bn", None),
        ("timm/resnet50", {}, "timm/resnet50", None),
    ],
)
def test_titles(name, options, title, blocks):
    network = parse_network(name, options)
    assert (network.title, network.blocks) == (title, blocks)


def test_another_network_than_the_papers_has_no_published_number():
    assert published(parse_network("resnet50", {"stride_in_1x1": False})) is None
    assert published(parse_network("cifar_resnet20", {"shortcut": "B"})) is None
    assert published(parse_network("cifar_resnet26")) is None
    released = {"stride_in_1x1": True, "caffe_pool": True}
    assert published(parse_network("resnet50", released)) is not None


def test_lengths_of_the_recipes():
    lengths = {"cifar_plain20": 64_000, "resnet50": 600_000, "torchvision/googlenet": 600_000}
    lengths |= {"vgg16": 370_000, "prelu_net_b": 800_000, "bn_inception": 600_000}
    assert {name: recipe_iterations(parse_network(name)) for name in lengths} == lengths


@pytest.mark.parametrize(
    "given, expected",
    [
        ("/a/b/tools/train_net.py --x ../y/z", "python tools/train_net.py --x ../y/z"),
        ("python tools/t.py -w=/a/w.pth K '(1, 2)'", "python tools/t.py -w=$ROOT/w.pth K '(1, 2)'"),
        ("/p/tools/t.py /p/configs/a.yaml /d/x /d/y/z", SHOWN),
        ("python tools/t.py detectron2://a/b.pkl", "python tools/t.py detectron2://a/b.pkl"),
    ],
)
def test_commands_without_folders_of_the_machine(given, expected):
    assert show_commands([given, None]) == {given: expected}


def test_two_files_do_not_look_alike(tmp_path):
    """The text runs again where ROOT is set."""
    files = [tmp_path / name / "w x.txt" for name in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text(file.parent.name)
    (tmp_path / "tools").mkdir()
    code = "import sys; print([open(f.rpartition('=')[2]).read() for f in sys.argv[1:]])"
    (tmp_path / "tools" / "t.py").write_text(code)
    command = shlex.join([f"{tmp_path}/tools/t.py", str(files[0]), f"data.root={files[1]}"])
    other = f"tools/t.py {tmp_path.parent}/other"
    shown = show_commands([command, other])[command]
    assert str(tmp_path) not in shown
    environment = {**os.environ, "ROOT": str(tmp_path.parent)}
    words = shown.replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(words, shell=True, cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.decode() == "['one', 'two']\n", done.stderr


def test_mean_and_spread():
    assert mean_and_spread([8.0, 9.0, 10.0]) == "9.00 ± 1.00"  # sample standard deviation
    assert mean_and_spread([8.0]) == "8.00"
    assert mean_and_spread([]) == "-"


@pytest.fixture
def runs(make_run):
    """Function that makes a finished run of each seed, with the given errors."""

    def make(config, errors, name="", overrides=(), **results):
        made = []
        tool = "python /home/me/x/tools/train_classifier.py data.root=/secret/x"
        place = {"date": "2025-01-02", "hardware": {"cpu": "a CPU", "threads": 2}}
        for seed, error in errors.items():
            content = {"command": f"{tool} train.seed={seed}", "val_top1_error": error}
            content |= {"train_error": error / 2, **place, **results}
            seeded = [f"train.seed={seed}", *overrides]
            folder = f"{name or config.replace('/', '_')}_{seed}"
            made.append(load_run(make_run(folder, config, seeded, content)))
        return made

    return make


def test_cifar10_rows(cells, runs):
    twenty = runs("cifar10/resnet20", {1: 8.1, 2: 8.3, 3: 8.8}, parameters=269722)
    table = results_table([*twenty, *runs("cifar10/plain56", {1: 13.0})])
    header, _, plain, residual = cells(table)
    assert plain[0] == "plain-56"  # plain before residual
    assert dict(zip(header, residual, strict=True)) == {
        **{"network": "ResNet-20", "n": "3", "parameters": "269,722", "paper": "8.75 (Table 6)"},
        **{"others, 50k split": "8.27", "**ours**": "8.40 ± 0.36"},
        **{"ours, training": "4.20 ± 0.18", "seeds": "3", "iterations": "64,000"},
    }
    plain = dict(zip(header, plain, strict=True))
    assert (plain["paper"], plain["**ours**"], plain["n"]) == ("about 13 (Fig. 6)", "13.00", "9")


def test_every_run_stands_with_its_command(runs):
    table = results_table(runs("cifar10/resnet20", {1: 8.1, 2: 8.3}))
    command = "`python tools/train_classifier.py data.root=$ROOT/x train.seed=2`"
    assert f"- ResNet-20, seed 2: 8.30 %; {command}; a CPU, 2 threads; 2025-01-02" in table
    assert "secret" not in table and "/home" not in table


def test_shortened_runs_and_the_45k_split_are_marked(cells, runs):
    short = runs("cifar10/resnet20", {1: 12.0}, "short", ["schedule.scale=0.1"])
    split = runs("cifar10/resnet20", {1: 8.9}, "split", ["data.split=45k"])
    whole = runs("cifar10/resnet20", {1: 8.4})
    header, _, *rows = cells(results_table([*short, *split, *whole]))
    remarks = {row[header.index("**ours**")]: row[header.index("remark")] for row in rows}
    shortened = "**shortened**: the recipe has 64,000"
    assert remarks == {"12.00": shortened, "8.90": "45k/5k split", "8.40": ""}
    assert [row[header.index("iterations")] for row in rows] == ["64,000", "64,000", "6,400"]


def test_only_the_recipe_separates_runs(cells, runs):
    moved = ["data.workers=1", "train.threads=1", "output.keep=9", "evaluation.every=7"]
    same = [*runs("cifar10/resnet20", {1: 8.0}), *runs("cifar10/resnet20", {2: 9.0}, "b", moved)]
    assert [len(group.runs) for group in group_runs(same)] == [2]
    half = runs("cifar10/resnet20", {1: 8.5}, "half", ["train.amp=bf16"])
    table = results_table([*same, *half])
    header, _, *rows = cells(table)
    assert {row[-1] for row in rows} == {"train.amp=none", "train.amp=bf16"}


def test_imagenet_columns(cells, runs):
    found = runs("imagenet/resnet34_C", {1: 26.1}, val_top5_error=8.5, iterations=600000)
    header, _, values = cells(results_table(found))
    row = dict(zip(header, values, strict=True))
    assert row["network"] == "ResNet-34 C"
    assert row["paper, 10-crop top-1 / top-5"] == "24.19 / 7.40 (Table 3)"
    assert row["paper, multi-scale"] == "21.53 / 5.60"
    assert (row["**ours**, center crop top-1"], row["**ours**, top-5"]) == ("26.10", "8.50")
    assert "remark" not in header  # nothing to remark
    other = runs("imagenet/resnet18", {1: 30.5})  # the paper has option A only
    header, _, values = cells(results_table(other))
    assert values[header.index("paper, 10-crop top-1 / top-5")] == "-"
    assert values[header.index("others, center crop top-1")] == "30.24"


def test_own_class_folders_are_neither_imagenet_nor_one_another(cells, runs):
    facts = dict(num_classes=10, iterations=3000)
    found = runs("imagenet/resnet50", {1: 5.0}, "a", evaluated_on="my_images/val", **facts)
    found += runs("imagenet/resnet50", {2: 9.0}, "b", evaluated_on="others/val", **facts)
    text = results_table(found)
    assert "### my_images/val, error (%)" in text and "### others/val, error (%)" in text
    assert "| 5.00 |" in text and "| 9.00 |" in text
    assert not any(word in text for word in ("22.85", "shortened", "ImageNet,"))


def test_only_the_error_is_needed(cells, make_run):
    run = load_run(make_run("cifar_resnet20", config="", results={"val_top1_error": 8.5}))
    header, _, values = cells(results_table([run]))
    row = dict(zip(header, values, strict=True))
    assert (row["network"], row["**ours**"], row["seeds"]) == ("ResNet-20", "8.50", "1")
    assert (row["parameters"], row["iterations"], row["ours, training"]) == ("-", "-", "-")


def test_other_data_has_no_paper_columns(cells, make_run):
    overrides = ["data.format=digits", "model=cifar_resnet8"]
    run = make_run("d", overrides=overrides, results={"val_top1_error": 3.0})
    table = results_table([load_run(run)])
    assert "### digits, error (%)" in table
    assert not any("paper" in cell for cell in cells(table)[0])


def test_refusals(runs, make_run):
    twice = [*runs("cifar10/resnet20", {1: 8.0}), *runs("cifar10/resnet20", {1: 8.0}, "again")]
    with pytest.raises(ValueError, match="cifar10_resnet20_1 and .*again_1 have the same recipe"):
        results_table(twice)
    with pytest.raises(ValueError, match="has not ended"):
        results_table([load_run(make_run("going", metrics=[{"iteration": 1, "lr": 1}]))])


def test_command_line(tool, refused, runs, tmp_path):
    folders = [run.folder for run in runs("cifar10/resnet20", {1: 8.0, 2: 8.5})]
    output = tmp_path / "new" / "table.md"
    status, out, _ = tool("table", "--run", *folders, "--output", output)
    assert status == 0 and "8.25 ± 0.35" in output.read_text() and "8.25 ± 0.35" in out
    assert "holds no run" in refused("table", "--run", tmp_path, "--output", output)
