"""Look at weights of ResNets and VGGs, convert them for another library, compare two files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps

from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.cli.export import read_picture, to_tensor
from resnet_backbone.runtime.errors import one_line_errors
from resnet_backbone.runtime.images import find_pictures, spread
from resnet_backbone.runtime.records import command_line
from resnet_backbone.weights import convert as conversion
from resnet_backbone.weights.checkpoint import Checkpoint, ModelSpec
from resnet_backbone.weights.compare import TOLERANCE, Comparison, Samples, compare, sample_images
from resnet_backbone.weights.export import FORMATS, check_target, export_checkpoint
from resnet_backbone.weights.inspect import default_size, inspect_source
from resnet_backbone.weights.preprocessing import (
    PREPROCESSINGS,
    Preprocessing,
    WeightsError,
    get_preprocessing,
)
from resnet_backbone.weights.reading import UnknownInput, read_checkpoint

EPILOG = """\
examples:
  What is in this file, and what does it not state?
    resnet-backbone convert-weights inspect resnet50.pth
  Weights of a library, downloaded by name, as a file that states everything:
    resnet-backbone convert-weights convert torchvision://resnet50/IMAGENET1K_V2 r50.safetensors
  The paper's released weights for transformers; you state what they were trained on:
    resnet-backbone convert-weights convert resnet50_msra.safetensors r50_hf --to huggingface \\
        --preprocessing msra
  A network of train-classifier for Detectron2, with PIXEL_STD [1, 1, 1]:
    resnet-backbone convert-weights convert output/resnet50/final.safetensors r50.pkl \\
        --to detectron2 --fold-std
  Are these two the same network? If not, what was mixed up?
    resnet-backbone convert-weights verify r50.safetensors r50.pkl --preprocessing-b msra

SOURCE, A, and B can be a file (.safetensors, .pth, .pt, .bin, .ckpt, .pkl), a folder of
transformers or timm, or a name such as torchvision://resnet50/IMAGENET1K_V2,
timm://resnet50.a1_in1k, hf://microsoft/resnet-50, detectron2://ImageNetPretrained/MSRA/R-101.pkl,
or https://... Nothing in a file is executed.

Exit status: 0; 1 if outputs differ (verify, convert); 2 for wrong input."""

CONVERT_EPILOG = """\
formats (--to):
  resnet_backbone  .safetensors that carries network, preprocessing, and origin (default)
  torchvision      .pth or .safetensors; RGB in 0..1, stride in the 3x3
  timm             a folder for timm.create_model("local-dir:FOLDER"); RGB, 0..1, stride in the 3x3
  huggingface      a folder for from_pretrained; RGB in 0..1
  detectron2       .pkl or .pth for MODEL.WEIGHTS
  caffe2           .pkl with the blob names of MSRA's and Detectron1's files

For libraries that take only RGB, the channel order is folded into the first convolution. The result
is read back and compared with the source on images, unless --no-verify is given."""

# Largest relative difference after rounding the kernels, a hundred layers deep.
TOLERANCES = {None: TOLERANCE, "fp32": TOLERANCE, "fp16": 1e-2, "bf16": 5e-2}
INPUT = ("channel_order", "value_range", "mean", "std")  # all are needed without a name
SOURCE_FACTS = ("preprocessing", *INPUT, "stride_in_1x1", "bn_eps", "model")


def add_source_arguments(parser: argparse.ArgumentParser, suffix: str = "") -> None:
    """Adds an option for each of :data:`SOURCE_FACTS`, which a source may not state itself."""
    whose, end = (f" of {suffix.upper()}", f"-{suffix}") if suffix else ("", "")
    add = parser.add_argument_group(f"what the source{whose} does not state").add_argument
    published = f"a published convention: {', '.join(PREPROCESSINGS)}"
    add(f"--preprocessing{end}", metavar="NAME", help=published)
    add(f"--channel-order{end}", choices=("RGB", "BGR"), help="order of the input's channels")
    text = "largest value of a pixel: 1 for pixels in 0..1, 255 for 0..255"
    add(f"--value-range{end}", type=float, choices=(1.0, 255.0), metavar="{1,255}", help=text)
    for name in ("mean", "std"):
        text = "one number per channel, in this order"
        add(f"--{name}{end}", nargs=3, type=float, metavar="X", help=text)
    text = "whether bottlenecks have their stride in the first 1x1 convolution"
    add(f"--stride-in-1x1{end}", choices=("true", "false"), help=text)
    add(f"--bn-eps{end}", type=float, metavar="EPS", help="epsilon of the batch norms")
    text = "network, if its tensors fit two, plain and option A (analyze-model lists all)"
    add(f"--model{end}", metavar="NAME", help=text)


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    inspect = add("inspect", help="show what a file holds, and what it does not state")
    convert = add("convert", help="write weights in another form", epilog=CONVERT_EPILOG)
    verify = add("verify", help="compare the outputs of two files on the same images")
    for command in (inspect, convert):
        text = "weights: a file, a folder, or a name"
        command.add_argument("source", metavar="SOURCE", help=text)
        text = "which of several networks in the file, such as state_dict_ema or module.encoder_k"
        command.add_argument("--key", default="", metavar="KEY", help=text)
        add_source_arguments(command)
    convert.add_argument("out", metavar="OUT", type=Path, help="file or folder to write")
    add_conversion_arguments(convert)
    verify.add_argument("a", metavar="A", help="the reference")
    verify.add_argument("b", metavar="B", help="the weights to compare with it")
    text = f"largest allowed difference, relative to A's largest output (default: {TOLERANCE})"
    verify.add_argument("--tolerance", type=float, default=TOLERANCE, help=text)
    for suffix in ("a", "b"):
        add_source_arguments(verify, suffix)
    for command in (convert, verify):
        add = command.add_argument_group("images to compare on").add_argument
        add("--images", metavar="DIR", help="folder (default: the photographs of scikit-image)")
        text = "number of images from DIR (default: 8)"
        add("--num-images", type=positive, default=8, metavar="N", help=text)
        add("--size", type=int, metavar="PIXELS", help="side (default: 224; CIFAR: 32)")
    return parser


def add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("conversion").add_argument
    text = "format, see below (default: %(default)s)"
    add("--to", default="resnet_backbone", choices=FORMATS, metavar="FORMAT", help=text)
    text = "channel order of the result"
    add("--channel-order-to", default="", choices=("RGB", "BGR"), help=text)
    text = "pixel range of the result: 1 for 0..1, 255 for 0..255"
    add("--value-range-to", type=float, choices=(1.0, 255.0), metavar="{1,255}", help=text)
    text = "fold the std into the first convolution; it becomes 1"
    add("--fold-std", action="store_true", help=text)
    text = "fold batch norms into the convolutions; cannot be undone"
    add("--fold-bn", action="store_true", help=text)
    text = "VGG without norms: scale every layer's responses to standard deviation 1"
    add("--unit-responses", action="store_true", help=text)
    add("--bn-eps-to", type=float, metavar="EPS", help="epsilon of the result's batch norms")
    add("--dtype", choices=conversion.DTYPES, help="type of the kernels; vectors stay fp32")
    text = "replace a per-pixel mean image by its channel means; not exact"
    add("--accept-channel-means", action="store_true", help=text)
    add("--shard-size", type=int, metavar="BYTES", help="huggingface: maximum size of a file")
    add("--overwrite", action="store_true", help="replace an existing OUT")
    add("--no-verify", action="store_true", help="do not compare the result with the source")


def stated(args: argparse.Namespace, suffix: str = "") -> dict[str, Any]:
    """Returns what the command line states of a source, by name in :data:`SOURCE_FACTS`."""
    end = f"_{suffix}" if suffix else ""
    found = {name: getattr(args, name + end) for name in SOURCE_FACTS}
    return {name: value for name, value in found.items() if value is not None}


def stated_source(
    args: argparse.Namespace, suffix: str = ""
) -> tuple[Preprocessing | str, ModelSpec | None]:
    """Returns the preprocessing and network that the command line states, or "" and None."""
    facts = stated(args, suffix)
    model = ModelSpec(facts.pop("model")) if "model" in facts else None
    if "stride_in_1x1" in facts:
        facts["stride_in_1x1"] = facts["stride_in_1x1"] == "true"
    name = facts.pop("preprocessing", "")
    if name:
        named, changed = get_preprocessing(name), ", ".join(facts)
        if changed:
            source = f"{name}, with {changed} stated on the command line; {named.source}"
            named = replace(named, **facts, source=source)
        return named, model
    if not facts:
        return "", model
    end = f"-{suffix}" if suffix else ""
    missing = [f"--{key.replace('_', '-')}{end}" for key in INPUT if key not in facts]
    if missing:
        raise WeightsError(f"to state the input, also give {', '.join(sorted(missing))}")
    return Preprocessing(**facts, source="stated on the command line"), model


def read(source: str, args: argparse.Namespace, suffix: str = "") -> Checkpoint:
    try:
        return read_checkpoint(source, *stated_source(args, suffix))
    except UnknownInput as error:
        option = f"--preprocessing{'-' * bool(suffix)}{suffix} {'|'.join(PREPROCESSINGS)}"
        text = (
            f"{source} does not state which input it was trained on: add {option}, or see inspect"
        )
        raise WeightsError(text) from error


def read_images(args: argparse.Namespace, checkpoint: Checkpoint) -> Samples:
    """Returns the images to compare on: center crops from a folder, or the built-in ones."""
    size = default_size(checkpoint) if args.size is None else args.size
    if size < 32:
        raise WeightsError("--size is at least 32")
    if args.images is None:
        return sample_images(size)
    files = find_pictures([args.images])
    chosen = (read_picture(file) for file in spread(files, args.num_images))
    crops = [to_tensor(ImageOps.fit(picture, (size, size))) for picture in chosen]
    return Samples(torch.stack(crops), f"{len(crops)} of {len(files)} pictures in {args.images}")


def report(comparison: Comparison, samples: Samples, a: str = "A", b: str = "B") -> None:
    print(f"on {samples.text}, {samples.images.shape[-1]} pixels")
    print(comparison.difference)
    if comparison.equal:
        print(f"{a} and {b} are equal within {comparison.tolerance:g}")
    elif comparison.explanation:
        print(f"{a} and {b} DIFFER as they do where this is wrong about {b} (or about {a}):")
        print("".join(f"  {text}\n" for text in comparison.explanation), end="")
        print(f"with that they agree; {comparison.explained}")
    else:
        known = "mistakes (stride, channel order, mean, std, range, pooling, BN eps)"
        print(f"{a} and {b} DIFFER, and none of {comparison.num_tried} known {known} explains it:")
        print("the weights themselves may differ")


def run_inspect(args: argparse.Namespace) -> int:
    lines, options = inspect_source(args.source, *stated_source(args))
    print("\n".join(lines))
    words = ["convert", args.source, "OUT"]
    for name, value in stated(args).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}"]
        words += [f"{x:.9g}" if isinstance(x, float) else x for x in values]
    print("next:         ", command_line("convert-weights", words), *options)
    return 0


def converted(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    rules = FORMATS[args.to]
    value_range = args.value_range_to or rules.value_range
    if rules.value_range not in (None, value_range):
        raise WeightsError(f"{args.to} files are used with pixels in 0..{rules.value_range:g}")
    if rules.rgb and args.channel_order_to == "BGR":
        raise WeightsError(f"{args.to} takes RGB only")
    order = args.channel_order_to
    checkpoint = conversion.convert_input(checkpoint, channel_order=order, value_range=value_range)
    if args.fold_std:
        checkpoint = conversion.convert_input(checkpoint, std=(1.0, 1.0, 1.0))
    if args.bn_eps_to is not None:
        checkpoint = conversion.to_bn_eps(checkpoint, args.bn_eps_to)
    if args.fold_bn:
        checkpoint = conversion.fold_bn(checkpoint)
    return checkpoint if args.dtype is None else conversion.to_dtype(checkpoint, args.dtype)


def run_convert(args: argparse.Namespace) -> int:
    check_target(args.out, args.to, args.overwrite)
    source = read(args.source, args)
    samples = read_images(args, source)
    if args.accept_channel_means:
        source = conversion.use_channel_means(source)
        print("from here on with the channel means, which is not exactly the same")
    if args.unit_responses:
        source = conversion.to_unit_responses(source, samples.images)
        print(f"every layer's responses have standard deviation 1 on {samples.text}")
    options = dict(overwrite=args.overwrite, shard_size=args.shard_size)
    exported = export_checkpoint(converted(source, args), args.out, args.to, **options)
    print(f"wrote {args.out} ({args.to}); use it so:")
    print("\n".join(f"  {line}" for line in exported.usage.splitlines()))
    if args.no_verify:
        return 0
    written = exported.checkpoint
    back = read_checkpoint(args.out, written.preprocessing, written.model)
    comparison = compare(source, back, samples.images, TOLERANCES[args.dtype])
    report(comparison, samples, "source", str(args.out))
    return 0 if comparison.equal else 1


def run_verify(args: argparse.Namespace) -> int:
    a, b = read(args.a, args, "a"), read(args.b, args, "b")
    samples = read_images(args, a)
    comparison = compare(a, b, samples.images, args.tolerance)
    report(comparison, samples)
    half = {value.dtype for value in b.tensors.values()} - {torch.float32}
    if half and comparison.tolerance < comparison.difference.relative < TOLERANCES["bf16"]:
        print("B is stored in half precision: --tolerance 0.05 allows for its rounding")
    return 0 if comparison.equal else 1


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if getattr(args, "key", ""):
        args.source = f"{args.source}#{args.key}"
    runs = {"inspect": run_inspect, "convert": run_convert, "verify": run_verify}
    return runs[args.command](args)
