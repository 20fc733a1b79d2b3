#!/usr/bin/env python
"""Write a data set as tar shards for an object store, or index shards that are there.

  python tools/make_shards.py write imagenet/train shards/train
  python tools/make_shards.py index shards/train --class-list wnids.txt

The shards are in WebDataset's layout (<key>.jpeg and <key>.cls in each tar), so other programs
read them too. The file index.npz beside them says where each image lies: with it the trainer
reads exact epochs and resumes at any sample. Copy the folder as it is to a bucket, and train from
s3://BUCKET/train (needs fsspec's package for that store: s3fs, gcsfs, ...).

Exit status: 0, or 2 with one line that says what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from tqdm import tqdm

from resnet_backbone.classification.data.decode import BadImage
from resnet_backbone.classification.data.imagenet import (
    name_classes,
    read_class_list,
    read_flat_folder,
    read_image_folder,
)
from resnet_backbone.classification.data.shards import index_shards, write_shards
from resnet_backbone.classification.data.stream import DataError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write shards and their index")
    write.add_argument("images", help="folder <class>/<image>, or a flat one with --labels")
    write.add_argument("folder", help="new local folder for the shards")
    write.add_argument("--labels", help="file of 'name label' lines for a flat folder")
    write.add_argument(
        "--samples-per-shard", type=int, default=1000, help="default: 1000, about 110 MB"
    )
    write.add_argument(
        "--seed", type=int, default=0, help="of the order; -1 keeps the folder's (default: 0)"
    )
    index = commands.add_parser("index", help="write the index of existing shards")
    index.add_argument("folder", help="local folder of *.tar")
    for command in (write, index):
        command.add_argument("--class-list", help="file of 'wnid index' lines, or of wnids")
    args = parser.parse_args(argv)
    if args.command == "write" and args.samples_per_shard < 1:
        parser.error("--samples-per-shard is 1 at least")
    return args


def run(args: argparse.Namespace) -> None:
    classes = read_class_list(args.class_list) if args.class_list else None
    if args.command == "index":
        bar = partial(tqdm, desc="shards", unit="shard")
        index_shards(args.folder, name_classes(classes or {}), bar)
        return
    if args.labels:
        dataset = read_flat_folder(args.images, args.labels, classes)
    else:
        dataset = read_image_folder(args.images, classes)
    seed = None if args.seed < 0 else args.seed
    bar = partial(tqdm, desc="images", unit="img", total=len(dataset))
    write_shards(dataset, args.folder, args.samples_per_shard, seed, bar)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
    except (DataError, BadImage, OSError) as error:
        print(f"make_shards.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
