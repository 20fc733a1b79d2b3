"""Export a network or a detector for other runtimes, and check the result there on images.

A classifier, or a backbone with --out-features, becomes NAME.pt2 (torch.export) and NAME.onnx, for
any batch size, height, and width:

  resnet-backbone export --weights resnet50.safetensors --output exported/resnet50 \\
      --images photo1.jpg photo2.jpg
  resnet-backbone export --weights torchvision://resnet50/IMAGENET1K_V2 --out-features res3 res5 \\
      --with-normalization --output exported/backbone --images photos/

A detector of train-net (Faster or Mask R-CNN) becomes NAME.ts (TorchScript) and NAME.onnx, for one
image of any size at a time. Its backbone with the pyramid becomes NAME_backbone.pt2:

  resnet-backbone export --config-file output/run/config.yaml \\
      --weights output/run/model_final.pth --output exported/detector --images photos/
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from resnet_backbone.cli import CommandParser, positive
from resnet_backbone.fast import export
from resnet_backbone.fast.export import Mismatch
from resnet_backbone.models import StagedNetwork
from resnet_backbone.runtime.errors import UnexpectedResults, UsageError, one_line_errors
from resnet_backbone.runtime.files import put_in_place, write_json
from resnet_backbone.runtime.images import find_pictures, read_rgb
from resnet_backbone.weights import ModelSpec, Preprocessing, load_weights, read_checkpoint
from resnet_backbone.weights.preprocessing import InputNormalizer

EPILOG = """\
Every file is run on --images (with onnxruntime for ONNX), each image at its own size (at most
--longest-side), and compared with PyTorch. The command prints the largest difference: for a
network, relative to the largest value of an output; for a detector, of the scores, and of the boxes
as a fraction of the image's longer side. If this exceeds --tolerance, or if shapes or the number of
detections differ, nothing is written and the exit status is 1. Give photographs of at least two
sizes; four are enough. NAME.json and the ONNX file's metadata describe the input.

The input is float32, normalized by the caller as NAME.json says, or, with --with-normalization, RGB
pixels in 0..255. A detector normalizes by itself: it takes float32 in 0..255, in the channel order
of INPUT.FORMAT. `resnet-backbone benchmark infer --engines` measures the speed of each engine."""

CHECKED = 4  # images
OF_NETWORKS = "model preprocessing out_features format with_normalization input_type".split()
SUFFIXES = (".json", ".onnx", ".pt2", ".ts", "_backbone.pt2")  # of all files of exports
DETECTOR_OUTPUTS = {
    "boxes": "float32 (N, 4): x0, y0, x1, y1 in pixels of the input",
    "classes": "int64 (N,): places in class_names",
    "scores": "float32 (N,): 0 to 1",
    "masks": "float32 (N, 1, 28, 28): probabilities within the box",
}


def output_name(text: str) -> Path:
    """Checks a path that gets suffixes."""
    if text.endswith("/") or Path(text).suffix in (".onnx", ".pt2", ".json"):
        raise argparse.ArgumentTypeError(f"{text}: give a file without suffix, as exported/model")
    return Path(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--weights", required=True, help="a file, a folder, or a name such as torchvision://...")
    add("--output", required=True, type=output_name, metavar="NAME", help="path without suffix")
    add("--overwrite", action="store_true", help="replace the files of an earlier export")
    add("--images", required=True, nargs="+", help="photographs or a folder of them")
    text = "reduce larger images to this size in pixels (default: 640)"
    add("--longest-side", type=positive, default=640, help=text)
    add("--tolerance", type=float, default=1e-4, help="largest allowed difference (default: 1e-4)")
    add = parser.add_argument_group("network").add_argument
    add("--model", help="name of the network, if the weights fit several")
    add("--preprocessing", default="", help="input of the weights, if they do not state it")
    text = "export a backbone that returns these stages: res2 ... res5"
    add("--out-features", nargs="+", metavar="STAGE", help=text)
    both = ("pt2", "onnx")
    add("--format", nargs="+", choices=both, default=both, help="(default: both)")
    text = "include the normalization: the input is RGB pixels in 0..255"
    add("--with-normalization", action="store_true", help=text)
    text = "type of these pixels (default: uint8)"
    add("--input-type", choices=("uint8", "float32"), help=text)
    add = parser.add_argument_group("detector").add_argument
    add("--config-file", help="config of the detector that --weights belong to")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    if args.config_file:
        from resnet_backbone.detection.config import take_back_overrides

        take_back_overrides(args, "images")
    args.images = [Path(path) for path in args.images]
    if args.input_type and not (args.with_normalization or args.config_file):
        parser.error(f"--input-type {args.input_type} needs --with-normalization")
    if args.config_file and any(getattr(args, n) != parser.get_default(n) for n in OF_NETWORKS):
        parser.error("--config-file exports a detector: omit the network's options")
    if args.opts and not args.config_file:
        parser.error(f"{args.opts[0]}: config overrides belong to --config-file")
    return args


def read_picture(file: Path) -> Image.Image:
    """Reads an image as RGB, upright."""
    return Image.fromarray(read_rgb(file))


def to_tensor(picture: Image.Image) -> Tensor:
    """Converts an RGB image to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_images(paths: list[Path], longest_side: int) -> list[Tensor]:
    """Reads the first images, each RGB uint8 (1, 3, H, W), in at least two sizes."""
    images: list[Tensor] = []
    for file in find_pictures(paths):
        picture = read_picture(file)
        picture.thumbnail((longest_side, longest_side))
        pixels = to_tensor(picture)[None]
        if len(images) < CHECKED or pixels.shape != images[0].shape:
            images.append(pixels)
        if len(images) >= CHECKED and any(image.shape != images[0].shape for image in images):
            return images
    if all(image.shape == images[0].shape for image in images):
        raise ValueError("--images: give photographs of at least two sizes")
    return images


def build_network(args: argparse.Namespace) -> tuple[StagedNetwork, Preprocessing, ModelSpec]:
    given = ModelSpec(args.model) if args.model else None
    checkpoint = read_checkpoint(args.weights, args.preprocessing, given)
    options = {"out_features": args.out_features} if args.out_features else {}
    network = checkpoint.model.build(**options)
    preprocessing = load_weights(network, args.weights, args.preprocessing)
    return network.eval(), preprocessing, checkpoint.model


def export_network(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    network, preprocessing, spec = build_network(args)
    if preprocessing.channel_order and getattr(network, "in_channels", 3) != 3:
        raise UsageError(f"{args.weights}: only networks of three channels are exported")
    images = read_images(args.images, args.longest_side)
    model: nn.Module = network
    normalize = InputNormalizer(preprocessing)
    dtype, prepare = torch.float32, normalize
    reference = export.run_model(network)
    if args.with_normalization:
        model = export.NormalizedNetwork(network, preprocessing).eval()
        dtype = torch.float32 if args.input_type == "float32" else torch.uint8
        prepare = partial(torch.Tensor.to, dtype=dtype)
        reference = export.run_model(lambda pixels: network(normalize(pixels.to(torch.uint8))))
    program = export.export_program(model, dtype=dtype)
    name = args.output.name
    facts = export.input_facts(preprocessing, args.with_normalization)
    facts |= {"dtype": str(dtype).removeprefix("torch.")}
    runners = {}
    if "pt2" in args.format:
        torch.export.save(program, folder / f"{name}.pt2")
        runners["pt2"] = export.run_program(folder / f"{name}.pt2")
    if "onnx" in args.format:
        path = folder / f"{name}.onnx"
        metadata = {"input": json.dumps(facts), "preprocessing": preprocessing.to_json()}
        export.export_onnx(model, path, metadata=metadata, program=program)
        runners["onnx"] = export.run_onnx(path)
    pair = torch.cat([images[0], images[0].flip(3)])
    batches = [prepare(batch) for batch in (*images, pair)]
    differences = {
        kind: export.largest_difference(reference, run, batches) for kind, run in runners.items()
    }
    return {
        "model": json.loads(spec.to_json()),
        "input": facts,
        "outputs": {
            output: network.features[output]._asdict() if output in network.features else {}
            for output in export.output_names(model)
        },
        "preprocessing": json.loads(preprocessing.to_json()),
        "differences": differences,
    }


def export_detector(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from resnet_backbone.detection.config import load_config
    from resnet_backbone.detection.inference import export as detectors
    from resnet_backbone.detection.inference.detector import switches_off
    from resnet_backbone.detection.inference.predictor import Predictor, find_class_names

    fixed = ["MODEL.WEIGHTS", args.weights, "MODEL.DEVICE", "cpu"]
    predictor = Predictor(load_config(args.config_file, [*switches_off(), *args.opts, *fixed]))
    cfg, detector = predictor.cfg, predictor.model
    stated = load_config(args.config_file, [*args.opts, *fixed])
    own, used = (one.RESNET_BACKBONE.TEST for one in (stated, cfg))
    left_out = [f"RESNET_BACKBONE.TEST.{key} {own[key]}" for key in own if own[key] != used[key]]
    for setting in left_out:
        print(f"not exported: {setting}", file=sys.stderr)
    model = detectors.SingleImageDetector(detector).eval()
    flip = cfg.INPUT.FORMAT == "BGR"
    images = [image[0].float() for image in read_images(args.images, args.longest_side)]
    images = [image.flip(0) if flip else image for image in images]
    name = args.output.name
    detectors.export_torchscript(model, images[0], folder / f"{name}.ts")
    about = {
        "input": {
            "layout": "CHW, one image",
            "dtype": "float32",
            "normalization": "in the graph",
            "channel_order": cfg.INPUT.FORMAT,
            "value_range": 255,
            "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
            "longer_side_at_most": cfg.INPUT.MAX_SIZE_TEST,
        },
        "class_names": find_class_names(cfg),
    }
    metadata = {key: json.dumps(value) for key, value in about.items()}
    detectors.export_onnx(model, images[0], folder / f"{name}.onnx", metadata)
    runners = {
        "ts": torch.jit.load(str(folder / f"{name}.ts")),
        "onnx": detectors.run_onnx(folder / f"{name}.onnx"),
    }
    reference = detectors.run_detector(detector, model.names)
    differences = {
        kind: detectors.largest_difference(reference, run, images) for kind, run in runners.items()
    }
    path = folder / f"{name}_backbone.pt2"
    differences["backbone.pt2"] = detectors.export_backbone(detector, path, images)
    return {
        "config_file": args.config_file,
        "not_exported": left_out,
        **about,
        "outputs": {name: DETECTOR_OUTPUTS.get(name, "") for name in model.names},
        "differences": differences,
    }


def run(args: argparse.Namespace) -> None:
    """Exports to a temporary folder beside the output, and moves the files after the check."""
    parent = args.output.parent
    parent.mkdir(parents=True, exist_ok=True)
    earlier = [parent / f"{args.output.name}{suffix}" for suffix in SUFFIXES]
    earlier = [path for path in earlier if path.exists()]
    if earlier and not args.overwrite:
        raise UsageError(f"{earlier[0]} already exists: give another --output, or --overwrite")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as temporary:
        folder = Path(temporary)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check would find what tracers warn about
            export_any = export_detector if args.config_file else export_network
            facts = export_any(args, folder)
        refuse_differences(facts["differences"], args.tolerance)
        facts["weights"] = args.weights
        facts["versions"] = {"torch": torch.__version__}
        if "onnx" in facts["differences"]:
            facts["versions"]["onnx"] = version("onnx")
        write_json(folder / f"{args.output.name}.json", facts, indent=1)
        for file in sorted(folder.iterdir()):
            target = parent / file.name
            put_in_place(file, target)
            print(f"written: {target}")
            earlier = [path for path in earlier if path != target]
    for path in earlier:  # of another network or format, which the new .json does not describe
        path.unlink()


def refuse_differences(differences: dict[str, dict[str, float]], tolerance: float) -> None:
    """Prints the differences of each file's outputs; raises Mismatch if one is too large."""
    wrong = []
    for kind, values in differences.items():
        for output, value in values.items():
            print(f"{kind:14}{output:10}largest difference from PyTorch {value:.1e}")
            if not value <= tolerance:
                wrong.append(f"{output} of {kind} by {value:.1e}")
    if wrong:
        limit = f"more than --tolerance {tolerance:g}: nothing was written"
        raise Mismatch(f"{', '.join(wrong)} from PyTorch, {limit}")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        run(args)
    except Mismatch as error:
        raise UnexpectedResults(f"differs: {error}") from error
