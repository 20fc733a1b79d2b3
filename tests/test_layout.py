"""The layers of the package, enforced by reading every import statement."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "resnet_backbone"
# A folder may import those of its own rank and of lower ones:
# cli -> {classification, detection, adapters, report} -> {fast, runtime, weights} -> models.
RANK = {"models": 0, "weights": 1, "fast": 1, "runtime": 1, "": 1}
RANK |= dict.fromkeys(("classification", "detection", "adapters", "report"), 2) | {"cli": 3}
STRANGERS = {"classification", "detection"}  # these do not import one another
LARGEST_FOLDER = 15  # files
SOURCES = sorted(path for top in (PACKAGE, "tools", "tests") for path in (ROOT / top).rglob("*.py"))
IN_PACKAGE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == PACKAGE]

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
every_module = pytest.mark.parametrize("path", IN_PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full dotted name of everything that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def layer_of(path: Path) -> str:
    """Return the folder or module below the package: "models", "config", "" for the package."""
    part = path.relative_to(ROOT / PACKAGE).parts[0]
    return "" if part == "__init__.py" else part.removesuffix(".py")


def layers_imported(path: Path) -> set[str]:
    ours = (name.split(".") for name in imported_names(path) if is_inside(name, PACKAGE))
    return {parts[1] if len(parts) > 1 and parts[1] in RANK else "" for parts in ours}


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )


@every_module
def test_layers(path):
    own, names, layers = layer_of(path), list(imported_names(path)), layers_imported(path)
    assert own in RANK, "give the new folder its place in RANK"
    upward = {layer for layer in layers if RANK[layer] > RANK[own]}
    assert not upward, "cli -> {detection, ...} -> {fast, runtime, weights} -> models"
    if own in STRANGERS:
        assert not layers & (STRANGERS - {own})
    if own != "detection":
        found = [name for name in names if is_inside(name, "detectron2", "fvcore")]
        assert not found, "only resnet_backbone/detection may import these"
    if own == "models":
        tops = {name.partition(".")[0] for name in names}
        assert tops <= {"torch", PACKAGE} | sys.stdlib_module_names


def test_no_circles():
    """Imports inside functions counted; a package's __init__ stands for what it imports."""
    names = {module_name(path): path for path in IN_PACKAGE}
    graph = {}
    for name, path in names.items():
        graph[name] = {found for found in map(partial(nearest, names), imported_names(path))}
        graph[name] -= {None, name}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError: these modules import one another


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nearest(names, dotted: str) -> str | None:
    while dotted and dotted not in names:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def test_folders_are_small():
    counts = Counter(path.parent for path in IN_PACKAGE)
    too_large = {str(folder): n for folder, n in counts.items() if n > LARGEST_FOLDER}
    assert not too_large


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_what_the_documents_name_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`((?:resnet_backbone|configs|tools|tests)/[\w/.]+)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.sh")), ids=lambda p: p.name)
def test_what_scripts_import_is_there(script):
    pattern = r"^from (resnet_backbone[\w.]*) import ([\w, ]+?)(?: as \w+)?$"
    for module, names in re.findall(pattern, script.read_text(encoding="utf-8"), re.MULTILINE):
        found = importlib.import_module(module)
        assert all(hasattr(found, name) for name in names.split(", ")), module


def test_the_map_is_complete():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(resnet_backbone[\w/]*)` \|", text, re.MULTILINE))
    folders = {str(path.parent.relative_to(ROOT)) for path in IN_PACKAGE} - {PACKAGE}
    assert listed == folders


@every_source
def test_nobody_imports_tools_or_the_model_zoo(path):
    found = [name for name in imported_names(path) if is_inside(name, "tools")]
    assert not found, "tools/ holds scripts; what is shared belongs in the package"
    found = [name for name in imported_names(path) if is_inside(name, "detectron2.model_zoo")]
    assert not found, "detectron2.model_zoo needs pkg_resources and downloads; state the config"


def test_importing_the_package_leaves_detectron2_alone():
    code = "import sys, resnet_backbone; print(sorted({'detectron2', 'fvcore'} & set(sys.modules)))"
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "detectron2":
            raise ModuleNotFoundError("No module named 'detectron2'", name="detectron2")

sys.meta_path.insert(0, Blocker())
import resnet_backbone
print(len(resnet_backbone.list_models()) > 0)
try:
    import resnet_backbone.detection
except ImportError as error:
    print(error)
"""


def test_without_detectron2_the_networks_work_and_detection_says_what_to_install():
    done = run_python(BLOCKER)
    assert done.returncode == 0, done.stderr
    works, _, message = done.stdout.partition("\n")
    assert works == "True"
    assert "pip install" in message and "detectron2" in message
    assert len(message.strip().splitlines()) == 1
