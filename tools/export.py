#!/usr/bin/env python
"""Export a network or a detector for other runtimes, and check it there on real images."""

from resnet_backbone.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
