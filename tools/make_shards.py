#!/usr/bin/env python
"""Write a data set as tar shards for an object store, or index shards that are there."""

from resnet_backbone.cli.make_shards import main

if __name__ == "__main__":
    raise SystemExit(main())
