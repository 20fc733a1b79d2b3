"""The commands, one module each: ``resnet-backbone COMMAND``; in a checkout also tools/*.py."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import logging
import sys
import warnings
from typing import Any, NoReturn

from resnet_backbone.runtime.errors import wants_traceback

# Warnings caused by Detectron2 and PyTorch, about which users can do nothing. Processes that a
# command spawns import this module, too.
warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA runtime

PROGRAM = "resnet-backbone"
COMMANDS = {
    "train-net": "train and evaluate a detector",
    "train-classifier": "train a classifier on ImageNet, CIFAR-10, or the built-in data",
    "evaluate-detector": "evaluate a detector with each of the paper's improvements",
    "evaluate-classifier": "measure error rates: center crop, ten crops, dense, ensembles",
    "demo": "draw what a detector finds in images and videos",
    "convert-weights": "inspect weights, convert them for another library, or compare two files",
    "prepare-data": "make a data set of your own images, or unpack and check another one",
    "export": "export a network or a detector to ONNX, torch.export, or TorchScript",
    "report": "write tables, curves, and pages of runs beside the published numbers",
    "reproduce": "run a plan of the paper's experiments and write its page",
    "benchmark": "measure speed and memory beside torchvision and Detectron2",
    "analyze-model": "count parameters and multiply-adds beside the published numbers",
    "recompute-bn": "recompute a classifier's BN statistics on its training set",
}
"""Name -> one-line description. The module has the name with underscores."""


class CommandParser(argparse.ArgumentParser):
    """A parser that prints texts, also of subcommands, as written, and errors in one line."""

    def __init__(self, *args: Any, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def key_and_text(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not (key and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def key_and_value(text: str) -> tuple[str, Any]:
    """Parses "key=value" into (key, value); a value that is no Python literal stays a string."""
    key, value = key_and_text(text)
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND [ARGUMENT ...]\n\ncommands:")
        print("\n".join(f"  {name:21}{about}" for name, about in COMMANDS.items()))
        print(f"\n{PROGRAM} COMMAND --help explains one. In a checkout, tools/COMMAND.py runs it.")
        return 0 if words else 2
    name, *arguments = words
    if name == "--version":
        from resnet_backbone import __version__

        print(__version__)
        return 0
    name = name.replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: no command {name!r}; {hint}See {PROGRAM} --help", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    except ImportError as error:
        if wants_traceback():
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "; pip install 'resnet_backbone[all]' installs all that commands need"
        print(f"error: {name}: {error}{hint}", file=sys.stderr)
        return 2
    before, sys.argv = sys.argv, [f"{PROGRAM} {name}", *arguments]  # usage lines, command_line()
    try:
        return command.main() or 0
    finally:
        sys.argv = before
