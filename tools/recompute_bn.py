#!/usr/bin/env python
"""Replace batch-norm statistics by true averages over the training set, as the paper does."""

from resnet_backbone.cli.recompute_bn import main

if __name__ == "__main__":
    raise SystemExit(main())
