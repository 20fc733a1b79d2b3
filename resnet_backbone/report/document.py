"""The report of detection runs: Markdown with tables, plots and pictures."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from resnet_backbone.detection.evaluation.voc_ap import CURVE_IOU
from resnet_backbone.report.detection_plots import (
    Curves,
    Point,
    detector_colors,
    error_shares,
    plot_accuracy_and_time,
    plot_class_curves,
    plot_class_gains,
    plot_errors_by_kind,
    plot_learning,
    plot_losses,
    plot_mean_curves,
)
from resnet_backbone.report.detection_table import (
    Row,
    class_section,
    improvements_section,
    is_coco,
    load_rows,
    provenance_section,
    published_section,
    reductions,
    results_section,
    rows_provenance,
    short_name,
    timing,
)
from resnet_backbone.report.detections import (
    DRAWS,
    NoDetections,
    interpolated_precision,
    load_all,
    resample_groups,
    with_defaults,
)
from resnet_backbone.report.gain import DetectorGroup, Gain, describe_gain, find_gains, group_runs
from resnet_backbone.report.pictures import (
    RULE,
    SCORE,
    Pair,
    Section,
    find_misses,
    make_sheet,
    select_misses,
)
from resnet_backbone.report.plots import save_png
from resnet_backbone.report.runs import load_detector_runs, read_table
from resnet_backbone.report.table import WHERE, show_commands

PAIRS, PAIRS_BACK = 6, 2  # objects shown that a detector finds, and the other way round
BASELINE = "baseline"  # the row of a detector as it was trained
PICTURES = ("gain_per_class.png", "precision_recall.png", "precision_recall_classes.png")
PICTURES += ("errors.png", "losses.png", "learning.png", "accuracy_time*.png", "misses_*.jpg")

SPREAD = """\
AP in percent: mean ± sample standard deviation over the seeds (one seed: no spread). Gains: \
difference of the means ± its standard error, and the smallest and largest difference of two runs, \
one of each detector. AP50 is the area under the curve (VOC 2010 and later), 11-point is VOC \
2007's, AP the mean over IoU .5:.95."""
INTERVALS = f"""\
In brackets: 95 % intervals (percentiles) over {DRAWS:,} test sets drawn with replacement from the \
test images; of a gain, with the same images for both detectors. They hold for these trained \
networks: training again is what the spread over seeds is of."""
ERRORS = """\
Of each class as many best-scored detections are looked at as it has objects (Hoiem et al., ECCV \
2012; IoU .5): correct, localization (IoU .1 to .5 with an object of the class), confusion (with \
one of another class), background, duplicate. Missed are the objects that no detection found at \
any score. All in percent of the objects, summed over the classes."""
TABLE_9 = """\
Ours beside the paper's Table 9 (ResNet-101 on COCO, each row on top of the one above; test-dev: \
trained on trainval)."""


class Report:
    """Markdown in parts, and the pictures that it shows."""

    def __init__(self, folder_name: str):
        self._folder = folder_name
        self.parts: list[str] = []
        self.pictures: dict[str, Figure | bytes] = {}

    def add(self, *parts: str) -> None:
        self.parts += [part for part in parts if part]

    def show(self, name: str, content: Figure | bytes, text: str) -> None:
        self.pictures[name] = content
        self.parts.append(f"![{text}]({self._folder}/{name})")

    @property
    def text(self) -> str:
        return "\n\n".join(self.parts) + "\n"


def write_detection_report(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    voc_root: str | None = None,
    rows_files: Sequence[str | os.PathLike] = (),
    reference: str | os.PathLike | None = None,
    note: str = "",
    score: float = SCORE,
    command: str = "",
) -> None:
    """Write the report, and its pictures into the folder beside it that has its name.

    Args:
        folders: run folders of tools/train_net.py, or folders of several seeds.
        output: Markdown file, written last and only if nothing goes wrong.
        voc_root: of the test set; by default as the runs' commands have it.
        rows_files: results.json of tools/evaluate_detector.py.
        reference: run folder that the others are compared with, see
            :func:`~resnet_backbone.report.gain.find_gains`.
        note: a paragraph on the data.
        score: from which on a detection counts in the pictures, 0..1.
        command: that makes this report.

    Raises:
        OSError, ValueError: a run that has not ended, damaged files, the same seed twice, runs of
            different test sets.
    """
    output, rows_files = Path(output), [Path(file) for file in rows_files]
    groups = group_runs(with_defaults(load_detector_runs(folders)))
    gains = find_gains(groups, None if reference is None else Path(reference))
    tables = [load_rows(file) for file in rows_files]
    truth, detections, reason = None, [], ""
    try:
        truth, detections = load_all(groups, voc_root)
        resample_groups(groups, detections, len(truth.images))
    except NoDetections as error:
        reason = str(error)
    report = Report(output.with_suffix("").name)
    _add_results(report, groups, gains, note)
    _add_improvements(report, groups, tables)
    _add_classes(report, groups, gains)
    report.add("## Precision and recall")
    if truth is None:
        report.add(f"Neither curves nor intervals: {reason}.")
    else:
        _add_curves(report, groups, truth.classes, detections)
    _add_errors(report, groups)
    _add_training(report, groups)
    _add_time(report, groups, [row for rows in tables for row in rows])
    report.add("## What one finds and the other misses")
    if truth is None or not gains:
        report.add(f"No pictures: {reason or 'there is one detector only'}.")
    else:
        for gain in gains:
            sides = [detections[groups.index(group)] for group in (gain.ours, gain.reference)]
            _add_sheet(report, gain, *sides, truth, score)
    _add_provenance(report, groups, rows_files, command)
    write_whole(output, report)


def _add_results(report: Report, groups, gains: Sequence[Gain], note: str) -> None:
    report.add("# Detection: our runs beside published numbers")
    sentences = [f"- {describe_gain(gain)} {_fairness(gain)}" for gain in gains]
    report.add("\n".join(sentences) or "One detector: there is nothing to compare it with.")
    if any(map(reductions, groups)):
        report.add(
            "**Reduced runs**: training, data or image size stay below the published protocol, see "
            "[How](#how). Their numbers compare with each other, not with published ones."
        )
    report.add(note, "## Results", results_section(groups, gains), SPREAD)
    report.add(INTERVALS if any(group.draws for group in groups) else "")
    report.add("## Beside published numbers", published_section(groups, gains))


def _fairness(gain: Gain) -> str:
    if not gain.differences:
        return "Apart from the network and its input, their configs are the same."
    return f"Their configs also differ in: {'; '.join(gain.differences)}."


def _add_improvements(report: Report, groups, tables: Sequence[Sequence[Row]]) -> None:
    improved = [rows for rows in tables if len(rows) > 1]  # one row is a measurement of time
    report.add("## Improvements in testing" if improved else "")
    for rows in improved:
        report.add(improvements_section(rows), _elsewhere(groups, rows[0]))
        report.add(TABLE_9 if is_coco(rows) else "Each row adds to the one above.")


def _add_classes(report: Report, groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> None:
    report.add(f"## {groups[0].first.class_metric} per class")
    if gains:
        text = "gain per class: bars are means, dots the pairs of runs"
        report.show("gain_per_class.png", plot_class_gains(gains), text)
    report.add(class_section(groups, gains))


def _add_curves(report: Report, groups, classes: Sequence[str], detections) -> None:
    curves, colors = [], detector_colors(groups)
    for group, runs in zip(groups, detections, strict=True):
        precision = np.array([interpolated_precision(run.numbers) for run in runs])
        curves.append(Curves(group.label, colors[group.label], precision))
    report.add(f"At IoU {CURVE_IOU:g}; thin lines are single runs, bold ones their mean.")
    report.show("precision_recall.png", plot_mean_curves(curves), "precision and recall")
    figure = plot_class_curves(curves, classes)
    report.show("precision_recall_classes.png", figure, "precision and recall of each class")


def _add_errors(report: Report, groups: Sequence[DetectorGroup]) -> None:
    report.add("## Errors by kind")
    shares = {
        group.label: [error_shares(run.details.get("errors", ())) for run in group.runs]
        for group in groups
    }
    if not all(all(runs) for runs in shares.values()):
        report.add("Not measured: a run has no errors in its voc_results.json.")
        return
    report.add(ERRORS)
    report.show(
        "errors.png", plot_errors_by_kind(shares, detector_colors(groups)), "errors by kind"
    )


def _add_training(report: Report, groups: Sequence[DetectorGroup]) -> None:
    report.add("## Training")
    colors = detector_colors(groups)
    learning, losses = plot_learning(groups, colors), plot_losses(groups, colors)
    if learning is not None:
        report.show("learning.png", learning, "AP50 during training, a line for each run")
    if losses is not None:
        report.show("losses.png", losses, "training losses, a line for each run")
    else:
        report.add("No losses: the runs have no metrics.json.")


def _elsewhere(groups: Sequence[DetectorGroup], row: Row) -> str:
    """Says that a row was evaluated on other images than the runs; empty where it was not."""
    if row.test in ((), tuple(groups[0].first.test)):
        return ""
    names = " and ".join(f"`{short_name(name)}`" for name in row.test)
    return f"Measured on {names}: these numbers compare with each other, not with the runs' above."


def _add_time(report: Report, groups: Sequence[DetectorGroup], rows: Sequence[Row]) -> None:
    """The detectors and the rows on the same images in one plot, other images in further ones."""
    report.add("## Accuracy and time")
    colors = detector_colors(groups)
    labels = {run.folder.resolve(): group.label for group in groups for run in group.runs}
    timed = [row for row in rows if row.seconds is not None]
    elsewhere = [row for row in timed if _elsewhere(groups, row)]
    here = [row for row in timed if row not in elsewhere]
    points, sources = [], {}
    for group in groups:
        seconds, source = _seconds(group, here, elsewhere)
        sources.setdefault(source, []).append(group.label)
        values = group.values("AP50")
        if seconds is not None and values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            ap50 = statistics.fmean(values)
            points.append(Point(group.label, seconds, ap50, spread, colors[group.label]))
    points += [_row_point(row, labels, colors) for row in here if row.name != BASELINE]
    if points:
        report.show("accuracy_time.png", plot_accuracy_and_time(points), "AP50 and seconds")
    for source, names in sources.items():
        report.add(f"Seconds per image of {', '.join(names)}: {source}." if source else "")
    for place, test in enumerate(dict.fromkeys(row.test for row in elsewhere), 2):
        found = [row for row in elsewhere if row.test == test]
        figure = plot_accuracy_and_time([_row_point(row, labels, colors) for row in found])
        report.add(_elsewhere(groups, found[0]))
        report.show(f"accuracy_time_{place}.png", figure, "AP50 and seconds of these rows")


def _seconds(
    group: DetectorGroup, here: Sequence[Row], elsewhere: Sequence[Row]
) -> tuple[float | None, str]:
    """Seconds per image of a group, and from where: rows here ("") come first."""
    ways = "; ".join(dict.fromkeys(timing(run) for run in group.runs))
    found = {
        "": group.seconds_per_image(_baselines(here)),
        f"the runs' own evaluations ({ways})": group.seconds_per_image(),
        "the rows on other images": group.seconds_per_image(_baselines(elsewhere)),
    }
    known = ((seconds, source) for source, seconds in found.items() if seconds is not None)
    return next(known, (None, "not measured"))


def _baselines(rows: Sequence[Row]) -> dict[Path, float]:
    """Seconds per image of runs as they were trained, by their folders."""
    return {Path(r.run).resolve(): r.seconds for r in rows if r.name == BASELINE and r.run}


def _row_point(row: Row, labels: Mapping[Path, str], colors: Mapping[str, str]) -> Point:
    """A baseline has its run's label and color."""
    label = labels.get(Path(row.run).resolve()) if row.name == BASELINE else None
    color = {"color": colors[label]} if label else {}
    return Point(label or row.name, row.seconds, row.numbers["AP50"], **color)


def _add_sheet(report: Report, gain: Gain, ours, reference, truth, score: float) -> None:
    label, other = gain.ours.label, gain.reference.label
    counts = [
        int(np.isfinite(find_misses(*pair, score)).sum())
        for pair in ((ours, reference), (reference, ours))
    ]
    objects = int((~ours[0].truth["difficult"]).sum())
    report.add(
        f"Of {objects:,} objects, {label} finds {counts[0]:,} that {other} misses; the other way "
        f"round it is {counts[1]:,}.",
        RULE.format(score=score, iou=CURVE_IOU, finder=label, other=other)
        + " Below them, the same the other way round.",
    )
    found = [
        Pair(m.row, reference[0], ours[m.run]) for m in select_misses(ours, reference, PAIRS, score)
    ]
    back = [
        Pair(m.row, reference[m.run], ours[0])
        for m in select_misses(reference, ours, PAIRS_BACK, score)
    ]
    sections = [
        Section(f"{a} finds, {b} misses", pairs)
        for a, b, pairs in ((label, other, found), (other, label, back))
        if pairs
    ]
    if not sections:
        report.add("There are none to show.")
        return
    name = f"misses_{label.replace(' ', '_')}.jpg"
    report.show(name, make_sheet(sections, truth, score), f"{label} and {other}")
    report.add(
        f"Green: annotated objects, the chosen one thick. Orange: {other}, blue: {label}, all "
        f"detections with a score of at least {score:g}."
    )


def _add_provenance(report: Report, groups, rows_files: Sequence[Path], command: str) -> None:
    recorded = [run.results.get("command") for group in groups for run in group.runs]
    recorded += [read_table(file).get("command") for file in rows_files]
    commands = show_commands([*recorded, command])
    report.add("## How", WHERE, provenance_section(groups, commands))
    report.add(*(rows_provenance(file, commands) for file in rows_files))
    report.add(f"This page: `{commands[command]}`" if command else "")


def write_whole(output: Path, report: Report) -> None:
    """Write pictures and text to a temporary folder first, then put them in place."""
    folder = output.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.stem}.", dir=output.parent))
    try:
        (stage / output.name).write_text(report.text, encoding="utf-8")
        for name, content in report.pictures.items():
            if isinstance(content, bytes):
                (stage / name).write_bytes(content)
            else:
                save_png(content, stage / name)
        if report.pictures:
            folder.mkdir(exist_ok=True)
        for name in report.pictures:
            os.replace(stage / name, folder / name)
        for old in (path for pattern in PICTURES for path in folder.glob(pattern)):
            if old.name not in report.pictures:
                old.unlink()
        os.replace(stage / output.name, output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
