#!/usr/bin/env python
"""Evaluate a classifier, or an ensemble, as the paper did: every image exactly once."""

from resnet_backbone.cli.evaluate_classifier import main

if __name__ == "__main__":
    raise SystemExit(main())
