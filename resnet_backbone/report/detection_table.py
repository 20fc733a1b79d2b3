"""Markdown tables of detection runs: results, published numbers, classes, provenance."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from resnet_backbone.detection.evaluation.operating import best_threshold
from resnet_backbone.report.boxes import own_paths
from resnet_backbone.report.detector_runs import DetectorRun
from resnet_backbone.report.gain import NONE, DetectorGroup, Difference, Gain, gain_text, signed
from resnet_backbone.report.published import DETECTORS, TASKS, Number, task_of
from resnet_backbone.report.runs import ELEVEN_POINT
from resnet_backbone.report.table import hardware_text, markdown, mean_and_spread

METRICS = {"AP50": "AP50", ELEVEN_POINT: "AP50, 11-point", "AP": "AP", "AP75": "AP75"}
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
EVENTS = re.compile(r"events\.out\.tfevents\.(\d{9,11})\.")  # TensorBoard's file, with its start
# Detectron2 has had no release since 0.6; builds of others have their own version numbers.
DETECTRON2_BUILDS = {"0.7.2": "main of 2024-04-17 (sal-detectron2 0.7.2)"}
SPREAD = """\
AP is in percent: the mean ± the sample standard deviation over the seeds (one seed: no spread). A \
gain is the difference of the means ± its standard error, with the smallest and the largest \
difference between two runs, one of each detector. """
METRICS_TEXT = {
    "voc": """\
AP50 is the area under the curve (VOC 2010 and later), 11-point is VOC 2007's metric, and AP is \
the mean over IoU .5:.95.""",
    "coco": "AP, AP50, and AP75 are COCO's.",
    "det": """\
AP50 is ImageNet's average precision of detection: a small object of w x h pixels needs an IoU of \
wh / ((w + 10)(h + 10)).""",
}
SOURCES = """\
Paper: arXiv 1512.03385. Public: the best number of tf-faster-rcnn, Detectron2's model zoo and \
MoCo's Detectron2 config for this network; of the gains, that of tf-faster-rcnn, which has both \
networks. Numbers compare only where their training data are the same too."""
OPERATING = """\
F1 is 2PR / (P + R) of the detections with a score of at least the threshold, by VOC's matching at \
IoU .5, mean over the runs. Dots and the table: the largest F1 and its threshold. A row of a \
confusion matrix has all objects of a class, at the threshold with the largest mean F1: correct \
ones first; then other detections and free objects, of different classes, are paired by falling \
IoU above .5. The last row has the detections that are on no object."""


def results_section(groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> str:
    used = {key: text for key, text in METRICS.items() if any(g.values(key) for g in groups)}
    rows = []
    for group in groups:
        seeds = ", ".join(NONE if run.seed is None else str(run.seed) for run in group.runs)
        name = group.label + (" (reduced)" if reductions(group) else "")
        start = [name, group.first.weights or "none", seeds, _iterations(group)]
        rows.append(start + [_number_text(group, key) for key in used])
    for gain in gains:
        numbers = [f"**{gain_text(gain, key)}**" for key in used]
        rows.append([f"**{gain.label}**", "", "", "", *numbers])
    table = markdown(["detector", "weights", "seeds", "iterations", *used.values()], rows)
    notes = [f"- {g.label}: {', '.join(g.particulars)}" for g in groups if g.particulars]
    text = SPREAD + METRICS_TEXT[groups[0].first.protocol]
    return "\n\n".join(filter(None, [table, "\n".join(notes), text]))


def _number_text(group: DetectorGroup, key: str) -> str:
    interval = group.interval(key)
    text = mean_and_spread(group.values(key))
    return text if interval is None else f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _iterations(group: DetectorGroup) -> str:
    done = sorted({run.iterations for run in group.runs if run.iterations is not None})
    return " to ".join(f"{number:,}" for number in dict.fromkeys(done[:1] + done[-1:])) or NONE


def task_of_run(run: DetectorRun) -> str:
    return task_of(list(run.classes), run.protocol)


def reductions(group: DetectorGroup) -> list[str]:
    """Lists where a group's training and test fall short of its data's published protocol."""
    run = group.first
    task = TASKS.get(task_of_run(run))
    if task is None:
        return []
    seen = (run.iterations or 0) * (run.images_per_batch or 0)
    facts = (
        ("{:,} images seen in training", seen, task.iterations * task.images_per_batch),
        ("trained on {:,} images", run.images_of(run.train), task.train_images),
        ("measured on {:,} images", run.images_of(run.test), min(task.sizes, default=0)),
        ("short side {} px", run.config.get("INPUT.MIN_SIZE_TEST"), task.short_side),
    )
    short = [fact for fact in facts if fact[1] and fact[1] < fact[2]]
    return [f"{text.format(found)}, not {whole:,}" for text, found, whole in short]


def data_text(group: DetectorGroup) -> str:
    """ "train (2,400 images) → test (800 images), 320 px"."""
    run = group.first

    def text(name: str) -> str:
        images = run.images_of([name])
        return f"`{short_name(name)}`" + (f" ({images:,} images)" if images else "")

    side = run.config.get("INPUT.MIN_SIZE_TEST")
    sets = " → ".join(" + ".join(map(text, names)) for names in (run.train, run.test))
    return sets + (f", {side} px" if side else "")


def short_name(dataset: str) -> str:
    """Returns "val" for "test:val", the split val of --voc-root."""
    return dataset.partition(":")[2] or dataset


def published_section(groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> str:
    """Returns published numbers beside ours, if ours were measured on the same images.

    Empty for data without published numbers.
    """
    run = groups[0].first  # all groups have one test set
    task = task_of_run(run)
    if not task:
        return ""
    names = [Path(own_paths(run).get("coco_json", "")).stem] if task == "det" else run.test
    if not TASKS[task].has_test_set(names, run.images_of(run.test)):
        tests = ", ".join(task.test for task in TASKS.values())
        return f"Published numbers are of {tests}; these runs were measured on other images."
    metric, rows = TASKS[task].metric, []
    left: list[DetectorGroup | Gain] = [*groups, *gains]
    for one in (one for one in DETECTORS if one.task == task):
        wanted = one.network, one.over, one.weights
        mine = [found for found in left if (*_networks(found), _start(found)) == wanted]
        if one.weights and not mine:
            continue
        sign = "+" if one.over else ""
        start = [_name(one.network, one.over) + (one.weights and f" from {one.weights}")]
        start += [*_cells(one.paper, sign), *_cells(one.public, sign)]
        rows += [[*start, *_our_cells(found, metric)] for found in mine]
        rows += [] if mine else [[*start, NOT_MEASURED, NONE]]
        left = [found for found in left if found not in mine]
    for found in left:
        rows.append([_name(*_networks(found)), *_cells(None) * 2, *_our_cells(found, metric)])
    header = ["network", "paper", "its data", "public", "its data", "**ours**", "its data"]
    return "\n\n".join([f"**{TASKS[task].name}**", markdown(header, rows), SOURCES])


def _networks(found: DetectorGroup | Gain):
    """Returns family and depth of a group, or of both groups of a gain."""
    one, other = (found.ours, found.reference) if isinstance(found, Gain) else (found, None)
    first, second = one.first, other and other.first
    return (first.family, first.depth), second and (second.family, second.depth)


def _start(found: DetectorGroup | Gain) -> str:
    """Returns the file of self-supervised weights with published numbers; "" for others."""
    file = found.first.weights if isinstance(found, DetectorGroup) else ""
    return file if any(one.weights == file for one in DETECTORS) else ""


def _name(network: tuple[str, int], over: tuple[str, int] | None) -> str:
    name = f"{network[0]}-{network[1]}"
    return name if over is None else f"gain, {name} over {over[0]}-{over[1]}"


def _cells(number: Number | None, sign: str = "") -> list[str]:
    if number is None:
        return ["none", NONE]
    return [f"{number.value:{sign}.1f}", f"{number.data} ({number.source})"]


def _our_cells(found: DetectorGroup | Gain, metric: str) -> list[str]:
    if isinstance(found, Gain):
        return [f"{gain_text(found, metric)} ({found.label})", data_text(found.ours)]
    return [f"{_number_text(found, metric)} ({found.label})", data_text(found)]


def class_section(groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> str:
    first = groups[0].first
    objects = first.objects
    header = ["class", *(["objects"] if objects else []), *(g.label for g in groups)]
    header += [f"**{gain.label}**" for gain in gains]
    rows = []
    for name in first.classes:
        row = [name, *([f"{objects.get(name, 0):,}"] if objects else [])]
        row += [mean_and_spread(group.class_values(name)) for group in groups]
        rows.append(row + [_class_gain(gain.of_class(name)) for gain in gains])
    total = ["**mean**", *([f"{sum(objects.values()):,}"] if objects else [])]
    total += [mean_and_spread(group.values(first.class_metric)) for group in groups]
    total += [_class_gain(gain.of(first.class_metric)) for gain in gains]
    return markdown(header, [*rows, total])


def thresholds_section(values: Mapping[str, np.ndarray], class_names: Sequence[str]) -> str:
    """Returns the largest F1 and its score threshold for each class and the mean over classes.

    `values` maps each detector's label to :func:`f1_curves` of its runs, (runs, C, T).
    """
    means = [runs.mean(axis=0) for runs in values.values()]
    rows = {name: [mean[number] for mean in means] for number, name in enumerate(class_names)}
    rows = {name: curves for name, curves in rows.items() if not np.isnan(curves).any()}
    rows["**mean**"] = [np.nanmean(mean, axis=0) for mean in means]
    cells = {name: map(best_threshold, curves) for name, curves in rows.items()}
    body = [[name, *(f"{b:.2f} at {t:.2f}" for t, b in found)] for name, found in cells.items()]
    return markdown(["class", *values], body)


def _class_gain(found: Difference | None) -> str:
    if found is None:
        return NONE
    return signed(found.mean) + ("" if found.error is None else f" ± {found.error:.2f}")


def provenance_section(groups: Sequence[DetectorGroup], commands: Mapping[str, str]) -> str:
    """Returns each detector's evaluation set, reductions, and its runs' commands."""
    parts = []
    for group in groups:
        lines = [f"**{group.label}**: {_evaluated(group.first)}."]
        notes = reductions(group)
        if notes:
            lines.append(f"**Reduced** compared with the published protocol: {'; '.join(notes)}.")
        parts.append("\n".join([*lines, "", *(_run_text(run, commands) for run in group.runs)]))
    return "\n\n".join(parts)


def _evaluated(run: DetectorRun) -> str:
    difficult = sum(row["difficult"] for row in run.details.get("classes", ()))
    counts = {"images": run.images_of(run.test), "boxes": sum(run.objects.values())}
    hard = "difficult ones" if run.protocol == "voc" else "crowds"
    counts[f"{hard} (ignored)"] = difficult
    parts = [f"{count:,} {what}" for what, count in counts.items() if count]
    return "evaluated on " + (", ".join(parts) or f"{' + '.join(run.test)}, size {NOT_RECORDED}")


def _run_text(run: DetectorRun, commands: Mapping[str, str]) -> str:
    seed = NOT_RECORDED if run.seed is None else run.seed
    score = run.numbers.get("AP50")
    ap50 = NONE if score is None else f"{score:.2f}"
    return run_facts(run, commands, f"seed {seed}, AP50 {ap50}")


def run_facts(run: DetectorRun, commands: Mapping[str, str], text: str) -> str:
    """Returns a text with a run's hardware, versions, commit, date, and commands."""
    revision = run.results.get("revision")
    commit = f"commit {revision}" if revision else ""
    known = "; ".join(filter(None, [text, hardware(run), versions(run), commit, date(run)]))
    shown = [f"`{commands[command]}`" for command in run.commands] or [NOT_RECORDED]
    return "  \n  ".join([f"- {known}", *shown])


def hardware(run: DetectorRun) -> str:
    return hardware_text(run.results.get("hardware")) or f"hardware {NOT_RECORDED}"


def timing(run: DetectorRun) -> str:
    """Describes how the seconds per image of a run's own evaluation were measured."""
    count, processes = (run.results.get(key) or 1 for key in ("images_at_a_time", "processes"))
    beside = f", {processes} processes beside one another" if processes > 1 else ""
    return f"{hardware(run)}, {count} image{'s' * (count > 1)} at a time{beside}"


def versions(run: DetectorRun) -> str:
    known = run.results.get("versions", {})
    build = known.get("detectron2") or known.get("sal-detectron2")
    found = {"PyTorch": known.get("torch"), "Detectron2": DETECTRON2_BUILDS.get(build, build)}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def date(run: DetectorRun) -> str:
    """Returns the day of the results, or of the run's first start from TensorBoard, or ""."""
    names = map(EVENTS.match, os.listdir(run.home))
    starts = [datetime.fromtimestamp(int(name[1]), timezone.utc) for name in names if name]
    return (run.results.get("date") or str(min(starts, default="")))[:10]
