"""Markdown tables of detection results: ours, beside published ones, per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from resnet_backbone.report.detector_gain import Difference, Gain, signed
from resnet_backbone.report.detector_runs import ELEVEN_POINT, DetectorGroup, DetectorRun
from resnet_backbone.report.published_detection import (
    IMPROVEMENTS,
    METRIC,
    NAMES,
    PROTOCOLS,
    PUBLISHED,
    Number,
    Published,
    published_gain,
    task_of,
)
from resnet_backbone.report.runs import read_table
from resnet_backbone.report.table import markdown, mean_and_spread

METRICS = {"AP50": "AP50", ELEVEN_POINT: "AP50, 11-point", "AP": "AP", "AP75": "AP75"}
NOT_MEASURED, NONE = "not measured", "-"


def gain_text(found: Difference | None) -> str:
    """ "+3.21 ± 0.45 (+2.50 to +4.01)": mean, standard error, range over pairs of runs."""
    if found is None:
        return NONE
    if found.error is None:
        return signed(found.mean)
    return f"{signed(found.mean)} ± {found.error:.2f} ({signed(found.low)} to {signed(found.high)})"


def results_section(groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> str:
    """The table of all detectors, and a row for each gain."""
    used = {key: text for key, text in METRICS.items() if any(g.values(key) for g in groups)}
    rows = []
    for group in groups:
        first = group.first
        start = [group.label + (" (reduced)" if reductions(group) else "")]
        start += [first.weights or "none", _seeds(group)]
        start.append(_iterations(group))
        rows.append(start + [mean_and_spread(group.values(key)) for key in used])
    for gain in gains:
        numbers = [f"**{gain_text(gain.of(key))}**" for key in used]
        rows.append([f"**{gain.label}**", "", "", "", *numbers])
    table = markdown(["detector", "weights", "seeds", "iterations", *used.values()], rows)
    notes = [f"- {g.label}: {', '.join(g.particulars)}" for g in groups if g.particulars]
    return "\n\n".join([table, "\n".join(notes)] if notes else [table])


def _iterations(group: DetectorGroup) -> str:
    done = sorted({run.iterations for run in group.runs if run.iterations is not None})
    if not done:
        return NONE
    return f"{done[0]:,}" if len(done) == 1 else f"{done[0]:,} to {done[-1]:,}"


def _seeds(group: DetectorGroup) -> str:
    return ", ".join(NONE if seed is None else str(seed) for seed in group.seeds)


def task_of_run(run: DetectorRun) -> str:
    return task_of(list(run.classes), run.class_metric)


def reductions(group: DetectorGroup) -> list[str]:
    """How far a group's training and test stay below the published protocol of its data."""
    run = group.first
    protocol = PROTOCOLS.get(task_of_run(run))
    if protocol is None:
        return []
    notes = []
    whole = protocol.iterations * protocol.images_per_batch
    if run.iterations is not None and run.images_per_batch:
        seen = run.iterations * run.images_per_batch
        if seen < whole:
            notes.append(f"{seen:,} images seen in training, not {whole:,}")
    for sets, least, verb in (
        (run.config.get("DATASETS.TRAIN", ()), protocol.train_images, "trained on"),
        (run.test, protocol.test_images, "measured on"),
    ):
        sizes = [run.size_of(name) for name in sets]
        if sizes and all(sizes) and sum(size[0] for size in sizes) < least:
            notes.append(f"{verb} {sum(size[0] for size in sizes):,} images, not {least:,}")
    side = run.config.get("INPUT.MIN_SIZE_TEST")
    if side and side < protocol.short_side:
        notes.append(f"short side {side} px, not {protocol.short_side}")
    return notes


def data_text(group: DetectorGroup) -> str:
    """ "train (2,400 images) → test (800 images), 320 px"."""
    run = group.first
    sides = (
        " + ".join(_dataset_text(run, name) for name in names)
        for names in (run.config.get("DATASETS.TRAIN", ()), run.test)
    )
    side = run.config.get("INPUT.MIN_SIZE_TEST")
    return " → ".join(sides) + (f", {side} px" if side else "")


def _dataset_text(run: DetectorRun, name: str) -> str:
    size = run.size_of(name)
    return f"`{short_name(name)}`" + (f" ({size[0]:,} images)" if size else "")


def short_name(dataset: str) -> str:
    """ "val" of "test:val", the split val of --voc-root."""
    return dataset.partition(":")[2] or dataset


def published_section(groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> str:
    """The paper's number, the best public reimplementation's and ours, each with its data."""
    header = ["network", "paper", "its data", "public", "its data", "**ours**", "its data"]
    parts = []
    for task, name in NAMES.items():
        mine = [group for group in groups if task_of_run(group.first) == task]
        rows = [
            row
            for one in PUBLISHED
            if one.task == task
            for row in _published_rows(one, [g for g in mine if _is(one, g)])
        ]
        rows += [_unpublished_row(g) for g in mine if not any(_is(p, g) for p in PUBLISHED)]
        rows += _gain_rows(task, [gain for gain in gains if gain.ours in mine])
        parts += [f"**{name}**", markdown(header, rows)]
    return "\n\n".join(parts)


def _is(one: Published, group: DetectorGroup) -> bool:
    first = group.first
    same = (one.family, one.depth) == (first.family, first.depth)
    return same and not first.title.startswith("plain") and one.task == task_of_run(first)


def _published_cells(number: Number | None) -> list[str]:
    return ["none", NONE] if number is None else [f"{number.value:.1f}", _source(number)]


def _source(number: Number) -> str:
    return f"{number.data} ({number.source})"


def _our_cells(group: DetectorGroup, task: str) -> list[str]:
    return [f"{mean_and_spread(group.values(METRIC[task]))} ({group.label})", data_text(group)]


def _published_rows(one: Published, groups: Sequence[DetectorGroup]) -> list[list[str]]:
    name = f"{'VGG' if one.family == 'VGG' else 'ResNet'}-{one.depth}"
    start = [name, *_published_cells(one.paper), *_published_cells(one.public)]
    return [[*start, *_our_cells(group, one.task)] for group in groups] or [
        [*start, NOT_MEASURED, NONE]
    ]


def _unpublished_row(group: DetectorGroup) -> list[str]:
    name = group.first.title
    return [name, *["none", NONE] * 2, *_our_cells(group, task_of_run(group.first))]


def _gain_rows(task: str, gains: Sequence[Gain]) -> list[list[str]]:
    start = ["gain, ResNet-101 over VGG-16"]
    for number in published_gain(task):
        start += [f"{number.value:+.1f}", _source(number)]
    rows = [
        [*start, f"{gain_text(gain.of(METRIC[task]))} ({gain.label})", data_text(gain.ours)]
        for gain in gains
    ]
    return rows or [[*start, NOT_MEASURED, NONE]]


class Row(NamedTuple):
    """A row of tools/evaluate_detector.py.

    Attributes:
        numbers: AP in percent.
        seconds: per image, if measured.
        run: folder of the detector.
        test: data sets that it was evaluated on; empty: not known.
    """

    name: str
    numbers: dict[str, float]
    seconds: float | None
    run: str = ""
    test: tuple[str, ...] = ()


def load_rows(path: Path) -> list[Row]:
    """Reads the rows of an evaluation: name, results (bbox), seconds per image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one without rows.
    """
    content = read_table(path).get("rows")
    if isinstance(content, dict):
        content = [{"name": name, **row} for name, row in content.items()]
    rows = [_read_row(row) for row in content or () if isinstance(row, dict)]
    if not rows or any(not row.name or "AP50" not in row.numbers for row in rows):
        raise ValueError(
            f"{path} has no rows with a name and AP50: give results.json of "
            "tools/evaluate_detector.py"
        )
    return rows


def _read_row(row: dict) -> Row:
    numbers = row.get("results", row)
    numbers = numbers.get("bbox", numbers)
    kept = {k: float(v) for k, v in numbers.items() if k in METRICS and v is not None}
    name = row.get("name") or row.get("row") or row.get("label") or ""
    run, test = str(row.get("run", "")), _test_sets(row.get("config"))
    return Row(str(name), kept, row.get("seconds_per_image"), run, test)


def _test_sets(config: str | None) -> tuple[str, ...]:
    """As a config's YAML has them; empty where they are not to be found."""
    try:
        return tuple(yaml.safe_load(config or "")["DATASETS"]["TEST"])
    except (yaml.YAMLError, KeyError, TypeError):
        return ()


def improvements_section(rows: Sequence[Row]) -> str:
    """Our rows, and the paper's beside those of the same name, in its order."""
    used = {key: text for key, text in METRICS.items() if any(key in row.numbers for row in rows)}
    header = ["row", *(f"**ours**, {text}" for text in used.values()), "s/image"]
    header += ["paper, COCO val, AP50 / AP", "paper, COCO test-dev, AP50 / AP"]
    cells, place = [], -1  # in the paper's order, rows of other names after the one before
    for row in rows:
        numbers = [f"{row.numbers[key]:.2f}" if key in row.numbers else NONE for key in used]
        seconds = NOT_MEASURED if row.seconds is None else f"{row.seconds:.3g}"
        paper = next((i for i in IMPROVEMENTS if any(k in row.name.lower() for k in i.keys)), None)
        place = IMPROVEMENTS.index(paper) if paper else place
        cells.append((place, paper, [_spaced(row.name), *numbers, seconds, *_paper_cells(paper)]))
    measured = [paper for _, paper, _ in cells]
    for place, paper in enumerate(IMPROVEMENTS):
        if paper not in measured:
            nothing = [NOT_MEASURED] * (len(used) + 1)
            cells.append((place, paper, [paper.name, *nothing, *_paper_cells(paper)]))
    return markdown(header, [row for _, _, row in sorted(cells, key=lambda cell: cell[0])])


def _spaced(name: str) -> str:
    """As the paper's rows: "+ refinement", whatever follows the plus sign."""
    return f"+ {name[1:].lstrip()}" if name.startswith("+") else name


def _paper_cells(paper) -> list[str]:
    if paper is None:
        return [NONE, NONE]
    pairs = (paper.val, paper.test_dev)
    return [NONE if pair is None else f"{pair[0]:.1f} / {pair[1]:.1f}" for pair in pairs]


def class_section(groups: Sequence[DetectorGroup], gains: Sequence[Gain]) -> str:
    """AP of every class: all detectors, and the gains; the mean in the last row."""
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


def _class_gain(found: Difference | None) -> str:
    if found is None:
        return NONE
    return signed(found.mean) + ("" if found.error is None else f" ± {found.error:.2f}")
