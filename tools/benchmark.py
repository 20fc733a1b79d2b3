#!/usr/bin/env python
"""Measure loader, training, inference, detectors and evaluation beside what people use today."""

import sys

from resnet_backbone.cli.benchmark.main import main

if __name__ == "__main__":
    sys.exit(main())
