"""Every Python example of docs/guides is a whole program of less than 25 lines, and runs."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from resnet_backbone.models import build_model
from resnet_backbone.weights import get_preprocessing, save_weights

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WEIGHTS = re.compile(r'"((\w+?)_(msra|caffe_vgg|torchvision)\.safetensors)"')
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in sorted(GUIDES.glob("*.md"))
    for number, code in enumerate(FENCE.findall(path.read_text(encoding="utf-8")), start=1)
]
every_example = pytest.mark.parametrize("code", EXAMPLES)


def libraries(code: str) -> set[str]:
    """Top-level names of what an example imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Function: name of a file such as resnet50_msra.safetensors -> that file, randomly made."""
    folder = tmp_path_factory.mktemp("weights")

    def make(file: str, name: str, preprocessing: str) -> Path:
        path = folder / file
        if not path.exists():
            found = get_preprocessing(preprocessing)
            stride = {} if found.stride_in_1x1 is None else {"stride_in_1x1": found.stride_in_1x1}
            save_weights(build_model(name, **stride), path, found)
        return path

    return make


@every_example
def test_example_is_short(code):
    lines = [line for line in code.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) < 25


@every_example
def test_example_runs(code, weights, tmp_path, monkeypatch):
    for name in libraries(code):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for file, name, preprocessing in set(WEIGHTS.findall(code)):
        (tmp_path / file).symlink_to(weights(file, name, preprocessing))
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


def test_links_lead_somewhere():
    for path in sorted(GUIDES.glob("*.md")):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8"))
        assert not [link for link in links if not (path.parent / link).exists()], path.name


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
