"""The page of localization runs: our errors beside the paper's Table 13."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnet_backbone.report.detection_table import NOT_MEASURED, run_facts
from resnet_backbone.report.detector_runs import DetectorRun, load_detector_run
from resnet_backbone.report.gain import NONE
from resnet_backbone.report.published import LOCALIZATION, LOCALIZATION_IMAGES
from resnet_backbone.report.table import WHERE, markdown, show_commands
from resnet_backbone.runtime.files import write_text

NODE = "RESNET_BACKBONE.LOCALIZATION"
MEMBERS = "RESNET_BACKBONE.TEST.ENSEMBLE"
HEADER = ["method", "testing", "paper, network", "true class", "top-5"]
HEADER += ["**ours**, network", "true class", "top-1", "top-5"]
TEXT = """\
Errors in percent of the images: with the true class given, and with the one or five best classes \
of a classifier. A box is right if it overlaps an object of its class by at least .5. Paper: arXiv \
1512.03385, Table 13, on ImageNet's validation set. Dense testing is of the whole image at \
several scales."""
OTHER_IMAGES = "Ours are of other images than the paper's, so the two do not compare."


def way(run: DetectorRun) -> tuple[str, str]:
    """Returns method and testing of a run, in Table 13's terms."""
    rcnn = run.config.get("MODEL.META_ARCHITECTURE") == "LocalizationRCNN"
    testing = "dense" if run.config.get(f"{NODE}.SCALES") else "whole image"
    testing = "center crop" if run.config.get(f"{NODE}.CENTER_CROP") else testing
    return "RPN + R-CNN" if rcnn else "RPN", testing


def _others(run: DetectorRun) -> int:
    """Returns the number of further networks in the run's ensemble."""
    return len(run.config.get(MEMBERS) or ())


def errors_section(runs: Sequence[DetectorRun]) -> str:
    """Returns the rows of Table 13, then our runs with other methods or testing."""
    rows, left = [], list(runs)
    for one in LOCALIZATION:
        like = [run for run in left if way(run) == (one.method, one.testing)]
        mine = [run for run in like if bool(_others(run)) == (one.network == "ensemble")]
        left = [run for run in left if run not in mine]
        paper = [NONE if error is None else f"{error:.1f}" for error in (one.true_class, one.top5)]
        ours = [*map(_our_errors, mine)] or [[NOT_MEASURED, NONE, NONE, NONE]]
        rows += [[one.method, one.testing, one.network, *paper, *cells] for cells in ours]
    rows += [[*way(run), NONE, NONE, NONE, *_our_errors(run)] for run in left]
    return markdown(HEADER, rows)


def _our_errors(run: DetectorRun) -> list[str]:
    found = run.results["results"]["localization"]
    errors = (found.get(key) for key in ("true_class_error", "top1_error", "top5_error"))
    cells = [NONE if error is None else f"{error:.2f}" for error in errors]
    others = f" and {_others(run)} more" if _others(run) else ""
    return [f"{run.family}-{run.depth}{others}", *cells]


def write_localization_report(folders: Sequence[str], output: Path, note: str, command: str) -> str:
    """Writes the page of some runs of train-net, and returns its table.

    Args:
        command: the command that makes this page.
    """
    runs = [load_detector_run(folder, "localization") for folder in folders]
    commands = show_commands([*(one for run in runs for one in run.commands), command])
    same = all(run.details.get("images") == LOCALIZATION_IMAGES for run in runs)
    table, facts = errors_section(runs), []
    for run in runs:
        text = f"{', '.join(way(run))}, {run.details.get('images', NONE)} images"
        facts.append(run_facts(run, commands, text))
    parts = ["# Localization: our runs beside Table 13", note, table, TEXT]
    parts += ["" if same else OTHER_IMAGES, "## How", WHERE, "\n".join(facts)]
    parts.append(f"This page: `{commands[command]}`")
    write_text(output, "\n\n".join(filter(None, parts)) + "\n")
    return table
