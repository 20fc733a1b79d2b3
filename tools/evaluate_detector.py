#!/usr/bin/env python
"""Evaluate a detector with the paper's improvements, one row each (appendix B, Table 9)."""

from resnet_backbone.cli.evaluate_detector import main

if __name__ == "__main__":
    raise SystemExit(main())
