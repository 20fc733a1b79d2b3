"""Compare every network's parameters and multiply-adds with the published ones."""

from __future__ import annotations

import argparse
import json
import re
from decimal import Decimal
from fnmatch import fnmatch
from typing import NamedTuple

import torch

from resnet_backbone.cli import CommandParser, key_and_value
from resnet_backbone.models import (
    StagedNetwork,
    analyze,
    build_model,
    count_parameters,
    list_models,
)
from resnet_backbone.runtime.errors import UsageError, one_line_errors

EPILOG = """\
examples:
  resnet-backbone analyze-model
  resnet-backbone analyze-model 'resnet*' --json
  resnet-backbone analyze-model --model resnet50 --option stride_in_1x1=False
  resnet-backbone analyze-model --model vgg16 --option 'out_features=["conv5"]' --input-size 600

Exit status: 0 when every row agrees with the published numbers, 1 when one differs, 2 for a
wrong argument."""

NOTES = """\
Multiply-adds are in 1e9, for one 224x224 image (CIFAR networks: 32x32); biases, norms, pooling and
additions are not counted. "conv" counts convolutions, "+linear" the linear layers as well.
Published parameters, which must agree to the digit:
  [t] torchvision's metadata; with BN less the convolutions' biases, which the norm cancels and
      our networks do not have (vgg16_bn: 138,365,992 - 4,224)
  [A] torchvision's less the projections of option B (18 and 34 layers: 173,824)
  [r] 11,295,240 of the BN-Inception that others released, less the convolutions' biases
  [s] sums over the layers of arXiv 1502.01852, Table 3, with a slope per channel
  [n] 97,216 n - 21,926 for 6n+2 layers, which rounds to the paper's Table 6 (0.27M ... 19.4M)
Published multiply-adds, which must agree within one unit of their last digit:
  paper        arXiv 1512.03385, Table 1, and section 4.1 for VGG; compared with "conv". One digit
               does not tell its rounding: 3.856 stands there as 3.8, 7.568 as 7.6.
  others       torchvision's metadata, and arXiv 1502.01852, Table 3, for PReLU-nets; compared with
               "+linear".
With "+linear" only VGG-16 would be further from the paper: 15.470 and 15.3. ResNet-34 rounds to
the paper's 3.6 with option A (3.644), which its Table 2 uses; with option B (3.663) it does not."""


class Row(NamedTuple):
    name: str
    options: dict[str, object]
    parameters: int
    source: str
    paper: str = ""  # 1e9 multiply-adds, convolutions
    others: str = ""  # 1e9 multiply-adds, convolutions and linear layers


def cifar_row(name: str) -> Row:
    blocks = (int(re.sub(r"\D", "", name)) - 2) // 6
    return Row(name, {}, 97_216 * blocks - 21_926, "n")


OPTION_A, STRIDE_3X3 = {"shortcut": "A"}, {"stride_in_1x1": False}

REFERENCES = (
    Row("resnet18", {}, 11_689_512, "t", "1.8", "1.814"),
    Row("resnet34", {}, 21_797_672, "t", "3.6", "3.664"),
    Row("resnet18", OPTION_A, 11_689_512 - 173_824, "A", "1.8"),
    Row("resnet34", OPTION_A, 21_797_672 - 173_824, "A", "3.6"),
    Row("resnet50", {}, 25_557_032, "t", "3.8"),
    Row("resnet101", {}, 44_549_160, "t", "7.6"),
    Row("resnet152", {}, 60_192_808, "t", "11.3"),
    Row("resnet50", STRIDE_3X3, 25_557_032, "t", others="4.089"),
    Row("resnet101", STRIDE_3X3, 44_549_160, "t", others="7.801"),
    Row("resnet152", STRIDE_3X3, 60_192_808, "t", others="11.514"),
    Row("plain18", {}, 11_689_512 - 173_824, "A", "1.8"),
    Row("plain34", {}, 21_797_672 - 173_824, "A", "3.6"),
    *(cifar_row(name) for name in list_models() if name.startswith("cifar")),
    Row("vgg11", {}, 132_863_336, "t", others="7.609"),
    Row("vgg13", {}, 133_047_848, "t", others="11.308"),
    Row("vgg16", {}, 138_357_544, "t", "15.3", "15.470"),
    Row("vgg19", {}, 143_667_240, "t", "19.6", "19.632"),
    Row("vgg11_bn", {}, 132_868_840 - 2_752, "t", others="7.609"),
    Row("vgg13_bn", {}, 133_053_736 - 2_944, "t", others="11.308"),
    Row("vgg16_bn", {}, 138_365_992 - 4_224, "t", others="15.470"),
    Row("vgg19_bn", {}, 143_678_248 - 5_504, "t", others="19.632"),
    Row("prelu_net_a", {}, 178_032_072, "s", others="19.0"),
    Row("prelu_net_b", {}, 183_343_048, "s", others="23.2"),
    Row("prelu_net_c", {}, 330_623_944, "s", others="53"),
    Row("bn_inception", {}, 11_295_240 - 10_016, "r"),
)


def within_last_digit(count: int, published: str) -> bool:
    """Returns whether a count is within one unit of the last digit of ``published`` (in 1e9)."""
    if not published:
        return True
    unit = Decimal(1).scaleb(Decimal(published).as_tuple().exponent)
    return abs(Decimal(count) / 10**9 - Decimal(published)) <= unit


def build_on_meta(name: str, options: dict[str, object]) -> tuple[StagedNetwork, int]:
    """Builds a network on the meta device; returns it and the side of its images in pixels."""
    with torch.device("meta"):
        model = build_model(name, **options)
    return model, 32 if name.startswith("cifar") else 224


def compare(reference: Row) -> dict[str, object]:
    """Returns our numbers and the published ones; the key ``ok`` says whether they agree."""
    model, size = build_on_meta(reference.name, reference.options)
    stages, parameters = analyze(model, size), count_parameters(model)
    convolutions = sum(stage.convolutions for stage in stages)
    total = sum(stage.multiply_adds for stage in stages)
    ok = (
        parameters == reference.parameters
        and within_last_digit(convolutions, reference.paper)
        and within_last_digit(total, reference.others)
    )
    return {
        "name": reference.name,
        "options": reference.options,
        "input_size": size,
        "parameters": parameters,
        "published_parameters": reference.parameters,
        "parameters_source": reference.source,
        "multiply_adds_convolutions": convolutions,
        "multiply_adds": total,
        "paper_multiply_adds_1e9": reference.paper or None,
        "others_multiply_adds_1e9": reference.others or None,
        "ok": ok,
    }


def select(patterns: list[str]) -> list[Row]:
    """Returns the references whose names match a pattern; all without patterns."""
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in REFERENCES):
            raise ValueError(f"no network is named {pattern!r}: use {', '.join(list_models())}")
    wanted = patterns or ["*"]
    return [row for row in REFERENCES if any(fnmatch(row.name, pattern) for pattern in wanted)]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *cells in [header, ["-" * width for width in widths], *rows]:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *padded]).rstrip())


def format_options(options: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def parse_size(text: str) -> tuple[int, int]:
    """Parses "224" or "600x1000" (height x width) into (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither SIZE nor HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="names or patterns (default: all networks)")
    add("--model", metavar="NAME", help="show the stages of one network instead")
    text = "with --model: an argument of the network, such as shortcut=A; may be repeated"
    how = dict(action="append", default=[], type=key_and_value, metavar="KEY=VALUE")
    add("--option", dest="options", help=text, **how)
    text = "with --model: size of the image (default: 224; CIFAR networks: 32)"
    add("--input-size", type=parse_size, metavar="SIZE|HxW", help=text)
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def show_stages(args: argparse.Namespace) -> int:
    options = dict(args.options)
    model, side = build_on_meta(args.model, options)
    size, results = args.input_size or (side, side), []
    for stage in analyze(model, size):
        feature = model.features.get(stage.name)
        if feature is None and stage.parameters == 0:
            continue  # dropout
        results.append(
            {
                "name": stage.name,
                "output_size": list(stage.output_shape[1:]),
                "channels": stage.output_shape[0],
                "stride": feature.stride if feature else None,
                "parameters": stage.parameters,
                "multiply_adds": stage.multiply_adds,
            }
        )
    total = {"name": "total", "output_size": [], "channels": None, "stride": None}
    for key in ("parameters", "multiply_adds"):
        total[key] = sum(result[key] for result in results)
    results.append(total)
    if args.json:
        print(json.dumps({"model": args.model, "input_size": size, "stages": results}, indent=2))
        return 0
    rows = []
    for name, output, channels, stride, parameters, count in map(dict.values, results):
        sizes = ["x".join(map(str, output)), str(channels or ""), str(stride or "")]
        rows.append([name, *sizes, f"{parameters:,}", f"{count:,}"])
    print(args.model, format_options(options), f"at {size[0]}x{size[1]}")
    print_table(["stage", "output", "channels", "stride", "parameters", "multiply-adds"], rows)
    return 0


def show_comparison(args: argparse.Namespace) -> int:
    references = select(args.names)
    results = [compare(reference) for reference in references]
    differing = sum(not result["ok"] for result in results)
    if args.json:
        print(json.dumps(results, indent=2))
        return 1 if differing else 0
    rows = []
    for one, found in zip(references, results, strict=True):
        counts = (found["multiply_adds_convolutions"], found["multiply_adds"])
        rows.append(
            [
                f"{one.name} {format_options(one.options)}".rstrip(),
                f"{found['parameters']:,}",
                f"{one.parameters:,} [{one.source}]",
                *(f"{count / 1e9:.4f}" for count in counts),
                *(one.paper or "-", one.others or "-"),
                "ok" if found["ok"] else "DIFFERS",
            ]
        )
    header = ["network", "parameters", "published", "conv", "+linear", "paper", "others", ""]
    print_table(header, rows)
    print(f"\n{NOTES}\n\n{len(results)} rows, {differing} differ from the published numbers")
    return 1 if differing else 0


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.model and (args.options or args.input_size):
        raise UsageError("--option and --input-size need --model")
    if args.model and args.names:
        raise UsageError("give either networks to compare or --model")
    try:
        return show_stages(args) if args.model else show_comparison(args)
    except (TypeError, RuntimeError) as error:  # options and sizes that the network cannot have
        raise UsageError(str(error)) from error
