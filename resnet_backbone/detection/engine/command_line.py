"""What the command-line tools share: configs, overrides, errors in one line."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode, get_cfg
from yaml import YAMLError

from resnet_backbone.detection.config import (
    UsageError,
    add_resnet_backbone_config,
    backbone_node,
)
from resnet_backbone.detection.evaluation.results import UnexpectedResults
from resnet_backbone.detection.modeling.projects import add_project_keys
from resnet_backbone.runtime.configs import find_config
from resnet_backbone.runtime.signals import EXIT_STOPPED, Stopped

ONE_LINE = (ValueError, OSError, FloatingPointError, Stopped)
IS_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD").fullmatch

# Detectron2's modules call it when they are imported; a user of the tools can do nothing about it.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def one_line_errors(main: Callable) -> Callable:
    """Wrong input (ValueError, OSError) and divergence end a tool with one line, exit status 2.

    A stop by a signal does so with ``EXIT_STOPPED``, results that are not those of
    ``TEST.EXPECTED_RESULTS`` with 1. With the environment variable ``RESNET_BACKBONE_TRACEBACK``
    set, the traceback is shown.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except ONE_LINE as error:
            if os.environ.get("RESNET_BACKBONE_TRACEBACK"):
                raise
            message, status = outcome(error)
            print(message, file=sys.stderr)
            raise SystemExit(status) from None

    return wrapped


def outcome(error: Exception) -> tuple[str, int]:
    """The line and the exit status for one of :data:`ONE_LINE`."""
    if isinstance(error, Stopped):
        return f"stopped by {error}; go on with the same command and --resume", EXIT_STOPPED
    text = diverged(error) if isinstance(error, FloatingPointError) else error
    return f"error: {text}", 1 if isinstance(error, UnexpectedResults) else 2


def diverged(error: FloatingPointError) -> str:
    """What to do about a loss, proposals or weights that are not finite."""
    first_line = str(error).partition("\n")[0]
    return (
        f"{first_line} Lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or set "
        "SOLVER.CLIP_GRADIENTS.ENABLED True, and start again"
    )


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Detectron2's defaults + ours + a YAML file + ``KEY VALUE`` pairs.

    Args:
        config_file: path, or name of a config of ours; see :func:`find_config`.

    Raises:
        ValueError: no such file, with the nearest name.
        UsageError: a key that does not exist (with the nearest one that does), a
            value of the wrong type, ``key=value`` in place of ``KEY VALUE``.
    """
    cfg = add_resnet_backbone_config(get_cfg())
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if config_file:
        config_file = str(find_config(config_file, "detection"))
        _merge(cfg, lambda: add_project_keys(cfg, config_file, overrides))
        _merge(cfg, lambda: cfg.merge_from_file(config_file, allow_unsafe=False))
    joined = next((word for word in overrides[::2] if "=" in word), None)
    if joined:
        raise UsageError(f"write {joined.replace('=', ' ', 1)!r} and not {joined!r}: KEY VALUE")
    if len(overrides) % 2:
        pairs = zip(overrides, [*overrides[1:], "SEED"], strict=True)
        alone = next((word for word, after in pairs if IS_KEY(word) and IS_KEY(after)), None)
        what = f"{alone} has no value" if alone else f"{' '.join(overrides)!r} has a rest"
        raise UsageError(f"overrides come in pairs, KEY VALUE: {what}")
    _merge(cfg, lambda: cfg.merge_from_list(list(_as_typed(cfg, overrides))))
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: there is no GPU here; use cpu")
    return cfg


def _as_typed(cfg: CfgNode, overrides: list[str]) -> Iterator[str]:
    """The overrides with whole numbers written as floats where the config has a float."""
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        node = cfg
        for name in key.split("."):
            node = node.get(name) if isinstance(node, CfgNode) else None
        is_whole = re.fullmatch(r"[+-]?\d+", value)
        yield from (key, value + ".0" if is_whole and isinstance(node, float) else value)


def _merge(cfg: CfgNode, merge: Callable[[], None]) -> None:
    try:
        merge()
    except (KeyError, ValueError, AssertionError, TypeError, YAMLError) as error:
        # yacs says "Non-existent config key: A.B" (KeyError) in files and "Non-existent key: A.B"
        # (AssertionError) in overrides
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error))
        if not unknown:
            raise UsageError(f"config: {' '.join(str(error).split())}") from error
        near = difflib.get_close_matches(unknown[1], _keys(cfg), n=1, cutoff=0.4)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"there is no config key {unknown[1]}{hint}") from error


def refuse_frozen_random(cfg: CfgNode) -> None:
    """Layers without weights that cannot learn either would spoil a training silently.

    Raises:
        UsageError: ``MODEL.WEIGHTS`` is empty, and ``FREEZE_AT`` or FrozenBN keeps layers fixed.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    key, norm = "MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM
    if "vgg" in cfg.MODEL.BACKBONE.NAME:
        key, norm = "RESNET_BACKBONE.VGG.NORM", backbone_node(cfg).VGG.NORM
    found, mend = [], []
    if freeze_at > 0:
        found.append(f"the first {freeze_at} stages are frozen (MODEL.BACKBONE.FREEZE_AT)")
        mend.append("MODEL.BACKBONE.FREEZE_AT 0")
    if norm == "FrozenBN":
        found.append(f"{key} is FrozenBN")
        mend.append(f"{key} BN")
    if found and not cfg.MODEL.WEIGHTS:
        raise UsageError(
            f"MODEL.WEIGHTS is empty but {' and '.join(found)}: random layers would never learn; "
            f"give weights, or set {' '.join(mend)}"
        )


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def take_back_overrides(args: argparse.Namespace, *options: str) -> None:
    """Gives KEY VALUE pairs behind options with several values back to the config, in place.

    Args:
        options: beside ``image_root``; their values are lists of words, or None.
    """
    for option in ("image_root", *options):
        words = getattr(args, option, None) or []
        first = next((i for i, word in enumerate(words) if i and IS_KEY(word)), len(words))
        args.opts = [*args.opts, *words[first:]]
        if words:
            setattr(args, option, words[:first])
