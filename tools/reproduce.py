#!/usr/bin/env python
"""Reproduce the paper's comparison of backbones in detection: from pre-training to the table."""

from resnet_backbone.cli.reproduce import main

if __name__ == "__main__":
    raise SystemExit(main())
