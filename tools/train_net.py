#!/usr/bin/env python
"""Train and evaluate a detector with one of the paper's backbones."""

from resnet_backbone.cli.train_net import main

if __name__ == "__main__":
    raise SystemExit(main())
