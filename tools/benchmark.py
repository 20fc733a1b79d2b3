#!/usr/bin/env python
"""Measure loader, training, inference, detectors and evaluation beside what people use today."""

from resnet_backbone.cli.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
