#!/usr/bin/env python
"""Look at weights of ResNets and VGGs, convert them for another library, compare two files."""

from resnet_backbone.cli.convert_weights import main

if __name__ == "__main__":
    raise SystemExit(main())
