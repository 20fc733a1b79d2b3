"""Where a detector's numbers come from: command, hardware, versions, date, how far reduced."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePath

from resnet_backbone.report.detection_table import reductions
from resnet_backbone.report.detector_runs import DetectorGroup, DetectorRun
from resnet_backbone.report.runs import read_table
from resnet_backbone.report.table import hardware_text

EVENTS = re.compile(r"events\.out\.tfevents\.(\d{9,11})\.")  # TensorBoard names a file by its start
NOT_RECORDED = "not recorded"


def provenance_section(groups: Sequence[DetectorGroup]) -> str:
    """For every detector what it was evaluated on, how it is reduced, and each run's command."""
    return "\n\n".join(_group_text(group) for group in groups)


def rows_provenance(path: Path) -> str:
    """Command, hardware and dates of the rows of tools/evaluate_detector.py."""
    content = read_table(path)
    rows = content["rows"].values() if isinstance(content["rows"], dict) else content["rows"]
    facts = [
        " and ".join(dict.fromkeys(filter(None, texts)))
        for texts in (
            [hardware_text(row.get("hardware")) for row in rows],
            [str(row.get("precision") or "") for row in rows],
            [str(row.get("date") or "")[:10] for row in rows],
        )
    ]
    known = "; ".join(fact for fact in facts if fact) or f"hardware {NOT_RECORDED}"
    return f"Improvements in testing: {known}  \n`{clean_command(content.get('command'))}`"


def _group_text(group: DetectorGroup) -> str:
    lines = [f"**{group.label}**: {_evaluated(group.first)}."]
    notes = reductions(group)
    if notes:
        lines.append(f"**Reduced**, against the published protocol: {'; '.join(notes)}.")
    lines += ["", *map(_run_text, group.runs)]
    return "\n".join(lines)


def _evaluated(run: DetectorRun) -> str:
    images, objects = [run.size_of(name) for name in run.test], run.objects
    parts = []
    if images and all(images):
        parts.append(f"{sum(size[0] for size in images):,} images")
    if objects:
        difficult = sum(row["difficult"] for row in run.details["classes"])
        parts.append(f"{sum(objects.values()):,} boxes")
        parts += [f"{difficult:,} difficult ones (which count neither way)"] if difficult else []
    return "evaluated on " + (", ".join(parts) or f"{' + '.join(run.test)}, size {NOT_RECORDED}")


def _run_text(run: DetectorRun) -> str:
    seed = NOT_RECORDED if run.seed is None else run.seed
    score = run.numbers.get("AP50")
    score = "-" if score is None else f"{score:.2f}"
    facts = [hardware(run), versions(run), date(run)]
    known = "; ".join(fact for fact in facts if fact)
    command = clean_command(run.results.get("command"))
    return f"- seed {seed}, AP50 {score}; {known}  \n  `{command}`"


def clean_command(command: str | None) -> str:
    """The command with the last part of each path outside of the project in place of the path."""
    if not command:
        return NOT_RECORDED
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    words = [re.sub(r"^\S*/(?=tools/\w+\.py$)", "", word) for word in words]
    words = [_shorten(word) for word in words]
    if words[0].startswith("tools/"):
        words.insert(0, "python")
    return shlex.join(words)


def _shorten(word: str) -> str:
    option, equals, value = word.rpartition("=")
    if not re.match(r"/|~|\.\.?/", value):
        return word
    return f"{option}{equals}{PurePath(value).name}"


def hardware(run: DetectorRun) -> str:
    """The GPU or CPU, from results.json or the environment that the log has."""
    given = hardware_text(run.results.get("hardware"))
    if given:
        return given
    gpus = re.findall(r"^GPU \d[\d,]*\s+(.+?)(?: \(arch.*)?$", run.log, re.MULTILINE)
    if gpus and run.config.get("MODEL.DEVICE") != "cpu":
        return gpus[0].strip()
    if run.config.get("MODEL.DEVICE") == "cpu":
        capability = re.search(r"CPU capability usage: (\S+)", run.log)
        return f"CPU ({capability[1]})" if capability else "CPU"
    return f"hardware {NOT_RECORDED}"


def timing(run: DetectorRun) -> str:
    """How the seconds per image of the run's own evaluation were measured."""
    count, processes = (run.results.get(key) or 1 for key in ("images_at_a_time", "processes"))
    facts = [hardware(run), f"{count} image{'s' * (count > 1)} at a time"]
    facts += [f"{processes} processes beside one another"] if processes > 1 else []
    return ", ".join(facts)


def versions(run: DetectorRun) -> str:
    """Versions of PyTorch and Detectron2, as the log has them."""
    found = re.findall(r"^(PyTorch|detectron2)\s+(\S+) @", run.log, re.MULTILINE)
    return ", ".join(f"{name.replace('d', 'D', 1)} {it}" for name, it in dict(found).items())


def date(run: DetectorRun) -> str:
    """Day of the results, or of the run's first start as TensorBoard's file says; "" else."""
    given = run.results.get("date")
    if given:
        return str(given)[:10]
    starts = [EVENTS.match(name) for name in os.listdir(run.folder)]
    starts = [int(match[1]) for match in starts if match]
    if not starts:
        return ""
    return datetime.fromtimestamp(min(starts), timezone.utc).strftime("%Y-%m-%d")
