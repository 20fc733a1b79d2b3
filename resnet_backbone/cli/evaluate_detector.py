"""Evaluate a detector with the paper's improvements, one row each (appendix B, Table 9).

  resnet-backbone evaluate-detector --run output/r101 --context-run output/r101_context \\
      --ensemble-run output/r152 output/r50 --voc-root VOCdevkit/VOC2007 --test-set test \\
      --output output/improvements
  resnet-backbone evaluate-detector --run output/r50 --alone \\
      --rows baseline flip refinement multi-scale soft-nms --voc-root VOCdevkit/VOC2007 \\
      --test-set test --output output/alone

Each row adds to the rows before it, or to the baseline alone (--alone). --rows selects some:

  baseline      the detector of --run
  refinement    box refinement: pooling again at the regressed boxes, NMS at .3, box voting
  context       global context: from here on, the detector of --context-run, which was trained
                with RESNET_BACKBONE.GLOBAL_CONTEXT True
  multi-scale   regions are pooled on two of several scales and merged by their maximum (--scales)
  ensemble      together with the detectors of --ensemble-run
  flip          the mirrored image too, averaged scores and boxes (only if selected)
  soft-nms      soft-NMS with Gaussian decay (only if selected)

A row without its run is left out, and the output says so. Finished rows are kept in --output: after
an interruption, the same command continues with the next row. Rows whose weights, settings, or data
have changed are measured again. Rows of another revision of this code are kept, and a line says so.
results.json has AP, AP per class, seconds per image, and the origin of each number. results.md has
the table, on COCO with the paper's numbers. With VOC's and COCO's metrics, both have each row's
change over the first one, with a 95 % interval over images, whose boxes are matched by VOC's rules.

KEY VALUE pairs at the end hold for all rows, for example INPUT.MIN_SIZE_TEST 320,
RESNET_BACKBONE.TEST.FLIP True, or RESNET_BACKBONE.TEST.PRECISION bfloat16. The members of an
ensemble keep the settings of their own runs. Detectron2's own test-time augmentation is evaluated
by resnet-backbone train-net --eval-only ... TEST.AUG.ENABLED True
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from resnet_backbone.cli import CommandParser
from resnet_backbone.detection.checkpoint.files import find_weights
from resnet_backbone.detection.checkpoint.input_check import prepare_weights
from resnet_backbone.detection.config import UsageError, take_back_overrides
from resnet_backbone.detection.data.arguments import add_data_arguments, set_up_data
from resnet_backbone.detection.engine.trainer import Trainer
from resnet_backbone.detection.evaluation import data_digest
from resnet_backbone.detection.inference import predictor
from resnet_backbone.detection.inference.detector import read_switches, switches_off
from resnet_backbone.report.boxes import NoDetections
from resnet_backbone.report.detector_runs import by_class
from resnet_backbone.report.improvements import (
    ADDED,
    BASELINE,
    change_intervals,
    improvements_section,
    read_row,
)
from resnet_backbone.report.table import markdown
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.files import sha256, write_json, write_text
from resnet_backbone.runtime.records import command_line, date, hardware, source_revision, versions

PAPER_ROWS = (BASELINE, "refinement", "context", "multi-scale", "ensemble")
ROWS = (*PAPER_ROWS, "flip", "soft-nms")
PAPER_SCALES = (200, 400, 600, 800, 1000)  # short sides, for a single-scale test at 600
OF_THE_ROWS = (  # keys that rows and other options set
    *("MODEL.WEIGHTS", "OUTPUT_DIR", "RESNET_BACKBONE.GLOBAL_CONTEXT", "TEST.AUG.ENABLED"),
    *(f"RESNET_BACKBONE.TEST.{key}" for key in ("BOX_REFINEMENT", "SCALES", "ENSEMBLE")),
)


class Row(NamedTuple):
    """A row to measure, with all its switches in `cfg`; `run` is its detector's folder."""

    label: str
    run: str
    cfg: Any


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="run folder of train-net")
    add("--context-run", metavar="DIR", help="run folder of a detector with global context")
    how = dict(action="extend", nargs="+", default=[], metavar="DIR")
    add("--ensemble-run", help="run folders of further detectors", **how)
    text = f"rows to measure (default: {' '.join(PAPER_ROWS)})"
    add("--rows", nargs="+", default=list(PAPER_ROWS), metavar="ROW", help=text)
    text = "each row alone on the baseline, without the rows before it"
    add("--alone", action="store_true", help=text)
    text = "short sides (default: 200 400 600 800 1000, times INPUT.MIN_SIZE_TEST / 600)"
    add("--scales", nargs="+", metavar="N", help=text)
    add("--output", required=True, metavar="DIR", help="folder for the results")
    add_data_arguments(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    take_back_overrides(args, "ensemble_run", "rows", "scales")
    for row in args.rows:
        if row not in ROWS:
            raise UsageError(f"--rows {row}: the rows are {', '.join(ROWS)}")
    try:
        args.scales = [int(scale) for scale in args.scales or ()]
    except ValueError:
        raise UsageError(f"--scales {' '.join(args.scales)}: short sides in pixels") from None
    args.eval_only = True
    for key in args.opts[::2]:
        if key in OF_THE_ROWS:
            raise UsageError(f"{key} is set by --run and --rows: leave it out")
    return args


def read_runs(args: argparse.Namespace) -> dict:
    """Returns the configs of --run and --context-run, with the data for their evaluation."""
    runs = [run for run in (args.run, args.context_run) if run]
    found = {run: predictor.run_config(run, [*switches_off(), *args.opts]) for run in runs}
    for run, wanted in ((args.run, False), (args.context_run, True)):
        if run and found[run].RESNET_BACKBONE.GLOBAL_CONTEXT != wanted:
            has, option = ("lacks", "--run") if wanted else ("has", "--context-run")
            raise UsageError(f"{run} {has} RESNET_BACKBONE.GLOBAL_CONTEXT: it belongs to {option}")
    for cfg in found.values():
        prepare_weights(cfg, given=args.opts[::2])
    first = found[args.run]
    set_up_data(first, args)
    if len(first.DATASETS.TEST) != 1:
        raise UsageError(f"DATASETS.TEST {first.DATASETS.TEST}: rows are of one test set")
    for run in runs[1:]:
        predictor.check_member(first, found[run], run)
        found[run].DATASETS = first.DATASETS.clone()
    for run in args.ensemble_run:  # check now, before hours of other rows
        member = predictor.run_config(run, ["MODEL.DEVICE", first.MODEL.DEVICE])
        predictor.check_member(first, member, run)
    return found


def plan_rows(args: argparse.Namespace, runs: dict) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows in the order of :data:`ROWS`, and omitted rows with the reason."""
    rows, left_out, run, switches = [], {}, args.run, {}
    lacking = {
        "context": not args.context_run and "give --context-run DIR",
        "ensemble": not args.ensemble_run and "give --ensemble-run DIR ...",
    }
    for name in (name for name in ROWS if name in args.rows):
        if lacking.get(name):
            left_out[name] = lacking[name]
            continue
        if args.alone:
            run, switches = args.run, {}
        if name == "context":
            run = args.context_run
        short = runs[run].INPUT.MIN_SIZE_TEST
        scaled = [round(scale * short / 600) for scale in PAPER_SCALES]
        switches |= {
            "refinement": {"BOX_REFINEMENT": True},
            "multi-scale": {"SCALES": list(args.scales or scaled)},
            "ensemble": {"ENSEMBLE": list(args.ensemble_run)},
            "flip": {"FLIP": True},
            "soft-nms": {"NMS": "gaussian"},
        }.get(name, {})
        cfg = runs[run].clone()
        for key, value in switches.items():
            cfg.RESNET_BACKBONE.TEST[key] = value
        cfg.OUTPUT_DIR = os.path.join(args.output, name)
        cfg.freeze()
        read_switches(cfg)
        plus = "" if args.alone or name == BASELINE else ADDED
        rows.append(Row(plus + name, run, cfg))
    return rows, left_out


def fingerprint(row: Row, data: str, digest: Callable[[Any], str]) -> str:
    """Returns a hash of a row's settings, its detectors' weights and the data."""
    cfg = row.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = ""
    parts = [cfg.dump(), data, digest(cfg.MODEL.WEIGHTS)]
    for run in cfg.RESNET_BACKBONE.TEST.ENSEMBLE:
        parts += [digest(find_weights(run)), digest(os.path.join(run, "config.yaml"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def evaluate(row: Row, detector: torch.nn.Module, revision: str) -> dict:
    cfg, data = row.cfg, row.cfg.DATASETS.TEST[0]
    loader = Trainer.build_test_loader(cfg, data)
    batches = tqdm(loader, desc=row.label, unit="batch", disable=None)
    evaluator = Trainer.build_evaluator(cfg, data)
    results, speed = predictor.timed_inference(
        predictor.for_testing(cfg, detector), batches, evaluator
    )
    if "bbox" not in results:
        found = " and ".join(results) or "nothing"
        raise UsageError(f"{data} has no boxes to compute AP with: its evaluation gives {found}")
    numbers = {key: None if value != value else value for key, value in results["bbox"].items()}
    return {
        "name": row.label,
        "results": {"bbox": numbers},
        **speed._asdict(),
        "run": row.run,
        "weights": cfg.MODEL.WEIGHTS,
        "seed": cfg.SEED,
        "switches": dict(cfg.RESNET_BACKBONE.TEST),
        "global_context": cfg.RESNET_BACKBONE.GLOBAL_CONTEXT,
        "precision": cfg.RESNET_BACKBONE.TEST.PRECISION,
        "hardware": hardware(torch.device(cfg.MODEL.DEVICE)),
        "date": date(),
        "revision": revision,
        "versions": versions(),
        "config": cfg.dump(),
    }


def measure(rows: list[Row], runs: dict, revision: str) -> Iterator[tuple[dict, bool]]:
    """Yields each row's numbers, and whether they were kept; rows of a run share its detector.

    Args:
        revision: of the code that measures.
    """
    digest, data = functools.cache(sha256), data_digest(rows[0].cfg.DATASETS.TEST[0])
    detector = functools.lru_cache(maxsize=1)(lambda run: predictor.trained_detector(runs[run]))
    for row in rows:
        path, wanted = Path(row.cfg.OUTPUT_DIR, "row.json"), fingerprint(row, data, digest)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("fingerprint") == wanted:
            yield {**kept, "name": row.label}, True
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {**evaluate(row, detector(row.run), revision), "fingerprint": wanted}
        found["weights_sha256"] = digest(row.cfg.MODEL.WEIGHTS)
        write_json(path, found)
        yield found, False


def as_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def format_tables(rows: list[dict], left_out: dict[str, str]) -> str:
    """Returns Markdown: our numbers, on COCO beside the paper's, then AP per class."""
    bbox = [row["results"]["bbox"] for row in rows]
    parts = [improvements_section([read_row(row) for row in rows])]
    parts += [f"`{name}` is left out: {reason}." for name, reason in left_out.items()]
    metric, classes = by_class(bbox[0])
    if classes:
        cells = [[name, *(as_text(b[f"{metric}-{name}"]) for b in bbox)] for name in classes]
        parts.append(markdown([f"{metric} of", *(row["name"] for row in rows)], cells))
    return "\n\n".join(parts) + "\n"


def write_results(folder: Path, rows: list[dict], left_out: dict[str, str]) -> None:
    content = {"command": command_line(), "rows": rows, "left_out": left_out}
    write_json(folder / "results.json", content)
    write_text(folder / "results.md", format_tables(rows, left_out))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    runs = read_runs(args)
    rows, left_out = plan_rows(args, runs)
    for name, reason in left_out.items():
        print(f"row {name} is left out: {reason}")
    if not rows:
        raise UsageError("no row is left to measure")
    done, folder, revision = [], Path(args.output), source_revision()
    for row, (found, kept) in zip(rows, measure(rows, runs, revision), strict=True):
        numbers = found["results"]["bbox"]
        columns = "  ".join(f"{key} {as_text(numbers.get(key))}" for key in ("AP50", "AP", "AP75"))
        seconds = f"{found['seconds_per_image']:.3f} s per image"
        print(f"{row.label:12}  {columns}  {seconds}{'  (kept)' if kept else ''}", flush=True)
        if found.get("revision") != revision:
            was = found.get("revision", "unknown")
            hint = f"delete {row.cfg.OUTPUT_DIR} to measure the row again"
            print(f"warning: {row.label} is of revision {was}, this code is {revision}: {hint}")
        done.append(found)
        write_results(folder, done, left_out)
    if len(done) > 1:
        try:
            intervals = change_intervals(done, [row.cfg.OUTPUT_DIR for row in rows])
        except NoDetections as error:
            print(f"changes over the first row have no intervals: {error}")
        else:
            done = [found | {"intervals": i} for found, i in zip(done, intervals, strict=True)]
            write_results(folder, done, left_out)
    print(f"written: {folder / 'results.json'}, {folder / 'results.md'}")
