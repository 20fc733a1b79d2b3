#!/usr/bin/env python
"""Train any network of the package on ImageNet, CIFAR-10 or the built-in data, as the paper did."""

from resnet_backbone.cli.train_classifier import main

if __name__ == "__main__":
    raise SystemExit(main())
