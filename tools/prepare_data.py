#!/usr/bin/env python
"""Unpack the official archives of PASCAL VOC or COCO, and check what is there."""

from resnet_backbone.cli.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
