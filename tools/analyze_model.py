#!/usr/bin/env python
from resnet_backbone.cli.analyze_model import main

if __name__ == "__main__":
    raise SystemExit(main())
