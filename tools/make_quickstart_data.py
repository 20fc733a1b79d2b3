#!/usr/bin/env python
"""Write the built-in detection set (handwritten digits on photographs) in PASCAL VOC layout."""

from resnet_backbone.cli.make_quickstart_data import main

if __name__ == "__main__":
    raise SystemExit(main())
