"""Pictures that the tools run networks on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnet_backbone.classification.data.decode import read_rgb
from resnet_backbone.classification.data.imagenet import EXTENSIONS


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are given, and in place of a folder all pictures below it, sorted by name.

    Raises:
        ValueError: no pictures at all.
    """
    found: list[Path] = []
    paths = [Path(path) for path in paths]
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file == path or file.suffix.lower() in EXTENSIONS]
    if not found:
        raise ValueError(f"--images {' '.join(map(str, paths))}: no pictures there")
    return found


def read_picture(file: Path) -> Image.Image:
    """A picture as a person sees it: RGB, upright.

    Raises:
        ValueError: anything that is not a whole image; with the file's name.
    """
    return Image.fromarray(read_rgb(file))


def to_tensor(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W), RGB."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
