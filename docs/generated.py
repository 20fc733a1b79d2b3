"""Parts of the site that are generated from the source: tables of config keys, help of commands.

A page says where one belongs with a comment of its own line, for example ``<!-- commands -->``.
"""

import argparse
import ast
import contextlib
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Notes = dict[int, tuple[str, bool]]
PACKAGE = Path(__file__).resolve().parents[1] / "resnet_backbone"


def fill_in(app, page: str, source: list[str]) -> None:
    """Puts the generated parts into a page that is being read (Sphinx's event source-read)."""
    for name, make in PARTS.items():
        marker = f"<!-- {name} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, make())


@dataclass
class Key:
    """A config key as the source states it."""

    name: str
    default: str
    about: str
    choices: list[str] = field(default_factory=list)
    group: str = ""  # the comment above it, where the key has a comment of its own


def classification_keys() -> str:
    """A table for each group of the classification config, in Markdown."""
    source = (PACKAGE / "classification" / "config.py").read_text(encoding="utf-8")
    classes = {c.name: c for c in ast.parse(source).body if isinstance(c, ast.ClassDef)}
    notes = read_comments(source)
    parts = []
    for group in _fields(classes["Config"]):
        parts.append(f"## {group.target.id}\n")
        keys = []
        for item in _fields(classes[group.annotation.id]):
            key = Key(f"{group.target.id}.{item.target.id}", *_default(item.value))
            key.about, key.group = comments(notes, item.lineno, item.end_lineno)
            keys.append(key)
        parts.append(table(keys))
    return "\n".join(parts)


def _fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    return (item for item in node.body if isinstance(item, ast.AnnAssign))


def _default(value: ast.expr) -> tuple[str, str, list[str]]:
    """Default, an empty comment, and the choices of a field of the config."""
    if not isinstance(value, ast.Call):
        return _plain(value), "", []
    if value.func.id == "one_of":
        choices = [_plain(choice) for choice in value.args]
        return choices[0], "", choices
    if value.args:
        return _plain(value.args[0]), "", []
    factory = next(word.value for word in value.keywords if word.arg == "default_factory")
    made = factory.body if isinstance(factory, ast.Lambda) else factory
    return _plain(made), "", []


def _plain(node: ast.expr) -> str:
    """A value as one writes it in YAML: text without quotes, but for the empty one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value or '""'
    text = ast.unparse(node)
    return {"list": "[]", "dict": "{}"}.get(text, text)


def detection_keys() -> str:
    """A table for each group of the node RESNET_BACKBONE, in Markdown."""
    source = (PACKAGE / "detection" / "config.py").read_text(encoding="utf-8")
    assigned = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    defaults = next(node for node in assigned if node.targets[0].id == "DEFAULTS")
    return table(_detection_keys(defaults.value.args[0], read_comments(source), "RESNET_BACKBONE."))


def _detection_keys(node: ast.Dict, notes: Notes, prefix: str) -> Iterator[Key]:
    for name, value in zip(node.keys, node.values, strict=True):
        if isinstance(value, ast.Dict):
            yield from _detection_keys(value, notes, f"{prefix}{name.value}.")
            continue
        about, group = comments(notes, name.lineno, value.end_lineno)
        yield Key(prefix + name.value, _plain(value), about, group=group)


def read_comments(source: str) -> Notes:
    """Line -> its comment, and whether the line holds nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def comments(notes: Notes, first: int, last: int) -> tuple[str, str]:
    """A key's own comment, and the one that heads its group.

    The comment at the end of its line is the key's own. Without one, the lines of comment above
    it are. Where both are there, those above head a group.

    Args:
        notes: see :func:`read_comments`.
        first, last: numbers of the key's lines, from 1.
    """
    above: list[str] = []
    while notes.get(first - len(above) - 1, ("", False))[1]:
        above.insert(0, notes[first - len(above) - 1][0])
    if last in notes:
        return notes[last][0], " ".join(above)
    return " ".join(above), ""


def table(keys) -> str:
    """Keys as Markdown; a group's comment stands above a table of its own."""
    lines: list[str] = []
    for number, key in enumerate(keys):
        if key.group:
            lines += ["", *_heading(key.group), ""]
        if key.group or number == 0:
            lines += ["| key | default | what |", "|---|---|---|"]
        choices = f"one of {', '.join(f'`{c}`' for c in key.choices)}" if key.choices else ""
        about = _code(key.about)
        what = "<br>".join(part for part in (choices, about) if part)
        lines.append(f"| `{key.name}` | `{key.default}` | {what} |")
    return "\n".join([*lines, ""])


def _heading(text: str) -> list[str]:
    """A group's comment: its first words are a heading, the rest is a paragraph."""
    title, _, rest = text.partition(". ")
    return [f"## {title.rstrip('.')}", "", _code(rest)]


def _code(text: str) -> str:
    """A comment as Markdown: config keys and names with an underscore are code."""
    text = text.replace("<", "&lt;").replace("|", "\\|").replace("*=", "\\*=")
    lower = r"(?<![`\w.])([a-z_.]*[a-z0-9]+_[a-z_0-9.]*[a-z0-9](?:\(\))?)(?![\w`])"
    upper = r"(?<![`\w])([A-Z][A-Z0-9]+(?:[._][A-Z0-9_*.]*[A-Z0-9*])+)"
    return re.sub(upper, r"`\1`", re.sub(lower, r"`\1`", text))


def commands() -> str:
    """Every command's ``--help``, in Markdown."""
    from resnet_backbone.cli import COMMANDS

    parts = []
    for name, about in COMMANDS.items():
        parts.append(f"## {name}\n\n{about[0].upper()}{about[1:]}.\n")
        for parser in _parsers(_parser_of(name)):
            words = parser.prog.split()[2:]
            if words:
                parts.append(f"### {name} {' '.join(words)}\n")
            parts.append(f"```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def _parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a command builds: the one that prints its help."""
    from resnet_backbone.cli import main

    found = []
    original = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda self, file=None: found.append(self)
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            main([name, "--help"])
    finally:
        argparse.ArgumentParser.print_help = original
    return found[0]


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


PARTS: dict[str, Callable[[], str]] = {
    "classification keys": classification_keys,
    "detection keys": detection_keys,
    "commands": commands,
}
