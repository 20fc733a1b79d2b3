#!/usr/bin/env python
"""Make panoptic and semantic ground truth from COCO instances, or "stuff" labels from panoptic.

  python tools/make_segmentation_labels.py --coco-json instances_train.json --output labels/train
  python tools/make_segmentation_labels.py --panoptic-json panoptic_train2017.json \\
      --output panoptic_stuff_train2017

The first writes labels/train/semantic (every class and background), labels/train/stuff (things,
background), labels/train/panoptic and panoptic.json. It is made from instances: the smaller of two
overlapping instances lies on top, crowds are ignored, and all that is no instance is one class,
background. The second writes, for annotations of stuff as COCO has them, what Panoptic FPN's
semantic head learns: 0 things, then the classes of stuff by rising id, 255 where nothing is
annotated.
"""

from __future__ import annotations

import argparse

from resnet_backbone.detection.data.panoptic import make_labels, make_stuff
from resnet_backbone.detection.engine.command_line import UsageError, one_line_errors


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco-json", metavar="FILE", help="instances in COCO's format")
    parser.add_argument("--panoptic-json", metavar="FILE", help="COCO's panoptic format")
    parser.add_argument(
        "--panoptic-root", metavar="DIR", help="its pictures (default: its name without .json)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    args = parser.parse_args(argv)
    if bool(args.coco_json) == bool(args.panoptic_json):
        raise UsageError("give --coco-json FILE or --panoptic-json FILE")
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.panoptic_json:
        number = make_stuff(args.panoptic_json, args.output, args.panoptic_root or "")
        print(f"written: {args.output}, {number} label pictures")
        return
    counts = make_labels(args.coco_json, args.output)
    print("written: {}, {images} images, {segments} segments".format(args.output, **counts))
    print("made from instances; {hidden} of them lie wholly under smaller ones".format(**counts))


if __name__ == "__main__":
    main()
