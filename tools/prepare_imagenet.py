#!/usr/bin/env python
"""Build the ImageNet folders from the official archives, or check folders that are there."""

from resnet_backbone.cli.prepare_imagenet import main

if __name__ == "__main__":
    raise SystemExit(main())
