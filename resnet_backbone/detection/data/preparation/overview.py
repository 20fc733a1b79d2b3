"""Pictures of a data set: how often each class occurs, and images with their boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from matplotlib.figure import Figure

from resnet_backbone.detection.data.preparation.tree_report import SplitCheck, TreeCheck
from resnet_backbone.detection.inference.visualize import (
    contact_sheet,
    draw_ground_truth,
    save_image,
)
from resnet_backbone.report.plots import COLORS, save_png

COLUMNS = 4
PARTS = {"trainval": ("train", "val")}  # splits that another one unites


def draw_classes(tree: TreeCheck, path: Path) -> bool:
    """Writes a bar chart (PNG) of the boxes per class, one bar for each annotated split.

    Returns:
        False where no split is annotated, and nothing is written.
    """
    annotated = {split.name: split for split in tree.splits if split.report.annotated}
    united = [part for whole, parts in PARTS.items() if whole in annotated for part in parts]
    shown = [split for name, split in annotated.items() if name not in united]
    names = list(dict.fromkeys(name for split in shown for name in split.class_names))
    if not names:
        return False
    height = 1.2 + 0.2 * len(names) * max(1, 0.5 * len(shown))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for number, split in enumerate(shown):
        counts = [split.report.boxes[name] for name in names]
        places = np.arange(len(names)) + (number - (len(shown) - 1) / 2) * width
        label = f"{split.name}: {sum(counts):,} boxes"
        axes.barh(places, counts, width, label=label, color=COLORS[number % len(COLORS)])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xscale="symlog", xlabel="boxes (logarithmic)", ylim=(len(names) - 0.4, -0.6))
    axes.set_title(tree.folder, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower left")
    save_png(figure, path)
    return True


def draw_samples(split: SplitCheck, path: Path) -> bool:
    """Writes a sheet of images of a split with their boxes and classes; the suffix says the format.

    Returns:
        False where no image can be shown, and nothing is written.
    """
    pictures = [
        draw_ground_truth(read_image(file, "RGB"), boxes, classes, split.class_names)
        for file, boxes, classes in split.samples
    ]
    if not pictures:
        return False
    captions = [Path(file).name for file, _, _ in split.samples]
    save_image(path, contact_sheet(pictures, COLUMNS, captions))
    return True
