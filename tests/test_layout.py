"""The layers of the package, enforced by reading every import statement."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "resnet_backbone"
# A module may import its own layer and lower ones: tools -> these -> weights -> models -> torch.
RANK = {"files": 0, "signals": 0, "models": 0, "weights": 1, "builtin": 1, "config": 2, "": 2}
RANK |= dict.fromkeys(("detection", "adapters", "engine", "data", "report"), 2)
RANK["deploy"] = 1
RANK["reproduction"] = 2
RANK |= {"classification": 3, "benchmark": 3}  # where data and engine meet, and all together
RANK["comparison"] = 3  # where detection and report meet
STRANGERS = {"detection", "data", "engine"}  # these do not import one another
SOURCES = sorted(path for top in (PACKAGE, "tools", "tests") for path in (ROOT / top).rglob("*.py"))
IN_PACKAGE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == PACKAGE]

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
every_module = pytest.mark.parametrize("path", IN_PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full dotted name of everything that a file imports, at any depth of its code."""
    location = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(location[: -node.level]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def is_inside(name: str, *parents: str) -> bool:
    """Return whether a dotted name is one of the parents or lies below it."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def layer_of(path: Path) -> str:
    """Return the folder or module below the package: "models", "config", "" for the package."""
    part = path.relative_to(ROOT / PACKAGE).parts[0]
    return "" if part == "__init__.py" else part.removesuffix(".py")


def layers_imported(path: Path) -> set[str]:
    """Return the layers of our own package that a file imports."""
    ours = (name.split(".") for name in imported_names(path) if is_inside(name, PACKAGE))
    return {parts[1] if len(parts) > 1 and parts[1] in RANK else "" for parts in ours}


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )


def test_relative_imports_are_resolved(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = tmp_path / "resnet_backbone" / "models" / "x.py"
    source.parent.mkdir(parents=True)
    source.write_text("from ..detection import heads\nfrom . import layers\nimport a.b as c\n")
    assert list(imported_names(source)) == [
        "resnet_backbone.detection.heads",
        "resnet_backbone.models.layers",
        "a.b",
    ]
    assert layers_imported(source) == {"detection", "models"}


@every_module
def test_detectron2_stays_in_detection(path):
    if layer_of(path) != "detection":
        found = [name for name in imported_names(path) if is_inside(name, "detectron2", "fvcore")]
        assert not found, "only resnet_backbone/detection may import these"


@every_module
def test_nothing_imports_upward(path):
    upward = {layer for layer in layers_imported(path) if RANK[layer] > RANK.get(layer_of(path), 2)}
    assert not upward, "tools -> {detection, ...} -> weights -> models -> torch"


@every_module
def test_every_part_has_a_layer(path):
    assert layer_of(path) in RANK, "give the new folder or module its place in RANK"


@every_module
def test_detection_data_and_engine_are_strangers(path):
    own = layer_of(path)
    if own in STRANGERS:
        assert not layers_imported(path) & (STRANGERS - {own})


@every_module
def test_models_need_torch_alone(path):
    if layer_of(path) == "models":
        tops = {name.partition(".")[0] for name in imported_names(path)}
        assert tops <= {"torch", PACKAGE} | sys.stdlib_module_names


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
