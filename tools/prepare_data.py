#!/usr/bin/env python
"""Unpack the official archives of a data set, check what is there, make what trainings need."""

from resnet_backbone.cli.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
