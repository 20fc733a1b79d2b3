#!/usr/bin/env python
from resnet_backbone.cli.evaluate_classifier import main

if __name__ == "__main__":
    raise SystemExit(main())
