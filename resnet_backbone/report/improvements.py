"""The rows of evaluate-detector: reading, intervals over test images, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from resnet_backbone.report.boxes import NoDetections
from resnet_backbone.report.detection_table import METRICS, NOT_MEASURED, NOT_RECORDED
from resnet_backbone.report.detections import DRAWS, load_all
from resnet_backbone.report.detector_runs import DetectorRun
from resnet_backbone.report.gain import NONE, DetectorGroup, Gain, signed
from resnet_backbone.report.published import IMPROVEMENTS, TASKS
from resnet_backbone.report.runs import read_table
from resnet_backbone.report.table import hardware_text, markdown
from resnet_backbone.runtime.records import flatten

BASELINE = "baseline"  # the row of a detector without improvements
ADDED = "+"  # begins the name of a row that adds to the one above
TABLE_9 = """\
Ours beside the paper's Table 9 (ResNet-101 on COCO; each row adds to the one above; test-dev: \
trained on trainval)."""
CHANGES = f"""\
In parentheses: the change over the first row. In brackets: its 95 % interval over {DRAWS:,} test \
sets drawn with replacement from the test images, the same ones for both rows, with boxes matched \
by VOC's rules."""


class Row(NamedTuple):
    name: str
    numbers: dict[str, float]  # AP in percent
    seconds: float | None  # per image, if measured
    run: str  # folder of the detector
    test: tuple[str, ...]  # data sets that it was evaluated on; empty: unknown
    intervals: dict[str, tuple[float, float]]  # of the change over the first row, if measured

    @property
    def measured_run(self) -> Path | None:
        """Folder of the run whose detector was measured as it is, without improvements."""
        return Path(self.run).resolve() if self.name == BASELINE and self.run else None


def load_rows(path: Path) -> list[Row]:
    """Reads the rows of evaluate-detector: name, results (bbox), seconds per image."""
    try:
        rows = [read_row(row) for row in read_table(path)["rows"]]
    except (KeyError, TypeError, AttributeError):
        rows = []
    if not rows or any("AP50" not in row.numbers for row in rows):
        raise ValueError(
            f"{path} has no rows with a name and AP50: give results.json of evaluate-detector"
        )
    return rows


def read_row(row: Mapping[str, Any]) -> Row:
    numbers = row["results"]["bbox"].items()
    kept = {key: float(value) for key, value in numbers if key in METRICS and value is not None}
    config = yaml.safe_load(row.get("config") or "{}")  # has the test sets
    test = tuple(config.get("DATASETS", {}).get("TEST", ()))
    where = row.get("seconds_per_image"), str(row.get("run", "")), test
    return Row(row["name"], kept, *where, row.get("intervals", {}))


def change_intervals(
    rows: Sequence[Mapping[str, Any]], folders: Sequence[str]
) -> list[dict[str, tuple[float, float]]]:
    """Returns for each row of evaluate-detector the 95 % intervals of its change over the first.

    Args:
        rows: each with "config" and "results"; their test set is registered.
        folders: with each row's detections, in inference/.

    Raises:
        NoDetections: a file is missing, or the metric is none of :data:`METRICS`.
    """
    groups = []
    for number, (row, folder) in enumerate(zip(rows, folders, strict=True)):
        config = dict(flatten(yaml.safe_load(row["config"])))
        if config.get("RESNET_BACKBONE.TEST.METRIC"):
            raise NoDetections("RESNET_BACKBONE.TEST.METRIC is not VOC's or COCO's")
        run = DetectorRun(Path(folder), config, {"results": row["results"]})
        groups.append(DetectorGroup([run]))
        groups[-1].label = str(number)
    load_all(groups, {})
    gains = [Gain(group, groups[0]) for group in groups]
    return [{key: g.interval(key) for key in METRICS if g.of(key) is not None} for g in gains]


def improvements_section(rows: Sequence[Row]) -> str:
    """Returns our rows; beside the paper's Table 9 in its order, with its numbers."""
    used = {key: text for key, text in METRICS.items() if any(key in row.numbers for row in rows)}
    header = ["row", *(f"**ours**, {text}" for text in used.values()), "s/image"]
    cells, place = [], -1  # place in the paper's order; other rows follow the row before them
    for row in rows:
        numbers = [_number_text(row, rows[0], key) for key in used]
        seconds = NOT_MEASURED if row.seconds is None else f"{row.seconds:.3g}"
        paper = next((i for i in IMPROVEMENTS if any(k in row.name.lower() for k in i.keys)), None)
        place = IMPROVEMENTS.index(paper) if paper else place
        name = f"+ {row.name[1:].lstrip()}" if row.name.startswith(ADDED) else row.name
        cells.append((place, paper, [name, *numbers, seconds]))
    notes = [CHANGES] if any(row.intervals for row in rows[1:]) else []
    if not is_table_9(rows):
        added = any(row.name.startswith(ADDED) for row in rows)
        order = "Each row adds to the one above." if added else "Each row is one improvement alone."
        table = markdown(header, [row for _, _, row in cells])
        return "\n\n".join([table, *([order] if len(rows) > 1 else []), *notes])
    header += ["paper, COCO val, AP50 / AP", "paper, COCO test-dev, AP50 / AP"]
    measured = [paper for _, paper, _ in cells]
    nothing = [NOT_MEASURED] * (len(used) + 1)
    for place, paper in enumerate(IMPROVEMENTS):
        if paper not in measured:
            cells.append((place, paper, [paper.name, *nothing]))
    cells.sort(key=lambda cell: cell[0])
    table = markdown(header, [[*row, *_paper_cells(paper)] for _, paper, row in cells])
    return "\n\n".join([table, TABLE_9, *notes])


def is_table_9(rows: Sequence[Row]) -> bool:
    """Returns whether rows are on the images of the paper's Table 9, each adding to the last."""
    added = len(rows) == 1 or any(row.name.startswith(ADDED) for row in rows)
    return added and all(TASKS["coco"].has_test_set(row.test, None) for row in rows)


def _number_text(row: Row, first: Row, key: str) -> str:
    """Formats as "58.71 (+0.52 [+0.31, +0.77])"; the change only with its interval."""
    if key not in row.numbers:
        return NONE
    text = f"{row.numbers[key]:.2f}"
    if row is first or key not in row.intervals:
        return text
    low, high = map(signed, row.intervals[key])
    return f"{text} ({signed(row.numbers[key] - first.numbers[key])} [{low}, {high}])"


def _paper_cells(paper) -> list[str]:
    pairs = (paper.val, paper.test_dev) if paper else (None, None)
    return ["{:.1f} / {:.1f}".format(*pair) if pair else NONE for pair in pairs]


def rows_provenance(path: Path, commands: Mapping[str, str]) -> str:
    content = read_table(path)
    rows = content["rows"]
    columns = (
        [hardware_text(row.get("hardware")) for row in rows],
        [row.get("precision", "") for row in rows],
        [row.get("date", "")[:10] for row in rows],
    )
    facts = [" and ".join(dict.fromkeys(filter(None, texts))) for texts in columns]
    known = "; ".join(filter(None, facts)) or f"hardware {NOT_RECORDED}"
    command = commands.get(content.get("command"), NOT_RECORDED)
    return f"Improvements in testing: {known}  \n`{command}`"
