"""The README's examples run, and the files that it names exist."""

import re
from pathlib import Path

import pytest

from resnet_backbone.weights import WeightsError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str) -> dict:
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    return scope


def test_feature_maps(capsys):
    scope = run(BLOCKS[0])
    assert {name: tuple(x.shape) for name, x in scope["maps"].items()} == {
        "res2": (1, 256, 120, 160),
        "res3": (1, 512, 60, 80),
        "res4": (1, 1024, 30, 40),
        "res5": (1, 2048, 15, 20),
    }


def test_detectron2_config(monkeypatch):
    pytest.importorskip("detectron2")
    monkeypatch.chdir(ROOT)
    model = run(BLOCKS[1])["model"]
    assert set(model.backbone.output_shape()) == {"p2", "p3", "p4", "p5", "p6"}


@pytest.mark.data
def test_weights(data_root):
    file = data_root / "weights" / "resnet50_msra_bgr_fp16.safetensors"
    code = BLOCKS[2].replace("resnet50_msra.safetensors", str(file))
    assert run(code)["preprocessing"].channel_order == "BGR"
    with pytest.raises(WeightsError, match="stride_in_1x1"):
        run(code.replace("stride_in_1x1=True", "stride_in_1x1=False"))


def test_files_named_in_the_readme_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    commands = re.findall(r"(?:tools|configs)/[\w/.-]+\.(?:sh|py|yaml)", README)
    assert links and commands
    missing = [name for name in (*links, *commands) if not (ROOT / name).exists()]
    assert not missing
