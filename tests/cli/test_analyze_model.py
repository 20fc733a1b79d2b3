"""tools/analyze_model.py: the table of published numbers, and a network's stages."""

import json

import pytest

from resnet_backbone.cli import analyze_model as tool
from resnet_backbone.models import list_models


def test_some_networks(run_command):
    assert {row.name for row in tool.REFERENCES} == set(list_models())
    status, out, _ = run_command(tool.main, "resnet[15]0", "resnet34")
    rows = [line for line in out.splitlines() if line.startswith("resnet")]
    assert status == 0 and len(rows) == 4 and all(row.endswith("ok") for row in rows)
    assert "3.6440" in out and "4 rows, 0 differ" in out


def test_every_network(capsys):
    assert tool.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 35 and all(row["ok"] for row in rows)


def test_a_difference_is_noticed(monkeypatch, capsys):
    rows = {row.name: row for row in tool.REFERENCES if not row.options}
    changes = (dict(paper="1.9", others="1.816"), dict(paper="1.6"), dict(paper="1.9"))
    wrong = [rows["vgg11"]._replace(parameters=1)]
    wrong += [rows["resnet18"]._replace(**change) for change in changes]
    monkeypatch.setattr(tool, "select", lambda names: wrong)
    assert tool.main([]) == 1
    table = capsys.readouterr().out
    assert table.count("DIFFERS") == 3 and "4 rows, 3 differ" in table


def test_stages(capsys):
    args = ("--model", "resnet50", "--option", "stride_in_1x1=False", "--input-size", "224x320")
    assert tool.main(args) == 0
    table = capsys.readouterr().out
    res4 = next(line.split() for line in table.splitlines() if line.startswith("res4"))
    assert res4[1:5] == ["14x20", "1024", "16", "7,098,368"]
    assert tool.main([*args, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert rows[-1]["parameters"] == 25_557_032
    assert rows[-1]["multiply_adds"] == sum(row["multiply_adds"] for row in rows[:-1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "resnet51"), "did you mean 'resnet50'"),
        (("nothing*",), "no network is named 'nothing*'"),
        (("--option", "a=b"), "need --model"),
        (("--model", "vgg11", "--input-size", "10y"), "neither SIZE nor HEIGHTxWIDTH"),
        (("--model", "vgg11", "--option", "norm"), "not of the form KEY=VALUE"),
        (("--model", "vgg11", "--option", "norm=7"), "norm"),
        (("--model", "vgg11", "resnet18"), "either networks to compare or --model"),
    ],
)
def test_refusals(arguments, message, refusal):
    assert message in refusal(tool.main, *arguments)
