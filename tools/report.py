#!/usr/bin/env python
"""Make pictures of results from the files that a training run leaves."""

from __future__ import annotations

import argparse
import os
import sys

from resnet_backbone.report import plot_training

METRICS = "metrics.json"

CURVES_EPILOG = """\
examples:
  python tools/report.py curves --run output/r50 --output curves.png
  python tools/report.py curves --run output/r50="pre-trained" --run output/scratch=scratch \\
      --output docs/curves.png

Runs that are still going on, or were resumed, can be drawn too. AP50 appears where the run
evaluated (TEST.EVAL_PERIOD above 0, or at its end)."""


def parse_run(text: str) -> tuple[str, str]:
    """Split "DIR" or "DIR=LABEL" into (path of the metrics file, label).

    Raises:
        argparse.ArgumentTypeError: there is no metrics.json.
    """
    folder, _, label = (text, "", "") if os.path.exists(text) else text.rpartition("=")
    folder = folder or text
    path = folder if os.path.isfile(folder) else os.path.join(folder, METRICS)
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(
            f"{path} does not exist; give a training run's OUTPUT_DIR, which holds {METRICS}"
        )
    return path, label or os.path.basename(os.path.dirname(os.path.abspath(path)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    curves = commands.add_parser(
        "curves",
        help="draw total loss and AP50 against iteration, one or more runs in one picture",
        description="Draw total loss (smoothed) and AP50 against iteration, as a PNG picture.",
        epilog=CURVES_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    curves.add_argument(
        "--run",
        dest="runs",
        action="append",
        required=True,
        type=parse_run,
        metavar="DIR[=LABEL]",
        help="a training run's OUTPUT_DIR (or its metrics.json) and its name in the legend;"
        " may be given several times",
    )
    curves.add_argument("--output", required=True, metavar="FILE.png", help="picture to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    paths, labels = zip(*args.runs, strict=True)
    try:
        plot_training(paths, args.output, labels)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
