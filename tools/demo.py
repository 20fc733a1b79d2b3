#!/usr/bin/env python
"""Draw what a trained detector or segmentation model finds in images and videos."""

from resnet_backbone.cli.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
