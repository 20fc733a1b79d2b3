"""The report of detection runs: Markdown with tables, plots and pictures."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure
from PIL import Image

from resnet_backbone.detection.config import backbone_node, load_config
from resnet_backbone.detection.evaluation.operating import (
    best_threshold,
    count_confusion,
    f1_curves,
)
from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU
from resnet_backbone.report import detection_plots as plots
from resnet_backbone.report import detection_table as tables
from resnet_backbone.report.boxes import NoDetections, RunDetections, Truth
from resnet_backbone.report.detections import (
    DRAWS,
    RULE,
    find_misses,
    interpolated_precision,
    load_all,
    make_sheet,
    select_misses,
)
from resnet_backbone.report.detector_runs import load_detector_runs
from resnet_backbone.report.gain import DetectorGroup, Gain, describe_gain, find_gains, group_runs
from resnet_backbone.report.improvements import (
    BASELINE,
    Row,
    improvements_section,
    load_rows,
    rows_provenance,
)
from resnet_backbone.report.plots import plot_confusion, save_png
from resnet_backbone.report.runs import read_table
from resnet_backbone.report.table import WHERE, show_commands
from resnet_backbone.runtime.files import write_text
from resnet_backbone.runtime.records import flatten

PAIRS, PAIRS_BACK = 6, 2  # objects shown that only ours finds, and only the reference
PICTURES = ("gain_per_class.png", "precision_recall*.png", "f1*.png", "confusion_*.png")
PICTURES += ("errors.png", "training.png", "accuracy_time*.png", "misses_*.jpg")

VOC_MATCHING = """\
Intervals, curves, errors by kind, and pictures come from the same boxes with VOC's matching, in \
which crowds are ignored. AP50 is then the area under the curve: {}."""
INTERVALS = f"""\
In brackets are 95 % intervals (percentiles) over {DRAWS:,} test sets drawn with replacement from \
the test images. For a gain, both detectors have the same images. The intervals hold for these \
trained networks. The spread over seeds shows what another training changes."""
REDUCED = """\
**Reduced runs**: training, data, or image size are below the published protocol, see [How](#how). \
Their numbers compare with each other, but not with published ones."""
ERRORS = """\
For each class with N objects, these are the N detections with the highest scores (Hoiem et al., \
ECCV 2012; IoU .5): correct, localization (IoU .1 to .5 with an object of the class), confusion \
(with an object of another class), background, or duplicate. "Missed" counts the objects that no \
detection found at any score. All numbers are in percent of the objects, summed over the classes."""


class Report:
    """The detectors and their boxes; the report's parts in Markdown, and its pictures."""

    def __init__(self, folder_name: str, groups: Sequence[DetectorGroup], gains: Sequence[Gain]):
        self.folder, self.groups, self.gains = folder_name, groups, gains
        self.colors = plots.detector_colors(groups)
        self.parts: list[str] = []
        self.pictures: dict[str, Figure | Image.Image] = {}
        self.truth: Truth | None = None
        self.detections: dict[str, list[RunDetections]] = {}  # by the groups' labels
        self.reason = ""  # why the boxes could not be read

    def add(self, *parts: str) -> None:
        self.parts += [part for part in parts if part]

    def show(self, name: str, content: Figure | Image.Image, text: str) -> None:
        self.pictures[name] = content
        self.parts.append(f"![{text}]({self.folder}/{name})")


def write_detection_report(
    folders: Sequence[str],
    output: Path,
    data: Mapping[str, str | None],
    rows_files: Sequence[Path],
    reference: Path | None,
    note: str,
    score: float,
    command: str,
) -> None:
    """Writes the report, and its pictures to a folder of the same name beside it.

    `output` is written last, after everything has succeeded. Detections in pictures have at least
    `score`, 0..1. `command` makes this report. For `data`, see :func:`.boxes.load_truth`.
    """
    defaults = yaml.safe_load(backbone_node(load_config("", [])).dump())
    defaults = dict(flatten(defaults, "RESNET_BACKBONE."))  # for keys that older runs lack
    runs = [replace(r, config={**defaults, **r.config}) for r in load_detector_runs(folders)]
    groups = group_runs(runs)
    gains, measured = find_gains(groups, reference), [load_rows(file) for file in rows_files]
    report = Report(output.stem, groups, gains)
    try:
        report.truth, report.detections = load_all(groups, data)
    except NoDetections as error:
        report.reason = str(error)
    _add_results(report, note)
    _add_improvements(report, measured)
    _add_classes(report)
    _add_curves(report)
    _add_operating_points(report)
    _add_errors(report)
    _add_training(report)
    _add_time(report, [row for rows in measured for row in rows if row.seconds is not None])
    report.add("## What one finds and the other misses")
    if report.truth is None or not gains:
        report.add(f"There are no pictures: {report.reason or 'there is only one detector'}.")
    for gain in gains if report.truth else ():
        _add_sheets(report, gain, score)
    _add_provenance(report, rows_files, command)
    write_whole(output, report)


def _add_results(report: Report, note: str) -> None:
    groups, gains = report.groups, report.gains
    published = tables.published_section(groups, gains)
    report.add(f"# Detection: our runs{' beside published numbers' if published else ''}")
    sentences = []
    for gain in gains:
        fair = "Apart from the network and its input, their configs are the same."
        unfair = f"Their configs also differ in: {'; '.join(gain.differences)}."
        sentences.append(f"- {describe_gain(gain)} {unfair if gain.differences else fair}")
    alone = "There is only one detector, so there is nothing to compare it with."
    report.add("\n".join(sentences) or alone)
    report.add(REDUCED if any(map(tables.reductions, groups)) else "")
    report.add(note, "## Results", tables.results_section(groups, gains))
    report.add(INTERVALS if report.detections else "")
    if report.detections and groups[0].first.protocol != "voc":
        found = report.detections.items()
        means = [f"{x} {statistics.fmean(run.ap50 for run in runs):.2f}" for x, runs in found]
        report.add(VOC_MATCHING.format(", ".join(means)))
    report.add("## Beside published numbers" if published else "", published)


def _add_improvements(report: Report, measured: Sequence[Sequence[Row]]) -> None:
    improved = [rows for rows in measured if len(rows) > 1]  # one row is a measurement of time
    report.add("## Improvements in testing" if improved else "")
    for rows in improved:
        report.add(improvements_section(rows), _elsewhere(report, rows[0]))


def _add_classes(report: Report) -> None:
    report.add(f"## {report.groups[0].first.class_metric} per class")
    if report.gains:
        text = "gain per class: bars are means, dots are pairs of runs"
        report.show("gain_per_class.png", plots.plot_class_gains(report.gains), text)
    report.add(tables.class_section(report.groups, report.gains))


def _curves(report: Report, number: Callable) -> list[plots.Curves]:
    """Applies a function to each run's detections: curves (classes, levels)."""
    found = {x: np.array([*map(number, runs)]) for x, runs in report.detections.items()}
    return [plots.Curves(label, report.colors[label], values) for label, values in found.items()]


def _add_curves(report: Report) -> None:
    report.add("## Precision and recall")
    if report.truth is None:
        report.add(f"There are no curves or intervals: {report.reason}.")
        return
    curves = _curves(report, lambda run: interpolated_precision(run.numbers))
    report.add(f"At IoU {CURVE_IOU:g}; thin lines are single runs, and bold lines are their mean.")
    _show_curves(report, "precision_recall", curves, "recall", "precision, interpolated")


def _show_curves(report: Report, name: str, curves, x: str, y: str, peak=None) -> None:
    figure = plots.plot_mean_curves(curves, x, y, peak)
    report.show(f"{name}.png", figure, f"{y} against {x}")
    figure = plots.plot_class_curves(curves, report.truth.classes, x, y, peak)
    report.show(f"{name}_classes.png", figure, f"{y} against {x}, of each class")


def _add_operating_points(report: Report) -> None:
    report.add("## At a score threshold")
    if report.truth is None:
        report.add(f"There is no F1 and no confusion matrix: {report.reason}.")
        return
    classes = report.truth.classes
    curves = _curves(report, lambda run: f1_curves(run.numbers, run.found))
    values = {one.label: one.values for one in curves}
    report.add(tables.OPERATING, tables.thresholds_section(values, classes))
    _show_curves(report, "f1", curves, "score threshold", "F1", best_threshold)
    for one, runs in zip(curves, report.detections.values(), strict=True):
        threshold, _ = best_threshold(np.nanmean(one.values, axis=(0, 1)))
        found = [count_confusion(run.truth, run.found, len(classes), threshold) for run in runs]
        figure = plot_confusion(np.mean(found, axis=0), classes, detected=True)
        report.add(f"{one.label}, detections with a score of at least {threshold:.2f}:")
        name = f"confusion_{one.label.replace(' ', '_')}.png"
        report.show(name, figure, f"confusion matrix of {one.label}")


def _add_errors(report: Report) -> None:
    report.add("## Errors by kind")
    shares = {
        group.label: [plots.error_shares(run.details.get("errors", ())) for run in group.runs]
        for group in report.groups
    }
    if not all(all(runs) for runs in shares.values()):
        report.add(f"Not measured: {report.reason}.")
        return
    report.add(ERRORS)
    report.show("errors.png", plots.plot_errors_by_kind(shares, report.colors), "errors by kind")


def _add_training(report: Report) -> None:
    report.add("## Training")
    metrics = {group.label: [run.metrics() for run in group.runs] for group in report.groups}
    figure = plots.plot_training(metrics, report.colors)
    if figure is None:
        report.add("There are no losses: the runs have no metrics.json.")
    else:
        report.show("training.png", figure, "losses and AP50 during training, a line for each run")


def _elsewhere(report: Report, row: Row) -> str:
    """Returns a note if a row was evaluated on other images than the runs; "" if not."""
    if row.test in ((), tuple(report.groups[0].first.test)):
        return ""
    names = " and ".join(f"`{tables.short_name(name)}`" for name in row.test)
    return f"Measured on {names}: these numbers compare with each other, not with the runs' above."


def _add_time(report: Report, rows: Sequence[Row]) -> None:
    """Adds a plot of the detectors and rows on the same images, and one for each other set."""
    report.add("## Accuracy and time")
    elsewhere = [row for row in rows if _elsewhere(report, row)]
    here = [row for row in rows if row not in elsewhere]
    points, sources = [], {}
    for group in report.groups:
        seconds, source = _seconds(group, here, elsewhere)
        sources.setdefault(source, []).append(group.label)
        values = group.values("AP50")
        if seconds is not None and values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            ap50, color = statistics.fmean(values), report.colors[group.label]
            points.append(plots.Point(group.label, seconds, ap50, spread, color))
    points += [_row_point(report, row) for row in here if row.name != BASELINE]
    if points:
        report.show("accuracy_time.png", plots.plot_accuracy_and_time(points), "AP50 and seconds")
    for source, names in sources.items():
        report.add(f"Seconds per image of {', '.join(names)}: {source}." if source else "")
    for place, test in enumerate(dict.fromkeys(row.test for row in elsewhere), 2):
        found = [row for row in elsewhere if row.test == test]
        figure = plots.plot_accuracy_and_time([_row_point(report, row) for row in found])
        report.add(_elsewhere(report, found[0]))
        report.show(f"accuracy_time_{place}.png", figure, "AP50 and seconds of these rows")


def _seconds(
    group: DetectorGroup, here: Sequence[Row], elsewhere: Sequence[Row]
) -> tuple[float | None, str]:
    """Returns mean seconds per image of a group's runs, and their source; "" for rows here."""
    own = {run.home: run.results.get("seconds_per_image") for run in group.runs}
    ways = "; ".join(dict.fromkeys(tables.timing(run) for run in group.runs))
    for source, measured in (
        ("", {row.measured_run: row.seconds for row in here}),
        (f"the runs' own evaluations ({ways})", own),
        ("the rows on other images", {row.measured_run: row.seconds for row in elsewhere}),
    ):
        found = [measured[path] for path in own if measured.get(path) is not None]
        if found:
            return statistics.fmean(found), source
    return None, "not measured"


def _row_point(report: Report, row: Row) -> plots.Point:
    """Returns a row's point; a baseline gets its run's label and color."""
    point = plots.Point(row.name, row.seconds, row.numbers["AP50"])
    labels = {run.home: group.label for group in report.groups for run in group.runs}
    label = labels.get(row.measured_run)
    return point._replace(label=label, color=report.colors[label]) if label else point


def _add_sheets(report: Report, gain: Gain, score: float) -> None:
    label, other = gain.ours.label, gain.reference.label
    ours, reference = report.detections[label], report.detections[other]
    pairs = (ours, reference), (reference, ours)
    found, back = (np.isfinite(find_misses(*pair, score)).sum() for pair in pairs)
    objects = int((~ours[0].truth["difficult"]).sum())
    report.add(
        f"Of {objects:,} objects, {label} finds {found:,} that {other} misses, and "
        f"{other} finds {back:,} that {label} misses.",
        RULE.format(score=score, iou=CURVE_IOU, finder=label, other=other)
        + " The reverse follows below.",
    )
    if not found and not back:
        report.add("There is nothing to show.")
        return
    name = f"misses_{label.replace(' ', '_')}"
    pairs = [(row, reference[0], run) for row, run in select_misses(ours, reference, PAIRS, score)]
    back = [(row, run, ours[0]) for row, run in select_misses(reference, ours, PAIRS_BACK, score)]
    for end, shown, text in (
        ("", pairs, f"{label} finds, {other} misses"),
        ("_back", back, f"{other} finds, {label} misses"),
    ):
        if shown:
            report.add(f"{text}:")
            report.show(f"{name}{end}.jpg", make_sheet(shown, report.truth, score), text)
    report.add(
        f"Green: annotated objects, the chosen one thick. Orange: {other}, blue: {label}, all "
        f"detections with a score of at least {score:g}."
    )


def _add_provenance(report: Report, rows_files: Sequence[Path], command: str) -> None:
    recorded = [one for group in report.groups for run in group.runs for one in run.commands]
    recorded += [read_table(file).get("command") for file in rows_files]
    commands = show_commands([*recorded, command])
    report.add("## How", WHERE, tables.provenance_section(report.groups, commands))
    report.add(*(rows_provenance(file, commands) for file in rows_files))
    report.add(f"This page: `{commands[command]}`")


def write_whole(output: Path, report: Report) -> None:
    """Writes pictures to a temporary folder, moves them in place, and writes the text."""
    folder = output.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}.", dir=output.parent) as temporary:
        stage = Path(temporary)
        for name, content in report.pictures.items():
            if isinstance(content, Figure):
                save_png(content, stage / name)
            else:
                content.save(stage / name, quality=75, optimize=True)
        for name in report.pictures:
            folder.mkdir(exist_ok=True)
            os.replace(stage / name, folder / name)
    for old in (path for pattern in PICTURES for path in folder.glob(pattern)):
        if old.name not in report.pictures:
            old.unlink()
    write_text(output, "\n\n".join(report.parts) + "\n")
