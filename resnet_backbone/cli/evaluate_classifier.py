"""Evaluate a classifier, or an ensemble, as the paper did: every image exactly once.

Prints top-1 and top-5 error and cross-entropy. With --output also writes results.json,
predictions.csv, per_class.csv, confusion.csv and confusion.png. With --predict it prints the
classes of pictures without labels.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.classification import networks, protocols
from resnet_backbone.classification.data import imagenet
from resnet_backbone.classification.data.evaluation import (
    EvaluationArrays,
    EvaluationFiles,
    EvaluationLoader,
)
from resnet_backbone.classification.data.sources import CIFAR10_CLASSES, read_cifar10
from resnet_backbone.classification.evaluation import EvaluationResult, evaluate, on_engine
from resnet_backbone.classification.protocols import Protocol
from resnet_backbone.classification.step import AMP
from resnet_backbone.cli import CommandParser, key_and_value
from resnet_backbone.fast.engines import CALIBRATION, ENGINES, check_engine
from resnet_backbone.report import evaluations
from resnet_backbone.runtime import records
from resnet_backbone.runtime.errors import UsageError, one_line_errors
from resnet_backbone.runtime.files import write_json
from resnet_backbone.runtime.images import find_pictures, spread
from resnet_backbone.runtime.launch import add_launch_arguments, plan_launch, run_processes
from resnet_backbone.runtime.processes import World, choose_device, current_world
from resnet_backbone.weights.load import WrongStride
from resnet_backbone.weights.preprocessing import InputNormalizer, Preprocessing, WeightsError
from resnet_backbone.weights.reading import UnknownInput, read_checkpoint

logger = logging.getLogger("resnet_backbone.evaluate_classifier")

EPILOG = """\
examples:
  A network of train-classifier; its file states the network and its input:
    resnet-backbone evaluate-classifier --weights output/resnet50/final.safetensors \\
        --imagenet-folder imagenet/val
  Images without labels: the five best classes of each, also as predictions.csv:
    resnet-backbone evaluate-classifier --weights output/mine/final.safetensors \\
        --predict photos/ --output predicted
  The paper's 10-crop testing (Tables 2 and 3) and its multi-scale dense testing (Table 4):
    resnet-backbone evaluate-classifier --weights final.safetensors --protocol ten_crop \\
        --imagenet-folder imagenet/val --num-gpus 8 --amp bf16
    resnet-backbone evaluate-classifier --weights final.safetensors --protocol dense \\
        --imagenet-folder imagenet/val --batch-size 16 --output output/dense
  The authors' released weights, which state neither, on ten of the thousand classes:
    resnet-backbone evaluate-classifier --weights resnet50_msra.safetensors --model resnet50 \\
        --preprocessing msra --imagenet-folder some_classes --class-list wnid_index.txt
  An ensemble, on a flat folder with a label list (its classes are ImageNet's wnids, such as
  n01440764, or your own names):
    resnet-backbone evaluate-classifier --weights a.safetensors b.safetensors \\
        --flat ILSVRC2012_img_val --labels val_labels.txt --class-list LOC_synset_mapping.txt
  In OpenVINO's int8, with the ranges of activations from 128 of the training images:
    resnet-backbone evaluate-classifier --weights final.safetensors \\
        --imagenet-folder imagenet/val --engine openvino --int8 imagenet/train
  CIFAR-10:
    resnet-backbone evaluate-classifier --weights output/resnet20/final.safetensors \\
        --cifar10 cifar10

Dense testing averages the class scores over all positions of the whole image at each of --sizes,
then over the sizes and their mirror images. With --pooling sliding, the network is fully
convolutional: 7x7 pooling windows, and fc as a 1x1 convolution. With global_pool, it makes its
ordinary forward pass at each size. --softmax says whether scores become probabilities at each
position, in each view, or at the end. The paper does not state these choices; the defaults are
those of VGG, to which it refers. A per-pixel mean has one size only, so dense testing subtracts the
channel means.

Several processes (--num-gpus, or torchrun) give the same numbers as one. An unreadable image ends
the evaluation. With --max-bad-images N, up to N of them count as wrong and are listed in
results.json. Exit status: 0, or 2 for wrong input."""

ONLY_FOR = dict.fromkeys(("resize", "crop"), ("center", "ten_crop"))
ONLY_FOR |= dict.fromkeys(("sizes", "flip", "pooling", "softmax", "window"), ("dense",))


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("networks").add_argument
    several: dict[str, Any] = dict(nargs="+", default=[])
    text = "weights of a network; several make an ensemble"
    add("--weights", nargs="+", required=True, metavar="FILE", help=text)
    silent = "of files that do not state it, one for all files or one for each"
    text = f"network {silent}: resnet50 (analyze-model lists all), torchvision/NAME, timm/NAME"
    add("--model", metavar="NAME", help=text, **several)
    text = "arguments of --model, such as stride_in_1x1=False"
    add("--model-options", type=key_and_value, metavar="KEY=VALUE", help=text, **several)
    add("--num-classes", type=int, help="classes of --model (default: 1000; CIFAR networks: 10)")
    add("--preprocessing", metavar="NAME", help=f"input {silent}: msra, caffe_vgg, ...", **several)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (give one)")
    chosen = group.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--imagenet-folder", metavar="DIR", help="class folders: DIR/CLASS/IMAGE")
    chosen.add_argument("--flat", metavar="DIR", help="images in one folder, with --labels")
    chosen.add_argument("--cifar10", metavar="DIR", help="the test set, binary or Python version")
    text = "images, and folders of images, without labels: print the classes of each"
    chosen.add_argument("--predict", nargs="+", type=Path, metavar="PATH", help=text)
    text = "file of lines 'image class' or 'image index'"
    group.add_argument("--labels", metavar="FILE", help=text)
    text = "file of lines 'class index'; needed if the data have only some of the network's classes"
    group.add_argument("--class-list", metavar="FILE", help=text)
    text = "count up to N unreadable images as wrong (default: 0, stop at the first)"
    group.add_argument("--max-bad-images", type=int, default=0, metavar="N", help=text)


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("protocol").add_argument
    text = "how images are tested (default: center; for --cifar10: full)"
    add("--protocol", choices=tuple(protocols.PROTOCOLS), help=text)
    text = "center, ten_crop: short side of the image (default: as the weights state, else 256)"
    add("--resize", type=int, metavar="N", help=text)
    text = "center, ten_crop: side of the crop (default: as the weights state, else 224)"
    add("--crop", type=int, metavar="N", help=text)
    add("--sizes", type=int, nargs="+", help="dense: short sides (default: 224 256 384 480 640)")
    text = "dense: also test mirror images (default)"
    add("--flip", action=argparse.BooleanOptionalAction, default=None, help=text)
    add("--pooling", choices=protocols.POOLINGS, help="dense: see below (default: sliding)")
    add("--softmax", choices=protocols.SOFTMAXES, help="dense: see below (default: per_view)")
    add("--window", type=int, help="dense: side of the sliding pooling window (default: 7)")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add_network_arguments(parser)
    add_data_arguments(parser)
    add_protocol_arguments(parser)
    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=int, default=64, help="images per process (default: 64)")
    add("--workers", type=int, default=4, help="loader processes (default: 4)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--amp", choices=tuple(AMP), default="none", help="mixed precision (default: none)")
    text = "what runs the network; auto: the fastest (default: eager)"
    add("--engine", choices=ENGINES, default="eager", help=text)
    text = "run in int8, with --engine openvino; DIR has images to calibrate on, at the test size"
    add("--int8", metavar="DIR", help=text)
    flag = argparse.BooleanOptionalAction
    add("--channels-last", action=flag, default=True, help="memory format (default: channels-last)")
    add("--output", metavar="DIR", help="folder for the results")
    add_launch_arguments(parser)
    args = parser.parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    if bool(args.flat) != bool(args.labels):
        raise UsageError("--flat DIR and --labels FILE need each other")
    if args.cifar10 and args.class_list:
        raise UsageError("--class-list is for --imagenet-folder and --flat")
    args.dtype = torch.int8 if args.int8 else AMP[args.amp] or torch.float32
    if args.int8 and args.amp != "none":
        raise UsageError("--int8 and --amp are two precisions: give one")
    check_engine(args.engine, args.dtype, choose_device(args.device))
    return args


def make_protocol(args: argparse.Namespace, trained: Preprocessing | None = None) -> Protocol:
    """Returns the protocol of the options; by default its sizes are what the weights state.

    Args:
        trained: input of the first network's weights; None: not read yet.
    """
    whole = trained and trained.mean_image is not None and trained.crop_size is None
    full = args.cifar10 or (args.predict and whole)
    name = args.protocol or ("full" if full else "center")
    settings = {key: getattr(args, key) for key in ONLY_FOR if getattr(args, key) is not None}
    for key in settings:
        if name not in ONLY_FOR[key]:
            raise UsageError(f"--{key} is for protocol {' and '.join(ONLY_FOR[key])}, not {name}")
    if trained is None and len({"resize", "crop"} & settings.keys()) == 1:
        return protocols.PROTOCOLS[name]()  # the other size is not known yet
    if trained and name in ONLY_FOR["crop"]:
        sizes = dict(zip(("resize", "crop"), trained.center_crop(), strict=True))
        settings = {**sizes, "interpolation": trained.interpolation or "bilinear", **settings}
        if settings != asdict(protocols.Center()):
            text = "crops of %(crop)d from a short side of %(resize)d, %(interpolation)s"
            logger.info(text, settings)
    if args.cifar10 and name != "full":
        raise UsageError(
            f"CIFAR-10 images are tested without crops: give --protocol full, not {name}"
        )
    return protocols.PROTOCOLS[name](**settings)


def one_each(values: list[str], args: argparse.Namespace, option: str) -> list[str]:
    """Returns one value for each weights file; a single one applies to all that need it."""
    if len(values) not in (0, 1, len(args.weights)):
        raise UsageError(f"{option}: give one for all, or one for each of the weights files")
    return values if len(values) > 1 else (values or [""]) * len(args.weights)


def network_spec(
    path: str, name: str, preprocessing: str, args: argparse.Namespace
) -> tuple[networks.NetworkSpec, bool]:
    """Returns a weights file's network, from file, arguments or tensors; whether from the file."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; give --weights a .safetensors file")
    found = networks.read_spec(path) if path.endswith(".safetensors") else None
    if found is not None:
        if len(args.model) == len(args.weights) and name != found.name:
            raise UsageError(f"{path} is a {found.name}, not a {name}: omit --model")
        return found, True
    if not name:
        try:
            found = read_checkpoint(path, preprocessing).model
        except UnknownInput:
            raise
        except WeightsError as error:
            raise UsageError(f"{error}: give --model NAME") from error
        return networks.NetworkSpec(found.name, found.num_classes, found.options), False
    classes = args.num_classes or (10 if name.startswith("cifar_") else 1000)
    return networks.NetworkSpec(name, classes, dict(args.model_options)), False


def load_networks(
    args: argparse.Namespace, world: World
) -> tuple[list[tuple[torch.nn.Module, InputNormalizer]], int]:
    """Returns the networks with their preprocessing, and their number of classes."""
    models, specs = [], []
    names = one_each(args.model, args, "--model")
    inputs = one_each(args.preprocessing, args, "--preprocessing")
    for path, name, preprocessing in zip(args.weights, names, inputs, strict=True):
        try:
            spec, own = network_spec(path, name, preprocessing, args)
            if own and len(args.preprocessing) < len(args.weights):
                preprocessing = ""  # a single value is only for files that do not state theirs
            model = spec.build()
            found = networks.load_network(model, path, preprocessing)
        except UnknownInput as error:
            raise UsageError(str(UnknownInput(error.source, "--preprocessing"))) from error
        except WrongStride as error:
            option = f"--model-options stride_in_1x1={error.expected}"
            raise UsageError(f"{error} ({option})") from error
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        model = model.to(world.device, memory_format=layout)
        models.append((model, InputNormalizer(found, world.device)))
        specs.append(spec)
    if len({spec.num_classes for spec in specs}) > 1:
        found = ", ".join(f"{spec.name} has {spec.num_classes}" for spec in specs)
        raise UsageError(f"an ensemble needs networks of the same classes: {found}")
    return models, specs[0].num_classes


def read_data(
    args: argparse.Namespace, protocol: Protocol, num_classes: int
) -> tuple[EvaluationFiles | EvaluationArrays, tuple[str, ...]]:
    """Returns the images, and a name for each of the network's classes."""
    if args.cifar10:
        if num_classes != len(CIFAR10_CLASSES):
            raise UsageError(f"the network has {num_classes} classes, but CIFAR-10 has 10")
        return EvaluationArrays(*read_cifar10(args.cifar10, train=False)), CIFAR10_CLASSES
    folder, listed = args.imagenet_folder or args.flat, args.class_list
    classes = imagenet.read_class_list(listed, folder, args.labels) if listed else None
    in_weights = {tuple(networks.read_class_names(path)) for path in args.weights} - {()}
    for index, name in chain.from_iterable(map(enumerate, in_weights)):
        if classes and classes.get(name, index) != index:
            raise UsageError(
                f"{listed}: {name} has index {classes[name]}, but {index} in the weights: correct "
                "the list, or omit --class-list"
            )
    if classes is None and len(in_weights) > 1:
        raise UsageError("these weights name different classes, or orders: give --class-list FILE")
    if classes is None and in_weights and len(names := in_weights.pop()) <= num_classes:
        classes = {name: index for index, name in enumerate(names)}
    if args.predict:
        samples = [(path.absolute(), 0) for path in find_pictures(args.predict, "--predict")]
        images = EvaluationFiles(samples, *protocol.loading)  # no labels
        return images, imagenet.name_classes(classes or {}, num_classes)
    if args.imagenet_folder:
        files = imagenet.read_image_folder(folder, classes, num_classes if classes else 0)
        known = len(files.class_names)
    else:
        files = imagenet.read_flat_folder(folder, args.labels, classes, num_classes)
        named = [name for name in files.class_names if not name.startswith("class ")]
        known = len(named) or num_classes  # indices need no names
    if not classes and known != num_classes:
        raise UsageError(
            f"{args.imagenet_folder or args.labels} has {known} classes, the network "
            f"{num_classes}: give --class-list FILE with a line 'wnid index' for each"
        )
    return EvaluationFiles(files.samples, *protocol.loading), files.class_names


def write_results(args: argparse.Namespace, world: World, images, names, result, engines) -> None:
    folder = Path(args.output)
    files = evaluations.write_evaluation(folder, result, names, images.name_of)
    content = {
        "command": records.command_line("evaluate-classifier", args.arguments),
        "weights": args.weights,
        "data": args.imagenet_folder or args.flat or args.cifar10,
        **result.to_dict(),
        "precision": str(args.dtype).removeprefix("torch."),
        "engine": engines,
        "processes": world.size,
        "date": records.date()[:10],
        "hardware": records.hardware(world.device),
        "versions": records.versions(),
        "revision": records.source_revision(),
    }
    write_json(folder / "results.json", content)
    logger.info("written: %s, %s", folder / "results.json", ", ".join(f.name for f in files))


def show_predictions(args: argparse.Namespace, images, names, result: EvaluationResult) -> None:
    """Prints a line for each image; with --output also writes predictions.csv, without labels."""
    labeled = evaluations.prediction_rows(result.predictions, names, images.name_of)
    rows = [[index, image, *best] for index, image, _, _, *best in labeled]
    for _, image, *best in rows[1:]:
        pairs = zip(best[1::3], best[2::3], strict=True)
        print(f"{image}: " + ", ".join(f"{name} {float(score):.3f}" for name, score in pairs))
    for one in result.bad:
        print(f"{one.name}: cannot be read: {one.reason}", file=sys.stderr)
    if args.output:
        path = Path(args.output) / evaluations.PREDICTIONS
        evaluations.write_csv(path, rows)
        print(f"written: {path}")


def work(args: argparse.Namespace) -> None:
    world = current_world(choose_device(args.device))
    records.set_up_logging(None, world.is_main)
    models, num_classes = load_networks(args, world)
    protocol = make_protocol(args, models[0][1].preprocessing)
    inputs = [normalizer.preprocessing for _, normalizer in models]
    stated = {(one.center_crop(), one.interpolation or "bilinear") for one in inputs}
    if len(stated) > 1 and protocol.name in ONLY_FOR["crop"]:
        logger.warning("the networks state different tests: all are tested with %s", protocol)
    images, names = read_data(args, protocol, num_classes)
    if args.engine != "eager":
        files = spread(find_pictures([args.int8], "--int8"), CALIBRATION) if args.int8 else []
        models = on_engine(models, protocol, files, dtype=args.dtype, engine=args.engine)
    place = dict(rank=world.rank, world=world.size)
    loader = EvaluationLoader(images, args.batch_size, workers=args.workers, **place)
    options = dict(channels_last=args.channels_last, max_bad_images=args.max_bad_images)
    autocast = AMP[args.amp] if args.engine == "eager" else None  # else the engine's precision
    result = evaluate(models, protocol, loader, world=world, autocast=autocast, **options)
    if world.is_main and args.predict:
        show_predictions(args, images, names, result)
    elif world.is_main:
        logger.info("%s", result)
        if args.output:
            engines = [getattr(model, "engine", "eager") for model, _ in models]
            write_results(args, world, images, names, result, engines)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    make_protocol(args)  # checks the options before processes are started
    run_processes(plan_launch(args, args.device, "--device cpu"), work, args)
