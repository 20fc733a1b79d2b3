"""What prepare-data does for detection: unpacking, converting, checking, reporting."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.data import trees
from resnet_backbone.detection.data.archives import unpack, verify_archive
from resnet_backbone.detection.data.formats.coco import unused_name
from resnet_backbone.detection.data.formats.voc import find_voc_folders
from resnet_backbone.detection.data.own import (
    count_boxes,
    of_one_class,
    read_class_names,
    read_own,
    split_records,
    write_coco,
)
from resnet_backbone.detection.data.problems import DataReport
from resnet_backbone.runtime.files import write_text


def unpack_and_check(args: argparse.Namespace) -> int:
    """Runs the subcommands voc and coco, and returns the exit status."""
    check_arguments(args)
    unpack_all(args)
    checks = check(args)
    for tree in checks:
        print(f"\n{trees.summary(tree)}")
    if args.json:
        write_text(args.json, json.dumps([trees.to_json(tree) for tree in checks], indent=1))
    if args.pictures:
        draw(checks, args.pictures)
    return 1 if any(tree.damaged for tree in checks) else 0


def check_arguments(args: argparse.Namespace) -> None:
    if bool(args.coco_json) != bool(args.image_root):
        raise UsageError("--coco-json and --image-root belong together")
    if args.coco_json and (args.kind == "voc" or args.archives):
        raise UsageError("--coco-json is for 'coco' without --archives")
    if len(args.image_root) not in (0, 1, len(args.coco_json)):
        raise UsageError("--image-root needs one folder, or one for each file of --coco-json")


def unpack_all(args: argparse.Namespace) -> None:
    """Verifies the checksums of all archives, then unpacks them."""
    for archive in args.archives:
        print(verify_archive(archive, args.unverified), flush=True)
    for archive in args.archives:
        print(unpack(archive, args.root, args.kind), flush=True)


def check(args: argparse.Namespace) -> list[trees.TreeCheck]:
    workers = 0 if args.quick else args.workers
    if args.coco_json:
        roots = args.image_root * (len(args.coco_json) if len(args.image_root) == 1 else 1)
        return [trees.check_coco_files(zip(args.coco_json, roots, strict=True), workers)]
    if args.kind == "coco":
        return [trees.check_coco_tree(args.root, args.own, args.splits, workers)]
    folders = find_voc_folders(args.root)
    return [trees.check_voc_tree(folder, args.own, args.splits, workers) for folder in folders]


def draw(checks: list[trees.TreeCheck], folder: Path) -> None:
    for tree in checks:
        name = Path(tree.folder).resolve().name if Path(tree.folder).is_dir() else tree.kind
        chart = folder / f"{name}_classes.png"
        if trees.draw_classes(tree, chart):
            print(f"boxes per class: {chart}")
        for split in tree.splits:
            sheet = folder / f"{name}_{split.name}.jpg"
            if trees.draw_samples(split, sheet):
                print(f"images of {split.name}: {sheet}")


SMALL = [
    "INPUT.MIN_SIZE_TRAIN '(320,)' INPUT.MAX_SIZE_TRAIN 533",
    "INPUT.MIN_SIZE_TEST 320 INPUT.MAX_SIZE_TEST 533",
    "SOLVER.IMS_PER_BATCH 2 SOLVER.AMP.ENABLED True",
]
"""Overrides that train on a CPU within hours: half the image size, bfloat16."""


def convert_own(args: argparse.Namespace) -> int:
    """Runs the subcommand own, and returns the exit status."""
    if not 0 < args.val < 1:
        raise UsageError(f"--val {args.val:g}: it is a share, above 0 and below 1")
    names_of_splits = ("train", "val2" if args.val1 else "val", "test")
    files = {split: args.output / f"{split}.json" for split in names_of_splits}
    there = [str(file) for file in files.values() if file.exists()]
    if there and not args.overwrite:
        raise UsageError(f"{there[0]} is there already; give --overwrite or another --output")
    images = args.images
    splits, names, report = read_own(images, args.annotations or images, args.format)
    if args.one_class:
        before = sum(map(len, splits.values()))
        splits = {split: of_one_class(records) for split, records in splits.items()}
        left = sum(map(len, splits.values()))
        print(f"{left:,} of {before:,} images show one class, the others are left out")
    if args.classes:
        known, wnids, names = read_class_names(args.classes), names, []
        for wnid in wnids:
            names.append(unused_name(known.get(wnid, wnid), names, wnid, report.notes))
    if "train" not in splits:
        splits["train"], splits["val"] = split_records(splits.pop(""), args.val, args.seed)
    elif splits.pop("", []):
        print("images outside the folders train, valid and test are left out")
    if "val" not in splits and not args.val1:
        print(f"there is no validation set: it is {args.val:g} of train")
        splits["train"], splits["val"] = split_records(splits["train"], args.val, args.seed)
    if args.val1:
        halve(args, splits)
    args.output.mkdir(parents=True, exist_ok=True)
    for split, file in files.items():
        if split in splits:
            write_coco(file, splits[split], names, images)
        else:
            file.unlink(missing_ok=True)
    tree = trees.TreeCheck(str(args.output), "coco")
    for split in (split for split in files if split in splits):
        tree.add_split(split, splits[split], count_boxes(split, splits[split], names))
    left_out = args.output / "left_out.txt"
    write_text(left_out, "".join(f"{problem}\n" for problem in report.problems))
    print(f"\n{own_summary(tree, report, left_out)}")
    draw([tree], args.output)
    print(f"\nLook at the pictures in {args.output} first. Then train:\n\n{training_command(args)}")
    return 0


def halve(args: argparse.Namespace, splits: dict[str, list[dict]]) -> None:
    """Moves val1, a part of val, to train, and keeps val2 for testing (paper, appendix B)."""
    if "val" not in splits:
        raise UsageError("--val1 divides a folder val, which these images do not have")
    records = splits.pop("val")
    if args.val1 == "balanced":
        val1, val2 = split_records(records, 0.5, args.seed)
        print(f"val1 and val2 are our own halves of val, each class in both, seed {args.seed}")
    else:
        lines = Path(args.val1).read_text(encoding="utf-8-sig").splitlines()
        listed = {Path(line.split()[0]).stem for line in lines if line.strip()}
        val1 = [one for one in records if Path(one["file_name"]).stem in listed]
        val2 = [one for one in records if Path(one["file_name"]).stem not in listed]
    if not val1 or not val2:
        raise UsageError(
            f"--val1 {args.val1} names {len(val1):,} of {len(records):,} images of val"
        )
    print(f"train.json has train ({len(splits['train']):,} images) and val1 ({len(val1):,})")
    splits["train"], splits["val2"] = [*splits["train"], *val1], val2


def own_summary(tree: trees.TreeCheck, report: DataReport, left_out: Path) -> str:
    number = sum(split.counts.images for split in tree.splits)
    lines = [f"{tree.folder}: {number:,} images, each of them decoded", ""]
    lines += [*trees.tables(tree), *(f"note: {line}" for line in report.remarks())]
    ignored = sum(split.report.difficult.total() for split in tree.splits)
    if ignored:
        lines.append(
            f"note: boxes marked difficult (VOC) or crowd (COCO): {ignored:,}; training leaves "
            "them out, evaluation ignores them"
        )
    if report.problems:
        number = f"{len(report.bad_files):,} x a file, {len(report.bad_boxes):,} x a box"
        lines.append(f"left out: {number}; {left_out} has all:")
        lines += [f"  {problem}" for problem in report.problems[:10]]
    return "\n".join(lines)


def training_command(args: argparse.Namespace) -> str:
    output = Path("output") / args.output.resolve().name
    test = args.output / ("val2.json" if args.val1 else "val.json")
    paths = (args.output / "train.json", test, args.images)
    train, val, images = (shlex.quote(str(path)) for path in paths)
    config = "voc/faster_rcnn_R_50_FPN"
    if args.format == "imagenet":
        config = "imagenet_loc/rpn_R_50" if args.one_class else "imagenet_det/faster_rcnn_R_50"
    lines = [
        f"resnet-backbone train-net --config-file {config}",
        f"--coco-json {train} {val} --image-root {images}",
        f"--output-dir {shlex.quote(str(output))} RESNET_BACKBONE.EPOCHS 12",
    ]
    if not torch.cuda.is_available():
        lines += SMALL
    return " \\\n    ".join(lines)
