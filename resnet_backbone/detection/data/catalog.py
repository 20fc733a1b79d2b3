"""Registering a data set twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog


def register_once(name: str, load: Callable[[], list[dict]], metadata: Mapping[str, Any]) -> None:
    """Register `name` with Detectron2's catalogs; the same registration again does nothing.

    Raises:
        ValueError: `name` is registered with other metadata.
    """
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        changed = [key for key, value in metadata.items() if known.get(key) != value]
        if changed:
            raise ValueError(
                f"data set {name!r} is registered already with another {', '.join(changed)};"
                " choose another name"
            )
        return
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
