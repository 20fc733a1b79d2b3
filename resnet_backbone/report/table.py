"""Tables of results: the paper's numbers and ours, each in their own columns."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_backbone.report.paper import published, recipe_iterations
from resnet_backbone.report.runs import Run, flatten

# Keys of a config that change where or how fast a run trains, not what it trains.
NOT_RECIPE = re.compile(
    r"output\.|train\.(seed|device|threads|compile|channels_last)$|evaluation\.(every|batch_size)$"
    r"|data\.(root|val_root|val_labels|workers|max_bad_images)$|model\.weights$"
)
LENGTH = ("schedule.iterations", "schedule.milestones", "schedule.warmup_iterations")


class Group:
    """Runs of one network and recipe that differ in their seeds."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = sorted(runs, key=lambda run: (run.seed is None, run.seed or 0))
        self.first = self.runs[0]
        self.network = self.first.network
        seeds = [run.seed for run in self.runs if run.seed is not None]
        for seed in set(seeds):
            same = [run.folder.name for run in self.runs if run.seed == seed]
            if len(same) > 1:
                raise ValueError(
                    f"runs {' and '.join(same)} have the same recipe and seed {seed}: give one "
                    "of them"
                )

    def values(self, key: str) -> list[float]:
        found = [run.results.get(key) for run in self.runs]
        return [float(value) for value in found if value is not None]

    @property
    def is_shortened(self) -> bool:
        iterations = self.first.iterations
        return iterations is not None and iterations < recipe_iterations(self.network)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs of the same network and recipe: plain before residual, by depth, full ones first.

    Raises:
        ValueError: a run without an error, or two runs of one group with the same seed.
    """
    if not runs:
        raise ValueError("no runs to tabulate; give at least one run folder")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.results.get("val_top1_error") is None:
            raise ValueError(
                f"{run.folder} has no results.json with val_top1_error: the run has not ended, "
                "go on with --resume"
            )
        groups.setdefault(_identity(run), []).append(run)
    return sorted((Group(members) for members in groups.values()), key=_order)


def _identity(run: Run) -> str:
    recipe = {key: value for key, value in flatten(run.config) if not NOT_RECIPE.match(key)}
    for key in ("model.name", "model.num_classes"):
        recipe.pop(key, None)
    return json.dumps([run.network, run.iterations, recipe], sort_keys=True, default=str)


def _order(group: Group) -> tuple:
    network = group.network
    return (
        group.first.data_format,
        ("plain", "ResNet").index(network.family) if network.family in ("plain", "ResNet") else 2,
        network.family,
        network.depth,
        network.shortcut,
        -(group.first.iterations or 0),
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """ "8.41 ± 0.12": mean and sample standard deviation; the value alone where there is one."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _common(group: Group) -> dict[str, str]:
    parameters = group.first.results.get("parameters")
    paper = published(group.network)
    return {
        "network": group.network.title,
        "n": str(group.network.blocks or "-"),
        "parameters": f"{parameters:,}" if parameters else "-",
        "paper": f"{paper.error} ({paper.source})" if paper and paper.source else "-",
        "multi-scale": (paper.multi_scale if paper else "") or "-",
        "others": (paper.others if paper else "") or "-",
        "top-1": mean_and_spread(group.values("val_top1_error")),
        "top-5": mean_and_spread(group.values("val_top5_error")),
        "training": mean_and_spread(group.values("train_error")),
        "seeds": str(len(group.runs)),
        "iterations": f"{group.first.iterations:,}" if group.first.iterations else "-",
    }


CIFAR10_COLUMNS = {
    "network": "network",
    "n": "n",
    "parameters": "parameters",
    "paper": "paper",
    "others": "others, 50k split",
    "top-1": "**ours**",
    "training": "ours, training",
    "seeds": "seeds",
    "iterations": "iterations",
    "remark": "remark",
}
IMAGENET_COLUMNS = {
    "network": "network",
    "parameters": "parameters",
    "paper": "paper, 10-crop top-1 / top-5",
    "multi-scale": "paper, multi-scale",
    "others": "others, centre crop top-1",
    "top-1": "**ours**, centre crop top-1",
    "top-5": "**ours**, top-5",
    "training": "ours, training",
    "seeds": "seeds",
    "iterations": "iterations",
    "remark": "remark",
}
OTHER_COLUMNS = {
    key: text
    for key, text in {**CIFAR10_COLUMNS, "top-1": "**ours**"}.items()
    if key not in ("n", "paper", "others")
}
TITLES = {
    "cifar10": ("CIFAR-10, test error (%)", CIFAR10_COLUMNS),
    "imagenet": ("ImageNet, validation error (%)", IMAGENET_COLUMNS),
    "shards": ("ImageNet, validation error (%)", IMAGENET_COLUMNS),
}
NOTE = """\
Ours: mean ± sample standard deviation over the seeds. Training error: of the augmented images,
while they train, at the end of training. Paper: arXiv 1512.03385; "about" is read off a figure."""


def _remark(group: Group, others: Sequence[Group]) -> str:
    """What sets a row apart: a shortened schedule, the 45k split, what its sisters do not have."""
    notes = []
    if group.is_shortened:
        notes.append(f"**shortened**: the recipe has {recipe_iterations(group.network):,}")
    mine = dict(flatten(group.first.config))
    if mine.get("data.split") == "45k":
        notes.append("45k/5k split")
    sisters = [dict(flatten(g.first.config)) for g in others if g.network == group.network]
    keys = {k for sister in sisters for k in mine if k in sister and sister[k] != mine[k]}
    for key in sorted(keys):
        if not NOT_RECIPE.match(key) and key not in (*LENGTH, "data.split"):
            notes.append(f"{key}={mine[key]}")
    return "; ".join(notes)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def results_table(runs: Sequence[Run]) -> str:
    """Markdown: a table for each data set, and below it the command and place of every run.

    Raises:
        ValueError: see :func:`group_runs`.
    """
    groups = group_runs(runs)
    parts = []
    for title, columns, members in _by_data(groups):
        rows = [{**_common(group), "remark": _remark(group, members)} for group in members]
        used = [key for key in columns if key != "remark" or any(row[key] for row in rows)]
        cells = [[row[key] for key in used] for row in rows]
        parts += [f"### {title}", markdown([columns[key] for key in used], cells)]
    parts += [NOTE, "Runs:"]
    parts.append("\n".join(_provenance(run) for group in groups for run in group.runs))
    return "\n\n".join(parts) + "\n"


def _by_data(groups: Sequence[Group]):
    sections: dict[str, tuple[dict[str, str], list[Group]]] = {}
    for group in groups:
        data = group.first.data_format
        title, columns = TITLES.get(data, (f"{data}, error (%)", OTHER_COLUMNS))
        sections.setdefault(title, (columns, []))[1].append(group)
    for title, (columns, members) in sections.items():
        yield title, columns, members


def _provenance(run: Run) -> str:
    results = run.results
    seed = "" if run.seed is None else f", seed {run.seed}"
    facts = [
        f"{results['val_top1_error']:.2f} %",
        _command(results.get("command")),
        results.get("evaluated_on") and f"evaluated on {results['evaluated_on']}",
        results.get("hours") and f"{results['hours']:.1f} h",
        hardware_text(results.get("hardware")),
        results.get("date"),
    ]
    return f"- {run.network.title}{seed}: " + "; ".join(str(fact) for fact in facts if fact)


def _command(command: str | None) -> str:
    """The command in code marks, with PATH in place of the data's folder on one machine."""
    if not command:
        return ""
    command = re.sub(r"\b((?:val_)?root=)\S+", r"\1PATH", command)
    script = re.sub(r"^(?:python )?\S*/(?=tools/\w+\.py)", "", command)
    return f"`{'python ' if script.startswith('tools/') else ''}{script}`"


def hardware_text(hardware: Mapping[str, Any] | str | None) -> str:
    """The GPU, or the CPU with its threads, of a result's "hardware"; "" where there is none."""
    if not isinstance(hardware, Mapping):
        return str(hardware or "")
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    threads = hardware.get("threads")
    return f"{hardware.get('cpu', 'CPU')}{f', {threads} threads' if threads else ''}"
