#!/usr/bin/env python
"""Compare every network's parameters and multiply-adds with the published ones."""

from resnet_backbone.cli.analyze_model import main

if __name__ == "__main__":
    raise SystemExit(main())
