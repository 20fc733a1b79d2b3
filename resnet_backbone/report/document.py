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
    plot_losses,
    plot_mean_curves,
)
from resnet_backbone.report.detection_table import (
    Row,
    class_section,
    improvements_section,
    load_rows,
    published_section,
    reductions,
    results_section,
    short_name,
)
from resnet_backbone.report.detector_gain import Gain, describe_gain, find_gains
from resnet_backbone.report.detector_provenance import (
    clean_command,
    provenance_section,
    rows_provenance,
    timing,
)
from resnet_backbone.report.detector_runs import DetectorGroup, group_runs, load_detector_runs
from resnet_backbone.report.evidence import (
    NoEvidence,
    Truth,
    interpolated_precision,
    load_all,
)
from resnet_backbone.report.misses import RULE, SCORE, find_misses, select_misses
from resnet_backbone.report.picture import save_png
from resnet_backbone.report.sheet import Pair, Section, make_sheet
from resnet_backbone.report.versions import with_defaults

PAIRS, PAIRS_BACK = 6, 2  # objects shown that the ResNet finds, and the other way round
BASELINE = "baseline"  # the row of a detector as it was trained
PICTURES = ("gain_per_class.png", "precision_recall.png", "precision_recall_classes.png")
PICTURES += ("errors.png", "losses.png", "accuracy_time*.png", "misses_*.jpg")

SPREAD = """\
AP in percent: mean ± sample standard deviation over the seeds (one seed: no spread). Gains: \
difference of the means ± its standard error, and the smallest and largest difference of two runs, \
one of each detector. AP50 is the area under the curve (VOC 2010 and later), 11-point is VOC \
2007's, AP the mean over IoU .5:.95."""
SOURCES = """\
Paper: arXiv 1512.03385. Public: the best number of tf-faster-rcnn, Detectron2's model zoo and \
MoCo's Detectron2 config for this network; of the gains, that of tf-faster-rcnn, which has both \
networks. Numbers compare only where their data are the same."""
ERRORS = """\
Of each class as many best-scored detections are looked at as it has objects (Hoiem et al., ECCV \
2012; IoU .5): correct, localisation (IoU .1 to .5 with an object of the class), confusion (with \
one of another class), background, duplicate. Missed are the objects that no detection found at \
any score. All in percent of the objects, summed over the classes."""
IMPROVEMENTS = """\
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
    note: str = "",
    score: float = SCORE,
    command: str = "",
) -> None:
    """Writes the report, and its pictures into the folder beside it that has its name.

    Args:
        folders: run folders of tools/train_net.py, or folders of several seeds.
        output: Markdown file, written last and only if nothing goes wrong.
        voc_root: of the test set; by default as the runs' commands have it.
        rows_files: results.json of tools/evaluate_detector.py.
        note: a paragraph on the data.
        score: from which on a detection counts in the pictures, 0..1.
        command: that makes this report.

    Raises:
        OSError, ValueError: a run that has not ended, damaged files, the same seed twice, runs of
            different test sets.
    """
    output = Path(output)
    groups = group_runs(with_defaults(load_detector_runs(folders)))
    gains = find_gains(groups)
    tables = [load_rows(Path(file)) for file in rows_files]
    improved = [rows for rows in tables if len(rows) > 1]  # one row is a measurement of time
    report = Report(output.with_suffix("").name)
    _add_results(report, groups, gains, note)
    if improved:
        report.add("## Improvements in testing")
        for rows in improved:
            report.add(improvements_section(rows), _elsewhere(groups, rows[0]))
        report.add(IMPROVEMENTS)
    _add_classes(report, groups, gains)
    try:
        truth, evidence = load_all(groups, voc_root)
        reason = ""
    except NoEvidence as error:
        truth, evidence, reason = None, [], str(error)
    _add_curves(report, groups, truth, evidence, reason)
    _add_errors(report, groups)
    _add_losses(report, groups)
    _add_time(report, groups, [row for rows in tables for row in rows])
    _add_misses(report, groups, gains, truth, evidence, reason, score)
    made = f"This page: `{clean_command(command)}`" if command else ""
    sources = [rows_provenance(Path(file)) for file in rows_files]
    report.add("## How", provenance_section(groups), *sources, made)
    write_whole(output, report)


def _add_results(report: Report, groups, gains: Sequence[Gain], note: str) -> None:
    report.add("# Detection: our runs beside published numbers")
    sentences = [f"- {describe_gain(gain)} {_fairness(gain)}" for gain in gains]
    report.add("\n".join(sentences) or "No VGG and ResNet of the same head, data and schedule.")
    if any(map(reductions, groups)):
        report.add(
            "**Reduced runs**: training, data or image size stay below the published protocol, see "
            "[How](#how). Their numbers compare with each other, not with published ones."
        )
    report.add(note, "## Results", results_section(groups, gains), SPREAD)
    report.add("## Beside published numbers", published_section(groups, gains), SOURCES)


def _fairness(gain: Gain) -> str:
    if not gain.differences:
        return "Apart from the network and its input, their configs are the same."
    return f"Their configs also differ in: {'; '.join(gain.differences)}."


def _add_classes(report: Report, groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> None:
    report.add(f"## {groups[0].first.class_metric} per class")
    if gains:
        text = "gain per class: bars are means, dots the pairs of runs"
        report.show("gain_per_class.png", plot_class_gains(gains), text)
    report.add(class_section(groups, gains))


def _add_curves(report: Report, groups, truth: Truth | None, evidence, reason: str) -> None:
    report.add("## Precision and recall")
    if truth is None:
        report.add(f"No curves: {reason}.")
        return
    curves, colors = [], detector_colors(groups)
    for group, runs in zip(groups, evidence, strict=True):
        precision = np.array([interpolated_precision(run.numbers) for run in runs])
        curves.append(Curves(group.label, colors[group.label], precision))
    report.add(f"At IoU {CURVE_IOU:g}; thin lines are single runs, bold ones their mean.")
    report.show("precision_recall.png", plot_mean_curves(curves), "precision and recall")
    classes = plot_class_curves(curves, truth.classes)
    report.show("precision_recall_classes.png", classes, "precision and recall of each class")


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


def _add_losses(report: Report, groups: Sequence[DetectorGroup]) -> None:
    report.add("## Training")
    figure = plot_losses(groups, detector_colors(groups))
    if figure is None:
        report.add("No losses: the runs have no metrics.json.")
    else:
        report.show("losses.png", figure, "training losses, a line for each run")


def _elsewhere(groups: Sequence[DetectorGroup], row: Row) -> str:
    """Says that a row was evaluated on other images than the runs; empty where it was not."""
    if row.test in ((), tuple(groups[0].first.test)):
        return ""
    names = " and ".join(f"`{short_name(name)}`" for name in row.test)
    return f"Measured on {names}: these numbers compare with each other, not with the runs' above."


def _add_time(report: Report, groups: Sequence[DetectorGroup], rows: Sequence[Row]) -> None:
    report.add("## Accuracy and time")
    points, colors, without, own, others = [], detector_colors(groups), [], [], []
    timed = [row for row in rows if row.seconds is not None]
    here = [row for row in timed if not _elsewhere(groups, row)]
    elsewhere = [row for row in timed if row not in here]
    measured, borrowed = (
        {Path(row.run).resolve(): row.seconds for row in some if row.name == BASELINE and row.run}
        for some in (here, elsewhere)
    )
    for group in groups:
        seconds, values = group.seconds_per_image(measured), group.values("AP50")
        if seconds is None:
            seconds = group.seconds_per_image(borrowed)
            (without if seconds is None else others).append(group.label)
        elif not any(run.folder.resolve() in measured for run in group.runs):
            own.append(group)
        if seconds is not None and values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            ap50, color = statistics.fmean(values), colors[group.label]
            points.append(Point(group.label, seconds, ap50, spread, color))
    labels = {run.folder.resolve(): group.label for group in groups for run in group.runs}
    points += [_row_point(row, labels, colors) for row in here if row.name != BASELINE]
    if points:
        report.show("accuracy_time.png", plot_accuracy_and_time(points), "AP50 and seconds")
    if own:
        names = ", ".join(group.label for group in own)
        ways = dict.fromkeys(timing(run) for group in own for run in group.runs)
        report.add(f"Seconds per image of {names}: the runs' own evaluations ({'; '.join(ways)}).")
    if others:
        report.add(f"Seconds per image of {', '.join(others)}: those of the rows on other images.")
    if without:
        report.add(f"Seconds per image: not measured for {', '.join(without)}.")
    for place, test in enumerate(dict.fromkeys(row.test for row in elsewhere), 2):
        found = [row for row in elsewhere if row.test == test]
        figure = plot_accuracy_and_time([_row_point(row, labels, colors) for row in found])
        report.add(_elsewhere(groups, found[0]))
        report.show(f"accuracy_time_{place}.png", figure, "AP50 and seconds of these rows")


def _row_point(row: Row, labels: Mapping[Path, str], colors: Mapping[str, str]) -> Point:
    """A baseline has its run's label and colour."""
    label = labels.get(Path(row.run).resolve()) if row.name == BASELINE else None
    color = {"color": colors[label]} if label else {}
    return Point(label or row.name, row.seconds, row.numbers["AP50"], **color)


def _add_misses(report, groups, gains: Sequence[Gain], truth, evidence, reason, score) -> None:
    report.add("## What one finds and the other misses")
    if not gains or truth is None:
        why = reason if gains else "they need a VGG and a ResNet of the same head and schedule"
        report.add(f"No pictures: {why}.")
        return
    for gain in gains:
        ours, reference = (evidence[groups.index(g)] for g in (gain.ours, gain.reference))
        _add_sheet(report, gain, ours, reference, truth, score)


def _add_sheet(report: Report, gain: Gain, ours, reference, truth: Truth, score: float) -> None:
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


def write_whole(output: Path, report: Report) -> None:
    """Writes pictures and text to a temporary folder first, then puts them in place."""
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
