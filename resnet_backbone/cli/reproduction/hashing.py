"""What a step depends on, as short hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from resnet_backbone.cli.reproduction.plan import PlanError
from resnet_backbone.runtime.files import sha256


def digest(content: object) -> str:
    """SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from error


def config_files(path: Path) -> Iterator[Path]:
    """A YAML config and, from ``_BASE_`` to ``_BASE_``, those that it builds on."""
    yield path
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    bases = (content or {}).get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from config_files(path.parent / base)


class _Loader(yaml.SafeLoader):
    """Passes over tags that Detectron2's own loader knows, such as tuples."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def tree_digest(folder: Path) -> str:
    """Of a data set's folder: when files were added to or taken from it and its subfolders.

    Two levels below it are looked at (ImageNet's classes, VOC's ImageSets/Main).

    Raises:
        PlanError: no such folder.
    """
    if not folder.is_dir():
        raise PlanError(f"{folder}: no such folder of data")
    folders = [folder, *folder.glob("*/"), *folder.glob("*/*/")]
    return digest(sorted([str(f.relative_to(folder)), f.stat().st_mtime_ns] for f in folders))
