"""Reading configs: files, ``KEY VALUE`` overrides, and one line for what is wrong in them."""

from __future__ import annotations

import argparse
import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from yaml import YAMLError

from resnet_backbone.detection.config import add_resnet_backbone_config
from resnet_backbone.detection.modeling.projects import add_project_keys
from resnet_backbone.runtime.configs import find_config
from resnet_backbone.runtime.errors import UsageError

IS_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD").fullmatch

# Detectron2's modules call it when they are imported; a user of the tools can do nothing about it.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def load_config(config_file: str, overrides: Sequence[str]) -> CfgNode:
    """Detectron2's defaults + ours + a YAML file + ``KEY VALUE`` pairs.

    Args:
        config_file: path, or name of a config of ours; see :func:`find_config`.

    Raises:
        ValueError: no such file, with the nearest name.
        UsageError: a key that does not exist (with the nearest one that does), a
            value of the wrong type, ``key=value`` in place of ``KEY VALUE``.
    """
    return load_configs(config_file, overrides)[0]


def load_configs(config_file: str, overrides: Sequence[str]) -> tuple[CfgNode, CfgNode]:
    """The config of :func:`load_config`, and the same without the overrides."""
    cfg = add_resnet_backbone_config(get_cfg())
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if config_file:
        config_file = str(find_config(config_file, "detection"))
        _merge(cfg, lambda: add_project_keys(cfg, config_file, overrides))
        _merge(cfg, lambda: cfg.merge_from_file(config_file, allow_unsafe=False))
    planned = cfg.clone()
    _check_pairs(overrides)
    _merge(cfg, lambda: cfg.merge_from_list(list(_as_typed(cfg, overrides))))
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: there is no GPU here; use cpu")
    return cfg, planned


def _check_pairs(overrides: Sequence[str]) -> None:
    joined = next((word for word in overrides[::2] if "=" in word), None)
    if joined:
        raise UsageError(f"write {joined.replace('=', ' ', 1)!r} and not {joined!r}: KEY VALUE")
    if len(overrides) % 2:
        pairs = zip(overrides, [*overrides[1:], "SEED"], strict=True)
        alone = next((word for word, after in pairs if IS_KEY(word) and IS_KEY(after)), None)
        what = f"{alone} has no value" if alone else f"{' '.join(overrides)!r} has a rest"
        raise UsageError(f"overrides come in pairs, KEY VALUE: {what}")


def _as_typed(cfg: CfgNode, overrides: Sequence[str]) -> Iterator[str]:
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
