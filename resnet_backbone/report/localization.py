"""The page of localization runs: our errors beside the paper's Table 13."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_backbone.detection.evaluation.imagenet import (
    LAST_RANK,
    LOCALIZATIONS,
    TOP5,
    TRUE_CLASS,
    wrong_images,
)
from resnet_backbone.detection.inference.pictures import (
    UnreadableError,
    contact_sheet,
    draw_boxes,
    read_bgr,
    save_image,
)
from resnet_backbone.report.detection_table import NOT_MEASURED, run_facts
from resnet_backbone.report.detector_runs import DetectorRun, load_detector_run
from resnet_backbone.report.evaluations import (
    CHANGE,
    ERROR,
    INTERVALS,
    change_interval,
    error_interval,
)
from resnet_backbone.report.gain import NONE
from resnet_backbone.report.published import LOCALIZATION, LOCALIZATION_IMAGES
from resnet_backbone.report.table import WHERE, markdown, show_commands
from resnet_backbone.runtime.files import write_text
from resnet_backbone.runtime.records import RESULTS

TOLERANCE = 1e-6  # percent
NODE = "RESNET_BACKBONE.LOCALIZATION"
MEMBERS = "RESNET_BACKBONE.TEST.ENSEMBLE"
HEADER = ["method", "testing", "paper, network", "true class", "top-5"]
HEADER += ["**ours**, network", "true class", "top-1", "top-5"]
TEXT = """\
Errors in percent of the images: with the true class given, and with the one or five best classes \
of a classifier. A box is right if it overlaps an object of its class by at least .5. Paper: arXiv \
1512.03385, Table 13, on ImageNet's validation set. Dense testing is of the whole image at \
several scales. """
CHANGES = "Errors minus those of {first}, image by image:"
SHOWN, COLUMNS, TILE = 12, 4, 360  # images on the sheet, in a row, largest side in pixels
GREEN, ORANGE = (0.24, 0.86, 0.24), (0.9, 0.47, 0.08)
PICTURE = """\
Of {count} images, evenly spaced, the box of the true class by {name}: objects in green, the box \
in orange. Beside the class: the score, and the overlap with the best object."""
OTHER_IMAGES = "Ours are of other images than the paper's, so the two do not compare."


class Localization(NamedTuple):
    """A run of train-net that was evaluated on a localization set."""

    run: DetectorRun
    images: list[dict[str, Any]]  # of localizations.json, see LOCEvaluator
    wrong: dict[str, np.ndarray]  # measured error -> whether each image is wrong, (N,)

    @property
    def way(self) -> tuple[str, str]:
        """Method and testing, in Table 13's terms."""
        config = self.run.config
        rcnn = config.get("MODEL.META_ARCHITECTURE") == "LocalizationRCNN"
        testing = "dense" if config.get(f"{NODE}.SCALES") else "whole image"
        testing = "center crop" if config.get(f"{NODE}.CENTER_CROP") else testing
        return "RPN + R-CNN" if rcnn else "RPN", testing

    @property
    def others(self) -> int:
        """Number of further networks in the ensemble."""
        return len(self.run.config.get(MEMBERS) or ())

    @property
    def name(self) -> str:
        return ", ".join([*self.way, *["ensemble"] * bool(self.others)])

    @property
    def cells(self) -> list[str]:
        """Cells of network and errors."""
        cells = [
            ERROR.format(*error_interval(self.wrong[key])) if key in self.wrong else NONE
            for key in LAST_RANK
        ]
        others = f" and {self.others} more" if self.others else ""
        return [f"{self.run.family}-{self.run.depth}{others}", *cells]


def load_localization(folder: str) -> Localization:
    """Reads a run folder; ValueError if files are missing, damaged, or contradict each other."""
    run = load_detector_run(folder, "localization")
    path, stated = run.inference / LOCALIZATIONS, run.results["results"]["localization"]
    if not path.is_file():
        raise ValueError(f"there is no {path}: evaluate the run again with train-net --eval-only")
    try:
        images = json.loads(path.read_text(encoding="utf-8"))
        wrong = {key: rows for key, rows in wrong_images(images).items() if key in stated}
        for key, rows in wrong.items():
            if abs(100 * rows.mean() - stated[key]) > TOLERANCE:
                raise ValueError(f"its {key} is not that of {run.folder / RESULTS}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from the run") from error
    return Localization(run, images, wrong)


def errors_section(runs: Sequence[Localization]) -> str:
    """Returns the rows of Table 13, then our runs with other methods or testing."""
    rows, left = [], list(runs)
    for one in LOCALIZATION:
        like = [run for run in left if run.way == (one.method, one.testing)]
        mine = [run for run in like if bool(run.others) == (one.network == "ensemble")]
        left = [run for run in left if run not in mine]
        paper = [NONE if error is None else f"{error:.1f}" for error in (one.true_class, one.top5)]
        ours = [run.cells for run in mine] or [[NOT_MEASURED, NONE, NONE, NONE]]
        rows += [[one.method, one.testing, one.network, *paper, *cells] for cells in ours]
    rows += [[*run.way, NONE, NONE, NONE, *run.cells] for run in left]
    return markdown(HEADER, rows)


def changes_section(runs: Sequence[Localization]) -> str:
    """Returns each run's errors minus those of the first on the same images; "" of one run."""
    first, rows = runs[0], []
    for run in runs[1:]:
        if [row["image"] for row in run.images] != [row["image"] for row in first.images]:
            folders = f"{run.run.folder} and {first.run.folder}"
            raise ValueError(f"{folders} were evaluated on different images")
        cells = [
            CHANGE.format(*change_interval(run.wrong[key], first.wrong[key]))
            if key in run.wrong and key in first.wrong
            else NONE
            for key in (TRUE_CLASS, TOP5)
        ]
        rows.append([run.name, *cells])
    if not rows:
        return ""
    table = markdown(["", "true class", "top-5"], rows)
    return f"{CHANGES.format(first=first.name)}\n\n{table}"


def draw_sheet(run: Localization) -> tuple[np.ndarray, int]:
    """Draws objects and boxes of evenly spaced images; also returns their number."""
    step = max(1, len(run.images) // SHOWN)
    pictures, captions = [], []
    for row in run.images[::step][:SHOWN]:
        boxes, colors = [*row["objects"]], [GREEN] * len(row["objects"])
        text = f"{row['class']}: no box"
        if row["box"]:
            boxes, colors = [*boxes, row["box"]], [*colors, ORANGE]
            text = f"{row['class']} {row['score']:.2f}, overlap {row['iou']:.2f}"
        photo = np.ascontiguousarray(read_bgr(Path(row["image"]))[:, :, ::-1])
        pictures.append(draw_boxes(photo, boxes, [""] * len(boxes), colors))
        captions.append(text)
    return contact_sheet(pictures, COLUMNS, captions, TILE), len(pictures)


def write_localization_report(folders: Sequence[str], output: Path, note: str, command: str) -> str:
    """Writes the page of some runs of train-net, and returns its table.

    Args:
        command: the command that makes this page.

    Raises:
        ValueError: a run has no results, or the runs were evaluated on different images.
    """
    runs = [load_localization(folder) for folder in folders]
    commands = show_commands([*(one for run in runs for one in run.run.commands), command])
    same = all(len(run.images) == LOCALIZATION_IMAGES for run in runs)
    table, facts = errors_section(runs), []
    for run in runs:
        facts.append(run_facts(run.run, commands, f"{run.name}, {len(run.images)} images"))
    try:
        sheet, count = draw_sheet(runs[-1])
        save_image(output.with_suffix("") / "boxes.jpg", sheet)
        shown = [f"![images with boxes]({output.stem}/boxes.jpg)"]
        shown.append(PICTURE.format(count=count, name=runs[-1].name))
    except UnreadableError as error:  # the images are elsewhere
        shown = [f"No picture: {error}."]
    parts = ["# Localization: our runs beside Table 13", note, table, TEXT + INTERVALS]
    parts += ["" if same else OTHER_IMAGES, changes_section(runs), *shown]
    parts += ["## How", WHERE, "\n".join(facts), f"This page: `{commands[command]}`"]
    write_text(output, "\n\n".join(filter(None, parts)) + "\n")
    return table
