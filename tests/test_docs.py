"""The documentation: its examples run, its links lead somewhere, and its site builds."""

import ast
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from resnet_backbone.models import build_model
from resnet_backbone.weights import get_preprocessing, save_weights, sources

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.parent.name != "results"]  # not by a command
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in WRITTEN
    for number, code in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), start=1)
]
# Address of weights in the examples -> network and convention of the file that stands in for it.
PUBLISHED = {
    "detectron2://ImageNetPretrained/MSRA/R-50.pkl": ("resnet50", "msra"),
    "torchvision://resnet50/IMAGENET1K_V2": ("resnet50", "torchvision"),
}
SITE = ("sphinx", "myst_parser", "furo", "sphinxcontrib.mermaid")
every_example = pytest.mark.parametrize("code", EXAMPLES)


def libraries(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def need(*names: str) -> None:
    """Skips a test where a package is missing; imports none of them."""
    for name in names:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Address -> a file with random weights of the same network and convention."""
    found = {}
    for address, (name, convention) in PUBLISHED.items():
        preprocessing = get_preprocessing(convention)
        path = tmp_path_factory.mktemp("published") / "weights.safetensors"
        network = build_model(name, stride_in_1x1=preprocessing.stride_in_1x1)
        save_weights(network, path, preprocessing)
        found[address] = sources.ResolvedSource(path, replace(preprocessing, source=address))
    return found


@pytest.fixture
def workplace(published, tmp_path, monkeypatch):
    for scheme in ("detectron2", "torchvision"):
        monkeypatch.setitem(
            sources.SCHEMES, scheme, lambda name, scheme=scheme: published[f"{scheme}://{name}"]
        )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.effect_noise((320, 240), 50).convert("RGB").save(tmp_path / "photo.jpg")
    torch.manual_seed(0)
    return tmp_path


@every_example
def test_example_is_short(code):
    lines = [line for line in code.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) < 25


@every_example
def test_example_runs(code, workplace):
    need(*libraries(code))
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


def test_feature_maps_of_the_readme(workplace):
    scope: dict = {}
    exec(FENCE.findall(README.read_text(encoding="utf-8"))[0], scope)
    shapes = {name: tuple(x.shape) for name, x in scope["maps"].items()}
    assert shapes == {"res3": (1, 512, 30, 40), "res4": (1, 1024, 15, 20), "res5": (1, 2048, 8, 10)}


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 900
    assert len(FENCE.findall(text)) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:tools|configs)/[\w/.-]+\.(?:sh|py|yaml)", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_site_builds_without_warnings(tmp_path):
    need(*SITE, "detectron2", "timm", "transformers", "mmengine")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    folders = ["-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")]
    done = subprocess.run([*command, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path / "html") for page in tmp_path.rglob("*.html")}
    assert {page.relative_to(ROOT / "docs").with_suffix(".html") for page in PAGES[1:]} <= pages
    commands = (tmp_path / "html/reference/commands.html").read_text(encoding="utf-8")
    keys = (tmp_path / "html/reference/classification_config.html").read_text(encoding="utf-8")
    assert "--voc-root" in commands and "schedule.milestones" in keys


def test_comments_of_config_keys(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from generated import comments, read_comments

    lines = ("# Data", "A = 1  # of A", "# of B", "# in two lines", "B = '#'", "C = 1")
    notes = read_comments("\n".join(lines))
    assert comments(notes, 2, 2) == ("of A", "Data")
    assert comments(notes, 5, 5) == ("of B in two lines", "")
    assert comments(notes, 6, 6) == ("", "")
