"""Evaluations of classifiers: their files, and several ones compared on the same images."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_backbone.report.plots import plot_confusion, save_png
from resnet_backbone.report.runs import read_table
from resnet_backbone.report.table import WHERE, hardware_text, markdown, show_commands
from resnet_backbone.runtime.records import RESULTS

PREDICTIONS = "predictions.csv"
ERROR, CHANGE = "{:.2f} [{:.2f}, {:.2f}]", "{:+.2f} [{:+.2f}, {:+.2f}]"
INTERVALS = """\
In brackets: 95 % intervals (Agresti and Coull 1998; Agresti and Min 2005 for changes). They cover \
the choice of the test images, not that of the seed."""
TEXT = """\
Errors in percent of {images:,} images. Change: top-1 error minus that of the first row, image by \
image. """


@dataclass(frozen=True)
class Evaluation:
    """A folder that ``evaluate-classifier --output`` has written."""

    name: str
    results: dict[str, Any]  # of results.json
    images: dict[int, tuple[str, str]]  # index of a readable image -> its file's name, label
    is_wrong: np.ndarray  # top-1, of all images (N,); unreadable ones are wrong


def error_interval(is_wrong: np.ndarray) -> tuple[float, float, float]:
    """Returns an error and its interval, in percent; four more images, half of them wrong."""
    count = len(is_wrong) + 4
    share = (is_wrong.sum() + 2) / count
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    return 100 * is_wrong.mean(), 100 * max(0, share - half), 100 * min(1, share + half)


def change_interval(is_wrong: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    """Returns an error minus that of `before` on the same images, and its interval, in percent.

    Half an image more is wrong in each alone, in both, and in none.
    """
    difference = is_wrong.astype(int) - before
    count, discordant = len(difference) + 2, np.abs(difference).sum() + 1
    mean = difference.sum() / count
    half = 1.96 * math.sqrt(discordant - count * mean**2) / count
    return 100 * difference.mean(), 100 * (mean - half), 100 * (mean + half)


def load_evaluation(folder: Path, name: str = "") -> Evaluation:
    """Reads results.json and predictions.csv; ValueError if they are missing or damaged."""
    for file in (RESULTS, PREDICTIONS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}: give the --output of evaluate-classifier")
    results = read_table(folder / RESULTS)
    try:
        is_wrong, images = np.ones(results["num_images"], bool), {}
        with open(folder / PREDICTIONS, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                index, label = int(row["index"]), row["label"]
                images[index] = Path(row["image"]).name, label
                is_wrong[index] = row["class1"] != label
        if abs(100 * is_wrong.mean() - results["top1_error"]) > 1e-6:
            raise ValueError(f"its top-1 error is not that of {RESULTS}")
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{folder / PREDICTIONS} is damaged ({error}): evaluate again") from error
    return Evaluation(name or folder.resolve().name, results, images, is_wrong)


def compare_evaluations(evaluations: Sequence[Evaluation]) -> str:
    """Returns Markdown: a table with each evaluation's change over the first, and commands."""
    first, rows = evaluations[0], []
    for one in evaluations:
        shared = one.images.keys() & first.images.keys()
        same = all(one.images[index] == first.images[index] for index in shared)
        if len(one.is_wrong) != len(first.is_wrong) or not same:
            raise ValueError(
                f"{one.name} and {first.name} were evaluated on different images or labels"
            )
        results = one.results
        top5, speed = results.get("top5_error"), results.get("images_per_second")
        run_by = [*(results.get("engine") or ["eager"]), results.get("precision", "")]
        cells = [one.name, ", ".join(filter(None, dict.fromkeys(run_by)))]
        cells.append(ERROR.format(*error_interval(one.is_wrong)))
        cells += ["-" if top5 is None else f"{top5:.2f}", f"{results['cross_entropy']:.4f}"]
        cells.append("-" if speed is None else f"{speed:.1f}")
        change = CHANGE.format(*change_interval(one.is_wrong, first.is_wrong))
        rows.append([*cells, "" if one is first else change])
    header = ["network", "engine, precision", "top-1 error", "top-5 error", "cross-entropy"]
    table = markdown([*header, "images per s", "change of top-1 error"], rows)
    commands = show_commands(one.results.get("command") for one in evaluations)
    lines = "\n".join(_facts(one, commands) for one in evaluations)
    text = TEXT.format(images=len(first.is_wrong)) + INTERVALS
    return "\n\n".join([table, text, WHERE, lines]) + "\n"


def _facts(one: Evaluation, commands: Mapping[str | None, str]) -> str:
    command = commands.get(one.results.get("command"), "not recorded")
    versions = one.results.get("versions", {})
    facts = [hardware_text(one.results.get("hardware")), one.results.get("date")]
    facts += [f"PyTorch {versions['torch']}" if "torch" in versions else ""]
    facts += [f"revision {one.results['revision']}" if one.results.get("revision") else ""]
    return f"- {one.name}: {', '.join(filter(None, facts))}  \n  `{command}`"


def write_evaluation(
    folder: Path, result: Any, class_names: Sequence[str], name_of: Callable[[int], str]
) -> list[Path]:
    """Writes predictions.csv, per_class.csv, confusion.csv, confusion.png; returns their paths.

    Args:
        result: an ``EvaluationResult`` of resnet_backbone.classification.
        name_of: index of an image -> its path.
    """
    confusion = result.confusion.numpy()
    tables = {
        PREDICTIONS: prediction_rows(result.predictions, class_names, name_of),
        "per_class.csv": per_class_rows(result, class_names),
        "confusion.csv": confusion_rows(confusion, class_names),
    }
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    save_png(plot_confusion(confusion, class_names), folder / "confusion.png")
    return [folder / name for name in (*tables, "confusion.png")]


def write_csv(path: Path, rows: Iterable[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def prediction_rows(
    predictions: Any, class_names: Sequence[str], name_of: Callable[[int], str]
) -> Iterable[list]:
    """Yields a row per readable image: its label, then its best classes with their scores."""
    best = predictions.classes.shape[1]
    columns = [f"{kind}{rank + 1}" for rank in range(best) for kind in ("class", "name", "score")]
    yield ["index", "image", "label", "label_name", *columns]
    columns = (predictions.indices, predictions.labels, predictions.classes, predictions.scores)
    for index, label, classes, scores in zip(*(c.tolist() for c in columns), strict=True):
        row = [index, name_of(index), label, class_names[label]]
        for number, score in zip(classes, scores, strict=True):
            row += [number, class_names[number], f"{score:.6g}"]
        yield row


def per_class_rows(result: Any, class_names: Sequence[str]) -> Iterable[list]:
    """Yields a row per class with images: their number and the top-1 error in percent."""
    yield ["class", "name", "images", "top1_error"]
    columns = zip(class_names, result.class_counts, result.per_class_error, strict=True)
    for number, (name, count, error) in enumerate(columns):
        if error is not None:
            yield [number, name, count, f"{error:.4f}"]


def confusion_rows(confusion: np.ndarray, class_names: Sequence[str]) -> Iterable[list]:
    """Yields counts: a row per class with images, a column per class with images or predictions."""
    rows = np.flatnonzero(confusion.sum(1))
    columns = np.flatnonzero(confusion.sum(1) + confusion.sum(0))
    yield ["label \\ predicted", *(class_names[column] for column in columns)]
    for row in rows:
        yield [class_names[row], *(int(confusion[row, column]) for column in columns)]
