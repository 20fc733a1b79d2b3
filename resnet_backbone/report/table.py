"""Tables of classification results, and shared parts of tables."""

from __future__ import annotations

import os
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from resnet_backbone.report.published import PublishedErrors, published, recipe_iterations
from resnet_backbone.report.runs import Group, Run, group_by

LENGTH = ("schedule.iterations", "schedule.milestones", "schedule.warmup_iterations")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def mean_and_spread(values: Sequence[float]) -> str:
    """Formats mean and sample standard deviation as "8.41 ± 0.12"; a single value as "8.41"."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def hardware_text(hardware: Mapping[str, Any] | str | None) -> str:
    """Returns the GPU, or the CPU with its threads, of a result's "hardware"; "" without it."""
    if not isinstance(hardware, Mapping):
        return str(hardware or "")
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    threads = hardware.get("threads")
    text = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    return f"{hardware.get('cpu', 'CPU')}{text}"


PATH = re.compile(r"((?:[\w.-]+=)?)(/.*)$")  # an absolute path, also in "data.root=/a/b"
WHERE = "Commands run in the folder of the project; `ROOT` is the folder of data and runs."


def show_commands(commands: Iterable[str | None]) -> dict[str | None, str]:
    """Returns recorded command -> command that can be run again, without one machine's folders.

    The project's own files are relative to its folder. Other paths are below ``$ROOT``, the common
    parent of the other paths of all commands, so that paths stay distinct.
    """
    given = [command for command in dict.fromkeys(commands) if command]
    words = {command: _project_words(command) for command in given}
    found = [PATH.match(word) for line in words.values() for word in line]
    parents = {os.path.dirname(os.path.normpath(path[2])) for path in found if path}
    root = os.path.commonpath(parents).rstrip("/") if parents else ""
    return {command: " ".join(_quote(word, root) for word in words[command]) for command in given}


def _project_words(command: str) -> list[str]:
    """Splits a command into words, with the project's files relative to its folder."""
    words = shlex.split(command)
    script = next((word for word in words[:2] if re.search(r"(^|/)tools/\w+\.py$", word)), "")
    project = script.rpartition("tools/")[0]
    if project:
        words = [re.sub(rf"(^|=){re.escape(project)}", r"\1", word) for word in words]
    if script:
        words = ["python", *words[words.index(script.removeprefix(project)) :]]
    return words


def _quote(word: str, root: str) -> str:
    path = PATH.match(word)
    if not (path and root):
        return shlex.quote(word)
    return f"{path[1]}$ROOT{shlex.quote(os.path.normpath(path[2]).removeprefix(root))}"


def group_runs(runs: Sequence[Run]) -> list[Group[Run]]:
    """Groups runs of the same network and recipe: plain before residual, by depth, long first."""
    for run in runs:
        if run.results.get("val_top1_error") is None:
            raise ValueError(
                f"{run.folder} has no results.json with val_top1_error: the run has not ended; "
                "continue it with --resume"
            )
    return sorted(map(Group, group_by(runs, _identity)), key=_order)


def _identity(run: Run) -> list:
    names = ("model.name", "model.num_classes")
    recipe = {key: value for key, value in run.recipe.items() if key not in names}
    facts = () if run.has_published else ("evaluated_on", "num_classes", "train_images")
    return [run.network, run.iterations, recipe, *map(run.results.get, facts)]


def _order(group: Group) -> tuple:
    network = group.first.network
    place = {"plain": 0, "ResNet": 1}.get(network.family, 2)
    order = (network.family, network.depth, network.shortcut, -(group.first.iterations or 0))
    return group.first.data_format, place, *order


def _common(group: Group) -> dict[str, str]:
    first, network = group.first, group.first.network
    parameters = first.results.get("parameters")
    paper = (first.has_published and published(network)) or PublishedErrors("", "")
    return {
        "network": network.title,
        "n": str(network.blocks or "-"),
        "parameters": f"{parameters:,}" if parameters else "-",
        "paper": f"{paper.error} ({paper.source})" if paper.source else "-",
        "multi-scale": paper.multi_scale or "-",
        "others": paper.others or "-",
        "top-1": mean_and_spread(group.values("val_top1_error")),
        "top-5": mean_and_spread(group.values("val_top5_error")),
        "training": mean_and_spread(group.values("train_error")),
        "seeds": str(len(group.runs)),
        "iterations": f"{first.iterations:,}" if first.iterations else "-",
    }


CIFAR10_COLUMNS = {
    **{"network": "network", "n": "n", "parameters": "parameters", "paper": "paper"},
    **{"others": "others, 50k split", "top-1": "**ours**", "training": "ours, training"},
    **{"seeds": "seeds", "iterations": "iterations", "remark": "remark"},
}
IMAGENET_COLUMNS = {
    **{"network": "network", "parameters": "parameters", "paper": "paper, 10-crop top-1 / top-5"},
    **{"multi-scale": "paper, multi-scale", "others": "others, center crop top-1"},
    **{"top-1": "**ours**, center crop top-1", "top-5": "**ours**, top-5"},
    **{"training": "ours, training", "seeds": "seeds", "iterations": "iterations"},
    "remark": "remark",
}
OTHER_COLUMNS = {
    key: text for key, text in CIFAR10_COLUMNS.items() if key not in ("n", "paper", "others")
}
TITLES = {
    "cifar10": ("CIFAR-10, test error (%)", CIFAR10_COLUMNS),
    **dict.fromkeys(("imagenet", "shards"), ("ImageNet, validation error (%)", IMAGENET_COLUMNS)),
}
NOTE = """\
Ours: mean ± sample standard deviation over the seeds. Training error: of the augmented images,
while they train, at the end of training. Paper: arXiv 1512.03385; "about" is read from a figure."""


def _remark(group: Group, others: Sequence[Group]) -> str:
    """Notes a shortened schedule, the 45k split, and differences from rows of the same network."""
    notes, network = [], group.first.network
    whole, done = recipe_iterations(network), group.first.iterations
    if group.first.has_published and done is not None and done < whole:
        notes.append(f"**shortened**: the recipe has {whole:,}")
    if group.first.config.get("data.split") == "45k":
        notes.append("45k/5k split")
    sisters = [other for other in others if other.first.network == network]
    keys = {key for sister in sisters for key in group.differing_keys(sister)}
    for key in sorted(keys - {*LENGTH, "data.split"}):
        notes.append(f"{key}={group.first.config[key]}")
    return "; ".join(notes)


def results_table(runs: Sequence[Run]) -> str:
    """Returns Markdown: a table per data set, then each run's command, date and hardware."""
    groups = group_runs(runs)
    sections: dict[str, tuple[dict[str, str], list[Group]]] = {}
    for group in groups:
        data = group.first.data_format
        other = f"{group.first.results.get('evaluated_on', data)}, error (%)", OTHER_COLUMNS
        title, columns = TITLES.get(data, other) if group.first.has_published else other
        sections.setdefault(title, (columns, []))[1].append(group)
    parts = []
    for title, (columns, members) in sections.items():
        rows = [{**_common(group), "remark": _remark(group, members)} for group in members]
        used = [key for key in columns if key != "remark" or any(row[key] for row in rows)]
        cells = [[row[key] for key in used] for row in rows]
        parts += [f"### {title}", markdown([columns[key] for key in used], cells)]
    ordered = [run for group in groups for run in group.runs]
    shown = show_commands(run.results.get("command") for run in ordered)
    lines = "\n".join(_provenance(run, shown) for run in ordered)
    return "\n\n".join([*parts, NOTE, f"Runs. {WHERE}", lines]) + "\n"


def _provenance(run: Run, commands: Mapping[str, str]) -> str:
    results = run.results
    command = commands.get(results.get("command"))
    seed = "" if run.seed is None else f", seed {run.seed}"
    facts = [
        f"{results['val_top1_error']:.2f} %",
        command and f"`{command}`",
        results.get("evaluated_on") and f"evaluated on {results['evaluated_on']}",
        results.get("hours") and f"{results['hours']:.1f} h",
        hardware_text(results.get("hardware")),
        results.get("date"),
    ]
    return f"- {run.network.title}{seed}: " + "; ".join(str(fact) for fact in facts if fact)
