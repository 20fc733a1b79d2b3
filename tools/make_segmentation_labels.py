#!/usr/bin/env python
"""Make panoptic and semantic ground truth from COCO instances, or "stuff" labels from panoptic."""

from resnet_backbone.cli.make_segmentation_labels import main

if __name__ == "__main__":
    raise SystemExit(main())
