"""YOLO's text files, with one object per line, and the files with their class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from resnet_backbone.detection.data.formats.shapes import mask_area
from resnet_backbone.detection.data.problems import reading
from resnet_backbone.runtime.errors import DataError


def is_yolo_file(file: Path) -> bool:
    """Whether the first line of a file is an object."""
    try:
        words = file.read_text(encoding="utf-8-sig").split("\n", 1)[0].split()
        is_label = len(words) >= 5 and words[0].isdecimal() and bool([float(w) for w in words])
    except (OSError, ValueError):
        return False
    return is_label and not file.name.lower().startswith("readme")


def parse_yolo_line(
    line: str, num_classes: int, size: tuple[int, int]
) -> tuple[int, tuple[float, ...], dict[str, Any]]:
    """Returns the class, the box (x0, y0, x1, y1) in pixels, and a polygon's segmentation.

    Args:
        line: ``class x y width height``, or ``class x1 y1 x2 y2 x3 y3 ...`` for a polygon, as
            fractions of the image's sides.
        size: (width, height) of the image.

    Raises:
        ValueError: it is neither.
    """
    try:
        category, *numbers = map(float, line.split())
    except ValueError:
        raise ValueError(f"{line!r} is not a class number and coordinates") from None
    if not category.is_integer() or not 0 <= category < num_classes or len(numbers) < 4:
        raise ValueError(
            f"{line!r} needs a class from 0 to {num_classes - 1} and at least four numbers"
        )
    if len(numbers) == 5:
        raise ValueError(f"{line!r} has five numbers: take the confidence out")
    if len(numbers) % 2:
        raise ValueError(f"{line!r} is not a polygon (keypoints are not read)")
    if not all(-0.5 < number < 1.5 for number in numbers):
        raise ValueError(f"{line!r} is not within the image: YOLO's are shares of it, 0..1")
    points = [number * size[k % 2] for k, number in enumerate(numbers)]
    if len(points) == 4:
        x, y, w, h = points
        return int(category), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), {}
    xs, ys = points[::2], points[1::2]
    mask = {"segmentation": [points], "area": mask_area([points])}
    return int(category), (min(xs), min(ys), max(xs), max(ys)), mask


def read_yolo_data(annotations: Path, images: Path) -> tuple[list[str], dict[Path, str]]:
    """Reads class names, and which images and folders are of which split, if a data.yaml says it.

    The names are in data.yaml, classes.txt, obj.names, or the only other YAML file, up to two
    folders above labels or images.
    """
    folders = [annotations, images]
    folders += [above for folder in folders for above in folder.absolute().parents[:2]]
    names = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names")
    places = [folder / name for folder in folders for name in names]
    for folder in filter(Path.is_dir, folders):
        others = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
        places += others if len(others) == 1 else []
    if annotations.is_file():
        places = [annotations]
    for file in filter(Path.is_file, places):
        content: Any = {}
        with reading(file):
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix in (".txt", ".names"):
                return [line.strip() for line in text.rstrip().splitlines()], {}
            content = yaml.safe_load(text)
            names = content.get("names")
            if isinstance(names, dict):
                by_number = {int(key): name for key, name in names.items()}
                numbers = range(max(by_number, default=-1) + 1)
                names = [by_number.get(number, f"class {number}") for number in numbers]
        if isinstance(names, list) and names:
            return [str(name) for name in names], _read_splits(file, content)
        raise DataError(
            f'{file} has no "names": add the class names, in the order of their numbers'
        )
    raise DataError(
        f"no data.yaml or classes.txt, for YOLO's class names, in {annotations} or above: write "
        "classes.txt there, a name in each line, or give --annotations DIR/data.yaml"
    )


def _read_splits(file: Path, content: dict[str, Any]) -> dict[Path, str]:
    """Returns the folders and images of a data.yaml's splits that exist."""
    root, found = file.parent / str(content.get("path") or ""), {}
    for split in ("train", "val", "test"):
        given = content.get(split) or ()
        for path in [given] if isinstance(given, str) else given:
            # Roboflow's ../train/images are beside the file
            places = [base / path for base in (root, file.parent)]
            places.append(file.parent / str(path).removeprefix("../"))
            place = next(filter(Path.exists, places), None)
            if place and place.suffix == ".txt":
                lines = map(str.strip, place.read_text(encoding="utf-8-sig").splitlines())
                listed = [[base / line for base in (place.parent, root)] for line in lines if line]
                entries = [next(filter(Path.exists, some), some[0]) for some in listed]
            else:
                entries = [place] if place else []
            found = {entry.resolve(): split for entry in entries} | found  # the first use counts
    return found
